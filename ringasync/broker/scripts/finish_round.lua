-- role, token, round_id. The learner has updated: the coordinator may open the next round.
local refused = fenced(ARGV[1], ARGV[2])
if refused then return refused end
local m = call('HMGET', P .. 'meta', 'round_state', 'round_id')
if int(m[2]) > int(ARGV[3]) or (m[2] == ARGV[3] and m[1] == 'none') then return 0 end
if m[2] ~= ARGV[3] or m[1] ~= 'training' then
  return bug('finish_round ', ARGV[3], ': round ', m[2], ' is ', m[1])
end
free()
call('HSET', P .. 'meta', 'round_state', 'none')
return 1
