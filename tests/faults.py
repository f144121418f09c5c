"""The faults of upstreams, and what a caller, the ledger and the metrics shall say of each.

`tests/app/test_faults.py` asks for each once; so does `python -m tests.performance.faults`, which writes the
table of docs/resilience.md. Each case has a Weir of its own, so that neither an open circuit nor a spent
retry budget of one shows in the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import aiohttp
import openai

from service.config import FileConfig
from service.domain import Outcome, RequestRecord, UsageSource
from tests.fakes.upstream import CONTENT, HUGE_SIZE, FakeUpstream
from tests.programs import need
from tests.running import RunningWeir, configuration

SECRET: Final = "sk-upstream-secret-key"
HELLO: Final[Any] = [{"role": "user", "content": "Hello!"}]
ALL: Final = -1
"""As many attempts as there may be."""
SLOW_MILLISECONDS: Final = 100

PROVIDER, ESTIMATED = UsageSource.PROVIDER, UsageSource.ESTIMATED


class Times(NamedTuple):
    """Deadlines in seconds, and how often a call is made again."""

    first_byte: float
    idle: float
    answer: float
    retries: int


class Sees(NamedTuple):
    """What is to be seen of one case."""

    status: int = 200
    code: str | None = None
    """Of the error, in the answer or in the stream's last event; None for a good answer."""
    raises: str = ""
    """The class of the official SDK's exception."""
    again: str | None = None
    """x-should-retry."""
    retry_after: str | None = None
    attempts: int = 1
    outcome: Outcome = Outcome.SUCCESS
    usage: UsageSource | None = PROVIDER
    ledger_code: str | None = None
    """Where it is not `code`: the provider's own words go to the caller alone."""


GOOD: Final = Sees()
BROKEN: Final = Sees(
    502, "openai_service_error", "InternalServerError", "false", None, ALL, Outcome.UPSTREAM_ERROR, None
)
UNAVAILABLE: Final = BROKEN._replace(status=503)
LATE: Final = Sees(504, "api_timeout", "InternalServerError", "false", None, ALL, Outcome.TIMEOUT, ESTIMATED)
REFUSED_KEY: Final = Sees(
    502,
    "upstream_authentication_error",
    "InternalServerError",
    "false",
    outcome=Outcome.UPSTREAM_ERROR,
    usage=None,
)
LIMITED: Final = Sees(
    429, "rate_limit_exceeded", "RateLimitError", "true", None, ALL, Outcome.RATE_LIMITED, None
)
TOLD: Final = UNAVAILABLE._replace(again="true", retry_after="7", attempts=1)
CUT: Final = Sees(200, "stream_truncated", "APIError", outcome=Outcome.STREAM_TRUNCATED, usage=ESTIMATED)


def rejected(status: int, raises: str) -> Sees:
    """The provider found the request wrong: status, message and code are its own."""
    again = status in (408, 409)
    return Sees(
        status,
        f"fake_{status}",
        raises,
        "false",
        attempts=ALL if again else 1,
        outcome=Outcome.TIMEOUT if status == 408 else Outcome.CLIENT_ERROR,
        usage=None,
        ledger_code="upstream_rejected",
    )


TOO_LONG: Final = rejected(400, "BadRequestError")._replace(code="context_length_exceeded")


class Place(NamedTuple):
    """An upstream of `Surroundings`, and the model there, which says how it behaves."""

    upstream: str
    model: str = "gpt-4o-mini"


class Fault(NamedTuple):
    """One fault; None where it makes no sense for an answer of that form."""

    name: str
    places: tuple[Place, ...]
    whole: Sees | None
    stream: Sees | None
    stream_model: str | None = None
    """Where a stream shows the fault in another way."""


def fault(name: str, model: str, whole: Sees | None, stream: Sees | None, **more: Any) -> Fault:
    return Fault(name, (Place("fake", model),), whole, stream, **more)


def at(name: str, *places: Place, whole: Sees, stream: Sees | None = None) -> Fault:
    return Fault(name, places, whole, stream or whole)


