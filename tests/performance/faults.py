"""The fault suite, measured: `python -m tests.performance.faults` prints its tables; --write: into the docs.

`table`: each fault once; `deadlines`: each deadline 20 times; `amplification`: an upstream at 100 % errors.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Final, NamedTuple

import aiohttp
import structlog

from service.config import FileConfig
from tests.fakes.upstream import FakeUpstream
from tests.faults import (
    CASES,
    FAULTS,
    HELLO,
    Seen,
    Sees,
    Surroundings,
    Times,
    expected,
    full_backlog,
    name_of,
    observe,
    outage,
)
from tests.performance.pages import put, table
from tests.running import RunningWeir, configuration

PAGE: Final = "resilience.md"
TIMES: Final = Times(first_byte=1.0, idle=2.0, answer=6.0, retries=2)
SECONDS: Final = 2.0
RUNS: Final = 20
BOUND: Final = 0.05
REQUESTS: Final = 1_100


# -- each fault ----------------------------------------------------------------------------------


def faults() -> tuple[str, bool]:
    seen: dict[str, Seen] = {}
    wrong = 0
    with structlog.testing.capture_logs(), Surroundings() as surroundings:
        for fault, stream in CASES:
            name = name_of(fault, stream=stream)
            seen[name] = observe(surroundings, fault, TIMES, stream=stream)
            wanted = expected(fault, TIMES, stream=stream)
            if seen[name].sees != wanted:
                wrong += 1
                print(f"{name}: {seen[name].sees}, and not {wanted}", file=sys.stderr)
    rows = []
    for fault in FAULTS:
        of = [seen[name] for s in (False, True) if (name := name_of(fault, stream=s)) in seen]
        forms = [form for form, sees in (("whole", fault.whole), ("stream", fault.stream)) if sees]
        if len(of) == 2 and _cells(of[0]) == _cells(of[1]):
            seconds = " / ".join(f"{each.seconds:.2f}" for each in of)
            rows.append((fault.name, "both", seconds, *_cells(of[0])))
            continue
        for form, each in zip(forms, of, strict=True):
            rows.append((fault.name, form, f"{each.seconds:.2f}", *_cells(each)))
    heads = ("fault", "answer", "seconds", "the caller sees", "the SDK raises", "retry?", "attempts")
    told = table((*heads, "ledger: outcome, code, usage", "metrics: attempts"), rows)
    return told, not wrong


def _cells(seen: Seen) -> tuple[str, ...]:
    sees = seen.sees
    tokens = {None: "none", "provider": "the provider's", "estimated": "estimated"}[sees.usage]
    code = f", `{sees.ledger_code}`" if sees.ledger_code else ""
    attempts = ", ".join(
        f"{_times(count)}{kind.replace(' ', ' `', 1)}`" for kind, count in seen.attempts.items()
    )
    return (
        _caller(sees),
        f"`{sees.raises}`" if sees.raises else "-",
        {"true": "yes", "false": "no", None: "-"}[sees.again]
        + (f", after {sees.retry_after} s" if sees.retry_after else ""),
        str(sees.attempts),
        f"`{sees.outcome.value}`{code}, {tokens}",
        attempts,
    )


def _times(count: float) -> str:
    return f"{count:.0f} " if count > 1 else ""


def _caller(sees: Sees) -> str:
    if sees.code is None:
        return "the answer"
    return f"200, last event `{sees.code}`" if sees.status == 200 else f"{sees.status} `{sees.code}`"


# -- deadlines -----------------------------------------------------------------------------------


class Limit(NamedTuple):
    """A deadline: what sets it, and what would go on without it."""

    name: str
    model: str
    stream: bool
    upstream: dict[str, float]
    settings: dict[str, float]
    header: bool = False
    since_last_event: bool = False


LIMITS: Final = (
    Limit("`connect_timeout`", "any", False, {"connect_timeout": SECONDS}, {}),
    Limit("`first_byte_timeout`, whole answer", "hang", False, {"first_byte_timeout": SECONDS}, {}),
    Limit("`first_byte_timeout`, stream", "stall-comments", True, {"first_byte_timeout": SECONDS}, {}),
    Limit("`idle_timeout`", "stall", True, {"idle_timeout": SECONDS}, {}, since_last_event=True),
    Limit("`OPENAI_TIMEOUT`: all attempts", "hang", False, {}, {"openai_timeout": SECONDS}),
    Limit("`REQUEST_TIMEOUT`, whole answer", "hang", False, {}, {"request_timeout": SECONDS}),
    Limit("`REQUEST_TIMEOUT`, in the stream", "ticks-200-20", True, {}, {"request_timeout": SECONDS}),
    Limit("`X-Request-Timeout`, whole answer", "hang", False, {}, {}, header=True),
    Limit("`X-Request-Timeout`, in the stream", "ticks-200-20", True, {}, {}, header=True),
)


def deadlines() -> tuple[str, bool]:
    rows, well = [], True
    with structlog.testing.capture_logs():
        for limit in LIMITS:
            took = sorted(_deadline(limit))
            worst = max((seconds / SECONDS - 1 for seconds in took), key=abs)
            well = well and abs(worst) <= BOUND
            median = took[len(took) // 2]
            rows.append((limit.name, f"{median:.3f}", f"{took[0]:.3f}", f"{took[-1]:.3f}", f"{worst:+.1%}"))
    return table((f"deadline of {SECONDS:g} s", "median", "shortest", "longest", "worst"), rows), well


def _deadline(limit: Limit) -> list[float]:
    """The seconds of each run: from the request, or the last good event, to the error."""
    with ExitStack() as stack:
        upstream = stack.enter_context(FakeUpstream(record=False))
        nowhere = "connect_timeout" in limit.upstream
        base_url = stack.enter_context(full_backlog()) if nowhere else upstream.base_url
        place = {"name": "fake", "base_url": base_url, **limit.upstream}
        settings: dict[str, Any] = {"openai_max_retries": 0, "openai_timeout": 60.0, **limit.settings}
        file = FileConfig.model_validate({"upstreams": [place]})
        weir = stack.enter_context(RunningWeir(configuration(file=file, **settings)))
        return asyncio.run(_ask_often(weir.url, limit))


async def _ask_often(url: str, limit: Limit) -> list[float]:
    async with aiohttp.ClientSession() as session:

        async def one(number: int) -> float:
            await asyncio.sleep(number * SECONDS / RUNS)
            return await _ask(session, url, limit)

        return await asyncio.gather(*(one(number) for number in range(RUNS)))


async def _ask(session: aiohttp.ClientSession, url: str, limit: Limit) -> float:
    body = {"model": limit.model, "messages": HELLO, "stream": limit.stream}
    headers = {"X-Request-Timeout": f"{SECONDS:g}"} if limit.header else {}
    began, last = time.perf_counter(), b""
    async with session.post(f"{url}/v1/chat/completions", json=body, headers=headers) as answer:
        async for data in answer.content.iter_any():
            if b'"error"' in data:
                took = time.perf_counter() - began
                assert b"api_timeout" in data or b"request_deadline_exceeded" in data, data
                return took
            if limit.since_last_event:
                began = time.perf_counter()
            last = data
    raise AssertionError(last)


# -- amplification -------------------------------------------------------------------------------


def amplification() -> tuple[str, bool]:
    rows, well = [], True
    with structlog.testing.capture_logs():
        for second in (False, True):
            for one_circuit in (True, False):
                with FakeUpstream(record=False) as upstream:
                    out = outage(upstream, REQUESTS, second=second, one_circuit=one_circuit)
                at_failing, at_all = out.failing / REQUESTS, (out.failing + out.well) / REQUESTS
                well = well and at_failing <= 1.1 and (at_all <= 1.1 or (second and not one_circuit))
                rows.append(
                    (
                        "one that is well" if second else "none",
                        "open" if one_circuit else "never open",
                        f"{out.good:,} of {REQUESTS:,}",
                        f"{out.failing:,}",
                        f"{out.well:,}" if second else "-",
                        f"{at_failing:.2f}",
                        f"{at_all:.2f}",
                    )
                )
    heads = ("second upstream", "circuits", "answered", "attempts at the failing one", "at the second")
    return table((*heads, "a request there", "a request in all"), rows), well


PARTS: Final[dict[str, Callable[[], tuple[str, bool]]]] = {
    "faults": faults,
    "deadlines": deadlines,
    "amplification": amplification,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help=f"put the tables into docs/{PAGE}")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all if none is named")
    options = parser.parse_args()
    failed = 0
    for name in options.parts or PARTS:
        text, well = PARTS[name]()
        failed += not well
        print(f"{name}: {'as wanted' if well else 'NOT as wanted'}\n\n{text}\n", flush=True)
        if options.write:
            put(PAGE, name, text)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
