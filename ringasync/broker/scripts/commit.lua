-- uses: groups
-- role, token, batch, then pairs: group, trajectories. reserved -> taken; payloads leave Redis,
-- for the learner's journal has them.
local refused = fenced(ARGV[1], ARGV[2])
if refused then return refused end
local batch, t = ARGV[3], now()
local key = P .. 'batch:' .. batch
local found = call('HMGET', key, 'state', 'groups')
if not found[1] then return bug('commit: no batch ', batch) end
if found[1] ~= 'reserved' then return 0 end
local open = {}
for i = 4, #ARGV, 2 do open[ARGV[i]] = ARGV[i + 1] end
for gid in string.gmatch(found[2], '[^,]+') do
  if not open[gid] then
    return bug('commit: batch ', batch, ' holds ', gid, ', which was not named')
  end
end
free()
for gid in string.gmatch(found[2], '[^,]+') do
  local g = read_group(gid)
  for _, rid in ipairs(members(gid)) do
    local r = read_rollout(rid)
    shift('train', 'graded', 'taken', r.tokens)
    count_rollout('train', 'graded', nil)
    history(rid, t, 'taken', { why = batch })
    retire(r, 'taken')
  end
  count_group('train', 'reserved', 'taken')
  add('pool', 'reserved_tokens', -g.tokens)
  call('HSET', P .. 'group:' .. gid, 'state', 'taken', 'tokens_left', g.tokens,
    'open_trajectories', open[gid], 'taken_ms', str(t))
  call('HDEL', P .. 'group:' .. gid, 'prompt', 'prompt_ids', 'task')
end
call('HSET', key, 'state', 'taken', 'taken_ms', str(t))
flush()
return 1
