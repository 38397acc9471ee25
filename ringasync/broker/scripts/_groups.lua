-- Helpers of the scripts that end groups or return leases. None of them validates: the calling
-- script has done so before its first write.

local function members(gid)
  local ids = {}
  local text = call('HGET', P .. 'group:' .. gid, 'members') or ''
  for index in string.gmatch(text, '%d+') do ids[#ids + 1] = gid .. '.' .. index end
  return ids
end

-- Breaker: pauses feeding when too many of the last 64 closed groups went wrong.
local function note_end(bad, reason)
  call('LPUSH', P .. 'ends', bad and 'bad' or 'ok')
  call('LTRIM', P .. 'ends', 0, 63)
  if not bad then return end
  local ends, count = call('LRANGE', P .. 'ends', 0, -1), 0
  for _, value in ipairs(ends) do if value == 'bad' then count = count + 1 end end
  local limit = tonumber(call('HGET', P .. 'meta', 'breaker') or '') or 0.5
  if #ends >= 16 and count / #ends > limit then
    call('HSET', P .. 'meta', 'paused_feeding', string.format(
      '%d of the last %d groups ended quarantined or grade_error (limit %.2f); the last: %s',
      count, #ends, limit, reason))
  end
end

-- One entry of the outcomes stream. `rows` are rollouts as read_rollout gives them. `rollout` names
-- the only one that ended while its group goes on.
local function emit(gid, group, ending, rows, reason, t, rollout)
  local rewards, lengths, low, high, retention = {}, {}, 0, 0, 0
  for _, r in ipairs(rows) do
    if r.reward ~= '' then rewards[#rewards + 1] = r.reward end
    lengths[#lengths + 1] = str(r.tokens)
    local a, b = span(r.versions)
    if a > 0 and (low == 0 or a < low) then low = a end
    high = math.max(high, b)
    retention = math.max(retention, r.retention)
  end
  call('XADD', P .. 'outcomes', '*', 'group', gid, 'kind', group.kind, 'domain', group.domain,
    'end', ending, 'rewards', table.concat(rewards, ','), 'lengths', table.concat(lengths, ','),
    'versions', high > 0 and (low .. '-' .. high) or '', 'retention', retention,
    'reason', reason, 'at_ms', str(t), 'rollout', rollout or '')
  if rollout then return end
  note_end(ending == 'quarantined' or ending == 'grade_error', reason)
end

local function read_group(gid)
  local v = call('HMGET', P .. 'group:' .. gid, 'state', 'kind', 'domain', 'size', 'graded',
    'tokens', 'batch', 'max_new_tokens')
  if not v[1] then return nil end
  return { id = gid, state = v[1], kind = v[2] or 'train', domain = v[3] or '', size = int(v[4]),
    graded = int(v[5]), tokens = int(v[6]), batch = v[7] or '', max_new_tokens = int(v[8]) }
end

-- Drop a rollout's payload and ticket and whoever holds it; the small hash expires later.
local function retire(r, state)
  if r.worker ~= '' then call('SREM', P .. 'leases:' .. r.worker, r.id) end
  dequeue(r.ticket)
  call('DEL', P .. 'seg:' .. r.id)
  local key = P .. 'rollout:' .. r.id
  call('HSET', key, 'state', state, 'lease', '')
  call('HDEL', key, 'ticket')
  call('EXPIRE', key, KEEP_S)
  call('EXPIRE', P .. 'hist:' .. r.id, KEEP_S)
end

-- Take a group out of its batch, e.g. when the learner finds a broken record in it.
local function leave_batch(batch, gid)
  local key = P .. 'batch:' .. batch
  local kept = {}
  for id in string.gmatch(call('HGET', key, 'groups') or '', '[^,]+') do
    if id ~= gid then kept[#kept + 1] = id end
  end
  call('HSET', key, 'groups', table.concat(kept, ','))
end

-- Ended groups stay readable for an hour, but only the last KEEP_GROUPS of them: memory must not
-- grow with the speed of a run.
local function bury(gid)
  call('RPUSH', P .. 'ended', gid)
  if call('LLEN', P .. 'ended') <= KEEP_GROUPS then return end
  local old = call('LPOP', P .. 'ended')
  local state = call('HGET', P .. 'group:' .. old, 'state')
  if not state or not END_ACCOUNT[state] then return end -- forced back to taken after a rollback
  for _, rid in ipairs(members(old)) do
    call('DEL', P .. 'rollout:' .. rid, P .. 'hist:' .. rid)
  end
  call('DEL', P .. 'group:' .. old)
end

-- End an open, ready or reserved group: siblings follow, tokens go to the end's account.
local function end_group(group, state, reason, t)
  local gid, total, rows = group.id, 0, {}
  for _, rid in ipairs(members(gid)) do
    local r = read_rollout(rid)
    if r then
      if ACCOUNT[r.state] then
        shift(group.kind, ACCOUNT[r.state], END_ACCOUNT[state], r.tokens)
        count_rollout(group.kind, r.state, nil)
        total = total + r.tokens
      end
      retire(r, state)
      history(rid, t, state, { why = reason })
      rows[#rows + 1] = r
    end
  end
  if group.state == 'ready' then add('pool', 'ready_tokens', -group.tokens) end
  if group.state == 'reserved' then
    add('pool', 'reserved_tokens', -group.tokens)
    leave_batch(group.batch, gid)
  end
  count_group(group.kind, group.state, nil)
  call('ZREM', P .. 'ready', gid)
  call('SREM', P .. 'live', gid)
  local key = P .. 'group:' .. gid
  call('HSET', key, 'state', state, 'reason', reason, 'ended_ms', str(t),
    'ended_tokens', str(total))
  call('HDEL', key, 'prompt', 'prompt_ids', 'task')
  call('EXPIRE', key, KEEP_S)
  bury(gid)
  emit(gid, group, state, rows, reason, t)
end

-- A new rollout of a group, with its ticket. Small hashes are searched from the front: what every
-- append reads and writes stands first, and keeps its place.
local function new_rollout(rid, gid, kind)
  local ticket = enqueue(kind == 'eval' and 'tickets:eval' or 'tickets', rid)
  call('HSET', P .. 'rollout:' .. rid, 'state', 'queued', 'lease', '', 'length', 0, 'tokens', 0,
    'versions', '', 'kind', kind, 'group', gid, 'retention', 0, 'attempts', 0, 'epoch', 0,
    'leased_tokens', 0, 'ticket', ticket)
  count_rollout(kind, nil, 'queued')
end

-- leased -> parked or queued, with a ticket. Retention stays: only a closing round raises it.
-- `event` is what happened: parked (by its holder, whose repeat is a duplicate), lost, closed...
local function return_lease(r, t, event, why)
  local state = r.length > 0 and 'parked' or 'queued'
  local stream = state == 'parked' and 'tickets:resume' or 'tickets'
  if r.kind == 'eval' then stream = 'tickets:eval' end
  call('HSET', P .. 'rollout:' .. r.id, 'state', state, 'lease', '', 'last_lease', r.lease,
    'last_move', event, 'attempts', r.attempts, 'ticket', enqueue(stream, r.id))
  call('SREM', P .. 'leases:' .. r.worker, r.id)
  count_rollout(r.kind, 'leased', state)
  history(r.id, t, event,
    { worker = r.worker, tokens = r.progress, versions = r.versions, why = why })
  return state
end

-- A lease lost without progress raises attempts; at the limit the whole group is quarantined.
local function lose_lease(r, t, event, why, max_attempts)
  if r.progress == 0 then r.attempts = r.attempts + 1 end
  if max_attempts > 0 and r.progress == 0 and r.attempts >= max_attempts then
    call('HSET', P .. 'rollout:' .. r.id, 'attempts', r.attempts)
    end_group(read_group(r.group), 'quarantined',
      r.id .. ': ' .. r.attempts .. ' leases lost without progress; ' .. why, t)
    return 'quarantined'
  end
  return return_lease(r, t, event, why)
end

-- grading -> finished, with a grading ticket. `failed` counts towards the grading limit.
local function return_grading(r, t, event, why, failed, max_attempts)
  if failed then r.grade_attempts = r.grade_attempts + 1 end
  local key = P .. 'rollout:' .. r.id
  if failed and max_attempts > 0 and r.grade_attempts >= max_attempts then
    local reason = r.id .. ': ' .. r.grade_attempts .. ' gradings failed; ' .. why
    call('HSET', key, 'grade_attempts', r.grade_attempts, 'grade_error', why)
    end_group(read_group(r.group), 'grade_error', reason, t)
    return 'grade_error'
  end
  call('HSET', key, 'state', 'finished', 'lease', '', 'last_lease', r.lease, 'last_move', event,
    'grade_attempts', r.grade_attempts, 'grade_error', why, 'ticket', enqueue('grading', r.id))
  call('SREM', P .. 'leases:' .. r.worker, r.id)
  count_rollout(r.kind, 'grading', 'finished')
  history(r.id, t, 'grading_' .. event, { worker = r.worker, why = why })
  return 'finished'
end
