-- sid, n, loaded_version, nonce. Reads tickets, marks the rollouts leased, deletes the entries.
-- A repeat with the same nonce gives the leases of the first call again.
local sid, want, loaded, nonce, t = ARGV[1], int(ARGV[2]), int(ARGV[3]), ARGV[4], now()
if not call('ZSCORE', P .. 'sessions', sid) then return { '!NOSESSION', sid } end
local m = call('HMGET', P .. 'meta', 'incarnation', 'paused', 'phase', 'pin_version', 'mode',
  'round_state')
local leases = {}
local function give(rid, token, r)
  local g = call('HMGET', P .. 'group:' .. r.group, 'prompt_ids', 'max_new_tokens')
  leases[#leases + 1] = { rid, r.group, token, r.kind, g[1] or '[]', g[2] or '0',
    call('LRANGE', P .. 'seg:' .. rid, 0, -1), r.length, r.retention, r.attempts, m[4] or '' }
end
if call('HGET', P .. 'session:' .. sid, 'take_nonce') == nonce then
  for _, rid in ipairs(call('SMEMBERS', P .. 'leases:' .. sid)) do
    local r = read_rollout(rid)
    if r and r.state == 'leased' and string.sub(r.lease, -#nonce) == nonce then
      give(rid, r.lease, r)
    end
  end
  return leases
end
if m[2] == '1' or m[3] == 'done' then return leases end
local streams = {}
if m[4] and m[4] ~= '' and int(m[4]) == loaded then streams[1] = 'tickets:eval' end
if m[5] ~= 'rounds' or m[6] == 'open' then
  streams[#streams + 1] = 'tickets:resume' -- resumed first: waiting makes their tokens staler
  streams[#streams + 1] = 'tickets'
end
free()
local function lease(rid, r)
  local key = P .. 'rollout:' .. rid
  local token = (m[1] or '1') .. '.' .. (r.epoch + 1) .. '.' .. nonce
  call('HSET', key, 'state', 'leased', 'lease', token, 'worker', sid, 'epoch', r.epoch + 1,
    'leased_tokens', str(r.tokens), 'leased_ms', str(t))
  call('HDEL', key, 'ticket')
  call('SADD', P .. 'leases:' .. sid, rid)
  count_rollout(r.kind, r.state, 'leased')
  history(rid, t, 'leased', { worker = sid, version = loaded, tokens = r.tokens })
  give(rid, token, r)
end
for _, stream in ipairs(streams) do
  local left = call('XLEN', P .. stream)
  while #leases < want and left > 0 do
    local count = math.min(want - #leases, left)
    local got = call('XREADGROUP', 'GROUP', 'ring', 'ring', 'COUNT', count, 'NOACK',
      'STREAMS', P .. stream, '>')
    if not got then break end
    for _, entry in ipairs(got[1][2]) do
      left = left - 1
      local id, rid = entry[1], entry[2][2]
      call('XDEL', P .. stream, id)
      local r = read_rollout(rid)
      if r and (r.state == 'queued' or r.state == 'parked') and r.ticket == stream .. ' ' .. id then
        local _, high = span(r.versions)
        if high > loaded then -- versions never fall inside a rollout: leave it to newer workers
          call('HSET', P .. 'rollout:' .. rid, 'ticket', enqueue(stream, rid))
        else
          lease(rid, r)
        end
      end
    end
  end
end
call('HSET', P .. 'session:' .. sid, 'take_nonce', nonce)
flush()
return leases
