#!lua
-- A node's sign of life, and who else gives one, by the store's clock.
--
-- KEYS: nodes zset (node -> last beat, ms)
-- ARGV: 1 node, 2 lease ms
--
-- Returns {{live nodes ...}, {silent nodes ...}}
local at = now_ms()
redis.call('ZADD', KEYS[1], at, ARGV[1])
local limit = whole(at - tonumber(ARGV[2]))
return {
  redis.call('ZRANGEBYSCORE', KEYS[1], limit, '+inf'),
  redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', '(' .. limit)
}