FAULTS: Final = (
    at("connection refused", Place("dead"), whole=UNAVAILABLE),
    fault("connection reset", "flaky-reset-100000", UNAVAILABLE, UNAVAILABLE),
    at("no such name (DNS)", Place("nameless"), whole=UNAVAILABLE),
    at("certificate not trusted (TLS)", Place("untrusted"), whole=UNAVAILABLE),
    at("no TLS there (TLS)", Place("plain"), whole=UNAVAILABLE),
    fault("401", "status-401", REFUSED_KEY, REFUSED_KEY),
    fault("402", "status-402", REFUSED_KEY, REFUSED_KEY),
    fault("403", "status-403", REFUSED_KEY, REFUSED_KEY),
    fault("404", "status-404", *[rejected(404, "NotFoundError")] * 2),
    fault("408", "status-408", *[rejected(408, "APIStatusError")] * 2),
    fault("409", "status-409", *[rejected(409, "ConflictError")] * 2),
    fault("413", "status-413", *[rejected(413, "APIStatusError")] * 2),
    fault("429", "status-429", LIMITED, LIMITED),
    fault("429, Retry-After 7", "status-429-after", *[LIMITED._replace(retry_after="7", attempts=1)] * 2),
    fault(
        "429 once, Retry-After 1",
        "flaky-after-1",
        *[GOOD._replace(attempts=2)] * 2,
        stream_model="flaky-after-01",
    ),
    fault("500", "status-500", BROKEN, BROKEN),
    fault("502", "status-502", BROKEN, BROKEN),
    fault("503", "status-503", UNAVAILABLE, UNAVAILABLE),
    fault("503, Retry-After 7", "status-503-after", *[TOLD] * 2),
    fault("504", "status-504", *[LATE._replace(usage=None)] * 2),
    fault("503 as HTML", "status-503-html", UNAVAILABLE, UNAVAILABLE),
    fault("half of the calls get 503", "half-1", *[GOOD._replace(attempts=2)] * 2, stream_model="half-2"),
    fault("hang: no answer", "hang", LATE, LATE),
    fault("slow head", f"slow-head-{SLOW_MILLISECONDS}", GOOD, GOOD),
    fault("slow drip", "ticks-10-30", GOOD, GOOD),
    fault(
        "stall in the middle",
        "stall",
        LATE,
        Sees(200, "api_timeout", "APIError", outcome=Outcome.TIMEOUT, usage=ESTIMATED),
    ),
    fault("head, then silence", "stall-first", LATE, LATE),
    fault("comments, no event", "stall-comments", LATE, LATE),
    fault("drop in the middle", "drop", BROKEN, CUT),
    fault(
        "error event",
        "error-event",
        None,
        Sees(200, "openai_service_error", "APIError", outcome=Outcome.UPSTREAM_ERROR, usage=ESTIMATED),
    ),
    fault("error as the first event", "error-first", None, BROKEN),
    fault("200 with an error, its code 502", "error-200-502", BROKEN, BROKEN),
    fault("200 with an error, its code 429", "error-200-429", LIMITED, LIMITED),
    fault("200 with an error, its code context_length_exceeded", "too-long-200", TOO_LONG, TOO_LONG),
    fault("no [DONE]", "close-no-done", None, CUT._replace(usage=PROVIDER)),
    fault("no usage", "no-usage", *[GOOD._replace(usage=ESTIMATED)] * 2),
    fault("wrong content type", "wrong-type", BROKEN, BROKEN),
    fault("JSON in place of a stream", "refuse-stream", None, BROKEN),
    fault("HTML in place of JSON", "html", BROKEN, BROKEN),
    fault("truncated JSON", "truncated-json", BROKEN, CUT, stream_model="drop-mid-event"),
    fault("gzip", "gzip", GOOD, GOOD),
    fault("10 MB answer", "huge", GOOD, GOOD),
    fault("duplicated usage", "usage-twice", None, GOOD),
    at("two upstreams, the first dead", Place("dead"), Place("fake"), whole=GOOD._replace(attempts=2)),
    at(
        "two upstreams, the first silent",
        Place("fake", "hang"),
        Place("slow", f"slow-head-{SLOW_MILLISECONDS}"),
        whole=GOOD._replace(attempts=2),
    ),
    at("two upstreams, all dead", Place("dead"), Place("dead-too"), whole=UNAVAILABLE),
)

CASES: Final = tuple(
    (fault, stream)
    for fault in FAULTS
    for stream in (False, True)
    if (fault.stream if stream else fault.whole) is not None
)


class Seen(NamedTuple):
    """What was seen of one case."""

    sees: Sees
    seconds: float
    text: str
    message: str
    """Of the error."""
    upstream_request_id: str | None
    record: RequestRecord
    requests: dict[str, float]
    """weir_requests_total by outcome."""
    attempts: dict[str, float]
    """weir_upstream_attempts_total by kind and outcome."""
    records: int


