#!lua flags=no-writes
-- Tells where a session stands.
--
-- KEYS: meta, journal, turns
-- ARGV: 1 an offset whose turn is asked for; -1: the newest
--
-- Returns {epoch or '', newest offset, oldest offset kept, turn at the offset or '',
--          {{turn, state, first, node, read or ''}, ...}}: running ones, then the newest that ended
local meta, journal, turns = KEYS[1], KEYS[2], KEYS[3]
local epoch, last, base = head_of(meta, journal)
if not epoch then return {'', 0, 1, '', {}} end
local asked = tonumber(ARGV[1])
if asked < 0 then asked = last end
local entry = redis.call('XRANGE', journal, entry_id(asked), entry_id(asked))
local told = {}
local function tell(member)
  local first, turn = split_member(member)
  local known = redis.call('HMGET', turn_key_of(meta, turn), 'state', 'node', 'read', 'epoch')
  if known[1] and known[4] == epoch then
    table.insert(told, {turn, known[1], first, known[2], known[3] or ''})
  end
end
local running = redis.call('ZRANGEBYSCORE', turns, '+inf', '+inf')
table.sort(running, function(left, right) return split_member(left) < split_member(right) end)
for _, member in ipairs(running) do tell(member) end
for _, member in ipairs(redis.call('ZREVRANGEBYSCORE', turns, '(+inf', '-inf', 'LIMIT', 0, 1)) do tell(member) end
return {epoch, last, base, entry[1] and entry[1][2][2] or '', told}
