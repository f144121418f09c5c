-- Several conversations, whole; one call reads until it has so many bytes of them, so that it holds nobody up for long.
-- KEYS: for each the conversation and its messages. ARGV: messages wanted of each, at most; bytes.
-- Returns for each that was read its fields and values, then its messages; nothing for one that is not there any more.
local found, read = {}, 0
for place = 1, #KEYS, 2 do
  if read >= tonumber(ARGV[2]) then
    break
  end
  local fields, messages = redis.call('HGETALL', KEYS[place]), {}
  if #fields > 0 then
    messages = redis.call('LRANGE', KEYS[place + 1], -tonumber(ARGV[1]), -1)
    for _, message in ipairs(messages) do
      read = read + #message
    end
    found[#found + 1] = {fields, messages}
  else
    found[#found + 1] = {}
  end
end
return found
