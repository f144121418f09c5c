"""Idempotency keys: the store in memory against a simple model, the middleware around small applications."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.context import SCOPE_KEY, Dialect, RequestContext, context_of
from service.api.idempotency import (
    REPLAY_OF,
    VERSION,
    Idempotency,
    IdempotencyMiddleware,
    KeptAnswer,
    pack,
    unpack,
)
from service.api.openai import send_json
from service.api.sse import COMMENT, HEADERS
from service.domain import Operation, Outcome, Principal, RequestRecord
from service.errors import (
    CallerGone,
    IdempotencyMismatch,
    IdempotencyNotKept,
    IdempotencyRunning,
    InvalidRequest,
    StreamTruncated,
    UpstreamRejected,
    UpstreamUnavailable,
    WeirError,
)
from service.ports import Claim, ClaimState, Place
from service.stores.memory_idempotency import PLACE_BYTES, MemoryReplays
from tests.unit.ports import Clock

CHAT = "/v1/chat/completions"
ANNA, BERT = Principal("anna", "team"), Principal("bert", "team")
ELSEWHERE = Principal("anna", "other team")
TTL, LEASE, MOST = 100.0, 10.0, 4 * (PLACE_BYTES + 5)


# -- the store against a model -------------------------------------------------------------------


class Model:
    """The same in words: what each place holds, and since when; everything looked at anew each time."""

    def __init__(self, most: int = MOST) -> None:
        self.most = most
        self.claims: dict[str, tuple[bytes, str, float]] = {}
        self.answers: list[tuple[str, bytes, str, bytes, float]] = []

    def living(self, now: float) -> None:
        self.claims = {n: c for n, c in self.claims.items() if c[2] + LEASE > now}
        self.answers = [a for a in self.answers if a[4] + TTL > now]

    def answer(self, name: str) -> tuple[str, bytes, str, bytes, float] | None:
        return next((a for a in self.answers if a[0] == name), None)

    def claim(self, now: float, name: str, fingerprint: bytes, token: str) -> Claim:
        self.living(now)
        answer, claim = self.answer(name), self.claims.get(name)
        if answer is not None:
            same = answer[1] == fingerprint
            return Claim(ClaimState.KEPT, answer[3]) if same else Claim(ClaimState.OTHER)
        if claim is not None and claim[0] != fingerprint:
            return Claim(ClaimState.OTHER)
        if claim is not None and claim[1] != token:
            return Claim(ClaimState.RUNNING)
        self.claims[name] = (fingerprint, token, now)
        return Claim(ClaimState.TAKEN)

    def keep(self, now: float, name: str, fingerprint: bytes, token: str, body: bytes) -> bool:
        self.living(now)
        answer, claim = self.answer(name), self.claims.get(name)
        if answer is not None:
            return answer[2] == token
        if claim is not None and claim[1] != token:
            return False
        self.claims.pop(name, None)
        self.answers.append((name, fingerprint, token, body, now))
        while len(self.answers) > 1 and sum(len(a[3]) + PLACE_BYTES for a in self.answers) > self.most:
            self.answers.pop(0)
        return True

    def release(self, name: str, token: str) -> None:
        if name in self.claims and self.claims[name][1] == token:
            del self.claims[name]


names, tokens = st.sampled_from("abcdef"), st.sampled_from(["one", "two"])
prints = st.sampled_from([b"A", b"B"])
steps = st.lists(
    st.one_of(
        st.tuples(st.just("claim"), names, prints, tokens),
        st.tuples(st.just("keep"), names, prints, tokens, st.binary(max_size=8)),
        st.tuples(st.just("release"), names, tokens),
        st.tuples(st.just("wait"), st.sampled_from([1.0, LEASE / 2, LEASE, TTL / 2, TTL])),
    ),
    max_size=60,
)


def now(coroutine: Any) -> Any:
    """What a coroutine returns that never waits: nothing in memory does."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it waited")


@given(steps)
def test_the_store_does_what_the_model_says(steps: Sequence[tuple[Any, ...]]) -> None:
    clock, model = Clock(), Model()
    store = MemoryReplays(ttl_seconds=TTL, lease_seconds=LEASE, most_bytes=MOST, clock=clock)
    for what, first, *rest in steps:
        place = Place("team", "anna", str(first))
        if what == "wait":
            clock.now += first
        elif what == "claim":
            assert now(store.claim(place, *rest)) == model.claim(clock.now, first, *rest)
        elif what == "keep":
            assert now(store.keep(place, *rest)) == model.keep(clock.now, first, *rest)
        else:
            model.release(first, *rest)
            now(store.release(place, *rest))
        if what in ("claim", "keep"):
            assert store.bytes == sum(len(a[3]) + PLACE_BYTES for a in model.answers)
    assert now(store.erase("elsewhere")) == 0
    model.living(clock.now)
    assert now(store.erase("team")) == len(model.answers)
    assert store.bytes == 0


