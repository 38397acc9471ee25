-- uses: groups
-- role, token, max_attempts. Ends sessions past their deadline and returns their work.
local refused = fenced(ARGV[1], ARGV[2])
if refused then return refused end
local t, limit = now(), int(ARGV[3])
free()
tick(t)
local counts = {
  sessions = 0, parked = 0, queued = 0, finished = 0, quarantined = 0, grade_error = 0,
}
for _, sid in ipairs(call('ZRANGEBYSCORE', P .. 'sessions', '-inf', '(' .. str(t))) do
  counts.sessions = counts.sessions + 1
  for _, rid in ipairs(call('SMEMBERS', P .. 'leases:' .. sid)) do
    local r, became = read_rollout(rid), nil
    if r and r.worker == sid and r.state == 'leased' then
      became = lose_lease(r, t, 'lost', 'session ' .. sid .. ' died', limit)
    elseif r and r.worker == sid and r.state == 'grading' then
      became = return_grading(r, t, 'lost', 'grader ' .. sid .. ' died', true, limit)
    end
    if became then counts[became] = counts[became] + 1 end
  end
  call('DEL', P .. 'leases:' .. sid)
  call('ZREM', P .. 'sessions', sid)
  call('HSET', P .. 'session:' .. sid, 'state', 'dead')
  call('EXPIRE', P .. 'session:' .. sid, KEEP_S)
end
flush()
return cjson.encode(counts)
