-- role, token, turn. The learner is off the device: the workers may wake. 0 on a repeat.
local refused = fenced(ARGV[1], ARGV[2])
if refused then return refused end
local turn = int(ARGV[3])
if int(call('HGET', P .. 'meta', 'device_turn')) > turn then return 0 end
free()
call('HSET', P .. 'meta', 'device_turn', str(turn + 1), 'device_ms', str(now()))
return 1
