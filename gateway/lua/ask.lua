#!lua flags=allow-oom
-- How a turn stands, for its producer: also when the store is full, for a cancel must come through then too.
--
-- KEYS: meta, journal, turn
-- ARGV: 1 ... 3 seen, 4 turn id, 5 fence, 6 token, 7 how many of its records were journalled
--
-- Returns what append returns, for no records
local meta, journal, turn = KEYS[1], KEYS[2], KEYS[3]
local refusal, found = examined(meta, journal, turn)
if refusal then return refusal end
if tonumber(ARGV[7]) > found.count then return {'BEHIND', found.epoch, found.last, found.count} end
local state = state_after_abort(turn, found, now_ms())
return {'APPENDED', found.epoch, found.last, found.count, state, found.check, found.check, found.by}
