-- uses: groups
-- role, token, batch, number of stale groups, then stale ids, then ids to reserve. Stale ones end;
-- groups not ready any more are left out. A batch that exists is answered as it stands.
local refused = fenced(ARGV[1], ARGV[2])
if refused then return refused end
local batch, stale_count, t = ARGV[3], int(ARGV[4]), now()
local key = P .. 'batch:' .. batch
local found = call('HMGET', key, 'state', 'groups', 'stale')
if not found[1] then
  free()
  local stale, ids = {}, {}
  for i = 5, #ARGV do
    local gid = ARGV[i]
    local g = read_group(gid)
    if g and g.state == 'ready' then
      if i < 5 + stale_count then
        end_group(g, 'stale', 'older than max_staleness at reservation of ' .. batch, t)
        stale[#stale + 1] = gid
      else
        call('HSET', P .. 'group:' .. gid, 'state', 'reserved', 'batch', batch)
        call('ZREM', P .. 'ready', gid)
        count_group('train', 'ready', 'reserved')
        add('pool', 'ready_tokens', -g.tokens)
        add('pool', 'reserved_tokens', g.tokens)
        ids[#ids + 1] = gid
      end
    end
  end
  found = { 'reserved', table.concat(ids, ','), table.concat(stale, ',') }
  call('HSET', key, 'state', 'reserved', 'groups', found[2], 'stale', found[3],
    'reserved_ms', str(t))
  call('ZADD', P .. 'batches', str(t), batch)
  flush()
end
if found[1] ~= 'reserved' then
  return bug('reserve: batch ', batch, ' is ', found[1], ' already')
end
local rows = {}
for gid in string.gmatch(found[2], '[^,]+') do
  local v = call('HMGET', P .. 'group:' .. gid, 'domain', 'prompt_ids', 'source_index')
  local row = { gid, v[1] or '', v[2] or '[]', v[3] or '0' }
  for _, rid in ipairs(members(gid)) do
    local r = read_rollout(rid)
    row[#row + 1] = { rid, r.reward, r.finish, str(r.retention), call('LLEN', P .. 'seg:' .. rid) }
  end
  rows[#rows + 1] = row
end
return { rows, found[3] }
