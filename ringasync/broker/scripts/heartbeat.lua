-- sid, ttl_ms, then status pairs. Returns alive and what every role must notice.
local sid, t = ARGV[1], now()
local alive = call('ZSCORE', P .. 'sessions', sid) and 1 or 0
if alive == 1 then
  free()
  tick(t)
  call('ZADD', P .. 'sessions', str(t + int(ARGV[2])), sid)
  call('HSET', P .. 'session:' .. sid, 'beat_ms', str(t), 'ttl_ms', ARGV[2])
  if #ARGV > 2 then call('HSET', P .. 'session:' .. sid, unpack(ARGV, 3)) end
end
local m = call('HMGET', P .. 'meta', 'phase', 'paused', 'latest_version', 'pin_version',
  'bad_versions', 'round_id', 'round_state', 'incarnation', 'learner_step',
  'device_turn')
if not m[8] then return { '!NORUN' } end
local reply = { alive }
for i = 1, 10 do reply[i + 1] = m[i] or '' end
return reply
