-- role, token, on. Pins the latest version (0 = nothing is published), or clears the pin.
local refused = fenced(ARGV[1], ARGV[2])
if refused then return refused end
free()
if ARGV[3] ~= '1' then
  call('HSET', P .. 'meta', 'pin_version', '')
  return 0
end
local m = call('HMGET', P .. 'meta', 'latest_version', 'pin_version')
if m[2] and m[2] ~= '' then return int(m[2]) end
if int(m[1]) == 0 then return 0 end
call('HSET', P .. 'meta', 'pin_version', m[1])
return int(m[1])
