#!lua flags=no-writes
-- What is known of one turn.
--
-- KEYS: turn
--
-- Returns {state or '', node, first, refusal or '', abort pending or '', who cancels it (JSON) or ''}
local known = redis.call('HMGET', KEYS[1], 'state', 'node', 'first', 'refusal', 'abort_at', 'by')
if not known[1] then return {'', '', 0, '', '', ''} end
return {known[1], known[2], tonumber(known[3]), known[4] or '', known[5] or '', known[6] or ''}
