-- uses: groups
-- role, token, batch, then three an item: group, policy tokens by the journal, trajectories.
-- After Redis lost its tail: whatever state these groups are back in, they are taken now.
-- Tokens the journal has and Redis lost are taken out of `lost`, or accepted again.
local refused = fenced(ARGV[1], ARGV[2])
if refused then return refused end
local batch, t = ARGV[3], now()
local key = P .. 'batch:' .. batch
local state = call('HGET', key, 'state')
if state == 'taken' or state == 'trained' then return 0 end
free()
local lost = int(call('HGET', P .. 'ledger', 'lost'))
local ids = {}
local function detach(g) -- where the group's tokens are now; returns how many
  local tokens = 0
  for _, rid in ipairs(members(g.id)) do
    local r = read_rollout(rid)
    if r and ACCOUNT[r.state] then
      shift(g.kind, ACCOUNT[r.state], 'taken', r.tokens)
      count_rollout(g.kind, r.state, nil)
      history(rid, t, 'taken', { why = batch .. ' after Redis lost its tail' })
      retire(r, 'taken')
      tokens = tokens + r.tokens
    end
  end
  if g.state == 'ready' then add('pool', 'ready_tokens', -g.tokens) end
  if g.state == 'reserved' then
    add('pool', 'reserved_tokens', -g.tokens)
    leave_batch(g.batch, g.id)
  end
  if END_ACCOUNT[g.state] then
    tokens = int(call('HGET', P .. 'group:' .. g.id, 'ended_tokens'))
    shift(g.kind, END_ACCOUNT[g.state], 'taken', tokens)
  else
    count_group(g.kind, g.state, nil)
  end
  return tokens
end
for i = 4, #ARGV, 3 do
  local gid, journal = ARGV[i], int(ARGV[i + 1])
  local g = read_group(gid)
  if not g or (g.state ~= 'taken' and g.state ~= 'trained') then
    local group = P .. 'group:' .. gid
    local here = g and detach(g) or 0
    if here > journal then
      shift('train', 'taken', 'lost', here - journal)
    elseif journal > here then
      local from_lost = math.min(lost, journal - here)
      lost = lost - from_lost
      shift('train', 'lost', 'taken', from_lost)
      add('ledger', 'accepted', journal - here - from_lost)
      shift('train', nil, 'taken', journal - here - from_lost)
    end
    call('ZREM', P .. 'ready', gid)
    call('SADD', P .. 'live', gid)
    call('HSET', group, 'state', 'taken', 'kind', 'train', 'batch', batch, 'tokens', journal,
      'tokens_left', journal, 'open_trajectories', ARGV[i + 2], 'taken_ms', str(t))
    call('HDEL', group, 'prompt', 'prompt_ids', 'task')
    call('PERSIST', group)
    count_group('train', nil, 'taken')
  end
  ids[#ids + 1] = gid
end
call('HSET', key, 'state', 'taken', 'groups', table.concat(ids, ','), 'taken_ms', str(t),
  'forced', 1)
call('ZADD', P .. 'batches', str(t), batch)
flush()
return 1
