-- Some of an owner's conversations, erased; the caller asks again until none is left.
-- KEYS: its conversations (sorted set), the common beginnings of their keys and of their messages', the owners of the
--   tenant's conversations (set). ARGV: how many.
-- Returns how many there were, and how many ids are left.
local erased, popped = 0, redis.call('ZPOPMIN', KEYS[1], ARGV[1])
for place = 1, #popped, 2 do
  erased = erased + redis.call('UNLINK', KEYS[2] .. popped[place])
  redis.call('UNLINK', KEYS[3] .. popped[place])
end
local left = redis.call('ZCARD', KEYS[1])
if left == 0 then
  redis.call('SREM', KEYS[4], string.match(KEYS[1], '[^:]*$'))
end
return {erased, left}
