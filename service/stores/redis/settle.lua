-- A request's end: its record into the ledger and the sums, what it used onto the counters, what it did not use back.
-- Once, however often this is run for the same request.
-- KEYS: requests under way, their leases, ids that were entered of late (set), the ledger (stream), sums of the hour and
--   of the day (hashes), then one for each counter of tokens or dollars.
-- ARGV: the request's id, its short id, its record as JSON ("" for the fleet's counters), records to keep (about),
--   milliseconds in which it may come again, milliseconds to keep an hour's and a day's sums, 1 if its process has gone
--   ("abandoned"), fields that a sum may have before models become _other, how many fields of the sums, for each its name
--   and what to add, then for each counter three: kind, what was used, period.
-- Returns 1 if it was new.
local id, short, record, abandoned = ARGV[1], ARGV[2], ARGV[3], ARGV[8] == '1'
local most, sums = tonumber(ARGV[9]), tonumber(ARGV[10])
local first = 11 -- of the names
local seconds, now = seconds_and_ticks()
local new = redis.call('SISMEMBER', KEYS[3], short) == 0
-- Its process was not gone, only held up or cut off: what it used counts now, and its record takes the other's place.
local late = not new and not abandoned and redis.call('SREM', KEYS[3], '!' .. short) == 1

local function add(key, counted)
  local full = redis.call('HLEN', key) >= most
  for place = first, first - 1 + 2 * sums, 2 do
    local name = ARGV[place]
    if counted or not (string.find(name, '|requests$') or string.find(name, '|errors$')) then
      if full and redis.call('HEXISTS', key, name) == 0 then
        name = string.gsub(name, '^([^|]*)|[^|]*|', '%1|_other|')
      end
      redis.call('HINCRBY', key, name, ARGV[place + 1])
    end
  end
end

if new or late then
  if record ~= '' then
    -- First, so that a record that could not be entered is not known as one that was.
    redis.call('XADD', KEYS[4], 'MAXLEN', '~', ARGV[4], '*', 'record', record)
    add(KEYS[5], new)
    add(KEYS[6], new)
    redis.call('PEXPIRE', KEYS[5], ARGV[6])
    redis.call('PEXPIRE', KEYS[6], ARGV[7])
  end
  redis.call('SADD', KEYS[3], short)
  if abandoned then
    redis.call('SADD', KEYS[3], '!' .. short)
  end
  if redis.call('PTTL', KEYS[3]) < tonumber(ARGV[5]) then -- others of this minute may have to be known for longer
    redis.call('PEXPIRE', KEYS[3], ARGV[5])
  end
end
local holds = {}
local packed = redis.call('HGET', KEYS[1], id)
if packed then
  for _, hold in ipairs(cmsgpack.unpack(packed)[2]) do
    holds[hold.key] = hold
    give_back(hold)
  end
  redis.call('HDEL', KEYS[1], id)
  redis.call('ZREM', KEYS[2], id)
end
for place = 7, #KEYS do
  local key, at = KEYS[place], (place - 7) * 3 + first + 2 * sums
  local used = tonumber(ARGV[at + 1])
  if ARGV[at] == 'budget' then
    if (new or late) and used > 0 then
      add_spent(key, ARGV[at + 1], seconds, ARGV[at + 2])
    end
  elseif holds[key] then
    refund(holds[key], used, now)
  elseif (new or late) and used > 0 then -- nobody could set it aside: Redis was away
    refund({key = key, amount = 0, due = 0}, used, now)
  end
end
return new and 1 or 0
