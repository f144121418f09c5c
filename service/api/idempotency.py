"""`Idempotency-Key`: the same request sent again gets the answer of the first, and no second call is made.

The first request with a key claims it, and holds the claim while it runs. If its answer is good it is kept;
however else it ends, the key is free again and a repeat runs. docs/idempotency.md has the rules. A request
without the header costs one look into a dictionary.
"""

from __future__ import annotations

import asyncio
import re
import zlib
from collections.abc import Awaitable, Collection, Coroutine
from contextlib import suppress
from hashlib import sha256
from typing import Any, Final
from uuid import uuid4

import msgspec
import structlog
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.context import SCOPE_KEY, Dialect, RequestContext, source_headers
from service.api.sse import COMMENT
from service.domain import Outcome
from service.errors import (
    CallerGone,
    IdempotencyMismatch,
    IdempotencyNotKept,
    IdempotencyRunning,
    InvalidRequest,
    StateUnavailable,
)
from service.ports import Claim, ClaimState, Place, Replays

HEADER: Final = b"idempotency-key"
REPLAY_OF: Final = "weir.replay_of"
"""In the scope of a request that was answered from here: the id of the request that was run."""
RENEWALS: Final = 3
"""In the time of one lease."""
COMPRESS_ABOVE_BYTES: Final = 1024
IN_A_THREAD_ABOVE_BYTES: Final = 256 * 1024
"""So much takes a millisecond or more, in which nobody else would be served."""
PIECE_BYTES: Final = 64 * 1024
VERSION: Final = 1

_KEY: Final = re.compile(rb"[\x21-\x7e]{1,255}")
_CHANGES_ANSWERS: Final = b"openai-beta"
_KEPT_HEADERS: Final = frozenset(
    (b"content-type", b"cache-control", b"x-accel-buffering", b"x-conversation-id")
)
_WHOLE_AT_ITS_MARK: Final = (Dialect.CHUNKS, Dialect.RESPONSES)
"""Streams whose readers may leave at the end mark, before the end of the connection."""

log = structlog.get_logger("weir")


class KeptAnswer(msgspec.Struct, array_like=True):
    """An answer as a store keeps it."""

    version: int
    request_id: str
    status: int
    headers: list[tuple[bytes, bytes]]
    dialect: str | None
    """Of a stream."""
    size: int
    """Bytes of the body as it was; -1: it was too large to be kept."""
    body: bytes
    compressed: bool


_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(KeptAnswer).decode


class Idempotency:
    """What all requests with an idempotency key share. `routes` are those that it is for."""

    def __init__(self, replays: Replays, *, routes: Collection[str], most_bytes: int) -> None:
        self.replays = replays
        self.routes = frozenset(routes)
        self.most_bytes = most_bytes
        self._ending: set[asyncio.Task[Any]] = set()

    async def settled(self) -> None:
        """Returns when every claim whose request was cut short has been given up."""
        while self._ending:
            await asyncio.wait(self._ending)

    async def surely(self, work: Coroutine[Any, Any, None]) -> None:
        """In a task of its own, which a cancelled request cannot take down with it."""
        task = asyncio.get_running_loop().create_task(work)
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)
        await asyncio.shield(task)


class IdempotencyMiddleware:
    """For the innermost place: who calls, and the body, must be known."""

    def __init__(self, app: ASGIApp, idempotency: Idempotency) -> None:
        self._app = app
        self._shared = idempotency

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        # Not a coroutine: a request without the header has no frame of this on its stack.
        context: RequestContext | None = scope.get(SCOPE_KEY)
        if context is None or HEADER not in context.headers or not self._concerns(context):
            return self._app(scope, receive, send)
        return self._once(scope, receive, send, context)

    def _concerns(self, context: RequestContext) -> bool:
        return context.method == "POST" and context.path in self._shared.routes

    async def _once(self, scope: Scope, receive: Receive, send: Send, context: RequestContext) -> None:
        run = _Run(self._shared, context, _place(context), await _fingerprint(scope, context))
        claim = await run.claim()
        if claim.state is ClaimState.TAKEN:
            return await run.through(self._app, scope, receive, send)
        if claim.state is ClaimState.OTHER:
            raise IdempotencyMismatch(
                "This Idempotency-Key is that of another request.", param="Idempotency-Key"
            )
        if claim.state is ClaimState.RUNNING:
            raise IdempotencyRunning("A request with this Idempotency-Key is running.")
        await _replay(scope, send, context, claim.answer)


