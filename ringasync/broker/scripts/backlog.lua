-- Everything scheduling looks at, in one answer: pool, round, meta, stream lengths.
local reply = { pool = {}, round = {}, ledger = {} }
for name, fields in pairs(reply) do
  local flat = call('HGETALL', P .. name)
  for i = 1, #flat, 2 do fields[flat[i]] = int(flat[i + 1]) end
end
reply.tickets = call('XLEN', P .. 'tickets') + call('XLEN', P .. 'tickets:resume')
reply.paused_feeding = call('HGET', P .. 'meta', 'paused_feeding') or ''
return cjson.encode(reply)
