#!lua flags=allow-oom
-- Rings a bell; a store that refuses it is no failure, for who waits for it hears nothing then.
--
-- KEYS: the channel
-- ARGV: 1 what to say
redis.pcall('SPUBLISH', KEYS[1], ARGV[1])
