#!lua flags=no-writes
-- Reads records after an offset.
--
-- KEYS: meta, journal
-- ARGV: 1 after, 2 most payload bytes (at least one record comes)
--
-- Returns {epoch or '', newest offset, oldest offset kept, {turn, kind, payload, turn, kind, payload, ...}}:
-- flat, for a table per record would cost as much again as reading it. The records are dense from
-- `after` + 1; where the journal has a hole they stop before it.
local epoch, last, base = head_of(KEYS[1], KEYS[2])
if not epoch then return {'', 0, 1, {}} end
local records, bytes, after = {}, 0, tonumber(ARGV[1])
local limit = tonumber(ARGV[2])
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
    local filled = 3 * read
    records[filled + 1], records[filled + 2], records[filled + 3] = fields[2], fields[4], fields[6]
    bytes = bytes + #fields[6] + 64
    after, read = after + 1, read + 1
  end
  if size < count then break end
  count = math.min(count * 4, 64, math.ceil((limit - bytes) * read / bytes))
until bytes >= limit
return {epoch, last, base, records}
