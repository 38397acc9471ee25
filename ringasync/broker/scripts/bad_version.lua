-- sid, version, why. How many distinct workers failed this version; two block publication.
local who = call('HGET', P .. 'session:' .. ARGV[1], 'worker') or ARGV[1]
free()
call('HSET', P .. 'bad:' .. ARGV[2], who, ARGV[3])
call('EXPIRE', P .. 'bad:' .. ARGV[2], 24 * KEEP_S)
local count = call('HLEN', P .. 'bad:' .. ARGV[2])
if count >= 2 then
  local bad, known = call('HGET', P .. 'meta', 'bad_versions') or '', false
  for version in string.gmatch(bad, '%d+') do known = known or version == ARGV[2] end
  if not known then
    bad = bad == '' and ARGV[2] or (bad .. ',' .. ARGV[2])
    call('HSET', P .. 'meta', 'bad_versions', bad, 'publication_blocked',
      string.format('version %s failed on %d workers; the last: %s: %s', ARGV[2], count, who,
        ARGV[3]))
  end
end
return count
