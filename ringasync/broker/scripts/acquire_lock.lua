-- role, owner, nonce, ttl_ms, server run id, jump. Returns the fencing token; it rises strictly.
-- After a Redis restart whose incarnation has not begun yet the counter jumps by `jump`, and to the
-- clock at least, so that no number from a lost tail is given out again, nor one below it.
local role, owner, nonce, ttl = ARGV[1], ARGV[2], ARGV[3], int(ARGV[4])
local key, t = P .. 'lock:' .. role, now()
local meta = call('HMGET', P .. 'meta', 'server_run_id', 'fence_' .. role)
if not call('HGET', P .. 'meta', 'schema') then return { '!NORUN' } end
local lock = call('HMGET', key, 'token', 'owner', 'nonce', 'deadline', 'beat_ms')
if lock[1] and lock[3] == nonce then return int(lock[1]) end
if lock[1] and int(lock[4]) > t then
  return { '!HELD', role, lock[2], str(math.max(0, t - int(lock[5]))) }
end
local token = int(meta[2]) + 1
if meta[1] ~= ARGV[5] then token = math.max(token + int(ARGV[6]), t) end
free()
tick(t)
call('HSET', P .. 'meta', 'fence_' .. role, str(token))
call('HSET', key, 'token', str(token), 'owner', owner, 'nonce', nonce,
  'deadline', str(t + ttl), 'beat_ms', str(t), 'ttl_ms', str(ttl))
return token
