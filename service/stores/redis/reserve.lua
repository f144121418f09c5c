-- Sets aside what a request asks for, at all counters or at none; run again for the same request it changes nothing.
-- KEYS: requests under way (hash), their leases (sorted set), then one for each counter.
-- ARGV: the request's id, milliseconds of its lease, its record as JSON ("" for the fleet's counters), then for each
--   counter five: kind and
--   requests, tokens: ticks wanted, ticks of a whole window, ticks that it may be ahead, "";
--   concurrent: 1, places, 0, "";
--   budget: billionths expected, billionths there are (0: it only warns), the most to keep from others, period.
-- Returns 0 and a number for each counter: ticks used up, places taken, billionths spent; or, refused, which counter,
--   ticks to wait, and of a budget 1 if it is not spent but set aside, and what is spent.
local id, record = ARGV[1], ARGV[3]
local seconds, now = seconds_and_ticks()
local again = redis.call('HEXISTS', KEYS[1], id) == 1
local found, holds = {0}, {}
for place = 3, #KEYS do
  local key, at = KEYS[place], (place - 3) * 5 + 4
  local kind, want, limit, most, period = ARGV[at], tonumber(ARGV[at + 1]), tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3]), ARGV[at + 4]
  local hold = {kind = kind, key = key, amount = want}
  if kind == 'concurrent' then
    local running = tonumber(redis.call('GET', key) or 0)
    if running >= limit and not again then
      return {place - 2, 0}
    end
    found[#found + 1] = again and running or running + 1
  elseif kind == 'budget' then -- what costs nothing goes through a spent one, too
    local current, left = period_at(seconds, period)
    local known = redis.call('HMGET', key, 'period', 'spent', 'held')
    local spent = known[1] == tostring(current) and tonumber(known[2]) or 0
    if limit > 0 and not again and want + most > 0 and (spent >= limit or spent + tonumber(known[3] or 0) + want > limit) then
      return {place - 2, left * 10000000, (spent < limit and spent + want <= limit) and 1 or 0, spent}
    end
    hold.amount, hold.left = most, left
    found[#found + 1] = spent
  else
    -- Never further ahead: it may be of a clock that was ahead.
    local due = math.min(math.max(tonumber(redis.call('GET', key) or 0), now), now + most)
    if not again then
      local wait = due + want - now - limit
      if wait > 0 then
        return {place - 2, wait}
      end
      due = due + want
    end
    hold.due = due
    found[#found + 1] = due - now
  end
  holds[#holds + 1] = hold
end
if again then
  return found
end
redis.call('HSET', KEYS[1], id, cmsgpack.pack({record, holds}))
redis.call('ZADD', KEYS[2], BEGINNING * 1000 + math.floor(now / 10000) + tonumber(ARGV[2]), id)
for _, hold in ipairs(holds) do
  if hold.kind == 'concurrent' then
    redis.call('INCR', hold.key)
    redis.call('PEXPIRE', hold.key, 86400000)
  elseif hold.kind == 'budget' then
    if hold.amount > 0 then
      redis.call('HINCRBY', hold.key, 'held', hold.amount)
      redis.call('PEXPIRE', hold.key, (hold.left + 86400) * 1000)
    end
  elseif hold.due > now then -- not, where nothing is wanted of what nobody uses
    redis.call('SET', hold.key, string.format('%.0f', hold.due), 'PX', math.ceil((hold.due - now) / 10000))
  end
end
return found
