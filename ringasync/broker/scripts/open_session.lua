-- sid, role, ttl_ms, then info pairs.
if call('EXISTS', P .. 'meta') == 0 then return { '!NORUN' } end
local t, key = now(), P .. 'session:' .. ARGV[1]
free()
tick(t)
call('HSET', key, 'role', ARGV[2], 'ttl_ms', ARGV[3], 'state', 'alive', 'opened_ms', str(t),
  'beat_ms', str(t))
for i = 4, #ARGV, 2 do call('HSET', key, ARGV[i], ARGV[i + 1]) end
call('PERSIST', key)
call('ZADD', P .. 'sessions', str(t + int(ARGV[3])), ARGV[1])
return 1