# -- the form in which answers are kept ----------------------------------------------------------


def kept(body: bytes, **values: Any) -> KeptAnswer:
    known: dict[str, Any] = {
        "version": VERSION,
        "request_id": "r",
        "status": 200,
        "headers": [(b"content-type", b"text/plain")],
        "dialect": None,
        "size": len(body),
        "body": body,
        "compressed": False,
    }
    return KeptAnswer(**known | values)


@given(st.binary(max_size=3000), st.integers(1, 4), st.sampled_from([None, *Dialect.__members__]))
def test_an_answer_is_unpacked_as_it_was_packed(piece: bytes, times: int, dialect: str | None) -> None:
    answer = kept(piece * times, dialect=dialect)
    found = unpack(pack(answer))
    assert found is not None
    assert (found.body, found.headers, found.dialect) == (answer.body, answer.headers, dialect)
    assert (found.request_id, found.status, found.size) == ("r", 200, len(answer.body))


def test_large_answers_are_compressed() -> None:
    assert len(pack(kept(b"word " * 10_000))) < 1000


@pytest.mark.parametrize(
    "packed",
    [
        b"",
        b"nonsense",
        pack(kept(b"x", version=VERSION + 1)),
        pack(kept(b"", size=-1)),
        pack(kept(b"x", dialect="TOMORROWS")),
        pack(kept(b"xx", size=1)),
        pack(kept(b"no zlib", compressed=True)),
        pack(kept(b"x" * 2000))[:-1],
    ],
)
def test_what_cannot_be_read_is_no_answer(packed: bytes) -> None:
    assert unpack(packed) is None


# -- the middleware ------------------------------------------------------------------------------

Handler: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]


