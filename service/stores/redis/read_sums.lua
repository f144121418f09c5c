-- The sums of several hours or days. One call reads whole hashes until it has `fields` of them, so that no call holds up
-- the others for long. KEYS: hashes. ARGV: fields.
-- Returns the names and numbers of each hash that was read, from the first on: the caller asks again for the rest.
local found, read = {}, 0
for place, key in ipairs(KEYS) do
  if read >= tonumber(ARGV[1]) then
    break
  end
  found[place] = redis.call('HGETALL', key)
  read = read + #found[place] / 2
end
return found
