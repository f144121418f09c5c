"""How long an answer from the cache takes, one caller: `python -m tests.performance.cached`."""

from __future__ import annotations

import http.client
import json
import statistics
import sys
import time
from typing import Final

from tests.redis_servers import Single
from tests.running import WeirProcess

REQUESTS: Final = 3_000
GOAL_MS: Final = 1.5
BODY: Final = json.dumps(
    {"model": "simulator", "temperature": 0, "messages": [{"role": "user", "content": "Why steps? " * 50}]}
)


def measure(what: str, **values: str) -> float:
    """Milliseconds, median, of hits."""
    with WeirProcess(LOG_FORMAT="json", **values) as weir:
        weir.wait_until_ready()
        connection = http.client.HTTPConnection("127.0.0.1", weir.port)
        times, uses = [], []
        for _ in range(REQUESTS):
            began = time.perf_counter()
            connection.request("POST", "/v1/chat/completions", BODY, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            times.append((time.perf_counter() - began) * 1000)
            uses.append(answer.headers["x-weir-cache"])
        connection.close()
    hits = sorted(t for t, used in zip(times, uses, strict=True) if used == "hit")
    p50, p99 = statistics.median(hits), hits[int(len(hits) * 0.99)]
    print(f"| {what} | {len(hits)} | {p50:.2f} | {p99:.2f} |")
    return p50


def main() -> int:
    """0 also where the goal is missed, as in the rest of `make bench`."""
    print("| where the answer is | hits | p50, ms | p99, ms |\n|---|---:|---:|---:|")
    with Single() as redis:
        found = [
            measure("in memory, no Redis"),
            measure("in memory, the accounts on Redis", REDIS_URL=redis.url),
            measure("in Redis alone", REDIS_URL=redis.url, CACHE_MAX_BYTES="0"),
        ]
    print(f"\nGoal, p50 < {GOAL_MS} ms: {'reached' if max(found) < GOAL_MS else 'missed'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