class Answer:
    """What a caller gets."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.scope: Scope = {}

    async def send(self, message: Message) -> None:
        self.messages.append(message)

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.messages[0]["headers"])

    @property
    def body(self) -> bytes:
        return b"".join(m.get("body", b"") for m in self.messages[1:])

    @property
    def ended(self) -> bool:
        last = self.messages[-1] if self.messages else {}
        return last.get("type") == "http.response.body" and not last.get("more_body")


class Quick(Answer):
    """Sends the request again as soon as it has all."""

    def __init__(self, service: Service) -> None:
        super().__init__()
        self.again: Answer | None = None
        self._service = service

    async def send(self, message: Message) -> None:
        await super().send(message)
        if self.ended:
            self.again = await self._service.ask()


class Service:
    """A handler below the middleware, and how often it was asked."""

    def __init__(
        self, handler: Handler, *, most_bytes: int = 10_000, store: MemoryReplays | None = None
    ) -> None:
        self.calls = 0
        self.clock = Clock()
        if store is None:
            store = MemoryReplays(ttl_seconds=TTL, lease_seconds=LEASE, most_bytes=10**6, clock=self.clock)
        self.store = store
        self.idempotency = Idempotency(self.store, routes=(CHAT, "/v1/embeddings"), most_bytes=most_bytes)
        self.app: ASGIApp = IdempotencyMiddleware(self._handle, self.idempotency)
        self._handler = handler

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.calls += 1
        await self._handler(scope, receive, send)

    async def ask(
        self,
        key: bytes | None = b"key-1",
        body: bytes = b"{}",
        *,
        who: Principal = ANNA,
        path: str = CHAT,
        method: str = "POST",
        query: bytes = b"",
        headers: Sequence[tuple[bytes, bytes]] = (),
        answer: Answer | None = None,
    ) -> Answer:
        given = [*headers, *([(b"idempotency-key", key)] if key is not None else [])]
        scope: Scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": query,
            "headers": given,
        }
        context = RequestContext(scope, f"request-{self.calls}")
        context.principal, context.body = who, body
        scope[SCOPE_KEY] = context
        answer = answer or Answer()
        answer.scope = scope
        await self.app(scope, _never, answer.send)
        return answer


async def _never() -> Message:
    raise AssertionError("the body was read before")


def record(outcome: Outcome = Outcome.SUCCESS, upstream_id: str | None = None) -> RequestRecord:
    return RequestRecord("i", "r", CHAT, Operation.CHAT, outcome=outcome, upstream_request_id=upstream_id)


async def good(scope: Scope, receive: Receive, send: Send) -> None:
    context = context_of(scope)
    context.record = record(upstream_id="req-1")
    context.record.answered_by = "small one"
    own = ((b"x-conversation-id", b"c"), (b"x-secret", b"s"))
    await send_json(send, b'{"of":"' + context.request_id.encode() + b'"}', 200, own)


def stream(
    *blocks: bytes, outcome: Outcome = Outcome.SUCCESS, raises: BaseException | None = None
) -> Handler:
    async def handler(scope: Scope, receive: Receive, send: Send) -> None:
        context = context_of(scope)
        context.dialect, context.record = Dialect.CHUNKS, record(outcome)
        await send({"type": "http.response.start", "status": 200, "headers": [*HEADERS]})
        for block in blocks:
            await send({"type": "http.response.body", "body": block, "more_body": True})
        if raises is not None:
            raise raises
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return handler


async def test_a_repeat_gets_the_first_answer_and_is_told_so() -> None:
    service = Service(good)
    first = await service.ask()
    again = await service.ask()
    assert service.calls == 1
    assert first.body == again.body == b'{"of":"request-0"}'
    assert b"idempotent-replayed" not in first.headers
    assert again.headers == {
        b"content-type": b"application/json",
        b"content-length": b"18",
        b"x-conversation-id": b"c",
        b"x-upstream-request-id": b"req-1",
        b"x-weir-model": b"small%20one",
        b"idempotent-replayed": b"true",
        b"x-weir-original-request-id": b"request-0",
    }
    assert again.ended
    assert (again.scope[REPLAY_OF], first.scope.get(REPLAY_OF)) == ("request-0", None)
    assert context_of(again.scope).record is None


@pytest.mark.parametrize(
    ("key", "path", "method"),
    [
        (None, CHAT, "POST"),
        (b"key-1", "/v1/models", "POST"),
        (b"key-1", CHAT, "GET"),
        (b" ", "/v1/x", "POST"),
    ],
)
async def test_what_it_is_not_for_passes_by(key: bytes | None, path: str, method: str) -> None:
    service = Service(good)
    for _ in range(2):
        await service.ask(key, path=path, method=method)
    assert service.calls == 2
    assert len(service.store) == 0


async def test_other_kinds_of_connections_pass_by() -> None:
    seen: list[str] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    service = Service(good)
    await IdempotencyMiddleware(app, service.idempotency)({"type": "lifespan"}, _never, Answer().send)
    assert seen == ["lifespan"]


@pytest.mark.parametrize("key", [b"", b" ", b"a b", b"a\tb", b"\xc3\xa9", b"a\n", b"x" * 256])
async def test_a_key_that_is_none_is_400_and_names_the_header(key: bytes) -> None:
    service = Service(good)
    with pytest.raises(InvalidRequest, match="Idempotency-Key") as refused:
        await service.ask(key)
    assert refused.value.param == "Idempotency-Key"
    assert service.calls == 0


@pytest.mark.parametrize("key", [b"a", b"x" * 255, b'"8e03978e-40d5"', b"!~", b"stainless-python-retry-1"])
async def test_what_is_a_key(key: bytes) -> None:
    service = Service(good)
    await service.ask(key)
    assert (await service.ask(key)).headers[b"idempotent-replayed"] == b"true"


@pytest.mark.parametrize(
    "changed",
    [
        {"body": b'{"n":2}'},
        {"query": b"a=1"},
        {"headers": [(b"openai-beta", b"v2")]},
        {"body": b"", "query": b"{}"},
        {"body": b"x" * 300_000},
    ],
)
async def test_what_changes_the_answer_is_another_request(changed: dict[str, Any]) -> None:
    service = Service(good)
    await service.ask()
    with pytest.raises(IdempotencyMismatch) as refused:
        await service.ask(**changed)
    assert (refused.value.status, refused.value.code) == (422, "idempotency_key_reused")
    assert service.calls == 1


async def test_what_does_not_change_the_answer_does_not_matter() -> None:
    service = Service(good)
    await service.ask(headers=[(b"traceparent", b"00-1"), (b"x-stainless-retry-count", b"0")])
    again = await service.ask(headers=[(b"traceparent", b"00-2"), (b"x-stainless-retry-count", b"1")])
    assert again.headers[b"idempotent-replayed"] == b"true"


@pytest.mark.parametrize(
    "other", [{"who": BERT}, {"who": ELSEWHERE}, {"path": "/v1/embeddings"}, {"key": b"key-2"}]
)
async def test_each_owner_route_and_key_has_its_own_answer(other: dict[str, Any]) -> None:
    service = Service(good)
    await service.ask()
    assert b"idempotent-replayed" not in (await service.ask(**other)).headers
    assert service.calls == 2


async def test_rights_of_a_principal_are_not_part_of_its_name() -> None:
    service = Service(good)
    await service.ask()
    again = await service.ask(who=Principal("anna", "team", admin=True))
    assert again.headers[b"idempotent-replayed"] == b"true"


async def test_one_that_runs_is_409() -> None:
    go, at_it = asyncio.Event(), asyncio.Event()

    async def waits(scope: Scope, receive: Receive, send: Send) -> None:
        at_it.set()
        await go.wait()
        await good(scope, receive, send)

    service = Service(waits)
    running = asyncio.create_task(service.ask())
    await at_it.wait()
    with pytest.raises(IdempotencyRunning) as met:
        await service.ask()
    error = met.value
    assert (error.status, error.code, error.retry) == (409, "idempotency_in_progress", True)
    assert error.retry_after_seconds is not None
    with pytest.raises(IdempotencyMismatch):
        await service.ask(body=b"other")
    go.set()
    assert (await running).ended
    assert service.calls == 1


async def test_who_has_all_of_an_answer_can_have_it_again_at_once() -> None:
    service = Service(good)
    first = Quick(service)
    await service.ask(answer=first)
    assert first.again is not None
    assert first.again.headers[b"idempotent-replayed"] == b"true"
    assert service.calls == 1


@pytest.mark.parametrize(
    "error",
    [
        UpstreamUnavailable("down"),
        UpstreamRejected(400, {"message": "no"}),
        InvalidRequest("no"),
        CallerGone("left"),
        asyncio.CancelledError(),
        RuntimeError("bug"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_after_a_failure_the_key_is_free_even_for_another_body(error: BaseException) -> None:
    async def fails(scope: Scope, receive: Receive, send: Send) -> None:
        if service.calls == 1:
            raise error
        await good(scope, receive, send)

    service = Service(fails)
    with pytest.raises(type(error)):
        await service.ask()
    assert b"idempotent-replayed" not in (await service.ask(body=b"corrected")).headers
    assert service.calls == 2


@pytest.mark.parametrize("status", [199, 302, 400, 409, 429, 500])
async def test_only_good_answers_are_kept(status: int) -> None:
    async def answers(scope: Scope, receive: Receive, send: Send) -> None:
        await send_json(send, b"{}", status)

    service = Service(answers)
    for _ in range(2):
        answer = await service.ask()
        assert (answer.messages[0]["status"], answer.ended) == (status, True)
    assert service.calls == 2


async def test_an_answer_whose_record_tells_of_a_failure_is_not_kept() -> None:
    async def failed(scope: Scope, receive: Receive, send: Send) -> None:
        context_of(scope).record = record(Outcome.UPSTREAM_ERROR)
        await send_json(send, b'{"status":"failed"}')

    service = Service(failed)
    for _ in range(2):
        assert (await service.ask()).ended
    assert service.calls == 2


# -- streams -------------------------------------------------------------------------------------


async def test_a_stream_is_passed_on_at_once_and_replayed_as_a_stream_without_its_comments() -> None:
    blocks = (b"data: 1\n\n", b"data: 2\n\n", COMMENT, b"data: [DONE]\n\n")
    service = Service(stream(*blocks))
    first, again = await service.ask(), await service.ask()
    assert [m.get("body") for m in first.messages[1:]] == [*blocks, b""]
    assert again.body == b"data: 1\n\ndata: 2\n\ndata: [DONE]\n\n"
    assert again.headers[b"content-type"] == b"text/event-stream; charset=utf-8"
    assert again.headers[b"cache-control"] == b"no-cache, no-transform"
    assert b"content-length" not in again.headers
    assert context_of(again.scope).dialect is Dialect.CHUNKS
    assert service.calls == 1


async def test_a_large_stream_is_replayed_in_pieces() -> None:
    block = b"data: " + bytes(range(48, 58)) * 20_000 + b"\n\n"
    service = Service(stream(block, block), most_bytes=10**6)
    await service.ask()
    again = await service.ask()
    assert again.body == block * 2
    assert all(len(m.get("body", b"")) <= 65_536 for m in again.messages)


async def test_a_stream_that_breaks_off_is_not_kept() -> None:
    service = Service(stream(b"data: 1\n\n", outcome=Outcome.STREAM_TRUNCATED, raises=StreamTruncated("x")))
    for _ in range(2):
        with pytest.raises(StreamTruncated):
            await service.ask()
    assert service.calls == 2


@pytest.mark.parametrize(
    ("outcome", "calls"), [(Outcome.SUCCESS, 1), (Outcome.CLIENT_DISCONNECTED, 2)], ids=["after", "before"]
)
async def test_a_caller_who_leaves_after_the_end_mark_had_all(outcome: Outcome, calls: int) -> None:
    service = Service(stream(b"data: [DONE]\n\n", outcome=outcome, raises=CallerGone("left")))
    with pytest.raises(CallerGone):
        await service.ask()
    if calls == 1:
        assert (await service.ask()).body == b"data: [DONE]\n\n"
    else:
        with pytest.raises(CallerGone):
            await service.ask()
    assert service.calls == calls


async def test_of_a_native_stream_a_caller_who_leaves_may_have_missed_the_end() -> None:
    async def handler(scope: Scope, receive: Receive, send: Send) -> None:
        context_of(scope).dialect, context_of(scope).record = Dialect.NATIVE, record()
        await send({"type": "http.response.start", "status": 200, "headers": [*HEADERS]})
        raise CallerGone("left")

    service = Service(handler)
    for _ in range(2):
        with pytest.raises(CallerGone):
            await service.ask()
    assert service.calls == 2


@pytest.mark.parametrize(("size", "fits"), [(1000, True), (1001, False)])
async def test_after_an_answer_that_was_too_large_a_repeat_is_409_and_no_second_call(
    size: int, fits: bool
) -> None:
    half = b"x" * (size // 2)
    service = Service(stream(half, half, b"x" * (size % 2)), most_bytes=1000)
    assert len((await service.ask()).body) == size
    if fits:
        assert len((await service.ask()).body) == size
    else:
        with pytest.raises(IdempotencyNotKept) as refused:
            await service.ask()
        assert (refused.value.status, refused.value.retry) == (409, False)
        assert service.store.bytes < PLACE_BYTES + 500  # a mark, without the body
    assert service.calls == 1


# -- claims --------------------------------------------------------------------------------------


class Watched(MemoryReplays):
    """Tells of claims; `renewed` is set by the third one."""

    def __init__(self, lease_seconds: float) -> None:
        super().__init__(ttl_seconds=TTL, lease_seconds=lease_seconds, most_bytes=MOST)
        self.claims = 0
        self.renewed = asyncio.Event()

    async def claim(self, place: Place, fingerprint: bytes, token: str) -> Claim:
        self.claims += 1
        if self.claims == 3:
            self.renewed.set()
        return await super().claim(place, fingerprint, token)


async def test_a_claim_is_renewed_while_its_request_runs_and_no_longer() -> None:
    store = Watched(lease_seconds=0.03)

    async def waits(scope: Scope, receive: Receive, send: Send) -> None:
        await store.renewed.wait()
        raise UpstreamUnavailable("down")

    service = Service(waits, store=store)
    async with asyncio.timeout(10):
        with pytest.raises(UpstreamUnavailable):
            await service.ask()
    count = store.claims
    assert len(store) == 0
    await asyncio.sleep(0.05)
    assert (store.claims, len(store)) == (count, 0)


class Slow(MemoryReplays):
    """Its ends wait for `go`."""

    def __init__(self) -> None:
        super().__init__(ttl_seconds=TTL, lease_seconds=LEASE, most_bytes=MOST)
        self.go, self.ending = asyncio.Event(), asyncio.Event()

    async def keep(self, place: Place, fingerprint: bytes, token: str, answer: bytes) -> bool:
        self.ending.set()
        await self.go.wait()
        return await super().keep(place, fingerprint, token, answer)


async def test_an_answer_is_kept_though_its_request_is_cancelled_meanwhile() -> None:
    store = Slow()
    service, answer = Service(good, store=store), Answer()
    running = asyncio.create_task(service.ask(answer=answer))
    await store.ending.wait()
    assert not answer.ended
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert answer.ended
    store.go.set()
    await service.idempotency.settled()
    assert (await service.ask()).headers[b"idempotent-replayed"] == b"true"


async def test_an_error_while_the_answer_is_settled_takes_nothing_from_the_caller() -> None:
    async def fails_late(scope: Scope, receive: Receive, send: Send) -> None:
        await good(scope, receive, send)
        raise WeirError("the books")

    service, answer = Service(fails_late), Answer()
    with pytest.raises(WeirError):
        await service.ask(answer=answer)
    assert (answer.body, answer.ended) == (b'{"of":"request-0"}', True)
    assert (await service.ask()).headers[b"idempotent-replayed"] == b"true"
