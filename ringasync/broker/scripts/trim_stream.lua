-- role, token, stream, first id to keep.
local refused = fenced(ARGV[1], ARGV[2])
if refused then return refused end
return call('XTRIM', P .. ARGV[3], 'MINID', ARGV[4])
