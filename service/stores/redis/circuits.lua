-- Circuits that were opened, closed ones, and all that are open: names with their ends, in milliseconds.
-- ARGV: how many were opened, each with its milliseconds; then those that were closed; the last: how many may be kept.
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local opened = tonumber(ARGV[1])
for i = 1, opened do
  local name, till = ARGV[2 * i], now + ARGV[2 * i + 1]
  if till > tonumber(redis.call('ZSCORE', KEYS[1], name) or 0) then
    redis.call('ZADD', KEYS[1], till, name)
  end
end
for i = 2 * opened + 2, #ARGV - 1 do
  redis.call('ZREM', KEYS[1], ARGV[i])
end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
redis.call('ZREMRANGEBYRANK', KEYS[1], 0, -ARGV[#ARGV] - 1)
local open = redis.call('ZRANGE', KEYS[1], 0, -1, 'WITHSCORES')
if #open > 0 then
  redis.call('PEXPIRE', KEYS[1], math.ceil(open[#open] - now))
end
for i = 2, #open, 2 do
  open[i] = open[i] - now
end
return open
