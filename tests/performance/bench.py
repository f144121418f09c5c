"""The benchmark's run: starts everything, takes turns measuring, prints the table.

In each round every service is started anew, then each measurement visits all of them one after the other,
in an order that rotates from round to round, so that slow minutes of the machine hit all alike.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Final, NamedTuple, NoReturn, TypeVar, get_args

import msgspec

from tests.performance.load import Job, Outcome
from tests.performance.processes import BenchmarkError, Child, Cores, free_port, get, pin, resident_mb
from tests.performance.report import (
    TITLES,
    Metric,
    Row,
    Samples,
    as_json,
    bottleneck,
    goals,
    table,
    telemetry,
)
from tests.redis_servers import Single

_Number = TypeVar("_Number", int, float)

_API_KEY: Final = "weir-benchmark-key"
_RULES: Final = """
upstreams: [{{name: bench, base_url: "{upstream}/v1", api_key_env: OPENAI_API_KEY}}]
limits: [{{name: all, requests: 100000000, tokens: 100000000000, concurrent: 100000}}]
budgets: [{{name: month, usd: 1000000}}]
"""
_ROWS: Final[tuple[Row, ...]] = get_args(Row)
_OF_TELEMETRY: Final[tuple[Row, ...]] = ("weir_quiet", "weir_traces_1", "weir_traces")
_ON_REDIS: Final[tuple[Row, ...]] = ("weir_redis", "weir_turns")
_TALKS: Final[tuple[Row, ...]] = ("weir_turns",)
"""Its callers hold conversations; that API's streams are other ones, so they are not compared."""
_SAMPLED: Final[dict[Row, str]] = {"weir_traces_1": "0.01", "weir_traces": "1"}
_ANSWER_SECONDS: Final = 60.0
"""How much longer than its measured time a run may take altogether."""


class Measurement(NamedTuple):
    """One kind of run and what is kept of it."""

    name: str
    job: Callable[[float, int, int], Job]
    kept: Callable[[Outcome], dict[Metric, float | None]]
    left_out: tuple[Row, ...] = ()
    """Not measured by this."""


def _per_thousand(cpu_share: float, per_second: float) -> float | None:
    return 1000 * cpu_share / per_second if per_second else None


MEASUREMENTS: Final = (
    Measurement(
        "latency",
        lambda seconds, port, pid: Job("whole", port, 1, seconds, _API_KEY, pid),
        lambda o: {"p50_ms": o.p50_ms, "p99_ms": o.p99_ms},
        left_out=_OF_TELEMETRY,
    ),
    Measurement(
        "requests/s",
        lambda seconds, port, pid: Job("whole", port, 32, seconds, _API_KEY, pid),
        lambda o: {
            "requests_per_second": o.answers_per_second,
            "cpu_share_requests": o.cpu_share,
            "cpu_seconds_per_1000_requests": _per_thousand(o.cpu_share, o.answers_per_second),
        },
    ),
    Measurement(
        "paced streams",
        lambda seconds, port, pid: Job("paced", port, 200, seconds, _API_KEY, pid),
        lambda o: {
            "paced_chunks_per_second": o.chunks_per_second,
            "cpu_seconds_per_1000_chunks": _per_thousand(o.cpu_share, o.chunks_per_second),
        },
        left_out=_TALKS,
    ),
    Measurement(
        "unpaced streams",
        lambda seconds, port, pid: Job("fast", port, 32, seconds, _API_KEY, pid),
        lambda o: {"fast_chunks_per_second": o.chunks_per_second, "cpu_share_fast": o.cpu_share},
        left_out=(*_OF_TELEMETRY, *_TALKS),
    ),
)


@dataclass(slots=True)
class Service:
    """A row's process while a round runs."""

    row: Row
    port: int
    pid: int


