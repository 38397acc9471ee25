-- uses: groups
-- role, token, request, round_id. Retention + 1 on every unfinished train rollout, exactly once.
local refused = fenced(ARGV[1], ARGV[2])
if refused then return refused end
local before = answered(ARGV[3])
if before then return int(before) end
local m = call('HMGET', P .. 'meta', 'round_state', 'round_id')
if m[2] == ARGV[4] and (m[1] == 'closing' or m[1] == 'training') then return 0 end
if m[1] ~= 'open' or m[2] ~= ARGV[4] then
  return bug('close_round ', ARGV[4], ': round ', m[2], ' is ', m[1])
end
local t, raised = now(), 0
free()
for _, gid in ipairs(call('SMEMBERS', P .. 'live')) do
  local g = read_group(gid)
  if g.kind == 'train' and g.state == 'open' then
    for _, rid in ipairs(members(gid)) do
      local r = read_rollout(rid)
      if r and ACCOUNT[r.state] == 'open' then
        call('HINCRBY', P .. 'rollout:' .. rid, 'retention', 1)
        raised = raised + 1
      end
    end
  end
end
call('HSET', P .. 'meta', 'round_state', 'closing', 'round_closed_ms', str(t))
answer(ARGV[3], raised)
return raised
