-- A request ends with an answer, once, however often this is run with the same token.
-- KEYS: place (hash), the tenant's places by their ends (sorted set), the sum of their sizes (string).
-- ARGV: token, fingerprint, answer, milliseconds to live, the place's name after the beginning that those of the tenant
--   share, the answer's size, bytes that a tenant's answers may have.
-- Returns 1, or 0 if the place is another's by now.
local held = redis.call('HMGET', KEYS[1], 'token', 'answer')
if held[1] and held[1] ~= ARGV[1] then
  return 0
end
if held[2] then
  return 1
end
local name, size, most, live = ARGV[5], tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[4])
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
redis.call('HSET', KEYS[1], 'token', ARGV[1], 'fingerprint', ARGV[2], 'answer', ARGV[3])
redis.call('PEXPIRE', KEYS[1], live)
local total, member = tonumber(redis.call('GET', KEYS[3]) or 0), size .. ':' .. name
-- It is not new where an answer of the same size has ended here and nobody has removed it yet.
total = total + size * redis.call('ZADD', KEYS[2], now + live, member)
-- Those that have ended go, and while there is too much those that end soonest; never this one, and not so many at once
-- that others would wait for it.
local beginning = string.sub(KEYS[1], 1, -#name - 1)
for _ = 1, 1000 do
  local first = redis.call('ZRANGE', KEYS[2], 0, 0, 'WITHSCORES')
  local ended = tonumber(first[2]) <= now
  if not ended and total <= most or first[1] == member then
    break
  end
  local its_size, its_name = string.match(first[1], '^(%d+):(.*)$')
  if not ended then
    redis.call('UNLINK', beginning .. its_name)
  end
  redis.call('ZREM', KEYS[2], first[1])
  total = total - its_size
end
-- Both live as long as the longest-lived place.
live = math.max(live, redis.call('PTTL', KEYS[2]))
redis.call('PEXPIRE', KEYS[2], live)
redis.call('SET', KEYS[3], string.format('%.0f', total), 'PX', live)
return 1
