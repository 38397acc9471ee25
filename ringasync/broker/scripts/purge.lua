-- uses: groups
-- role, token, request, sigma, action. Queued, parked or leased train rollouts carried over more
-- than sigma rounds: their group ends, or a fresh sibling takes the place.
local refused = fenced(ARGV[1], ARGV[2])
if refused then return refused end
local before = answered(ARGV[3])
if before then return before end
local sigma, action, t, purged = int(ARGV[4]), ARGV[5], now(), {}
free()
local function replace(g, r)
  local key = P .. 'group:' .. g.id
  shift('train', 'open', 'purged', r.tokens)
  count_rollout('train', r.state, nil)
  local index = call('HINCRBY', key, 'next_index', 1) - 1
  local fresh, kept = g.id .. '.' .. index, {}
  for _, rid in ipairs(members(g.id)) do
    if rid ~= r.id then kept[#kept + 1] = string.match(rid, '(%d+)$') end
  end
  kept[#kept + 1] = index
  call('HSET', key, 'members', table.concat(kept, ','))
  local why = 'retention ' .. r.retention .. ', replaced by ' .. fresh
  history(r.id, t, 'purged', { why = why })
  retire(r, 'purged')
  emit(g.id, g, 'purged', { r }, why, t, r.id)
  new_rollout(fresh, g.id, 'train')
end
for _, gid in ipairs(call('SMEMBERS', P .. 'live')) do
  local g = read_group(gid)
  if g.kind == 'train' and g.state == 'open' then
    for _, rid in ipairs(members(gid)) do
      local r = read_rollout(rid)
      if r and ACCOUNT[r.state] == 'open' and r.retention > sigma then
        if action == 'replace' then
          replace(g, r)
          purged[#purged + 1] = rid
        else
          end_group(g, 'purged', rid .. ': retention ' .. r.retention .. ' above ' .. sigma, t)
          purged[#purged + 1] = gid
          break
        end
      end
    end
  end
end
flush()
local text = table.concat(purged, ',')
answer(ARGV[3], text)
return text
