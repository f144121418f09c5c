"""The way to Redis: scripts in, answers out, within milliseconds or not at all.

A breaker stands in the way. Closed, each call may take `timeout_seconds`. It opens at the first refused
connection or at the third late answer in a row, and from then on calls fail at once; a probe of its own
asks again every second whether Redis takes writes where the last one failed, and closes it. So nobody waits
for a Redis that is away, frozen, full or a replica, and nothing has to be restarted when it is back.

How a call travels is `line`'s business: those of one moment go together, and only Redis' silence counts as
time. Where it goes is `routes`'.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections.abc import Callable, Sequence
from math import inf
from typing import Any, Final, NamedTuple, TypeAlias

import structlog
from hiredis import pack_command
from redis.exceptions import (
    AskError,
    ClusterDownError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import TimeoutError as RedisTimeoutError

from service.errors import StateRefused, StateUnavailable
from service.stores.redis.address import Client
from service.stores.redis.line import Line, patiently
from service.stores.redis.routes import make_route

LATE_IN_A_ROW: Final = 3
PROBE_SECONDS: Final = 1.0
SETTLING_SECONDS: Final = 5.0
"""So long after an outage what is not there may only not be there yet."""
PROBE_TIMEOUT_SECONDS: Final = 1.0
"""Longer than a call may take: the first probe connects, asks Sentinels, learns a cluster's nodes."""
_LATE: Final = (TimeoutError, RedisTimeoutError)
_FAILURES: Final = (TimeoutError, RedisError, RedisClusterException, OSError)
"""What a call may end with where there is no answer. The cluster's client has errors of no common class."""
_CANNOT_SERVE: Final = (OutOfMemoryError, ReadOnlyError, ClusterDownError, TryAgainError, AskError)
_CANNOT_SERVE_WORDS: Final = ("MISCONF", "NOREPLICAS", "LOADING", "BUSY ", "UNKILLABLE")
"""Answers of a server that is there and can do nothing for us just now: those that redis-py has a class for,
of whose text it takes the first word away, and the others."""

_pack: Final[Callable[[tuple[Any, ...]], bytes]] = pack_command  # its own types know one word only

log = structlog.get_logger("weir")


class Script:
    """A Lua script, named by its hash once a server knows it.

    `repeatable`: run twice it does the same as once, because what it writes carries an id.
    """

    def __init__(self, source: str, *, repeatable: bool = True) -> None:
        self.source = source
        self.repeatable = repeatable
        self.sha = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()


Call: TypeAlias = tuple[Script, Sequence[str], Sequence[Any]]
"""A script, its keys, all of one slot, and its arguments."""


class _Sent(NamedTuple):
    """A call on its way."""

    key: str
    command: bytes
    repeatable: bool
    line: Line
    answer: asyncio.Future[Any]


_PROBE: Final = Script("redis.call('SET', KEYS[1], '1', 'PX', 10000) return 1")


