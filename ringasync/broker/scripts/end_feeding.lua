-- role, token, cursor. Phase finishing, if the cursor is still that; 0: Redis lost its tail.
local refused = fenced(ARGV[1], ARGV[2])
if refused then return refused end
if call('HGET', P .. 'meta', 'cursor') ~= ARGV[3] then return 0 end
free()
call('HSET', P .. 'meta', 'phase', 'finishing')
return 1
