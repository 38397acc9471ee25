-- count. Oldest ready first: id, tokens, versions, domain.
local rows = {}
for _, gid in ipairs(call('ZRANGE', P .. 'ready', 0, int(ARGV[1]) - 1)) do
  local v = call('HMGET', P .. 'group:' .. gid, 'tokens', 'versions', 'domain')
  rows[#rows + 1] = { gid, v[1], v[2], v[3] }
end
return rows