class Link:
    """One process's connection to the fleet's state. `on_change` hears of each opening and closing."""

    def __init__(
        self,
        client: Client,
        *,
        prefix: str,
        timeout_seconds: float,
        max_connections: int,
    ) -> None:
        self.on_change: Callable[[bool], None] = lambda _: None
        self.prefix = prefix
        self.client = client
        self._route = make_route(client, timeout_seconds, max_connections)
        self._late = 0
        self._late_at = -inf
        self._probe_key = f"{prefix}probe"
        self._open = True  # until the first probe has found it well
        self._probe: asyncio.Task[None] | None = None
        self.away = asyncio.Event()
        self.back = asyncio.Event()
        self.away.set()
        self._missed = False
        self._back_at = -inf

    @property
    def available(self) -> bool:
        return not self._open

    @property
    def just_back(self) -> bool:
        """It was away a moment ago, so other processes may still write what they kept meanwhile."""
        return time.monotonic() < self._back_at + SETTLING_SECONDS

    async def start(self) -> None:
        """Try it once; from then on a task probes whenever it is away. Away is a state, not an error."""
        reason = await self._try_again()
        if reason is not None:
            self._tell(available=False, reason=reason)
        self._probe = asyncio.create_task(self._watch())

    async def close(self) -> None:
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.gather(self._probe, return_exceptions=True)
        await self._route.aclose()

    async def run(
        self, script: Script, keys: Sequence[str], arguments: Sequence[str | bytes | int | float]
    ) -> Any:
        """What the script returns. Raises StateUnavailable, at once while the breaker is open.

        The keys must be of one slot. A script whose answer did not come may have run all the same. What is
        asked for in one round of the event loop goes to Redis together, in its order.
        """
        self._check()
        began = time.monotonic()
        sent = self._send((script, keys, arguments))
        answer = await sent.answer
        if isinstance(answer, Exception):
            return await self._second_thought(answer, sent, (script, keys, arguments), began)
        self._late = 0
        return answer

    async def ask(self, *words: str | bytes | int | float, key: str | None = None) -> Any:
        """The answer to a plain command as Redis sends it: bytes, whole numbers, None, and lists of them.

        It goes where `key` is; that is the command's second word if nothing else is said. Else as `run`.
        """
        self._check()
        began = time.monotonic()
        if key is None:
            key = words[1].decode() if isinstance(words[1], bytes) else str(words[1])
        line, command = self._route.line(key), _pack(words)
        sent = _Sent(key, command, False, line, line.ask(command))
        answer = await sent.answer
        if isinstance(answer, Exception):
            return await self._second_thought(answer, sent, None, began)
        self._late = 0
        return answer

    async def run_in_order(self, calls: Sequence[Call]) -> list[Any]:
        """What the scripts return, or the error of each: sent together, they run one after another.

        Raises StateUnavailable if that is what became of all. Any of them may have run all the same.
        """
        self._check()
        began = time.monotonic()
        sent = [self._send(call) for call in calls]
        answers = [await one.answer for one in sent]
        unknown = [n for n, answer in enumerate(answers) if isinstance(answer, NoScriptError)]
        for n in unknown:
            sent[n] = self._send(calls[n], in_full=True)
        for n in unknown:
            answers[n] = await sent[n].answer
        errors = {n: answer for n, answer in enumerate(answers) if isinstance(answer, Exception)}
        thoughts = (self._second_thought(error, sent[n], calls[n], began) for n, error in errors.items())
        if len(errors) < len(answers):
            self._late = 0
        for n, result in zip(errors, await asyncio.gather(*thoughts, return_exceptions=True), strict=True):
            if isinstance(result, BaseException) and not isinstance(result, StateUnavailable):
                raise result  # a fault of ours
            answers[n] = result
        unavailable = [
            a for a in answers if isinstance(a, StateUnavailable) and not isinstance(a, StateRefused)
        ]
        if unavailable and len(unavailable) == len(answers):
            raise unavailable[0]
        return answers

    def _check(self) -> None:
        if self._open:
            raise StateUnavailable("The store of shared state is away.")

    def _send(self, call: Call, *, in_full: bool = False) -> _Sent:
        """By the script's name where the server has seen it on this line: that is shorter."""
        script, keys, _ = call
        line = self._route.line(keys[0])
        if in_full or script.sha not in line.known:
            line.known.add(script.sha)
            command = _eval(call)
        else:
            command = _pack(("EVALSHA", script.sha, len(keys), *keys, *call[2]))
        return _Sent(keys[0], command, script.repeatable, line, line.ask(command))

    async def _second_thought(self, answer: Exception, sent: _Sent, call: Call | None, began: float) -> Any:
        """What Redis says once it was told the script, or asked in the right place. Raises what remains."""
        if isinstance(answer, NoScriptError) and call is not None:  # it forgot
            sent = self._send(call, in_full=True)
            answer = await sent.answer
        if isinstance(answer, Exception):
            answer = await self._route.elsewhere(
                answer,
                sent.line,
                sent.key,
                lambda: _eval(call) if call is not None else sent.command,
                repeatable=sent.repeatable,
            )
        if isinstance(answer, Exception):
            raise self._failed(answer, began, sent.key)
        self._late = 0
        return answer

    # -- the breaker -----------------------------------------------------------------------------

    def _failed(self, error: Exception, began: float, key: str) -> StateUnavailable:
        """Count it; whether it opens the breaker depends on what it says of the server."""
        self._probe_key = _beside(key) or self._probe_key
        if isinstance(error, _LATE):
            # Calls that were on their way together met one and the same pause.
            if began >= self._late_at:
                self._late, self._late_at = self._late + 1, time.monotonic()
            if self._late >= LATE_IN_A_ROW:
                self._trip("late")
            return StateUnavailable("The store of shared state did not answer in time.")
        if isinstance(error, ResponseError) and not _cannot_serve(error):
            # Our own mistake, or a wrong type in a key: the server is well.
            log.error("redis_refused", error=str(error)[:200])
            return StateRefused("The store of shared state refused a command.")
        self._trip(_reason(error))
        return StateUnavailable("The store of shared state is away.")

    def _trip(self, reason: str) -> None:
        if not self._open:
            self._open = True
            self._tell(available=False, reason=reason)
            self.back.clear()
            self.away.set()

    async def _watch(self) -> None:
        while True:
            await self.away.wait()
            # Not all pods at once.
            await asyncio.sleep(PROBE_SECONDS * random.uniform(0.75, 1.25))
            try:
                await self._try_again()
            except Exception:  # a fault of ours must not keep Redis away for ever
                log.exception("probe_fault")

    async def _try_again(self) -> str | None:
        """None when it is there, else why not."""
        try:
            await patiently(self._route.renew(self._probe_key), PROBE_TIMEOUT_SECONDS)
            answer = await self._send((_PROBE, [self._probe_key], []), in_full=True).answer
            if isinstance(answer, Exception):
                raise answer
        except _FAILURES as error:
            log.debug("redis_probe", reason=_reason(error))
            return _reason(error)
        self._late, self._open = 0, False
        if self._missed:
            self._missed, self._back_at = False, time.monotonic()
        self.away.clear()
        self.back.set()
        self._tell(available=True, reason="answers")
        return None

    def _tell(self, *, available: bool, reason: str) -> None:
        """One line for each change, however many calls met it."""
        if available:
            log.info("redis_available")
        else:
            self._missed = True
            log.warning("redis_unavailable", reason=reason)
        self.on_change(available)


def _eval(call: Call) -> bytes:
    script, keys, arguments = call
    return _pack(("EVAL", script.source, len(keys), *keys, *arguments))


def _beside(key: str) -> str | None:
    """A key of the same slot, for the probe: with the same hash tag."""
    tag = key.find("}") + 1
    return f"{key[:tag]}:probe" if tag else None


def _cannot_serve(error: ResponseError) -> bool:
    return isinstance(error, _CANNOT_SERVE) or str(error).startswith(_CANNOT_SERVE_WORDS)


def _reason(error: Exception) -> str:
    """A word for the log: never an address, never a password."""
    if type(error) is ResponseError:
        return str(error).partition(" ")[0][:40]
    return type(error).__name__
