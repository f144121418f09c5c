"""Is that Weir well? Asked from outside, as its callers do: `helm test`, `skaffold verify`, a person.

It knows an address and a key, and nothing of the service that answers there.
"""

from __future__ import annotations

import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import openai

SECONDS: Final = 60.0
"""For each answer: a model may be slow, and a test must end."""
MOST_TRIES: Final = 1_000
"""Requests that the limit check may send: a higher limit is left alone."""
PAGE_SECONDS: Final = 5.0
"""For what needs no model. A pod that has ended answers no packet at all: its silence must cost less than the
time in which its address goes."""
LEAVING_SECONDS: Final = 45.0
"""How long the address of an ended pod may still be told: caches of DNS keep it for up to 30 s."""
TURNS: Final = 4
TRIES_PER_LIMIT: Final = 2
"""Without a shared state two pods count by themselves, and time gives some back."""


_FAULTS: Final = (openai.OpenAIError, OSError, ValueError, KeyError, IndexError, TypeError)
"""What a check can meet: a refusal, no connection, an answer of another form."""


class Target(NamedTuple):
    """Whom to ask: base addresses without a path, and what a caller must know."""

    url: str
    admin_url: str
    key: str | None
    model: str | None
    """The first that is listed, if none is named."""
    limit: int | None = None
    """Requests per window, where a limit is set."""
    pods_url: str | None = None
    """A name with the addresses of all pods, where there are several: one conversation goes over all."""


class Result(NamedTuple):
    """How a check ended, in a sentence; `good` is None where there was nothing to check."""

    check: str
    good: bool | None
    told: str


class Skipped(Exception):
    """There is nothing to check, or nothing to check it with; the message says what."""


class Failed(Exception):
    """A check found something else than it should; the message says what."""


def run(names: Iterable[str], target: Target) -> Iterator[Result]:
    """Each check's result as it ends; one that fails does not stop the others."""
    for name in names:
        began = time.monotonic()
        try:
            told = CHECKS[name](target)
        except Skipped as skipped:
            yield Result(name, None, str(skipped))
            continue
        except openai.RateLimitError:
            yield Result(name, None, "the limit of this key is used up")
            continue
        except (Failed, *_FAULTS) as error:
            yield Result(name, False, f"{_words(error)} (at {target.url})")
            continue
        yield Result(name, True, f"{told}, in {time.monotonic() - began:.2f} s")


def _auth(target: Target) -> str:
    """Without a key and with a wrong one: 401 in OpenAI's form, so that the SDK raises its own class."""
    try:
        urllib.request.urlopen(f"{target.url}/v1/models", timeout=SECONDS)  # noqa: S310  # the address is the caller's
        raise Failed("a request without a key was let in")
    except urllib.error.HTTPError as error:
        if error.code != 401:
            raise Failed(f"a request without a key got {error.code}, not 401") from None
        code = json.load(error)["error"]["code"]
    try:
        _client(target, key="weir-not-a-key").models.list()
    except openai.AuthenticationError:
        return f"refused without a key and with a wrong one ({code})"
    raise Failed("a request with a wrong key was let in")


def _chat(target: Target) -> str:
    answer = _client(target).chat.completions.create(**_question(target))
    text, usage = answer.choices[0].message.content, answer.usage
    if not text or usage is None or not usage.total_tokens:
        raise Failed(f"the answer has no text or no usage: {answer.model_dump_json()[:200]}")
    return f"{answer.model} answered with {usage.completion_tokens} tokens"


def _stream(target: Target) -> str:
    """Raw lines, because the SDK hides the end mark that this is about."""
    asked = _client(target).chat.completions.with_streaming_response.create(**_question(target), stream=True)
    with asked as answer:
        events = [line for line in answer.iter_lines() if line.startswith("data:")]
    if not events or events[-1] != "data: [DONE]":
        raise Failed(f"the stream did not end with [DONE] but with {events[-1:]}")
    return f"{len(events)} events, the last one [DONE]"


def _limit(target: Target) -> str:
    if target.limit is None:
        raise Skipped("no limit is set, so there is nothing to reach")
    most = target.limit * TRIES_PER_LIMIT + 1
    if most > MOST_TRIES:
        raise Skipped(f"a limit of {target.limit} requests is too high to be reached by a check")
    client, question = _client(target).with_options(max_retries=0), _question(target)
    for number in range(1, most + 1):
        try:
            client.chat.completions.create(**question)
        except openai.RateLimitError as error:
            wait = error.response.headers.get("retry-after")
            if wait is None:
                raise Failed("the 429 says nothing of when to try again") from None
            return f"request {number} of a limit of {target.limit} got 429, Retry-After {wait}"
    raise Failed(f"{most} requests got through a limit of {target.limit}")


