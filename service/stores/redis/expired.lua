-- Requests whose lease has ended: the process that ran them is gone. KEYS: requests under way, leases. ARGV: at most.
-- Returns for each its id and its record as it was when it began.
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local found = {}
for _, id in ipairs(redis.call('ZRANGE', KEYS[2], '-inf', now, 'BYSCORE', 'LIMIT', 0, ARGV[1])) do
  local packed = redis.call('HGET', KEYS[1], id)
  if packed then
    found[#found + 1] = {id, cmsgpack.unpack(packed)[1]}
  else
    redis.call('ZREM', KEYS[2], id)
  end
end
return found
