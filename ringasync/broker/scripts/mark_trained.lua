-- uses: groups
-- role, token, batch, learner_step, then four an item: group, trained, masked, open trajectories.
local refused = fenced(ARGV[1], ARGV[2])
if refused then return refused end
local batch, t = ARGV[3], now()
local key = P .. 'batch:' .. batch
local state = call('HGET', key, 'state')
if state == 'trained' then return 0 end
if state == 'reserved' then return bug('mark_trained: batch ', batch, ' is not committed') end
for i = 5, #ARGV, 4 do
  local gid, used = ARGV[i], int(ARGV[i + 1]) + int(ARGV[i + 2])
  local g = call('HMGET', P .. 'group:' .. gid, 'state', 'tokens_left')
  local left = int(g[2]) - used
  if g[1] ~= 'taken' or left < 0 or (left > 0 and int(ARGV[i + 3]) == 0) then
    return bug(string.format('mark_trained: batch %s used %.0f tokens of group %s, which is %s ' ..
      'with %.0f left, and %s trajectories stay open', batch, used, gid, g[1] or 'absent',
      int(g[2]), ARGV[i + 3]))
  end
end
free()
for i = 5, #ARGV, 4 do
  local gid, trained, masked = ARGV[i], int(ARGV[i + 1]), int(ARGV[i + 2])
  local group = P .. 'group:' .. gid
  shift('train', 'taken', 'trained', trained)
  shift('train', 'taken', 'masked', masked)
  call('HINCRBY', group, 'tokens_left', str(0 - trained - masked)) -- never "-0"
  call('HSET', group, 'open_trajectories', ARGV[i + 3])
  if int(ARGV[i + 3]) == 0 then
    call('HSET', group, 'state', 'trained', 'ended_ms', str(t),
      'ended_tokens', call('HGET', group, 'tokens') or '0')
    call('EXPIRE', group, KEEP_S)
    bury(gid)
    call('SREM', P .. 'live', gid)
    count_group('train', 'taken', nil)
  end
end
call('HSET', key, 'state', 'trained', 'trained_ms', str(t), 'learner_step', ARGV[4])
call('ZADD', P .. 'batches', str(t), batch)
local old = call('ZCARD', P .. 'batches') - 1024
if old > 0 then
  for _, id in ipairs(call('ZRANGE', P .. 'batches', 0, old - 1)) do
    if call('HGET', P .. 'batch:' .. id, 'state') == 'trained' then
      call('DEL', P .. 'batch:' .. id)
      call('ZREM', P .. 'batches', id)
    end
  end
end
if int(ARGV[4]) > int(call('HGET', P .. 'meta', 'learner_step')) then
  call('HSET', P .. 'meta', 'learner_step', ARGV[4])
end
flush()
return 1
