-- Some of a tenant's cached answers, erased. There is no list of them, so all keys of this server are looked at, so many in
-- one call. KEYS: any key of the tenant. ARGV: where to go on ("0" at first), the pattern of their names, how many.
-- Returns where to go on ("0" when all were looked at), and how many were erased.
local found, erased = redis.call('SCAN', ARGV[1], 'MATCH', ARGV[2], 'COUNT', ARGV[3]), 0
for _, key in ipairs(found[2]) do
  erased = erased + redis.call('UNLINK', key)
end
return {found[1], erased}