class _Run:
    """One request that has, or asks for, the claim to a place."""

    def __init__(
        self, shared: Idempotency, context: RequestContext, place: Place, fingerprint: bytes
    ) -> None:
        self._shared = shared
        self._replays = shared.replays
        self._context = context
        self._place = place
        self._fingerprint = fingerprint
        self._token = uuid4().hex
        self._status = 0
        self._headers: list[tuple[bytes, bytes]] = []
        self._parts: list[bytes] = []
        self._size = 0
        self._last: Message | None = None
        self._timer: asyncio.TimerHandle
        self._renewing: asyncio.Task[None] | None = None

    async def claim(self) -> Claim:
        try:
            return await self._replays.claim(self._place, self._fingerprint, self._token)
        except BaseException:  # it may have been taken all the same
            await self._shared.surely(self._release())
            raise

    async def through(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Run it. The answer's last message goes out when the answer is kept: who has it may repeat it."""

        async def send_and_note(message: Message) -> None:
            self._note(message)
            if self._last is None:
                await send(message)

        self._renew_later()
        whole = False
        try:
            await app(scope, receive, send_and_note)
        except CallerGone:
            whole = self._had_all()
            raise
        finally:
            whole = whole or self._last is not None
            try:
                await self._shared.surely(self._end(keep=whole and self._is_good()))
            finally:
                if self._last is not None:
                    await send(self._last)

    def _note(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._headers = [(name, value) for name, value in message["headers"] if name in _KEPT_HEADERS]
            return
        body = message.get("body", b"")
        if body and body != COMMENT:
            self._size += len(body)
            if self._size > self._shared.most_bytes:
                self._parts.clear()
            else:
                self._parts.append(body)
        if not message.get("more_body"):
            self._last = message

    def _had_all(self) -> bool:
        """The caller left, but not before the end mark of its stream; what is in the books says so."""
        return self._context.dialect in _WHOLE_AT_ITS_MARK and self._is_good()

    def _is_good(self) -> bool:
        """A stream begins with 200 whatever it ends with: its record knows."""
        record = self._context.record
        return 200 <= self._status < 300 and (record is None or record.outcome is Outcome.SUCCESS)

    # -- the claim -------------------------------------------------------------------------------

    def _renew_later(self) -> None:
        seconds = self._replays.lease_seconds / RENEWALS
        self._timer = asyncio.get_running_loop().call_later(seconds, self._renew)

    def _renew(self) -> None:
        self._renewing = asyncio.get_running_loop().create_task(self._claim_again())

    async def _claim_again(self) -> None:
        with suppress(StateUnavailable):
            await self._replays.claim(self._place, self._fingerprint, self._token)
        self._renew_later()

    async def _end(self, *, keep: bool) -> None:
        if self._renewing is not None:
            await asyncio.wait((self._renewing,))  # a claim that came after the release would stay
        self._timer.cancel()
        await (self._keep() if keep else self._release())

    async def _keep(self) -> None:
        answer = self._answer()
        large = self._size > IN_A_THREAD_ABOVE_BYTES
        packed = await asyncio.to_thread(pack, answer) if large else pack(answer)
        try:
            kept = await self._replays.keep(self._place, self._fingerprint, self._token, packed)
        except StateUnavailable:
            kept = False
        if not kept:
            log.warning("idempotent_answer_lost")

    async def _release(self) -> None:
        try:
            await self._replays.release(self._place, self._token)
        except StateUnavailable:
            log.debug("idempotency_claim_left")  # until its lease ends

    def _answer(self) -> KeptAnswer:
        context = self._context
        headers, record = self._headers, context.record
        if record is not None:
            headers = [*headers, *source_headers(record)]
        fits = self._size <= self._shared.most_bytes
        return KeptAnswer(
            VERSION,
            context.request_id,
            self._status,
            headers,
            context.dialect.name if context.dialect is not None else None,
            self._size if fits else -1,
            b"".join(self._parts),
            compressed=False,
        )


async def _replay(scope: Scope, send: Send, context: RequestContext, packed: bytes) -> None:
    large = len(packed) > IN_A_THREAD_ABOVE_BYTES
    answer = await asyncio.to_thread(unpack, packed) if large else unpack(packed)
    if answer is None:
        raise IdempotencyNotKept(
            "The request with this Idempotency-Key was answered, but its answer cannot be given again."
        )
    scope[REPLAY_OF] = answer.request_id
    log.info("idempotent_replay", route=context.path, replay_of=answer.request_id)
    headers = [
        *answer.headers,
        (b"idempotent-replayed", b"true"),
        (b"x-weir-original-request-id", answer.request_id.encode()),
    ]
    if answer.dialect is not None:
        context.dialect = Dialect[answer.dialect]
    else:
        headers.append((b"content-length", str(answer.size).encode()))
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    for start in range(0, answer.size, PIECE_BYTES):
        piece = answer.body[start : start + PIECE_BYTES]
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def pack(answer: KeptAnswer) -> bytes:
    if answer.size > COMPRESS_ABOVE_BYTES:
        smaller = zlib.compress(answer.body, 1)
        if len(smaller) < len(answer.body):
            answer = msgspec.structs.replace(answer, body=smaller, compressed=True)
    return _encode(answer)


def unpack(packed: bytes) -> KeptAnswer | None:
    """None if it was too large to be kept, or another version of this service has kept it."""
    try:
        answer = _decode(packed)
        if answer.version != VERSION or answer.size < 0:
            return None
        if answer.compressed:
            # Never more than it says to be, whatever the bytes are.
            answer.body = zlib.decompressobj().decompress(answer.body, answer.size + 1)
        known = answer.dialect is None or answer.dialect in Dialect.__members__
    except (msgspec.DecodeError, zlib.error):
        return None
    return answer if known and len(answer.body) == answer.size else None


def _place(context: RequestContext) -> Place:
    """Raises InvalidRequest. In stores a key is a hash: it may say something of the caller's customers."""
    key = context.headers[HEADER]
    if not _KEY.fullmatch(key):
        raise InvalidRequest(
            "The header Idempotency-Key must have 1 to 255 visible ASCII letters, without spaces.",
            param="Idempotency-Key",
        )
    principal = context.principal
    name = sha256(b"%b %b" % (context.path.encode(), key)).hexdigest()
    return Place(principal.tenant, principal.name, name)


async def _fingerprint(scope: Scope, context: RequestContext) -> bytes:
    """Of all that changes the answer, beside the route: the query, a header that goes on, the body."""
    beside = b"%b\n%b\n" % (scope.get("query_string", b""), context.headers.get(_CHANGES_ANSWERS, b""))
    body = context.body
    if len(body) > IN_A_THREAD_ABOVE_BYTES:
        return await asyncio.to_thread(_digest, beside, body)
    return _digest(beside, body)


def _digest(beside: bytes, body: bytes) -> bytes:
    summed = sha256(beside)
    summed.update(body)
    return summed.digest()
