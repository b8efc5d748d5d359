#!lua flags=allow-oom
-- A queued turn's turn has come: those it waited for have ended.
--
-- KEYS: turn
-- ARGV: 1 token
--
-- Returns {'RUNNING'}   {'CANCELLING'}   {'FENCED'}
local known = redis.call('HMGET', KEYS[1], 'state', 'token')
-- A failover lost it: its producer will write it back.
if not known[2] then return {'RUNNING'} end
if known[2] ~= ARGV[1] then return {'FENCED'} end
if known[1] == 'running' then return {'RUNNING'} end -- said before, and the reply was lost
if known[1] ~= 'queued' then return {'CANCELLING'} end
redis.call('HSET', KEYS[1], 'state', 'running')
return {'RUNNING'}