class Surroundings:
    """All upstreams that the faults need: `with Surroundings() as surroundings:`."""

    def __init__(self) -> None:
        self.fake, self.slow = FakeUpstream(), FakeUpstream()
        self._stack = contextlib.ExitStack()
        self._making = threading.Lock()
        self.urls: dict[str, str] = {}

    def __enter__(self) -> Self:
        enter = self._stack.enter_context
        enter(self.fake)
        enter(self.slow)
        # Bound and not listening: refused as long as this is open, and nobody else gets the port.
        dead, dead_too = (enter(socket.socket()) for _ in range(2))
        for each in (dead, dead_too):
            each.bind(("127.0.0.1", 0))
        untrusted = enter(Accepting(certificate(Path(enter(tempfile.TemporaryDirectory())))))
        plain = enter(Accepting(None))
        self.urls = {
            "fake": self.fake.base_url,
            "slow": self.slow.base_url,
            "dead": f"http://127.0.0.1:{dead.getsockname()[1]}/v1",
            "dead-too": f"http://127.0.0.1:{dead_too.getsockname()[1]}/v1",
            "nameless": "http://weir-upstream.invalid/v1",
            "untrusted": f"https://localhost:{untrusted.port}/v1",
            "plain": f"https://localhost:{plain.port}/v1",
        }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def weir(
        self, models: dict[str, tuple[Place, ...]], times: Times, price: dict[str, float] | None = None
    ) -> RunningWeir:
        """A Weir with these models, not yet running; without `price` most of them have none."""
        file = FileConfig.model_validate(
            {
                "upstreams": [
                    {
                        "name": name,
                        "base_url": url,
                        "api_key_env": "OPENAI_API_KEY",
                        "first_byte_timeout": times.first_byte,
                        "idle_timeout": times.idle,
                    }
                    for name, url in self.urls.items()
                ],
                "models": [
                    {"name": name, "upstreams": [place._asdict() for place in places], "price": price}
                    for name, places in models.items()
                ],
            }
        )
        settings: dict[str, Any] = {
            "cache_ttl": 0.0,
            "openai_api_key": SECRET,
            "openai_timeout": times.answer,
            "openai_max_retries": times.retries,
        }
        with self._making:  # FastAPI and pydantic make one application at a time
            return RunningWeir(configuration(file=file, **settings))


class Accepting:
    """A listener that is no OpenAI: with a TLS certificate that nobody trusts, or without TLS at all."""

    def __init__(self, certified: Path | None) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._context: ssl.SSLContext | None = None
        if certified is not None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(certified)
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.settimeout(10)
                if self._context is not None:
                    self._context.wrap_socket(connection, server_side=True).close()
                else:
                    connection.recv(4096)
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")


def certificate(directory: Path) -> Path:
    """A new certificate for localhost, signed by itself, with its key."""
    openssl, path = need("openssl"), directory / "pair.pem"
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost"
    subprocess.run(
        [openssl, *words.split(), "-keyout", path, "-out", directory / "cert.pem"],
        capture_output=True,
        check=True,
    )
    path.write_bytes(path.read_bytes() + (directory / "cert.pem").read_bytes())
    return path


def name_of(fault: Fault, *, stream: bool) -> str:
    """The name under which its model is asked for."""
    return f"{fault.name}{', streamed' if stream else ''}".replace(" ", "-")


def places_of(fault: Fault, *, stream: bool) -> tuple[Place, ...]:
    if stream and fault.stream_model is not None:
        return (fault.places[0]._replace(model=fault.stream_model),)
    return fault.places


def observe(surroundings: Surroundings, fault: Fault, times: Times, *, stream: bool) -> Seen:
    """Ask once, with the official SDK, a Weir of its own."""
    name = name_of(fault, stream=stream)
    with surroundings.weir({name: places_of(fault, stream=stream)}, times) as weir:
        asked = ask(weir, name, stream=stream)
        record = weir.records(1)[0]
    return Seen(
        Sees(
            asked.status,
            asked.code,
            asked.raises,
            asked.headers.get("x-should-retry"),
            asked.headers.get("retry-after"),
            record.attempts,
            record.outcome,
            record.usage.source if record.usage is not None else None,
            record.error_code,
        ),
        asked.seconds,
        asked.text,
        asked.message,
        asked.headers.get("x-upstream-request-id"),
        record,
        dict(samples(weir, "weir_requests_total", "outcome")),
        dict(samples(weir, "weir_upstream_attempts_total", "kind", "outcome")),
        len(weir.records(1)),
    )


