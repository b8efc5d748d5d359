#!lua flags=allow-oom
-- A session was used: it is kept for as long again.
--
-- KEYS: meta, journal, turns
-- ARGV: 1 ttl ms
for index = 1, 3 do redis.call('PEXPIRE', KEYS[index], ARGV[1]) end
return {'OK'}
