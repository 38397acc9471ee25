-- uses: groups
-- role, token, batch. reserved -> ready, in the old order; the batch is forgotten.
local refused = fenced(ARGV[1], ARGV[2])
if refused then return refused end
local key = P .. 'batch:' .. ARGV[3]
local found = call('HMGET', key, 'state', 'groups')
if not found[1] then return 0 end
if found[1] ~= 'reserved' then
  return bug('release: batch ', ARGV[3], ' is ', found[1], ' already')
end
call('DEL', key)
call('ZREM', P .. 'batches', ARGV[3])
for gid in string.gmatch(found[2], '[^,]+') do
  local g = read_group(gid)
  if g and g.state == 'reserved' then
    local order = call('HGET', P .. 'group:' .. gid, 'ready_order')
    call('HSET', P .. 'group:' .. gid, 'state', 'ready', 'batch', '')
    call('ZADD', P .. 'ready', order, gid)
    count_group('train', 'reserved', 'ready')
    add('pool', 'ready_tokens', g.tokens)
    add('pool', 'reserved_tokens', -g.tokens)
  end
end
flush()
return 1
