#!lua flags=allow-oom
-- A node's sign of life, and who else gives one, by the store's clock.
--
-- KEYS: nodes zset (node -> last beat, ms), the node's set
-- ARGV: 1 node, 2 lease ms, 3 ttl ms
--
-- Returns {{live nodes ...}, {silent nodes ...}}
local at = now_ms()
redis.call('ZADD', KEYS[1], at, ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('PEXPIRE', KEYS[2], ARGV[3])
local limit = whole(at - tonumber(ARGV[2]))
return {
  redis.call('ZRANGEBYSCORE', KEYS[1], limit, '+inf'),
  redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', '(' .. limit)
}
