#!lua flags=allow-oom
-- Ends a turn: journals what closes it and its one `turn-end`.
--
-- KEYS: meta, journal, turns, turn
-- ARGV: 1 ... 3 seen, 4 turn id, 5 fence, 6 token (empty: seal a turn of node 10, and if 5 is not 0 only with
--       that token), 7 how many of its records were journalled (empty when sealing), 8 ttl ms, 9 reason,
--       10 the turn's node when sealing, 11 refusal (JSON, or empty), 12 node that calls,
--       13 the offset that these records stood behind before they were lost (empty: they are new),
--       14, 15 ... kind, payload; the last is the `turn-end`
--
-- Returns {'APPENDED', epoch, newest offset, count, reason, check before, check of the newest record}
--         {'ENDED', reason}: it has ended already
--         {'BEHIND', epoch, newest offset, count}, {'FENCED'}, {'LOST', ...}, {'REWOUND', ...} as append
local meta, journal, turns, turn = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local known = redis.call('HMGET', turn, 'epoch', 'fence', 'token', 'count', 'state', 'first', 'node')
local epoch, last, _, check = head_of(meta, journal)
if not known[1] or epoch ~= known[1] then return lost(journal, epoch, last, check) end
local state = known[5]
local count = tonumber(known[4])
local sealing = ARGV[6] == ''
if is_running(state) then
  if sealing then
    if known[7] ~= ARGV[10] or (ARGV[5] ~= '0' and known[3] ~= ARGV[5]) then return {'FENCED'} end
  elseif known[2] ~= ARGV[5] or known[3] ~= ARGV[6] then
    return {'FENCED'}
  end
end
-- An end that was lost with its failover must not look like one that stands.
local is_written_back = is_running(state) and ARGV[13] ~= '' and tonumber(ARGV[13]) == last
if not is_written_back and is_rewound(journal, epoch, last, check) then
  return {'REWOUND', epoch, last, count}
end
if not is_running(state) then return {'ENDED', state} end
if not sealing and tonumber(ARGV[7]) > count then return {'BEHIND', epoch, last, count} end

local at = now_ms()
local before = check
last, check = add_records(journal, ARGV[4], last, check, 14)
count = count + (#ARGV - 13) / 2
redis.call('HSET', turn, 'count', count, 'state', ARGV[9], 'last', last, 'ended', at)
redis.call('HDEL', turn, 'abort_at')
if ARGV[11] ~= '' then redis.call('HSET', turn, 'refusal', ARGV[11]) end
if sealing then redis.call('HSET', turn, 'token', '') end
redis.call('ZADD', turns, at, known[6] .. '/' .. ARGV[4])
redis.call('HSET', meta, 'last', last, 'check', check, 'used', at)
for index = 1, 4 do redis.call('PEXPIRE', KEYS[index], ARGV[8]) end
ring(meta, 'r ' .. ARGV[12])
return {'APPENDED', epoch, last, count, ARGV[9], before, check}
