-- role ('' = anybody), token, then field value pairs of meta.
if ARGV[1] ~= '' then
  local refused = fenced(ARGV[1], ARGV[2])
  if refused then return refused end
end
if call('EXISTS', P .. 'meta') == 0 then return { '!NORUN' } end
free()
for i = 3, #ARGV, 2 do call('HSET', P .. 'meta', ARGV[i], ARGV[i + 1]) end
return 1
