"""The load generator: raw HTTP/1.1 over keep-alive connections, with no more parsing than counting needs.

Run as `python -m tests.performance.load`: it reads one `Job` a line as JSON from standard input, answers
each with one `Outcome` a line, and ends when its standard input does.
"""

from __future__ import annotations

import asyncio
import gc
import re
import sys
import time
from collections import Counter
from typing import Final, Literal, NamedTuple, cast

import msgspec
import uvloop

from tests.performance.processes import cpu_seconds
from tests.performance.upstream import EVENTS_BESIDE_TOKENS, TOKENS_PER_SECOND

WARM_UP_SECONDS: Final = 0.5
_SPREAD_SECONDS: Final = 0.5
"""Paced streams begin one after another over this time."""
_GRACE_SECONDS: Final = 20.0
"""What has not ended so long after the run counts as an error."""
_FAST_TOKENS: Final = 2000
_TAIL_BYTES: Final = 1000
_CONVERSATION: Final = re.compile(rb'"conversation_id":"([0-9a-f-]{36})"')


class Job(msgspec.Struct, frozen=True):
    """One run: whole answers, streams paced by the upstream, or streams as fast as they go.

    `turns` are whole answers of Weir's own API: each connection goes on with a conversation of its own.
    """

    mode: Literal["whole", "turns", "paced", "fast"]
    port: int
    connections: int
    seconds: float
    key: str
    pid: int
    """The service's process, whose CPU time is read at both ends of the measured time."""


class Outcome(msgspec.Struct, frozen=True):
    """What a run measured. Rates are of the measured time alone, `answers` and `errors` of the whole run."""

    answers_per_second: float
    chunks_per_second: float
    cpu_seconds: float
    cpu_share: float
    p50_ms: float | None
    p99_ms: float | None
    answers: int
    errors: dict[str, int]


class _Tally:
    """What the connections of one run share."""

    def __init__(self) -> None:
        self.answers = 0
        self.chunks = 0
        self.latencies: list[float] = []
        self.errors: Counter[str] = Counter()
        self.stopping = False


class _Mark(NamedTuple):
    at: float
    cpu: float
    answers: int
    chunks: int
    latencies: int


class _Client(asyncio.Protocol):
    """Sends the same request again as soon as its answer is there, until the run stops."""

    _transport: asyncio.Transport

    def __init__(self, job: Job, tokens: int, tally: _Tally) -> None:
        self._job = job
        self._request = _request(job, tokens)
        self._events_expected = tokens + EVENTS_BESIDE_TOKENS if tokens else 0
        self._tally = tally
        self._once = job.mode == "paced"
        self._talks = job.mode == "turns"
        self._closing = False
        self._pending = b""
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are not of that class
        self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._closing:
            self._tally.errors["connection closed by the service"] += 1
        if not self.closed.done():
            self.closed.set_result(None)

    def give_up(self) -> None:
        if not self._closing:
            self._tally.errors[f"no end within {_GRACE_SECONDS:.0f} s after the run"] += 1
            self._closing = True
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._pending:
            data = self._pending + data
            self._pending = b""
        if not self._head_read:
            head_end = data.find(b"\r\n\r\n")
            if head_end < 0:
                self._pending = data
                return
            self._read_head(data[:head_end].lower())
            data = data[head_end + 4 :]
        if self._bytes_left is None:
            self._dechunk(data)
        else:
            self._bytes_left -= len(data)
            self._take(data)
            if self._bytes_left <= 0:
                self._finish()

    def _send(self) -> None:
        self._head_read = False
        self._status = b""
        self._bytes_left: int | None = None
        self._body = b""
        self._events = 0
        self._chunk = b""
        self._chunk_events = 0
        self._began = time.perf_counter()
        self._transport.write(self._request)

    def _read_head(self, head: bytes) -> None:
        self._head_read = True
        self._status = head[9:12]
        at = head.find(b"\r\ncontent-length:")
        if at >= 0:
            self._bytes_left = int(head[at + 17 :].split(b"\r\n", 1)[0])

    def _dechunk(self, data: bytes) -> None:
        position = 0
        repeats = 0
        while True:
            if self._chunk and data.startswith(self._chunk, position):
                # The same bytes again, as most tokens of the fake upstream are: nothing new to read.
                position += len(self._chunk)
                repeats += 1
                continue
            line_end = data.find(b"\r\n", position)
            if line_end < 0:
                break
            size = int(data[position:line_end], 16)
            after = line_end + size + 4
            if after > len(data):
                break
            self._count(repeats * self._chunk_events)
            repeats = 0
            if not size:
                self._finish()
                return
            payload = data[line_end + 2 : after - 2]
            self._chunk_events = self._take(payload)
            whole = payload.startswith(b"data: ") and payload.endswith(b"\n\n")
            self._chunk = data[position:after] if whole and size < _TAIL_BYTES else b""
            position = after
        self._count(repeats * self._chunk_events)
        self._pending = data[position:]

    def _take(self, payload: bytes) -> int:
        """Counts the events of a stream and keeps its last bytes; keeps a whole answer's body."""
        if not self._events_expected:
            self._body += payload
            return 0
        cut_in_two = (self._body[-5:] + payload[:5]).count(b"data: ")
        events = payload.count(b"data: ") + cut_in_two
        self._body = (self._body + payload[-_TAIL_BYTES:])[-_TAIL_BYTES:]
        self._count(events)
        return events

    def _count(self, events: int) -> None:
        self._events += events
        self._tally.chunks += events

    def _finish(self) -> None:
        problem = self._problem()
        if problem:
            self._tally.errors[problem] += 1
        else:
            self._tally.answers += 1
            self._tally.latencies.append(time.perf_counter() - self._began)
            if self._talks:
                self._go_on()
        if self._once or self._tally.stopping:
            self._closing = True
            self._transport.close()
        else:
            self._send()

    def _go_on(self) -> None:
        """The next turn is of the conversation that the first one began."""
        found = _CONVERSATION.search(self._body)
        if found is None:
            self._tally.errors["a turn without a conversation"] += 1
            return
        self._talks = False
        self._request = _request(self._job, 0, found[1].decode())

    def _problem(self) -> str | None:
        if self._status != b"200":
            return f"status {self._status.decode()}: {self._body[:200].decode(errors='replace')}"
        if not self._events_expected:
            sign = b'"conversation_id"' if self._job.mode == "turns" else b'"choices"'
            return None if sign in self._body else f"an answer without {sign.decode()}"
        if b"data: [DONE]" not in self._body:
            return "a stream without [DONE]"
        if self._events != self._events_expected:
            return f"a stream of {self._events} events instead of {self._events_expected}"
        return None


