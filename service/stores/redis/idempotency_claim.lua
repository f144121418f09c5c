-- One request takes a place, or takes it again with the same token, for the time of a lease.
-- KEYS: place (hash). ARGV: token, fingerprint, milliseconds of a lease.
-- Returns 1: taken; 2: an equal request runs; 3: the place is another request's; or the answer that is kept.
local held = redis.call('HMGET', KEYS[1], 'token', 'fingerprint', 'answer')
if held[2] and held[2] ~= ARGV[2] then
  return 3
end
if held[3] then
  return held[3]
end
if held[1] and held[1] ~= ARGV[1] then
  return 2
end
redis.call('HSET', KEYS[1], 'token', ARGV[1], 'fingerprint', ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
