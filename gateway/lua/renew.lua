#!lua flags=allow-oom
-- Gives a journal that has lost what was seen of it a new epoch: what survived is kept, and nobody mistakes it
-- for what it was. Nothing happens if it is whole again, or is another one already.
--
-- KEYS: meta, journal, turns
-- ARGV: 1 ... 3 seen, 4 new epoch, 5 ttl ms, 6 node
--
-- Returns {'RENEWED', epoch, newest offset}   {'KEPT', epoch or '', newest offset}
local meta, journal, turns = KEYS[1], KEYS[2], KEYS[3]
local epoch, last, _, check = head_of(meta, journal)
if not epoch or not is_rewound(journal, epoch, last, check) then return {'KEPT', epoch or '', last or 0} end
take_epoch(meta, turns_of_epoch(meta, turns, epoch), ARGV[4])
for index = 1, 3 do redis.call('PEXPIRE', KEYS[index], ARGV[5]) end
ring(meta, 'r ' .. ARGV[6])
return {'RENEWED', ARGV[4], last}