async def _run(job: Job) -> Outcome:
    tokens = 0
    if job.mode == "paced":
        # Long enough that every stream runs through the whole measured time, and then ends by itself.
        tokens = round(TOKENS_PER_SECOND * (_SPREAD_SECONDS + WARM_UP_SECONDS + job.seconds + 0.5))
    elif job.mode == "fast":
        tokens = _FAST_TOKENS
    tally = _Tally()
    clients = []
    try:
        for _ in range(job.connections):
            clients.append(await _connect(job, tokens, tally))
            if job.mode == "paced":
                await asyncio.sleep(_SPREAD_SECONDS / job.connections)
        await _wait(clients, WARM_UP_SECONDS)
        began = _mark(job.pid, tally)
        await _wait(clients, job.seconds)
        ended = _mark(job.pid, tally)
        tally.stopping = True
        await _wait(clients, _GRACE_SECONDS)
    finally:
        for client in clients:
            if not client.closed.done():
                client.give_up()
        await asyncio.sleep(0)
    return _outcome(began, ended, tally)


async def _connect(job: Job, tokens: int, tally: _Tally) -> _Client:
    _, client = await asyncio.get_running_loop().create_connection(
        lambda: _Client(job, tokens, tally), "127.0.0.1", job.port
    )
    return client


async def _wait(clients: list[_Client], seconds: float) -> None:
    """Waits so long, or until no connection is left."""
    await asyncio.wait([client.closed for client in clients], timeout=seconds)


def _request(job: Job, tokens: int, conversation: str | None = None) -> bytes:
    question = "What does a weir do, and how is the flow over it measured? " * 4
    instruction = "You are an engineer of waterways. " * 4
    body: dict[str, object] = {"model": "gpt-4o-mini", "temperature": 0.2, "max_tokens": 4000}
    path = "/v1/chat/completions"
    if job.mode == "turns":
        path = "/api/v1/chat"
        body |= {"message": question, "system_prompt": instruction}
        if conversation is not None:
            body["conversation_id"] = conversation
    else:
        body["messages"] = [
            {"role": "system", "content": instruction},
            {"role": "user", "content": question},
        ]
    if tokens:
        body["model"] = f"{'paced-50' if job.mode == 'paced' else 'fast'}-{tokens}"
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    encoded = msgspec.json.encode(body)
    head = (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1:{job.port}\r\n"
        f"authorization: Bearer {job.key}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(encoded)}\r\n\r\n"
    )
    return head.encode() + encoded


def _mark(pid: int, tally: _Tally) -> _Mark:
    return _Mark(time.perf_counter(), cpu_seconds(pid), tally.answers, tally.chunks, len(tally.latencies))


def _outcome(began: _Mark, ended: _Mark, tally: _Tally) -> Outcome:
    seconds = ended.at - began.at
    latencies = sorted(tally.latencies[began.latencies : ended.latencies])
    return Outcome(
        answers_per_second=(ended.answers - began.answers) / seconds,
        chunks_per_second=(ended.chunks - began.chunks) / seconds,
        cpu_seconds=ended.cpu - began.cpu,
        cpu_share=(ended.cpu - began.cpu) / seconds,
        p50_ms=_percentile(latencies, 0.50),
        p99_ms=_percentile(latencies, 0.99),
        answers=tally.answers,
        errors=dict(tally.errors),
    )


def _percentile(ordered: list[float], share: float) -> float | None:
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] * 1000 if ordered else None


def main() -> None:
    gc.disable()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for line in sys.stdin.buffer:
            job = msgspec.json.decode(line, type=Job)
            try:
                outcome = runner.run(_run(job))
            except OSError as error:
                outcome = Outcome(0.0, 0.0, 0.0, 0.0, None, None, 0, {f"{type(error).__name__}: {error}": 1})
            sys.stdout.buffer.write(msgspec.json.encode(outcome) + b"\n")
            sys.stdout.buffer.flush()
            gc.collect()


if __name__ == "__main__":
    main()
