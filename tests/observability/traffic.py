"""The scripted run: pods, providers and a Redis, traffic with a deploy in the middle, and its known truth.

    async with Traffic(directory, plan) as traffic: ...

Pods `a` and `b` run one version; in the middle `c` comes with the next one and takes the place of `a`, which
drains. Meanwhile Redis is away for some seconds, the YAML is replaced by a broken one and by a good one, and
at the end of `a` a stream is cut. Nothing leaves 127.0.0.1.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, Final, NamedTuple

import httpx2
import yaml

from service.domain import Outcome
from tests.fakes.otlp import FakeCollector
from tests.observability.asking import Ask, Caller, Seen, Used, cost, used
from tests.observability.cluster import ClusterMetrics
from tests.observability.pods import Pod
from tests.observability.prometheus import Target
from tests.observability.providers import Provider
from tests.observability.script import Script
from tests.observability.settings import (
    ADMIN,
    AZURE,
    CAPPED_REQUESTS,
    GROQ,
    OPENAI,
    PLACES,
    QUEUE,
    VLLM,
    document,
    secret,
)
from tests.postgres_server import PostgresServer
from tests.redis_servers import Single
from tests.running import WeirProcess, free_port

CLUSTER, NAMESPACE, JOB = "harbor", "llm", "weir"
OLD, NEW = "2.3.0", "2.4.0"
PODS: Final = {"a": "weir-6d5f7c9b4-k2x8p", "b": "weir-6d5f7c9b4-zr4wq", "c": "weir-7b9d8f6c5-m7t2n"}
WORKER: Final = "weir-worker-5f6c8d9b7-x9v2r"
POLL_SECONDS: Final = 0.02
TRIES: Final = 50
SETTLED_SECONDS: Final = 60.0


@dataclass(frozen=True)
class Plan:
    """How long the run is and what happens when, in seconds from the beginning of its main part."""

    seconds: float
    rate: Callable[[float], float]
    fault_share: float
    bad_config_at: float
    good_config_at: float
    outage: tuple[float, float]
    rush_at: float
    deploy_at: float
    """The new pod takes the place of the old one, which ends when it has no more to do."""
    drain_seconds: float = 1.5
    rush: int = PLACES + QUEUE + 60
    """Requests that come at once: more than there is room for."""


@dataclass
class Truth:
    """What every view of the run has to show."""

    asked: list[tuple[Ask, Seen]] = field(default_factory=list)
    surprises: list[str] = field(default_factory=list)

    def rated(self) -> Truth:
        """As much of it as rates can see: what came after the first scrape of its pod."""
        return Truth([(ask, seen) for ask, seen in self.asked if not seen.at_opening])

    def saw(self, ask: Ask, seen: Seen) -> None:
        self.asked.append((ask, seen))
        if seen.outcome not in (ask.expect, Outcome.OVERLOADED):
            self.surprises.append(f"{ask.model} {ask.told.id} {ask.told.faults}: {seen}, not {ask.expect}")

    @property
    def outcomes(self) -> Counter[Outcome]:
        return Counter(seen.outcome for _, seen in self.asked)

    def used(self) -> Iterable[tuple[Ask, Used]]:
        for ask, seen in self.asked:
            tokens = used(ask, seen)
            if tokens is not None:
                yield ask, tokens

    def tokens(self) -> dict[str, Counter[str]]:
        """By kind, then by the model that was asked for."""
        found: dict[str, Counter[str]] = defaultdict(Counter)
        for ask, tokens in self.used():
            for kind, number in tokens._asdict().items():
                found[kind][ask.model] += number
        return found

    def dollars(self) -> dict[tuple[str, str], Decimal]:
        """By tenant and the model that was asked for."""
        found: dict[tuple[str, str], Decimal] = defaultdict(Decimal)
        for ask, tokens in self.used():
            usd = cost(ask, tokens)
            if usd is not None:
                found[(ask.tenant, ask.model)] += usd
        return found


class LogLines(NamedTuple):
    """What one pod wrote."""

    pod: str
    requests: list[dict[str, Any]]
    """Its canonical lines."""
    others: list[dict[str, Any]]


class Traffic:
    """The run's parts; `main` is the run, and `close` ends all processes and reads what they left."""

    def __init__(
        self, directory: Path, plan: Plan, *, seed: int = 7, environment: dict[str, str] | None = None
    ) -> None:
        self.plan = plan
        self.truth = Truth()
        self.script = Script(seed)
        self.pods: dict[str, Pod] = {}
        self.opened: dict[str, str] = {}
        """The metrics of each pod as they were when its part of the run began."""
        self.on_pods: Callable[[list[Target]], None] = lambda _: None
        """Told whenever a pod comes or is gone."""
        self.until_scraped: Callable[[str], None] = lambda _: None
        """Returns when Prometheus has what the pod of this name has counted by now."""
        self._directory = directory
        self._environment = environment or {}
        self._stack = ExitStack()
        self._scraped: list[str] = []
        self._asked_now: list[Pod] = []
        self._turns = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()
        self._running: Counter[str] = Counter()
        """Requests under way, by pod."""
        self.redis = self._stack.enter_context(Single())
        self.worker: WeirProcess
        self.providers = {name: self._stack.enter_context(Provider(name)) for name in (OPENAI, AZURE, VLLM)}
        self.collector = self._stack.enter_context(FakeCollector())
        self.cluster = self._stack.enter_context(
            ClusterMetrics({"cluster": CLUSTER, "namespace": NAMESPACE}, self._ready)
        )
        self._config = directory / "weir.yaml"
        addresses = {name: provider.base_url for name, provider in self.providers.items()}
        addresses[GROQ] = f"http://127.0.0.1:{free_port()}/v1"  # nobody is there
        self.document = document(addresses)
        self._write(yaml.safe_dump(self.document))
        self._caller: Caller

    # -- the parts of the run, in their order ----------------------------------------------------------

    async def start(self) -> None:
        """Two pods, and one request of each kind to each of them."""
        self._caller = Caller(self._reached)
        for name in ("a", "b"):
            self._begin(name, OLD)
            self._scraped.append(name)
        await asyncio.to_thread(self._begin_worker)
        await asyncio.gather(*(asyncio.to_thread(self.pods[name].wait_until_ready) for name in ("a", "b")))
        self._asked_now = [self.pods["a"], self.pods["b"]]
        await self._open("a")
        await self._open("b")
        self._tell()

    async def main(self) -> None:
        """The main part. Returns when each request has been answered and the books are closed."""
        plan = self.plan
        for name in self.scraped():
            await asyncio.to_thread(self._begin_part, name)
        began = asyncio.get_running_loop().time()
        events = sorted(
            [
                (0.5, self._limits_are_met),
                (plan.bad_config_at, self._break_config),
                (plan.good_config_at, self._mend_config),
                (plan.outage[0], self._redis_goes),
                (plan.outage[1], self._redis_comes),
                (plan.rush_at, self._rush),
                (max(plan.deploy_at - 8.0, 0.0), self._new_pod_starts),
                (plan.deploy_at, self._new_pod_serves),
            ],
            key=lambda event: event[0],
        )
        timeline: list[tuple[float, Any]] = [
            *events,
            *self.script.timed(plan.seconds, plan.rate, plan.fault_share),
        ]
        for at, what in sorted(timeline, key=lambda one: one[0]):
            delay = began + at - asyncio.get_running_loop().time()
            if delay > 0:
                await asyncio.sleep(delay)
            if isinstance(what, Ask):
                if what.keep and self._redis_is_shaky(at):
                    continue  # nobody knows what a cache answers that is half there
                self._spawn(self._ask(self._next(), what))
            else:
                what()
        while self._tasks:
            await asyncio.wait(self._tasks)
        await asyncio.to_thread(self._settled)

    async def close(self) -> None:
        """Ends the pods, so that all of their lines are written, and then the rest."""
        await self._caller.close()
        for pod in self.pods.values():
            pod.let_go()
            if pod.process.poll() is None:
                pod.terminate()
        for pod in self.pods.values():
            await asyncio.to_thread(pod.wait)
        self.worker.terminate()
        await asyncio.to_thread(self.worker.wait)
        self._stack.close()

    # -- what it left ----------------------------------------------------------------------------------

    def targets(self) -> list[Target]:
        """What Prometheus scrapes now, with the labels that a ServiceMonitor gives it."""
        return [
            Target(self.cluster.address, {"job": "kube-state-metrics"}),
            _target(self.worker, WORKER, "weir-worker"),
            *(_target(self.pods[name], self.pods[name].name, JOB) for name in self._scraped),
        ]

    def scraped(self) -> list[str]:
        """The pods among them."""
        return [self.pods[name].name for name in self._scraped]

    def _ready(self) -> list[str]:
        return [self.pods[name].name for name in self._scraped if not self.pods[name].is_at_its_end]

    def worker_metrics(self) -> str:
        return httpx2.get(f"{self.worker.admin_url}/metrics", timeout=10).text

    def metrics(self) -> dict[str, str]:
        """Each pod's metrics as text, by its name: those of now, or those that it ended with."""
        found = {}
        for pod in self.pods.values():
            if pod.process.poll() is None and not pod.last_metrics.exists():
                found[pod.name] = httpx2.get(f"{pod.admin_url}/metrics", timeout=10).text
            else:
                found[pod.name] = pod.last_metrics.read_text()
        return found

    def ledger(self) -> list[dict[str, Any]]:
        """All records of the ledger in Redis."""
        records = []
        for stream in self.redis.server.command("KEYS", "weir:*}:ledger"):
            for _, fields in self.redis.server.command("XRANGE", stream, "-", "+"):
                records.append(json.loads(fields["record"]))
        return records

    def usage(self, group_by: str) -> dict[str, Any]:
        """What /api/v1/usage says, for operators."""
        pod = self._asked_now[0]
        answer = httpx2.get(
            f"{pod.url}/api/v1/usage",
            params={"group_by": group_by},
            headers={"Authorization": f"Bearer {secret(ADMIN)}"},
            timeout=10,
        )
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def lines(self) -> list[LogLines]:
        """The log of each pod; whole once it has ended."""
        found = []
        for pod in self.pods.values():
            events = [json.loads(line) for line in pod.lines if line.startswith("{")]
            requests = [event for event in events if event["event"] == "request"]
            found.append(LogLines(pod.name, requests, [e for e in events if e["event"] != "request"]))
        return found

    # -- events ----------------------------------------------------------------------------------------

    def _begin(self, name: str, version: str) -> None:
        pod = Pod(
            PODS[name],
            version,
            self._directory,
            WEIR_CONFIG=str(self._config),
            REDIS_URL=self.redis.url,
            REDIS_TIMEOUT="0.3",  # a call that is late lets its pod go by its own share
            REPLICAS="2",
            MAX_CONCURRENT_REQUESTS=str(PLACES),
            MAX_QUEUED_REQUESTS=str(QUEUE),
            OPENAI_MAX_RETRIES="1",
            DRAIN_TIMEOUT=str(self.plan.drain_seconds),
            CACHE_TTL="20",
            LOG_SLOW_REQUEST_SECONDS="1.5",
            OTEL_EXPORTER_OTLP_ENDPOINT=self.collector.url,
            OTEL_TRACES_SAMPLER="parentbased_traceidratio",
            OTEL_TRACES_SAMPLER_ARG="0.2",
            **self._environment,
        )
        self.pods[name] = self._stack.enter_context(pod)

    def _begin_worker(self) -> None:
        """And the PostgreSQL that it copies the ledger to."""
        postgres = self._stack.enter_context(PostgresServer())
        self.worker = self._stack.enter_context(
            WeirProcess(
                "worker",
                REDIS_URL=self.redis.url,
                REDIS_TIMEOUT="0.5",
                LEDGER_POSTGRES_URL=postgres.url,
                LEDGER_POLL_SECONDS="0.5",
            )
        )

    async def _open(self, name: str) -> None:
        pod = self.pods[name]
        for asks in self.script.opening():
            await asyncio.gather(*(self._ask(pod, ask, at_opening=True) for ask in asks))

    def _begin_part(self, pod: str) -> None:
        self.opened[pod] = self.metrics()[pod]

    def _break_config(self) -> None:
        self._write("upstreams: [{name: nobody}]\n")

    def _mend_config(self) -> None:
        models = [
            {**m, "aliases": ["mini"]} if m["name"] == "gpt-4o-mini" else m for m in self.document["models"]
        ]
        self._write(yaml.safe_dump({**self.document, "models": models}))

    def _redis_goes(self) -> None:
        """And with it the collector of traces: an outage seldom comes alone."""
        self.redis.server.freeze()
        self.collector.misbehave(400)

    def _redis_comes(self) -> None:
        self.redis.server.thaw()
        self.collector.behave()

    def _redis_is_shaky(self, at: float) -> bool:
        return self.plan.outage[0] - 1 <= at <= self.plan.outage[1] + 6

    def _rush(self) -> None:
        pod = self._asked_now[-1]
        for _ in range(self.plan.rush):
            self._spawn(self._ask(pod, self.script.rush()))

    def _new_pod_starts(self) -> None:
        self._begin("c", NEW)

    def _new_pod_serves(self) -> None:
        self._spawn(self._replace())

    async def _replace(self) -> None:
        await asyncio.to_thread(self.pods["c"].wait_until_ready)
        await self._open("c")
        self._scraped.append("c")
        self._tell()
        await asyncio.to_thread(self.until_scraped, self.pods["c"].name)
        await asyncio.to_thread(self._begin_part, self.pods["c"].name)
        self._asked_now = [self.pods["b"], self.pods["c"]]
        await self._drain("a")

    async def _drain(self, name: str) -> None:
        """When nothing runs there any more but two questions that will not be answered."""
        pod = self.pods[name]
        while self._running[pod.name]:
            await asyncio.sleep(POLL_SECONDS)
        await self._under_way(pod, self.script.endless, in_its_middle=True)
        await self._under_way(pod, self.script.unheard, in_its_middle=False)
        pod.terminate()
        while not pod.is_at_its_end:
            await asyncio.sleep(POLL_SECONDS)
        await asyncio.to_thread(self.until_scraped, pod.name)
        pod.let_go()
        await asyncio.to_thread(pod.wait)
        self._scraped.remove(name)
        self._tell()

    async def _under_way(self, pod: Pod, kind: Callable[[], Ask], *, in_its_middle: bool) -> None:
        """A question of this kind is with its provider; a busy machine may have turned some away before."""
        for _ in range(TRIES):
            ask, half = kind(), asyncio.Event()
            task = self._spawn(self._ask(pod, ask, half))
            while not task.done():
                if half.is_set() if in_its_middle else self._reached(ask.told.id):
                    return
                await asyncio.sleep(POLL_SECONDS)
        raise AssertionError(f"{pod.name} turned {TRIES} requests away")

    def _limits_are_met(self) -> None:
        for kind, good, refused in (
            (self.script.capped, CAPPED_REQUESTS, Outcome.RATE_LIMITED),
            (self.script.trial, 1, Outcome.BUDGET_REJECTED),
        ):
            asks = [kind() if n < good else _expecting(kind(), refused) for n in range(good + 8)]
            self._spawn(self._one_by_one(asks))

    async def _one_by_one(self, asks: Sequence[Ask]) -> None:
        for ask in asks:
            await self._ask(self._next(), ask)

    # ------------------------------------------------------------------------------------------------

    def _tell(self) -> None:
        self.on_pods(self.targets())

    def _next(self) -> Pod:
        return self._asked_now[next(self._turns) % len(self._asked_now)]

    def _spawn(self, coroutine: Any) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self.truth.surprises.append(repr(task.exception()))

    async def _ask(
        self, pod: Pod, ask: Ask, half: asyncio.Event | None = None, *, at_opening: bool = False
    ) -> None:
        self._running[pod.name] += 1
        try:
            seen = await self._caller.ask(pod.url, ask, half)
            seen.at_opening = at_opening
            self.truth.saw(ask, seen)
        finally:
            self._running[pod.name] -= 1

    def _reached(self, request: str) -> bool:
        return any(provider.has_seen(request) for provider in self.providers.values())

    def _settled(self) -> None:
        """Returns when all records that there must be are in the ledger."""
        deadline = time.monotonic() + SETTLED_SECONDS
        while (found := len(self.ledger())) < (told := self._records_told()):
            assert time.monotonic() < deadline, f"{found} records in the ledger, {told} told of"
            time.sleep(0.1)

    def _records_told(self) -> int:
        """Canonical lines of requests that had a record; once there is a line for each request."""
        lines = [line for pod in self.lines() for line in pod.requests]
        if len(lines) < len(self.truth.asked):
            return len(self.truth.asked)
        return sum("operation" in line for line in lines)

    def _write(self, text: str) -> None:
        new = self._config.with_suffix(".new")
        new.write_text(text)
        new.replace(self._config)


def _target(process: WeirProcess, pod: str, job: str) -> Target:
    labels = {"cluster": CLUSTER, "namespace": NAMESPACE, "job": job, "service": job}
    labels |= {"endpoint": "admin", "container": "weir", "pod": pod}
    return Target(f"127.0.0.1:{process.admin_port}", labels)


def _expecting(ask: Ask, outcome: Outcome) -> Ask:
    return dataclasses.replace(ask, expect=outcome)
