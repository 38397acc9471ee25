-- uses: groups
-- role, token, reason, server run id, accepted_seen. Voids every lease and session and rebuilds
-- the work streams from the hashes, which are the truth. Returns the new number.
-- Tokens that were seen accepted before and are gone now are booked as accepted and lost.
local refused = fenced(ARGV[1], ARGV[2])
if refused then return refused end
local t, meta = now(), P .. 'meta'
free()
tick(t)
-- The tail may have held incarnations of its own: milliseconds of the run are above them all.
local last = call('HMGET', meta, 'incarnation', 'created_ms')
local number = math.max(int(last[1]) + 1, t - int(last[2]))
call('HSET', meta, 'incarnation', str(number), 'server_run_id', ARGV[4],
  'incarnation_reason', ARGV[3], 'incarnation_ms', str(t))
-- The next holder of a role gets a token above every one that the lost tail may have given out.
for _, role in ipairs({ 'coordinator', 'learner' }) do
  local fence = int(call('HGET', meta, 'fence_' .. role))
  call('HSET', meta, 'fence_' .. role, str(math.max(fence, t)))
end
for _, sid in ipairs(call('ZRANGE', P .. 'sessions', 0, -1)) do
  call('HSET', P .. 'session:' .. sid, 'state', 'ended by incarnation ' .. str(number))
  call('EXPIRE', P .. 'session:' .. sid, KEEP_S)
end
for _, stream in ipairs({ 'tickets', 'tickets:resume', 'tickets:eval', 'grading' }) do
  call('DEL', P .. stream)
  call('XGROUP', 'CREATE', P .. stream, 'ring', '0', 'MKSTREAM')
end
for _, gid in ipairs(call('SMEMBERS', P .. 'live')) do
  for _, rid in ipairs(members(gid)) do
    local r = read_rollout(rid)
    if r and r.state == 'leased' then
      return_lease(r, t, 'incarnation', ARGV[3])
    elseif r and r.state == 'grading' then
      return_grading(r, t, 'incarnation', ARGV[3], false, 0)
    elseif r and (r.state == 'queued' or r.state == 'parked' or r.state == 'finished') then
      local stream = r.state == 'parked' and 'tickets:resume' or 'tickets'
      if r.kind == 'eval' then stream = 'tickets:eval' end
      if r.state == 'finished' then stream = 'grading' end
      call('HSET', P .. 'rollout:' .. rid, 'ticket', enqueue(stream, rid))
    end
  end
end
for _, sid in ipairs(call('ZRANGE', P .. 'sessions', 0, -1)) do
  call('DEL', P .. 'leases:' .. sid)
end
call('DEL', P .. 'sessions')
local accepted = int(call('HGET', P .. 'ledger', 'accepted'))
local gone = int(ARGV[5]) - accepted
if gone > 0 then
  add('ledger', 'accepted', gone)
  add('ledger', 'lost', gone)
end
flush()
return number
