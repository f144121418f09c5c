"""The load generator. It runs in a pod of the cluster, on the image's own Python, and knows HTTP alone.

    python3 load.py '{"url": "http://198.18.200.1", "key": "...", "whole": 16, "streams": 8, ...}'

It writes `{"event": "going"}` once every one of its callers has had an answer, or the first event of a
stream, and `enough` requests have ended. It goes on until its standard input has a line, lets what runs come
to its end, and writes one `Tally` for each kind of caller as JSON. What fails is counted, with its kind and
the second in which it happened, and nothing is tried again: but by the callers of `sdk_retrying`, whose
retries are the SDK's own. The tally counts those too, because they hide what failed.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import aiohttp
import openai

CLOSING_SECONDS = 180.0
"""What has not ended so long after the load was told to stop counts as failed."""
THINKING_SECONDS = 0.2
"""Between two turns of a conversation, whose history grows with each."""


@dataclass
class Job:
    """What to send. Each caller sends its next request when the last one has ended."""

    url: str
    key: str
    whole: int = 0
    """Callers of whole answers that keep their connections open."""
    fresh: int = 0
    """Callers of whole answers that open a connection for each."""
    streams: int = 0
    """Callers of streams, each on a connection of its own."""
    stream_tokens: int = 500
    sdk: int = 0
    """Callers of streams through the official SDK with its own retries off."""
    sdk_retrying: int = 0
    """Callers of whole answers through the official SDK with its retries."""
    sdk_max_retries: int = openai.DEFAULT_MAX_RETRIES
    conversations: int = 0
    """Callers that each go on with a conversation of their own."""
    enough: int = 0
    """Requests that must have ended before it says that it is going."""
    words: int = 8
    body_bytes: int = 0
    """Padding of each prompt, to weigh on memory."""


@dataclass
class Failure:
    """One request that did not end well. Times are seconds since 1970."""

    kind: str
    what: str
    began: float
    ended: float


@dataclass
class Tally:
    """What happened to all requests of one kind."""

    sent: int = 0
    good: int = 0
    failures: list[Failure] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)
    longest_gap_seconds: float = 0.0
    """Between two good answers, of whichever caller."""
    last_good: float = 0.0
    retries: int = 0
    """Attempts that the SDK made beyond the first, within requests that ended well."""
    put_off: int = 0
    """Turns that were told when to come again: 503 `state_unavailable` with Retry-After."""


class Broken(Exception):
    """An answer that is not what it should be; the message is its kind."""


Begun = Callable[[], None]
"""Called at the first sign of an answer."""


class Load:
    """All callers of one job."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.tallies: dict[str, Tally] = {}
        self.stopping = asyncio.Event()
        self._waiting = 0
        self._going = asyncio.Event()

    async def run(self) -> None:
        job = self.job
        kinds: list[tuple[str, int, Callable[[], Callable[[Begun], Awaitable[None]]]]] = [
            ("whole", job.whole, lambda: self._whole),
            ("fresh", job.fresh, lambda: self._fresh),
            ("stream", job.streams, lambda: self._stream),
            ("sdk_stream", job.sdk, lambda: self._sdk_stream),
            ("sdk_retrying", job.sdk_retrying, lambda: self._sdk_retrying),
            ("conversation", job.conversations, self._conversation),
        ]
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60)
        headers = {"Authorization": f"Bearer {job.key}"}
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:
            self.session = session
            self.plain = openai.AsyncOpenAI(base_url=f"{job.url}/v1", api_key=job.key, max_retries=0)
            self.retrying = openai.AsyncOpenAI(
                base_url=f"{job.url}/v1", api_key=job.key, max_retries=job.sdk_max_retries
            )
            self._waiting = sum(number for _, number, _ in kinds)
            callers = [
                asyncio.create_task(self._caller(kind, make()))
                for kind, number, make in kinds
                for _ in range(number)
            ]
            await self._going.wait()
            say({"event": "going", "at": time.time()})
            await self.stopping.wait()
            _, late = await asyncio.wait(callers, timeout=CLOSING_SECONDS)
            for caller in late:
                caller.cancel()
            await asyncio.gather(*callers, return_exceptions=True)

    async def _caller(self, kind: str, once: Callable[[Begun], Awaitable[None]]) -> None:
        waiting = True

        def begun() -> None:
            nonlocal waiting
            if waiting:
                waiting = False
                self._answered()

        while not self.stopping.is_set():
            with self._counted(kind):
                await once(begun)
            begun()
            if not self._going.is_set():
                self._look()
            await asyncio.sleep(THINKING_SECONDS if kind == "conversation" else 0)

    def _answered(self) -> None:
        self._waiting -= 1
        self._look()

    def _look(self) -> None:
        ended = sum(tally.good + len(tally.failures) for tally in self.tallies.values())
        if not self._waiting and ended >= self.job.enough:
            self._going.set()

    @contextmanager
    def _counted(self, kind: str) -> Iterator[None]:
        tally = self.tallies.setdefault(kind, Tally())
        tally.sent += 1
        began = time.time()
        try:
            yield
        except asyncio.CancelledError:
            tally.failures.append(Failure("never ended", "", began, time.time()))
            raise
        except Exception as error:  # whatever it is, it is what a caller would have met
            name = str(error) if isinstance(error, Broken) else type(error).__name__
            tally.failures.append(Failure(name, str(error)[:200], began, time.time()))
            return
        now = time.time()
        tally.good += 1
        tally.milliseconds.append((now - began) * 1000)
        if tally.last_good:
            tally.longest_gap_seconds = max(tally.longest_gap_seconds, now - tally.last_good)
        tally.last_good = now

    def _question(self, tokens: int, *, stream: bool) -> dict[str, Any]:
        text = "Hello! " + "x" * self.job.body_bytes
        return {
            "model": "sim-long",
            "max_tokens": tokens,
            "stream": stream,
            "messages": [{"role": "user", "content": text}],
        }

    async def _whole(self, begun: Begun) -> None:
        await self._post()

    async def _fresh(self, begun: Begun) -> None:
        await self._post({"Connection": "close"})

    async def _post(self, headers: dict[str, str] | None = None) -> None:
        question = self._question(self.job.words, stream=False)
        url = f"{self.job.url}/v1/chat/completions"
        async with self.session.post(url, json=question, headers=headers) as answer:
            body = await answer.read()
            if answer.status != 200:
                raise Broken(f"status {answer.status} {_code(body)}")
            words = json.loads(body)["choices"][0]["message"]["content"].split()
            if len(words) != self.job.words:
                raise Broken(f"{len(words)} words in place of {self.job.words}")

    async def _stream(self, begun: Begun) -> None:
        question = self._question(self.job.stream_tokens, stream=True)
        url = f"{self.job.url}/v1/chat/completions"
        events, last = 0, b""
        async with self.session.post(url, json=question, headers={"Connection": "close"}) as answer:
            if answer.status != 200:
                raise Broken(f"status {answer.status} {_code(await answer.read())}")
            async for line in answer.content:
                if line.startswith(b"data:"):
                    events, last = events + 1, line.strip()
                    begun()
        if last != b"data: [DONE]":
            raise Broken("error event" if b'"error"' in last else "cut: no [DONE]")
        if events < self.job.stream_tokens:
            raise Broken(f"{events} events of {self.job.stream_tokens} tokens")

    async def _sdk_stream(self, begun: Begun) -> None:
        stream = await self.plain.chat.completions.create(
            **self._question(self.job.stream_tokens, stream=True)
        )
        finish = None
        async for chunk in stream:
            begun()
            finish = chunk.choices[0].finish_reason if chunk.choices else finish
        if finish is None:
            raise Broken("a silent end")

    async def _sdk_retrying(self, begun: Begun) -> None:
        question = self._question(self.job.words, stream=False)
        answer = await self.retrying.chat.completions.with_raw_response.create(**question)
        self.tallies["sdk_retrying"].retries += answer.retries_taken

    def _conversation(self) -> Callable[[Begun], Awaitable[None]]:
        """The turns of one conversation, which the first of them begins."""
        said: dict[str, Any] = {"message": "Go on.", "model": "sim-long", "max_tokens": self.job.words}
        url = f"{self.job.url}/api/v1/chat"

        async def turn(begun: Begun) -> None:
            async with self.session.post(url, json=said) as answer:
                body = await answer.read()
                if answer.status == 200:
                    said["conversation_id"] = json.loads(body)["conversation_id"]
                    return
                code = _code(body)
                if (answer.status, code) != (503, "state_unavailable") or "conversation_id" not in said:
                    raise Broken(f"status {answer.status} {code}")
                if "Retry-After" not in answer.headers:
                    raise Broken("503 without Retry-After")
                self.tallies["conversation"].put_off += 1

        return turn


def _code(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return "without a code"


def say(what: dict[str, Any]) -> None:
    print(json.dumps(what), flush=True)


async def main() -> None:
    load = Load(Job(**json.loads(sys.argv[1])))

    async def until_told() -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        await reader.readline()
        load.stopping.set()

    told = asyncio.create_task(until_told())
    await load.run()
    told.cancel()
    say({"event": "ended", "tallies": {kind: asdict(tally) for kind, tally in load.tallies.items()}})


if __name__ == "__main__":
    asyncio.run(main())
