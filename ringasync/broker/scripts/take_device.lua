-- role, token, grace_ms. The learner asks for the device, or looks whether it has it: the turn is
-- odd while it is the learner's. Returns the turn, then of every worker that has not said that it
-- sleeps in this turn: name, what it is doing, age of its heartbeat. None: the device is free.
local refused = fenced(ARGV[1], ARGV[2])
if refused then return refused end
local t = now()
local m = call('HMGET', P .. 'meta', 'device_turn', 'incarnation', 'incarnation_ms')
local before = int(m[1])
local turn, sessions = before, {}
for _, sid in ipairs(call('ZRANGE', P .. 'sessions', 0, -1)) do
  local s = call('HMGET', P .. 'session:' .. sid, 'role', 'asleep_turn', 'worker', 'doing', 'beat_ms',
    'device_turn')
  if s[1] == 'worker' then
    sessions[#sessions + 1] = s
    turn = math.max(turn, int(s[6])) -- a Redis that lost its tail may know an older turn only
  end
end
if turn % 2 == 0 then turn = turn + 1 end
if turn ~= before then
  free()
  call('HSET', P .. 'meta', 'device_turn', str(turn), 'device_ms', str(t))
end
local reply = { turn }
local function owes(name, doing, age_ms)
  reply[#reply + 1] = name
  reply[#reply + 1] = doing
  reply[#reply + 1] = str(age_ms)
end
for _, s in ipairs(sessions) do
  if int(s[2]) ~= turn then owes(s[3] or '?', s[4] or 'joining', math.max(0, t - int(s[5]))) end
end
-- A new incarnation ended all sessions: give their workers the time to open new ones.
local since = t - int(m[3])
if int(m[2]) > 1 and since < int(ARGV[3]) then
  owes('workers of before', 'opening sessions of incarnation ' .. m[2], since)
end
return reply
