#!lua flags=no-writes
-- The turns that a node said it produces.
--
-- KEYS: the node's set
return redis.call('SMEMBERS', KEYS[1])
