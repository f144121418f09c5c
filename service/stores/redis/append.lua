-- A whole turn to the end of a conversation, once, however often this is run with the same turn.
-- KEYS: conversation (hash), its messages (list), its owner's conversations (sorted set), this turn (string), the owners
--   of the tenant's conversations (set).
-- ARGV: id, begin (1 or 0), messages to keep, milliseconds to live, conversations to keep, tokens, cost in US dollars
--   ("" if unknown), system prompt ("" to leave it), then the messages.
-- Returns 1, or 0 if the conversation is not there any more.
local id, begin, keep, live, most = ARGV[1], ARGV[2] == '1', tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
if redis.call('EXISTS', KEYS[4]) == 1 then
  return 1
end
if not begin and redis.call('EXISTS', KEYS[1]) == 0 then
  return 0
end
local clock = redis.call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)
local messages = #ARGV - 8
for place = 9, #ARGV do
  redis.call('RPUSH', KEYS[2], ARGV[place])
end
redis.call('LTRIM', KEYS[2], -keep, -1)
redis.call('HSETNX', KEYS[1], 'created', now)
redis.call('HSET', KEYS[1], 'updated', now)
redis.call('HINCRBY', KEYS[1], 'messages', messages)
redis.call('HINCRBY', KEYS[1], 'tokens', ARGV[6])
if ARGV[7] == '' then
  redis.call('HINCRBY', KEYS[1], 'unpriced', 1)
else
  redis.call('HINCRBYFLOAT', KEYS[1], 'usd', ARGV[7])
end
if ARGV[8] ~= '' then
  redis.call('HSET', KEYS[1], 'system', ARGV[8])
end
redis.call('ZADD', KEYS[3], now, id)
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now - live)
redis.call('PEXPIRE', KEYS[1], live)
redis.call('PEXPIRE', KEYS[2], live)
redis.call('PEXPIRE', KEYS[3], live)
-- The owner's name, percent-encoded, is the end of its key. The set lives as long as the longest-lived conversation.
redis.call('SADD', KEYS[5], string.match(KEYS[3], '[^:]*$'))
if redis.call('PTTL', KEYS[5]) < live then
  redis.call('PEXPIRE', KEYS[5], live)
end
-- So long the same turn may come again.
redis.call('SET', KEYS[4], '1', 'PX', math.min(live, 900000))
-- The longest unused ones go. Their keys are of the same slot: they differ from these in the id alone.
local over = redis.call('ZCARD', KEYS[3]) - most
if over > 0 then
  for _, old in ipairs(redis.call('ZRANGE', KEYS[3], 0, over - 1)) do
    redis.call('DEL', string.sub(KEYS[1], 1, -#id - 1) .. old, string.sub(KEYS[2], 1, -#id - 1) .. old)
    redis.call('ZREM', KEYS[3], old)
  end
end
return 1
