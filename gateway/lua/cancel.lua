#!lua flags=allow-oom
-- Marks a turn as to be ended, or remembers the wish for a turn that has not come yet.
--
-- KEYS: turn, tombstone, meta
-- ARGV: 1 how long to remember it (ms), 2 only if an abort is due by now ('due') or at once ('now'), 3 turn id,
--       4 by whom (JSON)
--
-- Returns {'CANCELLING', node}   {'ENDED', reason}   {'UNKNOWN'}   {'KEPT'}: no abort is due
local turn, tombstone = KEYS[1], KEYS[2]
local known = redis.call('HMGET', turn, 'state', 'node', 'abort_at')
if not known[1] then
  if ARGV[2] == 'due' then return {'KEPT'} end
  redis.call('SET', tombstone, ARGV[4], 'PX', ARGV[1])
  return {'UNKNOWN'}
end
local state = known[1]
if not is_running(state) then return {'ENDED', state} end
if ARGV[2] == 'due' and (not known[3] or tonumber(known[3]) > now_ms()) then return {'KEPT'} end
-- The first who asks is who cancelled it; of an abort that is due it is known already.
if state ~= 'cancelling' and ARGV[2] == 'now' then redis.call('HSET', turn, 'by', ARGV[4]) end
redis.call('HSET', turn, 'state', 'cancelling')
ring(KEYS[3], 'c ' .. ARGV[3])
return {'CANCELLING', known[2]}
