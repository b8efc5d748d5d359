#!lua flags=no-writes
-- Tells where a session stands.
--
-- KEYS: meta, journal, turns
-- ARGV: 1 ... 3 seen, 4 an offset whose turn is asked for; -1: the newest
--
-- Returns {epoch or '', newest offset, oldest offset kept, turn at the offset or '', check there,
--          check of the newest record, {{turn, state, first, node, read or '', abort pending or ''}, ...},
--          1 if the journal has lost what the caller has seen}:
--          running ones, then the newest that ended
local meta, journal, turns = KEYS[1], KEYS[2], KEYS[3]
local epoch, last, base, newest = head_of(meta, journal)
if not epoch then return {'', 0, 1, '', '', '', {}, 0} end
local asked = tonumber(ARGV[4])
if asked < 0 then asked = last end
local turn_there, check_there = record_at(journal, asked)
if asked == last then check_there = newest end -- known also when its record is trimmed
local told = {}
local function tell(member)
  local first, turn = split_member(member)
  local known = redis.call('HMGET', turn_key_of(meta, turn), 'state', 'node', 'read', 'epoch', 'abort_at')
  if known[1] and known[4] == epoch then
    table.insert(told, {turn, known[1], first, known[2], known[3] or '', known[5] or ''})
  end
end
local running = redis.call('ZRANGEBYSCORE', turns, '+inf', '+inf')
table.sort(running, function(left, right) return split_member(left) < split_member(right) end)
for _, member in ipairs(running) do tell(member) end
for _, member in ipairs(redis.call('ZREVRANGEBYSCORE', turns, '(+inf', '-inf', 'LIMIT', 0, 1)) do tell(member) end
return {epoch, last, base, turn_there, check_there, newest, told, is_rewound(journal, epoch, last, newest) and 1 or 0}
