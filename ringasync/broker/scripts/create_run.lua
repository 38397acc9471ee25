-- config_hash, schema, then field value pairs of meta. 1 = new, 0 = exists with the same hash.
local found = call('HMGET', P .. 'meta', 'schema', 'config_hash')
if found[1] then
  if found[1] ~= ARGV[2] then return { '!JOIN', 'schema', found[1], ARGV[2] } end
  if found[2] ~= ARGV[1] then return { '!JOIN', 'configuration', found[2], ARGV[1] } end
  return 0
end
free()
call('HSET', P .. 'meta', 'schema', ARGV[2], 'config_hash', ARGV[1])
for i = 3, #ARGV, 2 do call('HSET', P .. 'meta', ARGV[i], ARGV[i + 1]) end
call('HSET', P .. 'meta', 'created_ms', str(now()))
tick(now())
for _, stream in ipairs({ 'tickets', 'tickets:resume', 'tickets:eval', 'grading' }) do
  redis.pcall('XGROUP', 'CREATE', P .. stream, 'ring', '0', 'MKSTREAM')
end
return 1
