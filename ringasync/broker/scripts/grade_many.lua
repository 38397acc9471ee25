-- uses: groups
-- sid, max_attempts, filter_zero_variance, samples_keep, then five an item: rollout, token,
-- reward ('' = error), error, text. The last sibling decides the group.
local sid, limit, filter, keep, t = ARGV[1], int(ARGV[2]), ARGV[3] == '1', int(ARGV[4]), now()
local status, moves, seen = {}, {}, {}
for b = 5, #ARGV, 5 do
  local r, token, verdict = read_rollout(ARGV[b]), ARGV[b + 1], nil
  local again = r and (repeated(r, token, 'graded') or repeated(r, token, 'failed'))
  if again or (r and seen[r.id]) then verdict = 'duplicate'
  elseif not r or not ACCOUNT[r.state] then verdict = 'gone'
  elseif r.state ~= 'grading' or r.lease ~= token then verdict = 'fenced'
  else
    verdict = 'ok'
    seen[r.id] = true
    moves[#moves + 1] = { r.id, ARGV[b + 2], ARGV[b + 3], ARGV[b + 4] }
  end
  status[#status + 1] = verdict
end
free()

local function close_group(g)
  local rows, tokens, low, high, same = {}, 0, 0, 0, true
  for _, rid in ipairs(members(g.id)) do
    local r = read_rollout(rid)
    rows[#rows + 1] = r
    tokens = tokens + r.tokens
    same = same and r.reward == rows[1].reward
    local a, b = span(r.versions)
    if a > 0 and (low == 0 or a < low) then low = a end
    high = math.max(high, b)
  end
  if g.kind == 'eval' then return end_group(g, 'evaluated', '', t) end
  if filter and same then return end_group(g, 'filtered', 'zero variance', t) end
  local order = call('HINCRBY', P .. 'meta', 'ready_count', 1)
  call('HSET', P .. 'group:' .. g.id, 'state', 'ready', 'tokens', tokens,
    'versions', low .. '-' .. high, 'ready_order', order, 'ready_ms', str(t))
  call('ZADD', P .. 'ready', order, g.id)
  count_group('train', 'open', 'ready')
  add('pool', 'ready_tokens', tokens)
  add('round', 'trainable', tokens)
  emit(g.id, g, 'ready', rows, '', t)
end

local function sample(r, g, reward, text)
  if keep == 0 then return end
  call('LPUSH', P .. 'samples', cjson.encode({ rollout = r.id, group = g.id, kind = g.kind,
    domain = g.domain, prompt = call('HGET', P .. 'group:' .. g.id, 'prompt') or '', text = text,
    reward = tonumber(reward), tokens = r.tokens, versions = r.versions, at_ms = t }))
  call('LTRIM', P .. 'samples', 0, keep - 1)
end

for _, move in ipairs(moves) do
  local r = read_rollout(move[1]) -- a sibling's end above may have ended this one
  if r.state == 'grading' and move[2] == '' then
    return_grading(r, t, 'failed', move[3], true, limit)
  elseif r.state == 'grading' then
    call('HSET', P .. 'rollout:' .. r.id, 'state', 'graded', 'reward', move[2], 'lease', '',
      'last_lease', r.lease, 'last_move', 'graded', 'graded_ms', str(t))
    call('SREM', P .. 'leases:' .. r.worker, r.id)
    shift(r.kind, 'finished', 'graded', r.tokens)
    count_rollout(r.kind, 'grading', 'graded')
    history(r.id, t, 'graded', { worker = sid, reward = tonumber(move[2]) })
    local g = read_group(r.group)
    sample(r, g, move[2], move[4])
    if call('HINCRBY', P .. 'group:' .. r.group, 'graded', 1) == g.size then close_group(g) end
  end
end
flush()
return status
