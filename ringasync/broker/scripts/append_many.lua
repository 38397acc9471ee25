-- Seven arguments an item: rollout, lease token, start, length, policy tokens, version, payload.
-- Validates all, then writes; begins with a growing write, so that a full Redis changes nothing.
local seen, pushes, status = {}, {}, {}
for b = 1, #ARGV, 7 do
  local rid, token, start, length = ARGV[b], ARGV[b + 1], int(ARGV[b + 2]), int(ARGV[b + 3])
  local tokens, version = int(ARGV[b + 4]), int(ARGV[b + 5])
  local r = seen[rid]
  if not r then
    local v = call('HMGET', P .. 'rollout:' .. rid, 'state', 'lease', 'length', 'tokens',
      'versions', 'progress', 'kind')
    local low, high = span(v[5])
    r = { state = v[1], lease = v[2], length = int(v[3]), tokens = int(v[4]), low = low,
      high = high, progress = int(v[6]), kind = v[7], old = v[5] }
    seen[rid] = r
  end
  local verdict
  if not r.state or not ACCOUNT[r.state] then verdict = 'gone'
  elseif r.state ~= 'leased' or r.lease ~= token then verdict = 'fenced'
  elseif start + length <= r.length then verdict = 'duplicate'
  elseif start ~= r.length or (tokens > 0 and version < r.high) then verdict = 'gap'
  else
    verdict = 'ok'
    r.length, r.tokens, r.progress = r.length + length, r.tokens + tokens, r.progress + tokens
    if tokens > 0 then
      if r.low == 0 then r.low = version end
      r.high = version
    end
    r.new = (r.new or 0) + tokens
    pushes[#pushes + 1] = { rid, ARGV[b + 6], #status + 1 }
  end
  status[#status + 1] = verdict
end
for i, push in ipairs(pushes) do
  local done = redis.pcall('RPUSH', P .. 'seg:' .. push[1], push[2])
  if type(done) == 'table' and done.err then
    if i > 1 or not string.find(done.err, 'OOM', 1, true) then return { '!REDIS', done.err } end
    for _, other in ipairs(pushes) do status[other[3]] = 'full' end
    return status
  end
end
for rid, r in pairs(seen) do
  if r.new then
    local key, versions = P .. 'rollout:' .. rid, r.low .. '-' .. r.high
    call('HSET', key, 'tokens', str(r.tokens), 'length', str(r.length), 'progress', str(r.progress))
    if versions ~= r.old and r.high > 0 then call('HSET', key, 'versions', versions) end
    add('ledger', 'accepted', r.new)
    add('ledger', 'open', r.new)
    add('pool', 'tokens:' .. r.kind .. ':open', r.new)
    if r.kind == 'train' then add('round', 'generated', r.new) end
  end
end
flush()
return status
