#!lua flags=allow-oom
-- A node says which turn it is about to produce, before `begin`: a hint for who ends its turns later.
--
-- KEYS: the node's set of "<turn id> <session>"
-- ARGV: 1 member, 2 'add' or 'remove', 3 ttl ms
if ARGV[2] == 'add' then
  redis.call('SADD', KEYS[1], ARGV[1])
  redis.call('PEXPIRE', KEYS[1], ARGV[3])
else
  redis.call('SREM', KEYS[1], ARGV[1])
end
return {'OK'}
