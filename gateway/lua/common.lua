-- Shared by every script; pasted in front of each when it is loaded (gateway/store/scripts.py).
--
-- Keys of one session share one hash tag. A turn's own hash is named by the SHA-1 of its id, so that no
-- name that a client chose reaches a key.
--
--   meta    hash    epoch, last (newest offset), base (oldest kept), check (of the newest record), owner, created,
--                   used (ms), fence
--   journal stream  <offset>-0 -> t (turn), k (kind and flags), d (payload), c (check: a digest of all up to here)
--   turns   zset    "<first offset>/<turn id>" -> when it ended (ms), +inf while it runs
--   turn    hash    epoch, first, last, count, state, node, fence, token, digest, path, read, by, abort_at, ...

local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Lua's own tostring writes 1e14 from there on.
local function whole(number)
  return string.format('%.0f', number)
end

local function entry_id(offset)
  return whole(offset) .. '-0'
end

local function turn_key_of(meta, turn)
  return string.sub(meta, 1, -5) .. 'turn:' .. redis.sha1hex(turn)
end

local function split_member(member)
  local slash = string.find(member, '/', 1, true)
  return tonumber(string.sub(member, 1, slash - 1)), string.sub(member, slash + 1)
end

-- The check of a record: whoever knows it knows that the history before it is the same one.
local function next_check(check, turn, kind, payload)
  return string.sub(redis.sha1hex(check .. turn .. '\0' .. kind .. '\0' .. payload), 1, 8)
end

-- Journals one record and returns its check.
local function add_record(journal, offset, check, turn, kind, payload)
  check = next_check(check, turn, kind, payload)
  redis.call('XADD', journal, entry_id(offset), 't', turn, 'k', kind, 'd', payload, 'c', check)
  return check
end

-- Journals ARGV[from], ARGV[from + 1] = kind, payload ... and returns the newest offset and its check.
local function add_records(journal, turn, last, check, from)
  for index = from, #ARGV, 2 do
    last = last + 1
    check = add_record(journal, last, check, turn, ARGV[index], ARGV[index + 1])
  end
  return last, check
end

-- Returns epoch, newest offset, oldest offset kept, check; nothing if there is no journal, or only pieces of one:
-- records are dense, so a stream that was evicted or lost its end shows in its length.
local function head_of(meta, journal)
  local head = redis.call('HMGET', meta, 'epoch', 'last', 'base', 'check')
  if not head[1] then return nil end
  local last, base = tonumber(head[2]), tonumber(head[3])
  if redis.call('XLEN', journal) ~= last - base + 1 then return nil end
  return head[1], last, base, head[4] or ''
end

local function is_running(state)
  return state == 'running' or state == 'cancelling' or state == 'queued'
end

-- The turn and the check of the record at an offset; empty where none is kept.
local function record_at(journal, offset)
  local entry = redis.call('XRANGE', journal, entry_id(offset), entry_id(offset))[1]
  if not entry then return '', '' end
  return entry[2][2], entry[2][8] or ''
end

-- Whether the journal has lost what a caller has seen of it: it ends before, or has another history there.
-- ARGV[1 ... 3] of most scripts: epoch, offset and check of the newest record that the caller has seen.
local function is_rewound(journal, epoch, last, check)
  if epoch ~= ARGV[1] then return false end
  local seen = tonumber(ARGV[2])
  if last < seen then return true end
  if ARGV[3] == '' then return false end
  if last > seen then check = select(2, record_at(journal, seen)) end
  return check ~= '' and check ~= ARGV[3]
end

-- The answer to who writes a turn that the journal does not know: whether it is at least the history that was seen.
local function lost(journal, epoch, last, check)
  local rewound = epoch and is_rewound(journal, epoch, last, check)
  return {'LOST', epoch or '', last or 0, rewound and 1 or 0}
end

-- Tells those who wait for the session, on whichever node; a hint, so that a store that refuses it is no failure.
local function ring(meta, bell)
  redis.pcall('SPUBLISH', string.sub(meta, 1, -5) .. 'bell', bell)
end

-- What a turn's producer may not go on with, as the answer to it; or nothing, then the turn and the journal's head.
-- ARGV: 4 turn id, 5 fence, 6 token
local function examined(meta, journal, turn)
  local known = redis.call('HMGET', turn, 'epoch', 'fence', 'token', 'count', 'state', 'touched', 'first', 'abort_at',
    'by')
  local epoch, last, _, check = head_of(meta, journal)
  if not known[1] or epoch ~= known[1] then return lost(journal, epoch, last, check) end
  if known[2] ~= ARGV[5] or known[3] ~= ARGV[6] then return {'FENCED'} end
  if not is_running(known[5]) then return {'ENDED', known[5]} end
  local found = {
    epoch = epoch, last = last, check = check, count = tonumber(known[4]), state = known[5],
    touched = tonumber(known[6]), member = known[7] .. '/' .. ARGV[4], abort_at = tonumber(known[8] or 'inf'),
    by = known[9] or ''
  }
  if is_rewound(journal, epoch, last, check) then return {'REWOUND', epoch, last, found.count} end
  return nil, found
end

-- The turn's state, once an abort that is due by now has made it one to be ended.
local function state_after_abort(turn, found, at)
  if found.abort_at > at then return found.state end
  redis.call('HSET', turn, 'state', 'cancelling')
  redis.call('HDEL', turn, 'abort_at')
  return 'cancelling'
end

-- The keys of the turns that a journal knows; looked up before anything is written.
local function turns_of_epoch(meta, turns, epoch)
  local keys = {}
  for _, member in ipairs(redis.call('ZRANGE', turns, 0, -1)) do
    local _, id = split_member(member)
    local key = turn_key_of(meta, id)
    if redis.call('HGET', key, 'epoch') == epoch then table.insert(keys, key) end
  end
  return keys
end

local function take_epoch(meta, turn_keys, epoch)
  redis.call('HSET', meta, 'epoch', epoch)
  for _, key in ipairs(turn_keys) do redis.call('HSET', key, 'epoch', epoch) end
end
