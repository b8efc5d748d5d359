#!lua flags=allow-oom
-- A node is gone for good, and its turns are ended.
--
-- KEYS: nodes zset, the node's set
-- ARGV: 1 node
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('DEL', KEYS[2])
return {'OK'}
