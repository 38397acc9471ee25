-- uses: groups
-- sid. Leftover leases return at once; nobody's attempts rise.
local sid, t = ARGV[1], now()
free()
local returned = 0
for _, rid in ipairs(call('SMEMBERS', P .. 'leases:' .. sid)) do
  local r = read_rollout(rid)
  if r and r.worker == sid and r.state == 'leased' then
    return_lease(r, t, 'closed', 'session closed')
    returned = returned + 1
  elseif r and r.worker == sid and r.state == 'grading' then
    return_grading(r, t, 'closed', 'session closed', false, 0)
    returned = returned + 1
  end
end
call('DEL', P .. 'leases:' .. sid)
if call('ZREM', P .. 'sessions', sid) == 1 then
  call('HSET', P .. 'session:' .. sid, 'state', 'closed')
end
call('EXPIRE', P .. 'session:' .. sid, KEEP_S)
flush()
return returned
