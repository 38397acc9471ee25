-- uses: groups
-- role, token, request, cursor, count, then 10 per group: id kind domain prompt prompt_ids task
-- source_index size max_new_tokens quarantine_reason; last, the cursor that must stand there.
-- Begins with its growing write: -1 = full. -2: the cursor is another, Redis lost its tail.
local refused = fenced(ARGV[1], ARGV[2])
if refused then return refused end
local before = answered(ARGV[3])
if before then return int(before) end
local count, t, seen = int(ARGV[5]), now(), {}
local after = ARGV[6 + count * 10]
if after and after ~= (call('HGET', P .. 'meta', 'cursor') or '') then return -2 end
for i = 0, count - 1 do
  local gid = ARGV[6 + i * 10]
  if seen[gid] or call('EXISTS', P .. 'group:' .. gid) == 1 then return { '!DUPLICATE', gid } end
  seen[gid] = true
end
local first = redis.pcall('HSET', P .. 'meta', 'cursor', ARGV[4], 'fed_ms', str(t))
if type(first) == 'table' and first.err then
  if string.find(first.err, 'OOM', 1, true) then return -1 end
  return { '!REDIS', first.err }
end
for i = 0, count - 1 do
  local b = 6 + i * 10
  local gid, kind, domain = ARGV[b], ARGV[b + 1], ARGV[b + 2]
  local size, reason = int(ARGV[b + 7]), ARGV[b + 9]
  local key = P .. 'group:' .. gid
  call('HSET', key, 'kind', kind, 'domain', domain, 'source_index', ARGV[b + 6], 'size', size,
    'max_new_tokens', ARGV[b + 8], 'fed_ms', str(t), 'finished', 0, 'graded', 0, 'tokens', 0)
  if reason ~= '' then
    call('HSET', key, 'state', 'quarantined', 'reason', reason, 'ended_ms', str(t), 'members', '')
    call('EXPIRE', key, KEEP_S)
    bury(gid)
    emit(gid, { kind = kind, domain = domain }, 'quarantined', {}, reason, t)
  else
    local ids = {}
    for index = 0, size - 1 do
      ids[#ids + 1] = index
      new_rollout(gid .. '.' .. index, gid, kind)
    end
    call('HSET', key, 'state', 'open', 'prompt', ARGV[b + 3], 'prompt_ids', ARGV[b + 4],
      'task', ARGV[b + 5], 'members', table.concat(ids, ','), 'next_index', size)
    call('SADD', P .. 'live', gid)
    count_group(kind, nil, 'open')
  end
end
flush()
answer(ARGV[3], count)
return count
