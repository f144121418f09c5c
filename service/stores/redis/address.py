"""REDIS_URL in its three forms, as a client of redis-py. The settings have checked its form before.

The client finds Redis and logs in; what is asked of Redis goes by the lines of `routes`.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias
from urllib.parse import parse_qs, unquote, urlsplit

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import NoBackoff

Client: TypeAlias = Redis | RedisCluster
PORT: Final = 6379
SENTINEL_PORT: Final = 26379
OF_THE_LIMIT: Final = 0.8
MAP_SECONDS: Final = 0.3
"""For a cluster's map, which one node after the other is asked for."""


def make_client(
    url: str,
    *,
    password: str | None = None,
    sentinel_password: str | None = None,
    timeout_seconds: float,
    max_connections: int,
) -> Client:
    """A client of the one server, the Sentinels' master or the cluster; it connects when it is used."""
    parts = urlsplit(url)
    kind, options = parts.scheme.partition("+")[2], _options(parts, password, timeout_seconds)
    options["max_connections"] = max_connections
    database = int(parts.path.lstrip("/") or 0)
    if kind == "cluster":
        nodes = [ClusterNode(host, port) for host, port in _hosts(parts.netloc, PORT)]
        options["socket_timeout"] = max(timeout_seconds, MAP_SECONDS)
        # One try more, after it has learned anew which node has what.
        return RedisCluster(startup_nodes=nodes, retry=Retry(NoBackoff(), 1), **options)
    # None of its own: an answer that came late is counted as one that did not come.
    options["retry"] = Retry(NoBackoff(), 0)
    if kind == "sentinel":
        # They may have a password of their own; the user and the password of Redis are not told to them.
        watchers = {k: v for k, v in options.items() if k not in ("username", "max_connections")}
        watchers["password"] = sentinel_password
        sentinel = Sentinel(  # type: ignore[no-untyped-call]
            _hosts(parts.netloc, SENTINEL_PORT), sentinel_kwargs=watchers
        )
        master: Redis = sentinel.master_for(parse_qs(parts.query)["master"][0], db=database, **options)
        return master
    ((host, port),) = _hosts(parts.netloc, PORT)
    return Redis(host=host, port=port, db=database, **options)


async def close_client(client: Client) -> None:
    """Close its connections, and those that it forgets: to Sentinels, and to nodes that told the map."""
    await client.aclose()
    if isinstance(client, RedisCluster):
        await client.nodes_manager.aclose()
        await client.nodes_manager.aclose("startup_nodes")
    elif isinstance(client.connection_pool, SentinelConnectionPool):
        for sentinel in client.connection_pool.sentinel_manager.sentinels:
            await sentinel.aclose()


def _options(parts: Any, password: str | None, timeout_seconds: float) -> dict[str, Any]:
    # Calls have the link's limit. This is for what redis-py asks itself: Sentinels, one after the other.
    timeout_seconds *= OF_THE_LIMIT
    return {
        "username": unquote(parts.username) if parts.username else None,
        "password": unquote(parts.password) if parts.password else password,
        "ssl": parts.scheme.startswith("rediss"),
        "protocol": 2,  # plain lists, and no greeting before the first call
        "socket_timeout": timeout_seconds,
        "socket_connect_timeout": timeout_seconds,
    }


def _hosts(netloc: str, default_port: int) -> list[tuple[str, int]]:
    """`user:word@a:1,b:2,[::1]:3` as hosts and ports."""
    found = []
    for place in netloc.rpartition("@")[2].split(","):
        host, colon, port = place.rpartition(":")
        if not colon or port.endswith("]"):
            host, port = place, str(default_port)
        found.append((host.strip("[]"), int(port)))
    return found
