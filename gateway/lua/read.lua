#!lua flags=no-writes
-- Reads records after an offset.
--
-- KEYS: meta, journal
-- ARGV: 1 ... 3 seen, 4 after, 5 most payload bytes (at least one record comes), 6 the check that the record there
--       had, or empty
--
-- Returns {epoch or '', newest offset, oldest offset kept, check of the newest record, 1 if the record at `after`
--          has that check and nothing that was seen is lost, {turn, kind, payload, check, turn, kind, payload, check, ...}}:
-- flat, for a table per record would cost as much again as reading it. The records are dense from
-- `after` + 1; where the journal has a hole they stop before it. Otherwise: none.
local epoch, last, base, newest = head_of(KEYS[1], KEYS[2])
if not epoch then return {'', 0, 1, '', 1, {}} end
local records, bytes, after = {}, 0, tonumber(ARGV[4])
local there = newest
if ARGV[6] ~= '' and after < last then there = select(2, record_at(KEYS[2], after)) end
local is_other = ARGV[6] ~= '' and there ~= '' and there ~= ARGV[6]
if is_other or after > last or is_rewound(KEYS[2], epoch, last, newest) then
  return {epoch, last, base, newest, 0, {}}
end
local limit = tonumber(ARGV[5])
-- Few at first, and no more than should fit: a record may hold a megabyte, and what is over the limit was
-- copied for nothing. From 64 on, more at a time is no faster.
local count, read = 1, 0
repeat
  local page = redis.call('XRANGE', KEYS[2], entry_id(after + 1), '+', 'COUNT', count)
  local size = #page
  -- Offsets only rise, so the last one tells of all before it.
  local dense = size > 0 and page[size][1] == entry_id(after + size)
  for index = 1, size do
    if bytes >= limit or not (dense or page[index][1] == entry_id(after + 1)) then
      size = 0
      break
    end
    local fields = page[index][2]
    local filled = 4 * read
    records[filled + 1], records[filled + 2], records[filled + 3] = fields[2], fields[4], fields[6]
    records[filled + 4] = fields[8] or ''
    bytes = bytes + #fields[6] + 64
    after, read = after + 1, read + 1
  end
  if size < count then break end
  count = math.min(count * 4, 64, math.ceil((limit - bytes) * read / bytes))
until bytes >= limit
return {epoch, last, base, newest, 1, records}
