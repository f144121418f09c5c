"""What kube-state-metrics and the kubelet would say of the run's pods, in their names: there is no cluster.

That a pod runs, and whether it is ready, is true. Its restarts are none, its processor is throttled a little,
and the autoscaler wants as many pods as there are.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Final, Self

MOST_PODS: Final = 6
PHASES: Final = ("Pending", "Running", "Succeeded", "Failed", "Unknown")
PERIODS_PER_SECOND: Final = 10
THROTTLED: Final = 0.03


class ClusterMetrics:
    """Serves /metrics at `address`; `pods` tells the names of those that are ready."""

    def __init__(self, labels: Mapping[str, str], pods: Callable[[], Sequence[str]]) -> None:
        self._labels = dict(labels)
        self._pods = pods
        self._began: dict[str, float] = {}
        metrics = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = metrics.text().encode()
                self.send_response(200)
                self.send_header("content-type", "text/plain; version=0.0.4")
                self.send_header("content-length", str(len(body)))
                with suppress(ConnectionError):  # a scraper that waited no longer
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None: ...  # noqa: A002

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def text(self) -> str:
        pods, lines = self._pods(), []
        for pod in pods:
            container = {"pod": pod, "container": "weir"}
            seconds = time.monotonic() - self._began.setdefault(pod, time.monotonic())
            periods = seconds * PERIODS_PER_SECOND
            lines += [
                self._line("kube_pod_container_info", 1, **container),
                self._line("kube_pod_status_ready", 1, pod=pod, condition="true"),
                *(
                    self._line("kube_pod_status_phase", phase == "Running", pod=pod, phase=phase)
                    for phase in PHASES
                ),
                self._line("kube_pod_container_status_restarts_total", 0, **container),
                self._line("container_cpu_cfs_periods_total", periods, **container),
                self._line("container_cpu_cfs_throttled_periods_total", periods * THROTTLED, **container),
            ]
        for name, value in (
            ("status_current_replicas", len(pods)),
            ("status_desired_replicas", len(pods)),
            ("spec_max_replicas", MOST_PODS),
        ):
            lines.append(
                self._line(f"kube_horizontalpodautoscaler_{name}", value, horizontalpodautoscaler="weir")
            )
        return "\n".join(lines) + "\n"

    def _line(self, name: str, value: float, **labels: str) -> str:
        shown = ",".join(f'{k}="{v}"' for k, v in {**self._labels, **labels}.items())
        return f"{name}{{{shown}}} {value:g}"
