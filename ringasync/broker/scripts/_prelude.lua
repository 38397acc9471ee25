-- Prelude of every script. KEYS[1] is the run's prefix "ring:{RUN}:"; every other key is derived
-- from it, so all of them share the hash tag. Payloads are never unpacked here.
local P = KEYS[1]
local call = redis.call
local KEEP_S = 3600 -- how long small hashes of ended things stay readable
local KEEP_GROUPS = 1024 -- and of how many ended groups

-- Rollout state -> ledger account while the rollout is alive.
local ACCOUNT = {
  queued = 'open', leased = 'open', parked = 'open',
  finished = 'finished', grading = 'finished', graded = 'graded',
}
-- Group end -> ledger account that receives its tokens.
local END_ACCOUNT = {
  trained = 'trained', filtered = 'filtered', stale = 'stale', purged = 'purged',
  quarantined = 'quarantined', grade_error = 'grade_error', evaluated = 'eval', lost = 'lost',
}

local function int(text) return tonumber(text or '0') or 0 end
local function str(number) return string.format('%.0f', number) end

-- Milliseconds. Never falls: a clock set back goes on from where it was (offset kept by tick).
local function now()
  if SIMULATED then return int(call('GET', P .. 'sim_now')) end
  local time = call('TIME')
  local clock = call('HMGET', P .. 'clock', 'last', 'offset')
  local ms = time[1] * 1000 + math.floor(time[2] / 1000) + int(clock[2])
  return math.max(ms, int(clock[1]))
end

-- A growing script makes this its first write's guard, a draining one begins with free():
-- Redis checks the memory limit at a script's first write only.
local function free() call('DEL', P .. 'scratch') end

-- Advance the last seen time. After a gap longer than a session's ttl (Redis was down, or its
-- clock jumped forward) that session gets one ttl of grace instead of dying of the gap.
local function tick(t)
  local clock = call('HMGET', P .. 'clock', 'last', 'offset')
  local last, offset = int(clock[1]), int(clock[2])
  if not SIMULATED then
    local time = call('TIME')
    local raw = time[1] * 1000 + math.floor(time[2] / 1000)
    if raw + offset < last - 1000 then call('HSET', P .. 'clock', 'offset', str(last - raw)) end
  end
  local gap = t - last
  if last > 0 and gap > 1000 then
    for _, sid in ipairs(call('ZRANGE', P .. 'sessions', 0, -1)) do
      local ttl = int(call('HGET', P .. 'session:' .. sid, 'ttl_ms'))
      if gap > ttl then call('ZADD', P .. 'sessions', str(t + ttl), sid) end
    end
  end
  if gap > 0 then call('HSET', P .. 'clock', 'last', str(t)) end
end

-- Counter changes are gathered and written once, at the end of a script.
local deltas = {}
local function add(hash, field, amount)
  local fields = deltas[hash]
  if not fields then fields = {}; deltas[hash] = fields end
  fields[field] = (fields[field] or 0) + amount
end
local function flush()
  for hash, fields in pairs(deltas) do
    for field, amount in pairs(fields) do
      if amount ~= 0 then call('HINCRBY', P .. hash, field, str(amount)) end
    end
  end
  deltas = {}
end

-- Move tokens between ledger accounts; `pool` keeps the live ones by kind for the backlog.
local LIVE = { open = true, finished = true, graded = true, taken = true }
local function shift(kind, from, to, tokens)
  if from == to or tokens == 0 then return end
  if from then
    add('ledger', from, -tokens)
    if LIVE[from] then add('pool', 'tokens:' .. kind .. ':' .. from, -tokens) end
  end
  add('ledger', to, tokens)
  if LIVE[to] then add('pool', 'tokens:' .. kind .. ':' .. to, tokens) end
end

local function count_rollout(kind, from, to)
  if from then add('pool', 'rollouts:' .. kind .. ':' .. from, -1) end
  if to then add('pool', 'rollouts:' .. kind .. ':' .. to, 1) end
end
local function count_group(kind, from, to)
  if from then add('pool', 'groups:' .. kind .. ':' .. from, -1) end
  if to then add('pool', 'groups:' .. kind .. ':' .. to, 1) end
end

-- Refuses a role that lost its lock: returns nil when `token` is the role's newest.
local function fenced(role, token)
  local lock = call('HMGET', P .. 'lock:' .. role, 'token', 'owner')
  if lock[1] == token then return nil end
  return { '!FENCED', role, lock[1] or '', lock[2] or '' }
end

-- The reply that the client raises as InvariantError.
local function bug(...)
  local parts = { ... }
  for i = 1, select('#', ...) do parts[i] = tostring(parts[i] or 'nothing') end
  return { '!INVARIANT', table.concat(parts) }
end

-- Answers of request ids, so that a repeat is answered as the first was.
local function answered(request) return call('GET', P .. 'answer:' .. request) end
local function answer(request, text)
  call('SET', P .. 'answer:' .. request, text, 'EX', KEEP_S)
end

local function history(rid, t, event, fields)
  fields.t_ms = t
  fields.event = event
  call('RPUSH', P .. 'hist:' .. rid, cjson.encode(fields))
  call('LTRIM', P .. 'hist:' .. rid, -100, -1)
end

local FIELDS = {
  'state', 'group', 'kind', 'tokens', 'length', 'versions', 'lease', 'worker', 'epoch',
  'leased_tokens', 'retention', 'attempts', 'ticket', 'reward', 'last_lease', 'last_move',
  'grade_attempts', 'finish',
}
local NUMERIC = {
  tokens = true, length = true, epoch = true, leased_tokens = true, retention = true,
  attempts = true, grade_attempts = true,
}
local function read_rollout(rid)
  local values = call('HMGET', P .. 'rollout:' .. rid, unpack(FIELDS))
  if not values[1] then return nil end
  local r = { id = rid }
  for i, name in ipairs(FIELDS) do
    if NUMERIC[name] then r[name] = int(values[i]) else r[name] = values[i] or '' end
  end
  r.progress = r.tokens - r.leased_tokens -- under the present lease
  return r
end

-- Whether the holder of this lease has made this move already: its repeat is a duplicate.
local function repeated(r, token, move) return r.last_lease == token and r.last_move == move end

-- "12-14" -> 12, 14; empty -> 0, 0
local function span(versions)
  local low, high = string.match(versions or '', '^(%d+)-(%d+)$')
  return int(low), int(high)
end

local function enqueue(stream, rid)
  return stream .. ' ' .. call('XADD', P .. stream, '*', 'rollout', rid)
end
local function dequeue(ticket)
  local stream, id = string.match(ticket, '^(%S+) (%S+)$')
  if stream then call('XDEL', P .. stream, id) end
end
