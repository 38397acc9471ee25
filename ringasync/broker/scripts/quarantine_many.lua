-- uses: groups
-- sid, then three an item: rollout, lease or grading token, reason. Ends the whole group.
local t, status, moves = now(), {}, {}
for b = 2, #ARGV, 3 do
  local r, verdict = read_rollout(ARGV[b]), nil
  if not r or not ACCOUNT[r.state] then verdict = 'gone'
  elseif r.lease == '' or r.lease ~= ARGV[b + 1] then verdict = 'fenced'
  else
    verdict = 'ok'
    moves[#moves + 1] = { r.group, r.id .. ': ' .. ARGV[b + 2] }
  end
  status[#status + 1] = verdict
end
free()
for _, move in ipairs(moves) do
  local g = read_group(move[1])
  if g and g.state == 'open' then end_group(g, 'quarantined', move[2], t) end
end
flush()
return status
