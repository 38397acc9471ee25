-- uses: groups
-- sid, then three an item: rollout, lease token, why. leased -> parked (or queued without tokens).
-- A `why` that begins with "error" counts as a lease lost: without progress attempts rise.
local sid, t, status, moves, seen = ARGV[1], now(), {}, {}, {}
for b = 2, #ARGV, 3 do
  local r, token, verdict = read_rollout(ARGV[b]), ARGV[b + 1], nil
  if not r or not ACCOUNT[r.state] then verdict = 'gone'
  elseif seen[r.id] or repeated(r, token, 'parked') then verdict = 'duplicate'
  elseif r.state ~= 'leased' or r.lease ~= token then verdict = 'fenced'
  else
    verdict = 'ok'
    seen[r.id] = true
    moves[#moves + 1] = { r, ARGV[b + 2] }
  end
  status[#status + 1] = verdict
end
free()
local limit = int(call('HGET', P .. 'meta', 'max_attempts'))
for _, move in ipairs(moves) do
  local r = read_rollout(move[1].id) -- a sibling's quarantine above may have ended it
  if r.state == 'leased' then
    if string.sub(move[2], 1, 5) == 'error' then lose_lease(r, t, 'parked', move[2], limit)
    else return_lease(r, t, 'parked', move[2]) end
  end
end
flush()
return status
