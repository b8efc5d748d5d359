#!lua flags=allow-oom
-- A node is gone for good, and its turns are ended.
--
-- KEYS: nodes zset, the node's set
-- ARGV: 1 node, 2 the score that it fell silent with, or empty: it says so itself
--
-- Returns {'FORGOTTEN'}   {'KEPT'}: it has beaten since, or has a turn to be ended yet
if ARGV[2] ~= '' then
  local score = redis.call('ZSCORE', KEYS[1], ARGV[1])
  if score and tonumber(score) ~= tonumber(ARGV[2]) then return {'KEPT'} end
  if redis.call('SCARD', KEYS[2]) > 0 then return {'KEPT'} end
end
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('DEL', KEYS[2])
return {'FORGOTTEN'}
