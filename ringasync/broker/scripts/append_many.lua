-- ARGV[1] is a msgpack array, seven an item: rollout, lease token, start, stop, length, policy
-- tokens, version. One payload an item follows.
-- Validates all, then writes; begins with a growing write, so that a full Redis changes nothing.
-- Answers the statuses in order, or nothing at all when every one is 'ok'.
-- The hot path, so it saves Lua work: start and stop are text as the hash keeps it (compared and
-- stored without turning it into numbers and back), the reply of HMGET is the record, `versions` is
-- parsed once a spelling and written only when it changes.
local STATE, LEASE, LENGTH, TOKENS, VERSIONS, KIND, KEY, CHANGED = 1, 2, 3, 4, 5, 6, 7, 8
local argv, items, pcall = ARGV, cmsgpack.unpack(ARGV[1]), redis.pcall
local seen, spans, status, records, sums = {}, {}, {}, {}, {}
local all_ok = true

local function refusal(r, token, stop)
  if not ACCOUNT[r[STATE]] then return 'gone' end
  if r[STATE] ~= 'leased' or r[LEASE] ~= token then return 'fenced' end
  return int(stop) <= int(r[LENGTH]) and 'duplicate' or 'gap'
end

local b = 0
for i = 1, #argv - 1 do
  local rid, token, start, stop = items[b + 1], items[b + 2], items[b + 3], items[b + 4]
  local length, tokens, version = items[b + 5], items[b + 6], items[b + 7]
  b = b + 7
  local r = seen[rid]
  if not r then
    local key = P .. 'rollout:' .. rid
    r = call('HMGET', key, 'state', 'lease', 'length', 'tokens', 'versions', 'kind')
    r[KEY] = key
    seen[rid] = r
  end
  local verdict = 'ok'
  if r[LENGTH] ~= start or r[LEASE] ~= token or r[STATE] ~= 'leased' or length <= 0 then
    verdict = refusal(r, token, stop)
  elseif tokens > 0 then
    local versions = r[VERSIONS]
    local known = spans[versions]
    if not known then
      known = { span(versions) }
      spans[versions] = known
    end
    local low, high = known[1], known[2]
    if version < high then
      verdict = 'gap'
    else
      if version > high then
        r[VERSIONS] = (low > 0 and low or version) .. '-' .. version
        r[CHANGED] = true
      end
      -- As many policy tokens as tokens so far, and here too: then they end at the same place.
      if tokens == length and r[TOKENS] == start then r[TOKENS] = stop
      else r[TOKENS] = str(int(r[TOKENS]) + tokens) end
      local kind = r[KIND]
      sums[kind] = (sums[kind] or 0) + tokens
    end
  end
  status[i] = verdict
  if verdict == 'ok' then
    r[LENGTH] = stop
    records[i] = r
  else
    all_ok = false
  end
end

local first = true
b = 0
for i = 1, #status do
  local r = records[i]
  if r then
    local done = pcall('RPUSH', P .. 'seg:' .. items[b + 1], argv[i + 1])
    if type(done) ~= 'number' then
      if not first or not string.find(done.err, 'OOM', 1, true) then
        return { '!REDIS', done.err }
      end
      for other in pairs(records) do status[other] = 'full' end
      return status
    end
    first = false
    if r[KEY] then -- the record as it is after its last item
      if r[CHANGED] then
        call('HSET', r[KEY], 'length', r[LENGTH], 'tokens', r[TOKENS], 'versions', r[VERSIONS])
      else
        call('HSET', r[KEY], 'length', r[LENGTH], 'tokens', r[TOKENS])
      end
      r[KEY] = false
    end
  end
  b = b + 7
end
for kind, new in pairs(sums) do
  add('ledger', 'accepted', new)
  shift(kind, nil, 'open', new)
  if kind == 'train' then add('round', 'generated', new) end
end
flush()
return all_ok and {} or status
