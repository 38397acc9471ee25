-- json, milliseconds to keep. Begins with its growing write: refused when Redis is full.
local done = redis.pcall('XADD', P .. 'metrics', '*', 'json', ARGV[1])
if type(done) == 'table' and done.err then return { '!REDIS', done.err } end
local time = call('TIME')
call('XTRIM', P .. 'metrics', 'MINID', '~', str(time[1] * 1000 - int(ARGV[2])))
return 1
