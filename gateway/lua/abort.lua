#!lua flags=allow-oom
-- Sets, or takes back, the deadline of an ambiguous abort.
--
-- KEYS: turn, meta
-- ARGV: 1 ms from now, or empty to take it back, 2 turn id, 3 by whom (JSON)
--
-- Returns {'PENDING'}   {'KEPT'}: the turn does not run, or nothing was pending
local turn = KEYS[1]
local state = redis.call('HGET', turn, 'state')
if state ~= 'running' and state ~= 'queued' then return {'KEPT'} end
if ARGV[1] == '' then
  redis.call('HDEL', turn, 'abort_at')
  return {'KEPT'}
end
redis.call('HSET', turn, 'abort_at', whole(now_ms() + tonumber(ARGV[1])), 'by', ARGV[3])
ring(KEYS[2], 'c ' .. ARGV[2])
return {'PENDING'}
