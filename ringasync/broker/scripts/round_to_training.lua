-- role, token, round_id. 1 once no train lease is left (also when it was so before).
local refused = fenced(ARGV[1], ARGV[2])
if refused then return refused end
local m = call('HMGET', P .. 'meta', 'round_state', 'round_id')
-- Trained since: this call is made again, for its answer was lost.
if int(m[2]) > int(ARGV[3]) or (m[2] == ARGV[3] and m[1] == 'none') then return 1 end
if m[2] ~= ARGV[3] then return bug('round_to_training ', ARGV[3], ': round is ', m[2]) end
if m[1] == 'training' then return 1 end
if m[1] ~= 'closing' then return bug('round_to_training ', ARGV[3], ': state is ', m[1]) end
if int(call('HGET', P .. 'pool', 'rollouts:train:leased')) > 0 then return 0 end
free()
call('HSET', P .. 'meta', 'round_state', 'training')
return 1
