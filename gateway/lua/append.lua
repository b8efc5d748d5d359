#!lua
-- Compare-and-append: journals a turn's records from an index on, ignores those it has.
--
-- KEYS: meta, journal, turns, turn
-- ARGV: 1 ... 3 seen, 4 turn id, 5 fence, 6 token, 7 index of the first record, 8 ttl ms, 9 node,
--       10, 11 ... kind, payload of each record
--
-- Returns {'APPENDED', epoch, newest offset, how many of the turn's records are journalled now, state,
--          check before the first one that was new, check of the newest record, who cancelled it (JSON) or ''}
--         {'BEHIND', epoch, newest offset, count}: ask again from that index
--         {'FENCED'}: another may write this turn   {'ENDED', reason}
--         {'LOST', epoch or '', newest offset, 1 if what the caller has seen is lost too}: the turn is gone, or
--         the journal it was begun in
--         {'REWOUND', epoch, newest offset, count}: the journal has lost what the caller has seen
local meta, journal, turns, turn = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local refusal, found = examined(meta, journal, turn)
if refusal then return refusal end
local last, check, count, from = found.last, found.check, found.count, tonumber(ARGV[7])
if from > count then return {'BEHIND', found.epoch, last, count} end

local at = now_ms()
local state = state_after_abort(turn, found, at)
local new = (#ARGV - 9) / 2 - (count - from)
if new > 0 then
  last, check = add_records(journal, ARGV[4], last, check, 10 + 2 * (count - from))
  count = count + new
  redis.call('HSET', turn, 'count', count)
  redis.call('HSET', meta, 'last', last, 'check', check, 'used', at)
  -- The member is missing only where the key was evicted; without it the turn would not be told of.
  local healed = redis.call('ZADD', turns, 'NX', 'inf', found.member) == 1
  if healed or at - found.touched > tonumber(ARGV[8]) / 4 then
    redis.call('HSET', turn, 'touched', at)
    for index = 1, 4 do redis.call('PEXPIRE', KEYS[index], ARGV[8]) end
  end
  ring(meta, 'r ' .. ARGV[9])
end
return {'APPENDED', found.epoch, last, count, state, found.check, check, found.by}
