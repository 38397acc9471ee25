-- role, token, request, round_id. Resets the round's counters.
local refused = fenced(ARGV[1], ARGV[2])
if refused then return refused end
local before = answered(ARGV[3])
if before then return 1 end
local m = call('HMGET', P .. 'meta', 'round_state', 'round_id')
if m[1] ~= 'none' then return bug('open_round ', ARGV[4], ': round ', m[2], ' is ', m[1]) end
free()
call('DEL', P .. 'round')
call('HSET', P .. 'meta', 'round_state', 'open', 'round_id', ARGV[4], 'round_opened_ms', str(now()))
answer(ARGV[3], 1)
return 1
