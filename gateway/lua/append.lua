#!lua
-- Compare-and-append: journals a turn's records from an index on, ignores those it has.
--
-- KEYS: meta, journal, turns, turn
-- ARGV: 1 seen epoch, 2 seen offset, 3 turn id, 4 fence, 5 token, 6 index of the first record, 7 ttl ms,
--       8, 9 ... kind, payload of each record
--
-- Returns {'APPENDED', epoch, newest offset, how many of the turn's records are journalled now, state}
--         {'BEHIND', count}: ask again from that index   {'FENCED'}: another may write this turn
--         {'ENDED', reason}   {'LOST'}: the journal or the turn is gone   {'REWOUND'}: it is behind
local meta, journal, turns, turn = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local known = redis.call('HMGET', turn, 'epoch', 'fence', 'token', 'count', 'state', 'touched', 'first')
local epoch, last = head_of(meta, journal)
if not known[1] or epoch ~= known[1] then return {'LOST'} end
if known[2] ~= ARGV[4] or known[3] ~= ARGV[5] then return {'FENCED'} end
local state = known[5]
if not is_running(state) then return {'ENDED', state} end
if rewound(epoch, last, ARGV[1], tonumber(ARGV[2])) then return {'REWOUND'} end
local count, from = tonumber(known[4]), tonumber(ARGV[6])
if from > count then return {'BEHIND', count} end

local new = (#ARGV - 7) / 2 - (count - from)
if new > 0 then
  last = add_records(journal, ARGV[3], last, 8 + 2 * (count - from))
  count = count + new
  local at = now_ms()
  redis.call('HSET', turn, 'count', count)
  redis.call('HSET', meta, 'last', last, 'used', at)
  -- The member is missing only where the key was evicted; without it the turn would not be told of.
  local healed = redis.call('ZADD', turns, 'NX', 'inf', known[7] .. '/' .. ARGV[3]) == 1
  if healed or at - tonumber(known[6]) > tonumber(ARGV[7]) / 4 then
    redis.call('HSET', turn, 'touched', at)
    for index = 1, 4 do redis.call('PEXPIRE', KEYS[index], ARGV[7]) end
  end
end
return {'APPENDED', epoch, last, count, state}
