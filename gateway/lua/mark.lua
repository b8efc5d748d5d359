#!lua flags=allow-oom
-- Notes that a client has read an ended turn to its end.
--
-- KEYS: turn
--
-- Returns {'MARKED'}   {'KEPT'}: there is no such turn
if redis.call('EXISTS', KEYS[1]) == 0 then return {'KEPT'} end
redis.call('HSET', KEYS[1], 'read', '1')
return {'MARKED'}
