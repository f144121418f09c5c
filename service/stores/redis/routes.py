"""Which connection a call goes by: that to the one server or primary, or to the node that has its key."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from math import inf
from typing import Any, Final

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AskError, MovedError, RedisClusterException, RedisError, TryAgainError
from redis.exceptions import ConnectionError as RedisConnectionError

from service.stores.redis.address import Client, close_client
from service.stores.redis.line import Line

REDIRECTIONS: Final = 4
"""So often a cluster may send a call elsewhere; more is a cluster that cannot serve it."""
TRY_AGAIN_SECONDS: Final = 0.02
LEARN_SECONDS: Final = 1.0
"""A cluster's map is not asked for more often."""
_NO_RETRY: Final = Retry(NoBackoff(), 0)
_ASKING: Final = b"*1\r\n$6\r\nASKING\r\n"
_OURS: Final = {"socket_timeout": None, "socket_connect_timeout": None}
"""A line has its own time limit, which counts no pause of this process."""


class Server:
    """One Redis: one line at a time, but for those that wait for late answers."""

    def __init__(
        self, connection: Callable[[], AbstractConnection], timeout_seconds: float, max_connections: int
    ) -> None:
        self._connection = connection
        self._timeout = timeout_seconds
        self._most = max_connections
        self._lines: list[Line] = []

    @property
    def line(self) -> Line:
        """The newest, or a new one where it takes no more calls."""
        if not (self._lines and self._lines[-1].usable):
            self._lines = [line for line in self._lines if not line.closed]
            while len(self._lines) >= self._most:
                self._lines.pop(0).end()
            self._lines.append(Line(self._connection(), self._timeout))
        return self._lines[-1]

    def renew(self) -> None:
        """The next call takes a new connection: one to a node that vanished was not told of its end."""
        for line in self._lines:
            line.retire()

    async def aclose(self) -> None:
        await asyncio.gather(*(line.aclose() for line in self._lines))


class Route(ABC):
    """The way of each call to a line."""

    @abstractmethod
    def line(self, key: str) -> Line: ...

    @abstractmethod
    async def renew(self, key: str) -> None:
        """Connect anew, first to where `key` is. Raises what went wrong."""

    async def elsewhere(
        self, answer: Exception, line: Line, key: str, command: Callable[[], bytes], *, repeatable: bool
    ) -> Any:
        """What `command` is answered at the place that the error names, or the error where it names none.

        `line` is where it was asked before.
        """
        return answer

    @abstractmethod
    async def aclose(self) -> None: ...


class OneServer(Route):
    """A single server, or the primary that the Sentinels name whenever a connection is made."""

    def __init__(self, client: Redis, timeout_seconds: float, max_connections: int) -> None:
        self._client = client
        pool = client.connection_pool
        self._server = Server(
            lambda: pool.connection_class(**pool.connection_kwargs | _OURS), timeout_seconds, max_connections
        )

    def line(self, key: str) -> Line:
        return self._server.line

    async def renew(self, key: str) -> None:
        self._server.renew()
        await self._server.line.connected()

    async def aclose(self) -> None:
        await self._server.aclose()
        await close_client(self._client)


class ClusterMap(Route):
    """A line to each primary. redis-py keeps the map of slots; after a failure it is asked for anew."""

    def __init__(self, client: RedisCluster, timeout_seconds: float, max_connections: int) -> None:
        self._client = client
        self._timeout = timeout_seconds
        self._most = max_connections
        self._servers: dict[str, Server] = {}
        self._learning: asyncio.Task[None] | None = None
        self._learned_at = -inf
        self._known = False

    def line(self, key: str) -> Line:
        return self._line_to(self._client.nodes_manager.get_node_from_slot(self._client.keyslot(key)))

    async def renew(self, key: str) -> None:
        await self._learn()
        for server in self._servers.values():
            server.renew()
        await self.line(key).connected()

    async def elsewhere(
        self, answer: Any, line: Line, key: str, command: Callable[[], bytes], *, repeatable: bool
    ) -> Any:
        if isinstance(answer, TimeoutError):
            self._learn_soon()
        elif isinstance(answer, RedisConnectionError) and (repeatable or not line.opened):
            # Perhaps another node has taken the place of this one.
            with suppress(RedisError, RedisClusterException, OSError):
                await self._learn()
            answer = await self.line(key).ask(command())
        for _ in range(REDIRECTIONS):
            if isinstance(answer, MovedError):
                await self._client.nodes_manager.move_slot(answer)
                answer = await self.line(key).ask(command())
            elif isinstance(answer, AskError):
                there = self._line_to(self._node(answer.host, answer.port))
                there.ask(_ASKING)
                answer = await there.ask(command())
            elif isinstance(answer, TryAgainError):
                await asyncio.sleep(TRY_AGAIN_SECONDS)
                answer = await self.line(key).ask(command())
            else:
                break
        return answer

    async def aclose(self) -> None:
        if self._learning is not None:
            self._learning.cancel()
            await asyncio.gather(self._learning, return_exceptions=True)
        await asyncio.gather(*(server.aclose() for server in self._servers.values()))
        await close_client(self._client)

    def _node(self, host: str, port: int) -> ClusterNode:
        nodes = self._client.nodes_manager
        return nodes.get_node(host, port) or ClusterNode(host, port, **nodes.connection_kwargs)

    def _line_to(self, node: ClusterNode) -> Line:
        server = self._servers.get(node.name)
        if server is None:
            server = self._servers[node.name] = Server(
                lambda: node.connection_class(**node.connection_kwargs | _OURS | {"retry": _NO_RETRY}),
                self._timeout,
                self._most,
            )
        return server.line

    async def _learn(self) -> None:
        """Ask for the map. Those who want it at the same time wait for the same answer."""
        await asyncio.shield(self._begin_to_learn())

    def _begin_to_learn(self) -> asyncio.Task[None]:
        if self._learning is None or self._learning.done():
            self._learned_at = time.monotonic()
            self._learning = asyncio.create_task(self._ask_for_map())
            # Nobody may wait for it.
            self._learning.add_done_callback(lambda task: task.cancelled() or task.exception())
        return self._learning

    def _learn_soon(self) -> None:
        """Seldom: a silent node has each of its calls say so, and to read a map takes milliseconds."""
        if time.monotonic() >= self._learned_at + LEARN_SECONDS:
            self._begin_to_learn()

    async def _ask_for_map(self) -> None:
        nodes = self._client.nodes_manager
        if self._known:
            await nodes.initialize()
        else:  # what commands there are too, which the client's own methods need
            await self._client.initialize()
            self._known = True
        for name in self._servers.keys() - nodes.nodes_cache.keys():
            self._servers.pop(name).renew()


def make_route(client: Client, timeout_seconds: float, max_connections: int) -> Route:
    if isinstance(client, RedisCluster):
        return ClusterMap(client, timeout_seconds, max_connections)
    return OneServer(client, timeout_seconds, max_connections)
