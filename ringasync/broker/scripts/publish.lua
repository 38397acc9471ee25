-- role, token, version, learner_step, fork_step, manifest, manifests to keep. Strictly rising.
local refused = fenced(ARGV[1], ARGV[2])
if refused then return refused end
local m = call('HMGET', P .. 'meta', 'latest_version', 'publication_blocked')
local version = int(ARGV[3])
local entry = ARGV[4] .. ':' .. ARGV[5]
if version == int(m[1]) and call('HGET', P .. 'versions', ARGV[3]) == entry
  and call('HGET', P .. 'manifests', ARGV[3]) == ARGV[6] then return 0 end
if m[2] and m[2] ~= '' then return { '!WEIGHT', 'publication is blocked: ' .. m[2] } end
if version <= int(m[1]) then
  return { '!WEIGHT', 'version ' .. ARGV[3] .. ' is not above the latest, ' .. m[1] }
end
free()
call('HSET', P .. 'versions', ARGV[3], entry)
call('HSET', P .. 'manifests', ARGV[3], ARGV[6])
local function trim(name, keep)
  if call('HLEN', P .. name) <= keep then return end
  local numbers = {}
  for _, field in ipairs(call('HKEYS', P .. name)) do numbers[#numbers + 1] = int(field) end
  table.sort(numbers)
  for i = 1, #numbers - keep do call('HDEL', P .. name, str(numbers[i])) end
end
trim('manifests', int(ARGV[7]))
trim('versions', 8192)
call('HSET', P .. 'meta', 'latest_version', ARGV[3], 'learner_step', ARGV[4], 'fork_step', ARGV[5],
  'published_ms', str(now()))
return 1