def _conversation(target: Target) -> str:
    """Each turn on a connection of its own, and with another pod where the name of all is known."""
    # A pod on its way out takes no new callers, and has its address until it has ended.
    urls = list(filter(_listens, _behind(target.pods_url))) if target.pods_url else [target.url]
    if not urls:
        raise Failed(f"nobody listens behind {target.pods_url}")
    asked: dict[str, Any] = {"model": _question(target)["model"]}
    for turn in range(TURNS):
        answer = _post(target, urls[turn % len(urls)], asked | {"message": f"This is turn {turn + 1}."})
        asked["conversation_id"] = answer["conversation_id"]
    shown = _ask(target, f"{urls[-1]}/api/v1/conversations/{asked['conversation_id']}")
    if len(shown["messages"]) != 2 * TURNS:
        raise Failed(f"after {TURNS} turns the conversation has {len(shown['messages'])} messages")
    return f"{TURNS} turns over {len(urls)} addresses, and all of it is there"


def _metrics(target: Target) -> str:
    """Of each pod behind the name: a headless Service gives all their addresses."""
    until = time.monotonic() + LEAVING_SECONDS
    while True:
        urls = _behind(target.admin_url)
        try:
            return _metrics_of(urls)
        except OSError:
            # One of several may have ended just now: then its address is soon not among them any more.
            if len(urls) == 1 or time.monotonic() > until:
                raise
            time.sleep(1.0)


def _metrics_of(urls: Sequence[str]) -> str:
    for url in urls:
        page = urllib.request.urlopen(f"{url}/metrics", timeout=PAGE_SECONDS).read().decode()  # noqa: S310
        if "weir_build_info{" not in page:
            raise Failed(f"{url} shows no weir_build_info")
    return f"{len(urls)} of {len(urls)} addresses show metrics"


CHECKS: Final[dict[str, Callable[[Target], str]]] = {
    "auth": _auth,
    "chat": _chat,
    "stream": _stream,
    "conversation": _conversation,
    "metrics": _metrics,
    "limit": _limit,
}
"""By name, in the order in which they are best run: the limit last, because it uses up what others need."""


def _behind(url: str) -> list[str]:
    """An address for each host behind the name in `url`."""
    parts = urlsplit(url)
    port = parts.port or 80
    found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    hosts = sorted({str(address[0]) for *_, address in found})
    return [f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}" for host in hosts]


def _listens(url: str) -> bool:
    parts = urlsplit(url)
    try:
        socket.create_connection((parts.hostname or "", parts.port or 80), timeout=PAGE_SECONDS).close()
    except OSError:
        return False
    return True


def _post(target: Target, url: str, body: dict[str, Any]) -> Any:
    return _ask(target, f"{url}/api/v1/chat", json.dumps(body).encode())


def _ask(target: Target, url: str, body: bytes | None = None) -> Any:
    """The answer of Weir's own API, for which there is no SDK."""
    headers = {"Content-Type": "application/json"}
    if target.key:
        headers["Authorization"] = f"Bearer {target.key}"
    request = urllib.request.Request(url, body, headers)  # noqa: S310  # the address is the caller's
    try:
        return json.load(urllib.request.urlopen(request, timeout=SECONDS))  # noqa: S310
    except urllib.error.HTTPError as error:
        _excuse(target, error.code)
        raise Failed(f"{error.code}: {error.read().decode(errors='replace')[:300]}") from None


def _excuse(target: Target, status: int) -> None:
    """What is no fault of the service that is asked."""
    if status == 401 and target.key is None:
        raise Skipped("it wants an API key, and none was given: WEIR_API_KEY")
    if status == 429:
        raise Skipped("the limit of this key is used up")


def _words(error: Exception) -> str:
    """What a fault says; where its own words say nothing, its kind too."""
    if isinstance(error, KeyError | IndexError | TypeError | ValueError):
        return f"an answer of another form than expected: {type(error).__name__} {error}"
    return str(error) or type(error).__name__


def _client(target: Target, key: str | None = None) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{target.url}/v1", api_key=key or target.key or "none", timeout=SECONDS, max_retries=1
    )


def _question(target: Target) -> dict[str, Any]:
    """No parameter that only some models take."""
    try:
        model = target.model or next(iter(_client(target).models.list())).id
    except openai.AuthenticationError as error:
        _excuse(target, error.status_code)
        raise
    except StopIteration:
        raise Failed("no model is listed") from None
    return {"model": model, "messages": [{"role": "user", "content": "Say one word."}]}
