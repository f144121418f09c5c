-- Takes a reservation back, the time that it took up too, because the request was refused elsewhere.
-- KEYS: requests under way, their leases. ARGV: the request's id. Returns 1 if there was one.
local packed = redis.call('HGET', KEYS[1], ARGV[1])
if not packed then
  return 0
end
local _, now = seconds_and_ticks()
for _, hold in ipairs(cmsgpack.unpack(packed)[2]) do
  if hold.due then
    refund(hold, 0, now)
  end
  give_back(hold)
end
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('ZREM', KEYS[2], ARGV[1])
return 1
