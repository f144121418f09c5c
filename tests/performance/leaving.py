"""How soon an upstream is cancelled after its caller has left: `python -m tests.performance.leaving`.

Everything runs in one process, so the figures hold the test's own delays too.
"""

from __future__ import annotations

import json
import socket
import statistics
import sys
import time

from tests.fakes.upstream import FakeUpstream
from tests.running import RunningWeir, configuration

LEAVERS = 200
BOUND_SECONDS = 0.25


def leave(port: int, upstream: FakeUpstream, number: int, *, stream: bool) -> float:
    """Ask, leave once the upstream has the question; the seconds until it was cancelled."""
    body = json.dumps({"model": "endless" if stream else "hang", "messages": [], "stream": stream}).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=20) as caller:
        caller.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: w\r\nContent-Length: %d\r\n\r\n%s"
            % (len(body), body)
        )
        call = upstream.wait_for_call(number)
        if stream:
            caller.recv(1000)
    left_at = time.monotonic()
    if not call.cancelled.wait(10) or call.cancelled_at is None:
        return float("inf")
    return call.cancelled_at - left_at


def main() -> int:
    with (
        FakeUpstream() as upstream,
        RunningWeir(configuration(openai_base_url=upstream.base_url, log_level="error")) as weir,
    ):
        took = [leave(weir.port, upstream, n + 1, stream=n % 2 == 0) for n in range(LEAVERS)]
    within = sum(seconds <= BOUND_SECONDS for seconds in took)
    print(
        f"{LEAVERS} callers left: median {1000 * statistics.median(took):.0f} ms, "
        f"longest {1000 * max(took):.0f} ms until the upstream was cancelled; "
        f"{within} of {LEAVERS} within {1000 * BOUND_SECONDS:.0f} ms",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
