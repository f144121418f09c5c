-- The latest conversations of an owner, without their messages: hundreds of them would hold up everybody else.
-- KEYS: its conversations, and the common beginning of their keys. ARGV: how many, milliseconds to live.
-- Returns for each its id, its fields and values; the newest first.
local clock = redis.call('TIME')
local oldest = clock[1] * 1000 + math.floor(clock[2] / 1000) - tonumber(ARGV[2])
local ids = redis.call('ZRANGE', KEYS[1], '+inf', '(' .. oldest, 'BYSCORE', 'REV', 'LIMIT', 0, ARGV[1])
local found = {}
for _, id in ipairs(ids) do
  local fields = redis.call('HGETALL', KEYS[2] .. id)
  if #fields > 0 then
    found[#found + 1] = {id, fields}
  end
end
return found
