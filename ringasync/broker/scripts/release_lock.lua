-- role, token. Releasing a lock that is not ours any more changes nothing.
if fenced(ARGV[1], ARGV[2]) then return 0 end
call('DEL', P .. 'lock:' .. ARGV[1])
return 1
