-- sid, n, nonce. finished -> grading; a repeat with the same nonce gives the same jobs.
local sid, want, nonce, t = ARGV[1], int(ARGV[2]), ARGV[3], now()
if not call('ZSCORE', P .. 'sessions', sid) then return { '!NOSESSION', sid } end
local jobs = {}
local function give(r, token)
  local g = call('HMGET', P .. 'group:' .. r.group, 'domain', 'prompt', 'task')
  jobs[#jobs + 1] = { r.id, r.group, token, r.kind, g[1] or '', g[2] or '', g[3] or '{}',
    call('LRANGE', P .. 'seg:' .. r.id, 0, -1), r.finish, r.grade_attempts }
end
if call('HGET', P .. 'session:' .. sid, 'grade_nonce') == nonce then
  for _, rid in ipairs(call('SMEMBERS', P .. 'leases:' .. sid)) do
    local r = read_rollout(rid)
    if r and r.state == 'grading' and string.sub(r.lease, -#nonce) == nonce then
      give(r, r.lease)
    end
  end
  return jobs
end
local incarnation = call('HGET', P .. 'meta', 'incarnation') or '1'
free()
local left = call('XLEN', P .. 'grading')
while #jobs < want and left > 0 do
  local got = call('XREADGROUP', 'GROUP', 'ring', 'ring', 'COUNT', math.min(want - #jobs, left),
    'NOACK', 'STREAMS', P .. 'grading', '>')
  if not got then break end
  for _, entry in ipairs(got[1][2]) do
    left = left - 1
    local id, rid = entry[1], entry[2][2]
    call('XDEL', P .. 'grading', id)
    local r = read_rollout(rid)
    if r and r.state == 'finished' and r.ticket == 'grading ' .. id then
      local token = incarnation .. '.' .. (r.epoch + 1) .. '.' .. nonce
      call('HSET', P .. 'rollout:' .. rid, 'state', 'grading', 'lease', token, 'worker', sid,
        'epoch', r.epoch + 1)
      call('HDEL', P .. 'rollout:' .. rid, 'ticket')
      call('SADD', P .. 'leases:' .. sid, rid)
      count_rollout(r.kind, 'finished', 'grading')
      give(r, token)
    end
  end
end
call('HSET', P .. 'session:' .. sid, 'grade_nonce', nonce)
flush()
return jobs
