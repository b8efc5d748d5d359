#!lua flags=no-writes
-- Reads records after an offset.
--
-- KEYS: meta, journal
-- ARGV: 1 after, 2 most payload bytes (at least one record comes)
--
-- Returns {epoch or '', newest offset, oldest offset kept, {{turn, kind, payload}, ...}}. The records are
-- dense from `after` + 1; where the journal has a hole they stop before it.
local epoch, last, base = head_of(KEYS[1], KEYS[2])
if not epoch then return {'', 0, 1, {}} end
local records, bytes, after = {}, 0, tonumber(ARGV[1])
local limit = tonumber(ARGV[2])
-- Few at first: a record may hold a megabyte, and what is over the limit was copied for nothing.
local count, page = 4, nil
repeat
  count = math.min(count * 2, 256)
  page = redis.call('XRANGE', KEYS[2], entry_id(after + 1), '+', 'COUNT', count)
  for _, entry in ipairs(page) do
    if bytes >= limit or entry[1] ~= entry_id(after + 1) then
      page = {}
      break
    end
    local fields = entry[2]
    table.insert(records, {fields[2], fields[4], fields[6]})
    bytes = bytes + #fields[6] + 64
    after = after + 1
  end
until #page < count
return {epoch, last, base, records}
