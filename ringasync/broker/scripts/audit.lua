-- uses: groups
-- Walks every live group and recomputes the live accounts and the pool. Writes nothing.
local accounts = { open = 0, finished = 0, graded = 0, taken = 0 }
local pool, problems = {}, {}
local function problem(text) if #problems < 50 then problems[#problems + 1] = text end end
local function count(field, n) pool[field] = (pool[field] or 0) + n end
local function check_rollout(gid, rid, kind)
  local r = read_rollout(rid)
  if not r then return problem('rollout ' .. rid .. ' of live group ' .. gid .. ' is missing') end
  local account = ACCOUNT[r.state]
  if not account then
    return problem('rollout ' .. rid .. ' of live group ' .. gid .. ' is ' .. r.state)
  end
  accounts[account] = accounts[account] + r.tokens
  count('tokens:' .. kind .. ':' .. account, r.tokens)
  count('rollouts:' .. kind .. ':' .. r.state, 1)
  local elements = call('LLEN', P .. 'seg:' .. rid)
  if (elements > 0) ~= (r.length > 0) then
    problem(string.format('rollout %s has %.0f tokens and %d segments', rid, r.length, elements))
  end
  if r.state == 'leased' or r.state == 'grading' then
    if call('SISMEMBER', P .. 'leases:' .. r.worker, rid) == 0 then
      problem(r.state .. ' rollout ' .. rid .. ' is not among the leases of ' .. r.worker)
    elseif not call('ZSCORE', P .. 'sessions', r.worker) then
      problem(r.state .. ' rollout ' .. rid .. ' belongs to the ended session ' .. r.worker)
    end
  elseif r.state ~= 'graded' then
    local stream, id = string.match(r.ticket, '^(%S+) (%S+)$')
    if not stream or #call('XRANGE', P .. stream, id, id) == 0 then
      problem(r.state .. ' rollout ' .. rid .. ' has no ticket')
    end
  end
  return r.state
end
for _, gid in ipairs(call('SMEMBERS', P .. 'live')) do
  local g = read_group(gid)
  if not g then
    problem('live group ' .. gid .. ' is missing')
  elseif END_ACCOUNT[g.state] then
    problem('live group ' .. gid .. ' is ' .. g.state)
  else
    count('groups:' .. g.kind .. ':' .. g.state, 1)
    if g.state == 'taken' then
      local left = int(call('HGET', P .. 'group:' .. gid, 'tokens_left'))
      accounts.taken = accounts.taken + left
      count('tokens:' .. g.kind .. ':taken', left)
    else
      local graded, total = 0, 0
      for _, rid in ipairs(members(gid)) do
        total = total + 1
        if check_rollout(gid, rid, g.kind) == 'graded' then graded = graded + 1 end
      end
      if total ~= g.size then
        problem(string.format('group %s has %d members, not %d', gid, total, g.size))
      end
      if graded ~= g.graded then
        problem(string.format('group %s has %d graded members, says %d', gid, graded, g.graded))
      end
      if g.state == 'ready' then count('ready_tokens', g.tokens) end
      if g.state == 'reserved' then count('reserved_tokens', g.tokens) end
      if (g.state == 'ready') ~= (call('ZSCORE', P .. 'ready', gid) and true or false) then
        problem('group ' .. gid .. ' is ' .. g.state .. ', which the ready set denies')
      end
    end
  end
end
local flat = call('HGETALL', P .. 'pool')
for i = 1, #flat, 2 do
  if int(flat[i + 1]) ~= (pool[flat[i]] or 0) then
    problem(string.format('pool %s says %s, records say %.0f', flat[i], flat[i + 1],
      pool[flat[i]] or 0))
  end
  pool[flat[i]] = nil
end
for field, n in pairs(pool) do
  if n ~= 0 then problem('pool lacks ' .. field .. ', records say ' .. str(n)) end
end
local ledger = {}
flat = call('HGETALL', P .. 'ledger')
for i = 1, #flat, 2 do
  ledger[flat[i]] = int(flat[i + 1])
  if ledger[flat[i]] < 0 then problem('account ' .. flat[i] .. ' is negative') end
end
return cjson.encode({ recomputed = accounts, counters = ledger, problems = problems })
