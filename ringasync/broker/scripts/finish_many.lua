-- uses: groups
-- sid, then four an item: rollout, lease token, reason, total length. leased -> finished.
local sid, t, status, moves, seen = ARGV[1], now(), {}, {}, {}
for b = 2, #ARGV, 4 do
  local r, token, verdict = read_rollout(ARGV[b]), ARGV[b + 1], nil
  if not r or not ACCOUNT[r.state] then verdict = 'gone'
  elseif seen[r.id] or repeated(r, token, 'finished') then verdict = 'duplicate'
  elseif r.state ~= 'leased' or r.lease ~= token then verdict = 'fenced'
  elseif r.length ~= int(ARGV[b + 3]) then verdict = 'length ' .. str(r.length)
  else
    verdict = 'ok'
    seen[r.id] = true
    r.finish = ARGV[b + 2]
    moves[#moves + 1] = r
  end
  status[#status + 1] = verdict
end
free()
for _, r in ipairs(moves) do
  call('HSET', P .. 'rollout:' .. r.id, 'state', 'finished', 'finish', r.finish, 'lease', '',
    'last_lease', r.lease, 'last_move', 'finished', 'ticket', enqueue('grading', r.id),
    'finished_ms', str(t))
  call('SREM', P .. 'leases:' .. r.worker, r.id)
  call('HINCRBY', P .. 'group:' .. r.group, 'finished', 1)
  shift(r.kind, 'open', 'finished', r.tokens)
  count_rollout(r.kind, 'leased', 'finished')
  if r.kind == 'train' then add('round', 'finished', r.tokens) end
  history(r.id, t, 'finished',
    { worker = sid, tokens = r.progress, versions = r.versions, why = r.finish })
end
flush()
return status
