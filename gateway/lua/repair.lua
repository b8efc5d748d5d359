#!lua flags=allow-oom
-- Writes back what a failover lost of a turn, or the whole turn into a journal that does not know it.
--
-- KEYS: meta, journal, turns, turn, tombstone
-- ARGV: 1 epoch found ('': no journal), 2 newest offset found, 3 count found (-1: the turn is not known there),
--       4 turn id, 5 fence, 6 token, 7 the epoch from now on: the one found, or a new one, 8 ttl ms, 9 node,
--       10 digest, 11 path, 12 user, 13 offset of its start, or 0: the start is the first of the records,
--       14 how many of the turn's records are journalled before these, 15 ... 17 seen, 18, 19 ... kind, payload
--
-- Returns {'APPENDED', epoch, newest offset, count, state, check before, check of the newest record}
--         {'REWOUND', epoch, newest offset, count}: with these it would have another history than was seen, or the
--         turn is not there as it was said to be
--         {'MOVED'}: the journal is not as it was found   {'FENCED'}   {'ENDED', reason}
local meta, journal, turns, turn = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local epoch, last, base, check = head_of(meta, journal)
if (epoch or '') ~= ARGV[1] or (last or 0) ~= tonumber(ARGV[2]) then return {'MOVED'} end
local known = redis.call('HMGET', turn, 'epoch', 'fence', 'token', 'count', 'state', 'first')
local is_known = known[1] and known[1] == epoch
if is_known then
  if known[2] ~= ARGV[5] or known[3] ~= ARGV[6] then return {'FENCED'} end
  if not is_running(known[5]) then return {'ENDED', known[5]} end
end
if tonumber(ARGV[3]) ~= (is_known and tonumber(known[4]) or -1) then return {'MOVED'} end
if ARGV[7] == epoch and ARGV[15] == epoch then
  local offset, digest = last, check
  for index = 18, #ARGV, 2 do
    offset, digest = offset + 1, next_check(digest, ARGV[4], ARGV[index], ARGV[index + 1])
    if offset == tonumber(ARGV[16]) and ARGV[17] ~= '' and digest ~= ARGV[17] then
      return {'REWOUND', epoch, last, tonumber(ARGV[3])}
    end
  end
end
if not is_known and tonumber(ARGV[13]) > 0 then
  -- Only the turn's own key is said to be gone: then its records are all there, as many as it says.
  local held = 0
  for offset = tonumber(ARGV[13]), last do
    if record_at(journal, offset) == ARGV[4] then held = held + 1 end
  end
  if held ~= tonumber(ARGV[14]) + 1 then return {'REWOUND', epoch, last, -1} end
end
local kept = ARGV[7] ~= epoch and epoch and turns_of_epoch(meta, turns, epoch) or {}

-- From here on everything is written.
local at = now_ms()
if not epoch then
  last, check = 0, ''
  redis.call('DEL', journal, turns)
  redis.call('HSET', meta, 'base', 1, 'created', at)
end
if ARGV[7] ~= epoch then take_epoch(meta, kept, ARGV[7]) end
if not is_known then redis.call('DEL', turn) end
redis.call('HSETNX', meta, 'owner', ARGV[12])
if tonumber(redis.call('HGET', meta, 'fence') or '0') < tonumber(ARGV[5]) then
  redis.call('HSET', meta, 'fence', ARGV[5])
end
-- A cancel that came while it was lost.
local cancelled_by = not is_known and redis.call('GET', KEYS[5])
local before, count = check, tonumber(ARGV[14])
local state = is_known and known[5] or (cancelled_by and 'cancelling' or 'running')
local first = is_known and tonumber(known[6]) or tonumber(ARGV[13])
local has_start = first == 0
if has_start then first = last + 1 end
last, check = add_records(journal, ARGV[4], last, check, 18)
count = count + (#ARGV - 17) / 2 - (has_start and 1 or 0)
redis.call('HSET', turn, 'epoch', ARGV[7], 'first', whole(first), 'count', count, 'state', state, 'node', ARGV[9],
  'fence', ARGV[5], 'token', ARGV[6], 'digest', ARGV[10], 'path', ARGV[11], 'touched', at)
if cancelled_by then
  redis.call('HSET', turn, 'by', cancelled_by)
  redis.call('DEL', KEYS[5])
end
redis.call('ZADD', turns, 'inf', whole(first) .. '/' .. ARGV[4])
redis.call('HSET', meta, 'last', last, 'check', check, 'used', at)
for index = 1, 4 do redis.call('PEXPIRE', KEYS[index], ARGV[8]) end
ring(meta, 'r ' .. ARGV[9])
return {'APPENDED', ARGV[7], last, count, state, before, check, cancelled_by or ''}