@dataclass(slots=True)
class Harness:
    """What stays the same for the whole run, and what was found so far."""

    directory: Path
    cores: Cores
    upstream: Child
    upstream_port: int
    load: Child
    seconds: float
    profile: Path | None
    samples: Samples = field(default_factory=Samples)
    errors: list[str] = field(default_factory=list)
    given_up: set[Row] = field(default_factory=set)

    def run_round(self, turn: int, rows: Sequence[Row]) -> None:
        rotated = [*rows[turn % len(rows) :], *rows[: turn % len(rows)]]
        with ExitStack() as running:
            services = []
            for row in rotated:
                if row not in self.given_up:
                    try:
                        services.append(self._start(row, turn, running))
                    except BenchmarkError as error:
                        self.given_up.add(row)
                        self._fail(turn, row, "start", str(error))
            for measurement in MEASUREMENTS:
                for service in services:
                    if service.row not in measurement.left_out:
                        self._measure(turn, service, measurement)
            for service in services:
                if service.row != "upstream":
                    self.samples.add(service.row, "resident_mb", turn, resident_mb(service.pid))

    def _start(self, row: Row, turn: int, running: ExitStack) -> Service:
        if row == "upstream":
            return Service(row, self.upstream_port, self.upstream.pid)
        port, admin_port = free_port(), free_port()
        url = f"http://127.0.0.1:{self.upstream_port}"
        if row.startswith("weir"):
            command = self._weir_command(row)
            environment = self._weir_environment(port, admin_port, url)
            if row in _ON_REDIS:
                environment |= self._on_redis(running, url)
            if row in _SAMPLED:
                environment |= self._traced(running, _SAMPLED[row])
            ready = (admin_port, "/readyz")
        else:
            module = ["-m", "tests.performance.references", row]
            command = [sys.executable, *module, "--port", str(port), "--upstream", url]
            environment = {}
            ready = (port, "/")
        child = Child(
            command,
            log=self.directory / f"{row}.log",
            cores=self.cores.service,
            environment=environment,
            # cProfile writes its file when the interpreter ends as after Ctrl-C, not when SIGTERM ends it.
            stop_signal=signal.SIGINT if row.startswith("weir") and self.profile else signal.SIGTERM,
        )
        running.callback(child.stop)
        self.samples.add(row, "ready_seconds", turn, child.wait_until_ready(*ready))
        return Service(row, port, child.pid)

    def _on_redis(self, running: ExitStack, upstream: str) -> dict[str, str]:
        """A server of its own for this round, on the load generator's cores; limits that nobody reaches."""
        pin_before = pin(self.cores.rest)
        try:
            redis = running.enter_context(Single())
        finally:
            pin(pin_before)
        rules = self.directory / "rules.yaml"
        rules.write_text(_RULES.format(upstream=upstream))
        return {"REDIS_URL": redis.url, "WEIR_CONFIG": str(rules)}

    def _traced(self, running: ExitStack, ratio: str) -> dict[str, str]:
        """A collector of its own for this round, on the load generator's cores."""
        command = [sys.executable, "-m", "tests.performance.collector"]
        collector = Child(command, log=self.directory / "collector.log", cores=self.cores.rest, piped=True)
        running.callback(collector.stop)
        port = int(collector.ask(None, _ANSWER_SECONDS))
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
            "OTEL_TRACES_SAMPLER": "traceidratio",
            "OTEL_TRACES_SAMPLER_ARG": ratio,
        }

    def _weir_command(self, row: Row) -> list[str]:
        profiler = ["-m", "cProfile", "-o", str(self.profile)] if self.profile else []
        module = "tests.performance.quiet" if row == "weir_quiet" else "service"
        return [sys.executable, *profiler, "-m", module]

    def _weir_environment(self, port: int, admin_port: int, upstream: str) -> dict[str, str]:
        keys = self.directory / "keys.yaml"
        digest = hashlib.sha256(_API_KEY.encode()).hexdigest()
        keys.write_text(f'keys: [{{name: bench, tenant: bench, sha256: "{digest}"}}]\n')
        return {
            "HOST": "127.0.0.1",
            "PORT": str(port),
            "ADMIN_PORT": str(admin_port),
            "OPENAI_BASE_URL": f"{upstream}/v1",
            "OPENAI_API_KEY": "sk-bench",
            "WEIR_KEYS_FILE": str(keys),
            "LOG_FORMAT": "json",
        }

    def _measure(self, turn: int, service: Service, measurement: Measurement) -> None:
        _progress(f"round {turn + 1}: {measurement.name}: {TITLES[service.row]}")
        calls_before = self._upstream_calls()
        job = measurement.job(self.seconds, service.port, service.pid)
        if service.row in _TALKS:
            job = msgspec.structs.replace(job, mode="turns")
        line = self.load.ask(msgspec.json.encode(job), self.seconds + _ANSWER_SECONDS)
        outcome = msgspec.json.decode(line, type=Outcome)
        for error, count in outcome.errors.items():
            self._fail(turn, service.row, measurement.name, f"{count} times {error}")
        calls = self._upstream_calls() - calls_before
        if calls != outcome.answers and not outcome.errors:
            found = f"{outcome.answers} answers from {calls} calls of the upstream (a cache, or retries?)"
            self._fail(turn, service.row, measurement.name, found)
        if not outcome.answers:
            return
        for metric, value in measurement.kept(outcome).items():
            self.samples.add(service.row, metric, turn, value)

    def _upstream_calls(self) -> int:
        answer = get(self.upstream_port, "/calls")
        if answer is None:
            raise BenchmarkError("the fake upstream does not answer")
        return int(answer)

    def _fail(self, turn: int, row: Row, what: str, error: str) -> None:
        message = f"round {turn + 1}: {TITLES[row]}: {what}: {error}"
        self.errors.append(message)
        _progress(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if everything ran, goals reached or not; 1 if anything failed; 130 after Ctrl-C."""
    options = _options(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupted)
    cores = Cores.choose()
    pin(cores.rest)
    try:
        with ExitStack() as running:
            harness = _harness(options, cores, running)
            for turn in range(options.rounds):
                harness.run_round(turn, options.only)
            _print(harness, options)
    except KeyboardInterrupt:
        _progress("interrupted")
        return 130
    except BenchmarkError as error:
        _progress(f"failed: {error}")
        return 1
    return 1 if harness.errors else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.performance", description=__doc__)
    parser.add_argument("--rounds", type=_positive(int), default=5)
    parser.add_argument("--seconds", type=_positive(float), default=4.0, help="measured time of each run")
    parser.add_argument("--only", type=_rows, default=_ROWS, metavar="NAMES", help=",".join(_ROWS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples there too")
    parser.add_argument(
        "--profile", type=Path, metavar="FILE", help="run Weir under cProfile; its figures then say nothing"
    )
    return parser.parse_args(arguments)


def _positive(kind: Callable[[str], _Number]) -> Callable[[str], _Number]:
    def parse(text: str) -> _Number:
        value = kind(text)
        if value <= 0:
            raise argparse.ArgumentTypeError("must be above 0")
        return value

    return parse


def _rows(text: str) -> tuple[Row, ...]:
    names = text.split(",")
    if unknown := set(names) - set(_ROWS):
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))} is none of {', '.join(_ROWS)}")
    return tuple(row for row in _ROWS if row in names)


def _harness(options: argparse.Namespace, cores: Cores, running: ExitStack) -> Harness:
    directory = Path(running.enter_context(tempfile.TemporaryDirectory(prefix="weir-benchmark-")))
    children = []
    for name in ("upstream", "load"):
        command = [sys.executable, "-m", f"tests.performance.{name}"]
        children.append(Child(command, log=directory / f"{name}.log", cores=cores.rest, piped=True))
        running.callback(children[-1].stop)
    upstream, load = children
    return Harness(
        directory=directory,
        cores=cores,
        upstream=upstream,
        upstream_port=int(upstream.ask(None, _ANSWER_SECONDS)),
        load=load,
        seconds=options.seconds,
        profile=options.profile.resolve() if options.profile else None,
    )


def _print(harness: Harness, options: argparse.Namespace) -> None:
    samples, rows = harness.samples, options.only
    about = (
        f"Python {platform.python_version()} on {platform.system()} {platform.machine()}, "
        f"{os.cpu_count()} cores. {options.rounds} round(s) of {options.seconds:g} s a run; "
        "median (lowest to highest), ratios taken within each round."
    )
    parts = [table(samples, rows), f"{about}\n{harness.cores.note}", bottleneck(samples, rows)]
    if options.profile:
        parts.append("Weir ran under a profiler: its figures say nothing.")
    parts += [telemetry(samples), goals(samples)]
    if harness.errors:
        parts.append(
            "\n".join(["Errors:", *(f"- {error}".replace("\n", "\n  ") for error in harness.errors)])
        )
    print("\n\n".join(filter(None, parts)))
    if options.json:
        found = as_json(samples, rows)
        found |= {"about": about, "pinning": harness.cores.note, "errors": harness.errors}
        options.json.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")


def _progress(message: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        print(message, file=sys.stderr, flush=True)


def _interrupted(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
