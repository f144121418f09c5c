-- KEYS: conversation, its messages, its owner's conversations. ARGV: id. Returns 1 if there was one.
redis.call('ZREM', KEYS[3], ARGV[1])
redis.call('DEL', KEYS[2])
return redis.call('DEL', KEYS[1])
