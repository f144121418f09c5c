-- A request ends without an answer. KEYS: place (hash). ARGV: token. Returns 1 if it had the place.
local held = redis.call('HMGET', KEYS[1], 'token', 'answer')
if held[1] ~= ARGV[1] or held[2] then
  return 0
end
return redis.call('UNLINK', KEYS[1])
