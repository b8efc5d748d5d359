#!lua flags=allow-oom
-- Cuts the journal's prefix up to the oldest turn still kept.
--
-- KEYS: meta, journal, turns
-- ARGV: 1 how long a turn's records are kept after its end (ms)
--
-- Returns {'TRIMMED', oldest offset kept}
local meta, journal, turns = KEYS[1], KEYS[2], KEYS[3]
local epoch, last, base = head_of(meta, journal)
if not epoch then return {'TRIMMED', 0} end
local limit = whole(now_ms() - tonumber(ARGV[1]))
if redis.call('ZREMRANGEBYSCORE', turns, '-inf', '(' .. limit) == 0 then return {'TRIMMED', base} end
local oldest = last + 1
for _, member in ipairs(redis.call('ZRANGE', turns, 0, -1)) do
  oldest = math.min(oldest, (split_member(member)))
end
if oldest > base then
  redis.call('XTRIM', journal, 'MINID', entry_id(oldest))
  redis.call('HSET', meta, 'base', oldest)
  base = oldest
end
return {'TRIMMED', base}
