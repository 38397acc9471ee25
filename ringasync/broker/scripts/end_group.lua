-- uses: groups
-- role, token, group, state, reason. 1 = ended now, 0 = had ended before.
local refused = fenced(ARGV[1], ARGV[2])
if refused then return refused end
local g = read_group(ARGV[3])
if not g then return bug('end_group: no group ', ARGV[3]) end
if END_ACCOUNT[g.state] then return 0 end
if g.state == 'taken' then return bug('end_group: ', ARGV[3], ' is taken by the learner') end
free()
end_group(g, ARGV[4], ARGV[5], now())
flush()
return 1
