#!lua flags=allow-oom
-- Ends a turn: journals what closes it and its one `turn-end`.
--
-- KEYS: meta, journal, turns, turn
-- ARGV: 1 seen epoch, 2 seen offset, 3 turn id, 4 fence, 5 token (empty: seal a turn of node 9, and if 4 is
--       not 0 only with that token),
--       6 how many of its records were journalled (empty when sealing), 7 ttl ms, 8 reason, 9 node,
--       10 refusal (JSON, or empty), 11, 12 ... kind, payload; the last is the `turn-end`
--
-- Returns {'APPENDED', epoch, newest offset, count, reason}   {'ENDED', reason}: it has ended already
--         {'BEHIND', count}, {'FENCED'}, {'LOST'}, {'REWOUND'} as append
local meta, journal, turns, turn = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local known = redis.call('HMGET', turn, 'epoch', 'fence', 'token', 'count', 'state', 'first', 'node')
local epoch, last = head_of(meta, journal)
if not known[1] or epoch ~= known[1] then return {'LOST'} end
local state = known[5]
if not is_running(state) then return {'ENDED', state} end
local sealing = ARGV[5] == ''
if sealing then
  if known[7] ~= ARGV[9] or (ARGV[4] ~= '0' and known[3] ~= ARGV[4]) then return {'FENCED'} end
elseif known[2] ~= ARGV[4] or known[3] ~= ARGV[5] then
  return {'FENCED'}
end
if rewound(epoch, last, ARGV[1], tonumber(ARGV[2])) then return {'REWOUND'} end
local count = tonumber(known[4])
if not sealing and tonumber(ARGV[6]) > count then return {'BEHIND', count} end

local at = now_ms()
last = add_records(journal, ARGV[3], last, 11)
count = count + (#ARGV - 10) / 2
redis.call('HSET', turn, 'count', count, 'state', ARGV[8], 'last', last, 'ended', at)
redis.call('HDEL', turn, 'abort_at')
if ARGV[10] ~= '' then redis.call('HSET', turn, 'refusal', ARGV[10]) end
if sealing then redis.call('HSET', turn, 'token', '') end
redis.call('ZADD', turns, at, known[6] .. '/' .. ARGV[3])
redis.call('HSET', meta, 'last', last, 'used', at)
for index = 1, 4 do redis.call('PEXPIRE', KEYS[index], ARGV[7]) end
return {'APPENDED', epoch, last, count, ARGV[8]}
