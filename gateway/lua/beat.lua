#!lua flags=allow-oom
-- A node's sign of life, and who else gives one.
--
-- KEYS: nodes zset (node -> last beat, ms; below zero: a node that is leaving), the node's set
-- ARGV: 1 node, 2 ttl ms, 3 'leaving' or ''
--
-- Returns {1 if the node was not known, {node, score, ...}}: a score says no more than that it has changed, for
-- the clock of a server that took over may be another.
local at = now_ms()
local added = redis.call('ZADD', KEYS[1], ARGV[3] == 'leaving' and -at or at, ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('PEXPIRE', KEYS[2], ARGV[2])
return {added, redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES')}
