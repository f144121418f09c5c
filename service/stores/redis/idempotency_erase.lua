-- Some of a tenant's answers, erased; the caller asks again until none is left.
-- KEYS: the tenant's places by their ends (sorted set), the sum of their sizes (string), the common beginning of the
--   places. ARGV: how many.
-- Returns how many there were, and how many are left.
local erased, popped = 0, redis.call('ZPOPMIN', KEYS[1], ARGV[1])
for place = 1, #popped, 2 do
  local size, name = string.match(popped[place], '^(%d+):(.*)$')
  erased = erased + redis.call('UNLINK', KEYS[3] .. name)
  if redis.call('EXISTS', KEYS[2]) == 1 then
    redis.call('DECRBY', KEYS[2], size)
  end
end
local left = redis.call('ZCARD', KEYS[1])
if left == 0 then
  redis.call('DEL', KEYS[2])
end
return {erased, left}
