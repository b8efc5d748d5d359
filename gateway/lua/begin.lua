#!lua
-- Accepts a send: makes the journal if there is none, journals `turn-start`, registers the turn.
--
-- KEYS: meta, journal, turns, turn, tombstone
-- ARGV: 1 ... 3 seen, 4 turn id, 5 node, 6 token, 7 digest, 8 overlap, 9 ttl ms, 10 path, 11 user,
--       12 kind of the start, 13 its payload, 14 kind and 15 payload of the end if a cancel came first,
--       16 new epoch, 17 by whom the others are cancelled (JSON)
--
-- Returns {'BEGUN', epoch, offset of the start, check of the start, fence, the turns to wait for ...}
--         {'CANCELLED', epoch, offset of the start}: a cancel came first; start and end are journalled
--         {'DUPLICATE', epoch, offset of the start, state}
--         {'CONFLICT'}: the turn id had another body   {'BUSY'}: another turn runs
--         {'REWOUND', epoch, newest offset, 0}: the journal has lost what the caller has seen
local meta, journal, turns, turn, tombstone = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local known = redis.call('HMGET', turn, 'digest', 'epoch', 'first', 'state', 'token', 'fence', 'waits', 'check')
if known[1] then
  if known[1] ~= ARGV[7] then return {'CONFLICT'} end
  if known[5] == ARGV[6] and is_running(known[4]) then
    -- This very call, repeated because its reply was lost.
    local again = {'BEGUN', known[2], tonumber(known[3]), known[8] or '', tonumber(known[6])}
    for id in string.gmatch(known[7] or '', '%S+') do table.insert(again, id) end
    return again
  end
  return {'DUPLICATE', known[2], tonumber(known[3]), known[4]}
end

local epoch, last, _, check = head_of(meta, journal)
if epoch and is_rewound(journal, epoch, last, check) then return {'REWOUND', epoch, last, 0} end

local running, ghosts = {}, {}
for _, member in ipairs(epoch and redis.call('ZRANGEBYSCORE', turns, '+inf', '+inf') or {}) do
  local _, id = split_member(member)
  -- A turn whose hash is gone can neither go on nor be ended; it must not stand in the way.
  local exists = redis.call('EXISTS', turn_key_of(meta, id)) == 1
  table.insert(exists and running or ghosts, member)
end
local cancelled = redis.call('EXISTS', tombstone) == 1
if #running > 0 and ARGV[8] == 'reject' and not cancelled then return {'BUSY'} end

-- From here on everything is written.
local at = now_ms()
if not epoch then
  epoch, last, check = ARGV[16], 0, ''
  -- What is left of a journal that lost a key belongs to nobody's epoch.
  redis.call('DEL', journal, turns)
  redis.call('HSET', meta, 'epoch', epoch, 'base', 1, 'created', at)
end
for _, member in ipairs(ghosts) do redis.call('ZREM', turns, member) end
redis.call('HSETNX', meta, 'owner', ARGV[11])
local fence = redis.call('HINCRBY', meta, 'fence', 1)
local first = last + 1
last = first
check = add_record(journal, first, check, ARGV[4], ARGV[12], ARGV[13])
local check_of_start = check
local member = whole(first) .. '/' .. ARGV[4]

local waits_for = {}
if cancelled then
  last = last + 1
  check = add_record(journal, last, check, ARGV[4], ARGV[14], ARGV[15])
  redis.call('DEL', tombstone)
  redis.call('ZADD', turns, at, member)
elseif ARGV[8] == 'interrupt' then
  for _, other in ipairs(running) do
    local _, id = split_member(other)
    local key = turn_key_of(meta, id)
    redis.call('HSET', key, 'state', 'cancelling', 'by', ARGV[17])
    redis.call('HDEL', key, 'abort_at')
    table.insert(waits_for, id)
    ring(meta, 'c ' .. id)
  end
end
local state = cancelled and 'cancelled' or (#waits_for > 0 and 'queued' or 'running')
redis.call('HSET', turn, 'epoch', epoch, 'first', first, 'last', last, 'count', 0, 'state', state,
  'node', ARGV[5], 'fence', fence, 'token', ARGV[6], 'digest', ARGV[7], 'path', ARGV[10],
  'touched', at, 'check', check_of_start, 'waits', table.concat(waits_for, ' '))
if not cancelled then redis.call('ZADD', turns, 'inf', member) end
redis.call('HSET', meta, 'last', last, 'check', check, 'used', at)
for index = 1, 4 do redis.call('PEXPIRE', KEYS[index], ARGV[9]) end
ring(meta, 'r ' .. ARGV[5])
if cancelled then return {'CANCELLED', epoch, first} end
local reply = {'BEGUN', epoch, first, check_of_start, fence}
for _, id in ipairs(waits_for) do table.insert(reply, id) end
return reply
