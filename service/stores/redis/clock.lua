-- Before the scripts that count: the server's clock, and the notes of what was set aside.
local BEGINNING = 1767225600 -- 2026-01-01, so that tenths of a microsecond since then are exact in a double

local function seconds_and_ticks()
  local clock = redis.call('TIME')
  return tonumber(clock[1]), (clock[1] - BEGINNING) * 10000000 + clock[2] * 10
end

-- The number of the current day or month (UTC), and the seconds until it ends.
local function period_at(seconds, period)
  local days = math.floor(seconds / 86400)
  if period == 'day' then
    return days, (days + 1) * 86400 - seconds
  end
  local year, month, first = 2026, 1, BEGINNING / 86400
  while true do
    local long = month < 8 and 30 + month % 2 or 31 - month % 2
    if month == 2 then
      long = (year % 4 == 0 and (year % 100 ~= 0 or year % 400 == 0)) and 29 or 28
    end
    if days < first + long then
      return year * 12 + month, (first + long) * 86400 - seconds
    end
    first, month = first + long, month + 1
    if month > 12 then
      year, month = year + 1, 1
    end
  end
end

-- What is set aside until it is settled goes back, but for the time that requests and tokens took up.
local function give_back(hold)
  if hold.kind == 'concurrent' then
    if redis.call('DECR', hold.key) <= 0 then
      redis.call('DEL', hold.key)
    end
  elseif hold.kind == 'budget' and hold.amount > 0 then
    if redis.call('HINCRBY', hold.key, 'held', -hold.amount) <= 0 then
      redis.call('HDEL', hold.key, 'held')
    end
  end
end

-- Of a window, what was taken and not used; only what time has not given back yet, so that nobody gets it twice.
local function refund(hold, used, now)
  if used == hold.amount then
    return
  end
  local due = tonumber(redis.call('GET', hold.key) or 0)
  local unused = math.min(hold.amount - used, math.max(hold.due - now, 0))
  if used > hold.amount then
    due, unused = math.max(due, now), hold.amount - used
  end
  due = due - unused
  if due > now then
    redis.call('SET', hold.key, string.format('%.0f', due), 'PX', math.ceil((due - now) / 10000))
  else
    redis.call('DEL', hold.key)
  end
end

local function add_spent(key, number, seconds, period)
  local current, left = period_at(seconds, period)
  if redis.call('HGET', key, 'period') ~= tostring(current) then
    redis.call('HSET', key, 'period', current, 'spent', 0)
  end
  redis.call('HINCRBY', key, 'spent', number)
  redis.call('PEXPIRE', key, (left + 86400) * 1000)
end
