-- A conversation as it is at one moment. KEYS: conversation, its messages. ARGV: messages wanted, at most.
-- Returns its fields and values, then its messages; nothing if there is none.
local fields = redis.call('HGETALL', KEYS[1])
if #fields == 0 then
  return {}
end
return {fields, redis.call('LRANGE', KEYS[2], -tonumber(ARGV[1]), -1)}
