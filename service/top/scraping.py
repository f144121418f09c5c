"""Asking pods for their metrics, all at a time; and reading of these what the view needs."""

from __future__ import annotations

import http.client
import math
import os
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeAlias
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

from service.top.figures import Series, Values

SECONDS: Final = 5.0
"""For one pod's answer."""
MOST_BYTES: Final = 64 * 1024 * 1024

REQUESTS: Final = "weir_requests_total"
TIME_TO_FIRST: Final = "gen_ai_server_time_to_first_token_seconds"
DURATION: Final = "gen_ai_server_request_duration_seconds"
INPUT_TOKENS: Final = "gen_ai_client_inference_usage_input_tokens_total"
OUTPUT_TOKENS: Final = "gen_ai_client_inference_usage_output_tokens_total"
COST: Final = "weir_cost_usd_total"
UNPRICED: Final = "weir_unpriced_requests_total"
CACHE: Final = "weir_cache_requests_total"
INFLIGHT: Final = "weir_inflight_requests"
QUEUE: Final = "weir_queue_requests"
PLACES: Final = "weir_concurrency_limit"
LAG: Final = "weir_event_loop_lag_seconds"
DEGRADED: Final = "weir_degraded"
CIRCUITS: Final = "weir_circuit_state"
BUDGETS: Final = "weir_budget_used_ratio"
BUILD: Final = "weir_build_info"
BEGAN: Final = "process_start_time_seconds"

_DIRECT: Final = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Pods are no addresses for a proxy, whatever the environment says."""

COUNTERS: Final = frozenset(
    (
        *(REQUESTS, INPUT_TOKENS, OUTPUT_TOKENS, COST, UNPRICED, CACHE),
        *(f"{TIME_TO_FIRST}_bucket", f"{DURATION}_bucket"),
    )
)
GAUGES: Final = frozenset((INFLIGHT, QUEUE, PLACES, LAG, DEGRADED, CIRCUITS, BUDGETS, BUILD, BEGAN))
_WANTED: Final = tuple(sorted(COUNTERS | GAUGES))


class Away(Exception):
    """A pod that gives no metrics; the text says why."""


Answer: TypeAlias = Values | Away


def metrics_url(text: str) -> str:
    """The address of the metrics, of what a person has written. Raises ValueError."""
    url = text if "://" in text else f"http://{text}"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
        raise ValueError(f"{text!r} is no address such as http://127.0.0.1:9000")
    return url if parts.path.strip("/") else f"{parts.scheme}://{parts.netloc}/metrics"


def read(text: str) -> dict[Series, float]:
    """The values that the view needs, counters and gauges. Raises Away if there are none of Weir's."""
    # Most lines are of other metrics: they are not even parsed.
    lines = "\n".join(line for line in text.splitlines() if line.startswith(_WANTED))
    found: dict[Series, float] = {}
    try:
        for family in text_string_to_metric_families(lines + "\n"):
            for sample in family.samples:
                if math.isfinite(sample.value):
                    found[Series(sample.name, tuple(sorted(sample.labels.items())))] = sample.value
    except (ValueError, KeyError, IndexError):
        raise Away("its metrics cannot be read") from None
    if not any(series.name == BUILD for series in found):
        raise Away("what answers there has no metrics of Weir; its admin port has them")
    return found


def ask(url: str) -> dict[Series, float]:
    """One pod's values. Raises Away."""
    request = urllib.request.Request(url, headers={"Accept": "text/plain"})  # noqa: S310  # metrics_url looked
    try:
        with _DIRECT.open(request, timeout=SECONDS) as answer:
            text = answer.read(MOST_BYTES).decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        error.close()
        raise Away(f"it answers with the status {error.code}; Weir's admin port has /metrics") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Away(_why(error)) from None
    return read(text)


class Round:
    """One question to each pod, on a thread each. `done` when all have answered, or had their time."""

    def __init__(self, urls: Sequence[str], told: Callable[[], None] = lambda: None) -> None:
        """`told` is called, on another thread, as each answer comes."""
        self._urls = urls
        self._told = told
        self._answers: dict[str, Answer] = {}
        self._changed = threading.Condition()
        for url in urls:
            threading.Thread(target=self._ask, args=(url,), daemon=True).start()

    @property
    def done(self) -> bool:
        return len(self._answers) == len(self._urls)

    def wait(self) -> None:
        """Until it is done, but not for ever: a name server may be silent for longer than a pod may."""
        with self._changed:
            self._changed.wait_for(lambda: self.done, 2 * SECONDS)

    @property
    def answers(self) -> Mapping[str, Answer]:
        """By address; who has not answered by now is away."""
        answers = dict(self._answers)
        return {url: answers.get(url) or Away("it does not answer") for url in self._urls}

    def _ask(self, url: str) -> None:
        answer: Answer
        try:
            answer = ask(url)
        except Away as away:
            answer = away
        with self._changed:
            self._answers[url] = answer
            self._changed.notify_all()
        self._told()


def _why(error: BaseException) -> str:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(reason, TimeoutError):
        return f"it does not answer within {SECONDS:g} s"
    if isinstance(reason, socket.gaierror):
        return "there is no such host"
    if isinstance(reason, OSError) and reason.errno:
        return os.strerror(reason.errno).lower()
    return str(reason).lower() or type(reason).__name__
