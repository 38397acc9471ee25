-- Seven arguments an item: rollout, lease token, start, length, policy tokens, version, payload.
-- Validates all, then writes; begins with a growing write, so that a full Redis changes nothing.
-- The hot path: sums are gathered by kind, `versions` is parsed and written only when it changes.
local seen, pushes, status, spans, sums = {}, {}, {}, {}, {}
for b = 1, #ARGV, 7 do
  local rid, token, start, length = ARGV[b], ARGV[b + 1], int(ARGV[b + 2]), int(ARGV[b + 3])
  local tokens, version = int(ARGV[b + 4]), int(ARGV[b + 5])
  local r = seen[rid]
  if not r then
    local v = call('HMGET', P .. 'rollout:' .. rid, 'state', 'lease', 'length', 'tokens',
      'versions', 'progress', 'kind')
    local known = spans[v[5]]
    if not known then
      known = { span(v[5]) }
      spans[v[5]] = known
    end
    r = { state = v[1], lease = v[2], length = int(v[3]), tokens = int(v[4]), low = known[1],
      high = known[2], progress = int(v[6]), kind = v[7] }
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
    if tokens > 0 and version ~= r.high then
      if r.low == 0 then r.low = version end
      r.high, r.changed = version, true
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
    local key = P .. 'rollout:' .. rid
    call('HSET', key, 'tokens', r.tokens, 'length', r.length, 'progress', r.progress)
    if r.changed then call('HSET', key, 'versions', r.low .. '-' .. r.high) end
    sums[r.kind] = (sums[r.kind] or 0) + r.new
  end
end
for kind, new in pairs(sums) do
  add('ledger', 'accepted', new)
  shift(kind, nil, 'open', new)
  if kind == 'train' then add('round', 'generated', new) end
end
flush()
return status
