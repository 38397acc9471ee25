-- role, token, ttl_ms. A lock that ran out but that nobody took since may be renewed: its token
-- is still the newest, so nobody else has acted in the role.
local refused = fenced(ARGV[1], ARGV[2])
if refused then return refused end
local t = now()
free()
tick(t)
call('HSET', P .. 'lock:' .. ARGV[1], 'deadline', str(t + int(ARGV[3])), 'beat_ms', str(t))
return 1
