-- Shared by every script; pasted in front of each when it is loaded (gateway/store.py).
--
-- Keys of one session share one hash tag. A turn's own hash is named by the SHA-1 of its id, so that no
-- name that a client chose reaches a key.
--
--   meta    hash    epoch, last (newest offset), base (oldest kept), owner, created, used (ms), fence
--   journal stream  <offset>-0 -> t (turn), k (kind and flags), d (payload)
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

-- Journals ARGV[from], ARGV[from + 1] = kind, payload ... and returns the newest offset.
local function add_records(journal, turn, last, from)
  for index = from, #ARGV, 2 do
    last = last + 1
    redis.call('XADD', journal, entry_id(last), 't', turn, 'k', ARGV[index], 'd', ARGV[index + 1])
  end
  return last
end

-- Returns epoch, newest offset and oldest offset kept; nothing if there is no journal, or only pieces of one:
-- records are dense, so a stream that was evicted or lost its end shows in its length.
local function head_of(meta, journal)
  local head = redis.call('HMGET', meta, 'epoch', 'last', 'base')
  if not head[1] then return nil end
  local last, base = tonumber(head[2]), tonumber(head[3])
  if redis.call('XLEN', journal) ~= last - base + 1 then return nil end
  return head[1], last, base
end

local function is_running(state)
  return state == 'running' or state == 'cancelling' or state == 'queued'
end

-- Whether the journal is older than what the caller has seen of it, or another one.
local function rewound(epoch, last, seen_epoch, seen)
  return epoch == seen_epoch and last < seen
end
