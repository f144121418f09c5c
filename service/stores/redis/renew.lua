-- The leases of requests that still run. KEYS: leases. ARGV: milliseconds of a lease, then the requests' ids.
local clock = redis.call('TIME')
local ends = clock[1] * 1000 + math.floor(clock[2] / 1000) + tonumber(ARGV[1])
for place = 2, #ARGV do
  redis.call('ZADD', KEYS[1], 'XX', ends, ARGV[place])
end
return #ARGV - 1