class Asked(NamedTuple):
    """What the SDK's user got."""

    status: int
    headers: dict[str, str]
    code: str | None
    raises: str
    message: str
    text: str
    seconds: float


def ask(weir: RunningWeir, model: str, *, stream: bool, **options: Any) -> Asked:
    text, headers, status = "", {}, 0
    code, raises, message = None, "", ""
    began = time.perf_counter()
    with weir.sdk(timeout=120) as client:
        chat = client.chat.completions.with_raw_response
        try:
            answer = chat.create(model=model, messages=HELLO, stream=stream, **options)
            headers, status = dict(answer.headers), answer.status_code
            parsed: Any = answer.parse()
            if stream:
                for chunk in parsed:
                    text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
            else:
                text = parsed.choices[0].message.content
        except openai.APIStatusError as error:
            headers, status = dict(error.response.headers), error.status_code
            code, raises, message = error.code, type(error).__name__, str(error.body)
        except openai.APIError as error:
            code, raises, message = error.code, type(error).__name__, str(error.body)
    return Asked(status, headers, code, raises, message, text, time.perf_counter() - began)


def expected(fault: Fault, times: Times, *, stream: bool) -> Sees:
    """What the case shall show, with the numbers of these settings."""
    sees = fault.stream if stream else fault.whole
    assert sees is not None
    attempts = sees.attempts
    if attempts == ALL:
        attempts = (times.retries + 1) * len(fault.places)
    return sees._replace(attempts=attempts, ledger_code=sees.ledger_code or sees.code)


def samples(weir: RunningWeir, name: str, *labels: str) -> Iterator[tuple[str, float]]:
    """A counter's values by some of its labels."""
    sums: dict[str, float] = {}
    for family in weir.registry.collect():
        for sample in family.samples:
            if sample.name == name and sample.value:  # those of 0 are there from the start
                key = " ".join(sample.labels[label] for label in labels)
                sums[key] = sums.get(key, 0.0) + sample.value
    yield from sums.items()


def is_whole(text: str, fault: Fault) -> bool:
    """Whether all of the fake upstream's answer came."""
    model = fault.places[-1].model
    if model == "huge":
        return len(text) == HUGE_SIZE
    return text == ("".join(f"tick{n} " for n in range(10)) if model.startswith("ticks") else CONTENT)


@contextlib.contextmanager
def full_backlog() -> Iterator[str]:
    """The address of a listener whose queue of connections is full: it neither accepts nor refuses."""
    with socket.socket() as listener, socket.socket() as first:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        first.connect(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"


class Outage(NamedTuple):
    """What came of many requests whose first upstream fails always."""

    failing: int
    """Attempts there."""
    well: int
    """Attempts at the second upstream, if there is one."""
    good: int
    """Requests that were answered."""


def outage(upstream: FakeUpstream, requests: int, *, second: bool, one_circuit: bool) -> Outage:
    """So many requests, 32 at a time, to an upstream at 100 % errors.

    With `one_circuit` all ask for one model; else each asks for a model of its own, so that no circuit opens
    and the retry budget alone holds them back.
    """
    places = [{"upstream": "failing"}]
    if second:
        places.append({"upstream": "well", "model": "gpt-4o-mini"})
    upstreams = [{"name": name, "base_url": upstream.base_url} for name in ("failing", "well")]
    file = FileConfig.model_validate(
        {"upstreams": upstreams, "models": [{"name": "flaky-*", "upstreams": places}]}
    )
    first = 100_000
    models = [f"flaky-{first if one_circuit else first + n}" for n in range(requests)]

    async def ask_all(url: str) -> list[int]:
        waiting = asyncio.Semaphore(32)

        async def one(session: aiohttp.ClientSession, model: str) -> int:
            body = {"model": model, "messages": HELLO}
            async with waiting, session.post(f"{url}/v1/chat/completions", json=body) as answer:
                await answer.read()
                return answer.status

        async with aiohttp.ClientSession() as session:
            return await asyncio.gather(*(one(session, model) for model in models))

    with RunningWeir(configuration(file=file, cache_ttl=0.0)) as weir:
        statuses = asyncio.run(ask_all(weir.url))
        attempts = dict(samples(weir, "weir_upstream_attempts_total", "upstream"))
    return Outage(int(attempts.get("failing", 0)), int(attempts.get("well", 0)), statuses.count(200))
