"""The ledger's streams in Redis, read only.

Its errors become Away, and ConfigurationError where Redis refuses the password.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

from redis.exceptions import (
    AuthenticationError,
    NoPermissionError,
    RedisClusterException,
    RedisError,
    ResponseError,
)

from service.errors import ConfigurationError
from service.stores.redis.address import Client, close_client, make_client
from service.stores.redis.keys import Keys
from service.worker.ports import Away, Entry, NotAStream, Reading

TIMEOUT_SECONDS: Final = 5.0
"""Nobody waits for the worker: rather a late answer than none."""

# One script, so that what it says of the stream is of the moment in which it read the entries.
# KEYS: a stream. ARGV: the id after which to read, how many. Returns the time in milliseconds; and where the
# stream is there: its length, how many were ever added, the last id, the first id, and the entries.
_READ: Final = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if redis.call('EXISTS', KEYS[1]) == 0 then return {now} end
local list, info = redis.call('XINFO', 'STREAM', KEYS[1]), {}
for i = 1, #list, 2 do info[list[i]] = list[i + 1] end
local first = info['first-entry'] and info['first-entry'][1] or ''
local entries = redis.call('XRANGE', KEYS[1], '(' .. ARGV[1], '+', 'COUNT', ARGV[2])
return {now, info['length'], info['entries-added'], info['last-generated-id'], first, entries}
"""


class _Found(NamedTuple):
    now_ms: int
    length: int = 0
    added: int = 0
    last_id: bytes = b""
    first_id: bytes = b""
    entries: Any = ()


class Streams:
    """All tenants' ledgers below one prefix. It connects when it is used, and anew after `close`."""

    def __init__(self, url: str, *, password: str | None, sentinel_password: str | None, prefix: str) -> None:
        self._url = url
        self._password = password
        self._sentinel_password = sentinel_password
        self._keys = Keys(prefix)
        self._client: Client | None = None

    def name(self, tenant: str) -> str:
        return self._keys.ledger(tenant)

    async def tenants(self) -> list[str]:
        with _translated():
            found: Any = await self._connected().smembers(self._keys.tenants())
        return sorted(name.decode(errors="replace") for name in found)

    async def read(self, stream: str, after: str, count: int) -> Reading | None:
        """Up to `count` entries after an id. None where there is no such stream."""
        with _translated():
            answer: Any = await self._connected().eval(_READ, 1, stream, after, str(count))
        found = _Found(*answer)
        if not found.last_id:
            return None
        return Reading(
            now_ms=found.now_ms,
            length=found.length,
            added=found.added,
            first_id=found.first_id.decode(),
            last_id=found.last_id.decode(),
            entries=[Entry(name.decode(), _field(fields)) for name, fields in found.entries],
        )

    async def close(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            try:
                await close_client(client)
            except (OSError, RedisError, RedisClusterException):
                return  # what cannot be closed is closed

    def _connected(self) -> Client:
        if self._client is None:
            self._client = make_client(
                self._url,
                password=self._password,
                sentinel_password=self._sentinel_password,
                timeout_seconds=TIMEOUT_SECONDS,
                max_connections=4,
            )
        return self._client


def _field(fields: list[bytes]) -> bytes | None:
    """The value of `record` in a list of names and values."""
    for name, value in zip(fields[::2], fields[1::2], strict=True):
        if name == b"record":
            return value
    return None


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (AuthenticationError, NoPermissionError) as error:
        raise ConfigurationError(
            f"REDIS_URL, REDIS_PASSWORD: Redis does not let the worker in ({type(error).__name__})"
        ) from None
    except ResponseError as error:
        if "WRONGTYPE" in str(error):
            raise NotAStream from None
        raise Away("redis", str(error).partition(" ")[0][:40]) from None
    except (RedisError, RedisClusterException, OSError, TimeoutError) as error:
        raise Away("redis", type(error).__name__) from None
