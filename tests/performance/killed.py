"""Weir killed under load, again and again: `python -m tests.performance.killed --kills 50`.

Two processes answer streams and whole answers on one Redis; at random moments one of them gets SIGKILL and a
new one takes its place. Every caller names its requests, so that afterwards the ledger can be compared with
what callers had: exactly one record for each answer that came in whole, at most one for every other request,
sums that are the records', and nothing held for anybody.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, NamedTuple

import httpx2
import msgspec
import redis
import yaml

from service.domain import RequestRecord
from service.rules import NANO
from service.usage import increments
from tests.fakes.upstream import FakeUpstream
from tests.redis_servers import Single
from tests.running import WeirProcess

SLOTS: Final = 2
CALLERS: Final = 6
LEASE_SECONDS: Final = 3
SWEPT_SECONDS: Final = 40.0
TENANT: Final = "default"
RULES: Final = {
    "limits": [
        {"name": "r", "requests": 1_000_000, "tokens": 10**9, "concurrent": 1_000},
        {"name": "all", "per": ["model"], "requests": 1_000_000, "tokens": 10**9, "concurrent": 1_000},
    ],
    "budgets": [
        {"name": "hard", "usd": 100_000},
        {"name": "soft", "usd": 1, "per": "key", "period": "day", "hard": False},
    ],
}


class Found(NamedTuple):
    """What callers had, and what is in Redis after it; `held` are keys that something is left in."""

    kills: int
    whole: set[str]
    cut: set[str]
    records: list[RequestRecord]
    sums: Counter[str]
    spent: int
    held: dict[str, Any]
    seconds: float

    def faults(self) -> list[str]:
        """What is not as it must be, in words."""
        counted = Counter(record.request_id for record in self.records)
        sums: Counter[str] = Counter()
        for record in self.records:
            sums.update(dict(increments(record)))
        costs = sum(round(record.cost.usd * NANO) for record in self.records if record.cost.usd)
        missing = [name for name in self.whole if not counted[name]]
        twice = [name for name, count in counted.items() if count > 1]
        wrong = [record for record in self.records if record.request_id not in self.whole | self.cut]
        bare = [r.request_id for r in self.records if r.error_code != "abandoned" and r.usage is None]
        faults = {
            f"{len(missing)} whole answers have no record": missing,
            f"{len(twice)} requests have more than one record": twice,
            f"{len(wrong)} records are of nobody's request": wrong,
            f"{len(bare)} records of answers have no usage": [name for name in bare if name in self.whole],
            f"sums differ from the records: {sums - self.sums} and {self.sums - sums}": sums != self.sums,
            f"{self.spent} is spent, the records cost {costs}": self.spent != costs,
            f"something is held: {self.held}": self.held,
        }
        return [words for words, fault in faults.items() if fault]


class Killing:
    """Processes, callers and what they had; `run` does it all."""

    def __init__(self, kills: int, callers: int = CALLERS) -> None:
        self._kills = kills
        self._callers = callers
        self._urls = [""] * SLOTS
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._whole: set[str] = set()
        self._cut: set[str] = set()
        self._left = kills
        self._answers: Counter[str] = Counter()
        """By the address of the process."""
        self._faults: list[BaseException] = []

    def run(self) -> Found:
        began = time.monotonic()
        with ExitStack() as stack:
            single = stack.enter_context(Single())
            upstream = stack.enter_context(FakeUpstream(record=False))
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            self._environment = _environment(single, upstream, directory)
            threads = [threading.Thread(target=self._guarded, args=(self._slot, n)) for n in range(SLOTS)]
            threads += [
                threading.Thread(target=self._guarded, args=(self._call, n)) for n in range(self._callers)
            ]
            for thread in threads:
                thread.start()
            for thread in threads[:SLOTS]:
                thread.join()
            self._over.set()
            for thread in threads[SLOTS:]:
                thread.join()
            if self._faults:
                raise self._faults[0]
            client: Any = redis.Redis.from_url(single.url)
            with WeirProcess(**self._environment) as last:
                last.wait_until_ready()
                held = until_nothing_is_held(client)
            records = [
                msgspec.json.decode(fields[b"record"], type=RequestRecord)
                for _, fields in client.xrange(f"weir:{{{TENANT}}}:ledger")
            ]
            sums: Counter[str] = Counter()
            for name in client.scan_iter(f"weir:{{{TENANT}}}:day:*"):
                sums.update({what.decode(): int(number) for what, number in client.hgetall(name).items()})
            spent = int(client.hget(f"weir:{{{TENANT}}}:budget:hard:month:", "spent") or 0)
            client.close()
        return Found(
            self._kills, self._whole, self._cut, records, sums, spent, held, time.monotonic() - began
        )

    def _guarded(self, what: Any, number: int) -> None:
        try:
            what(number)
        except BaseException as fault:
            self._faults.append(fault)
            self._over.set()

    def _slot(self, number: int) -> None:
        """One process after another, each killed at a random moment."""
        chance = random.Random(number)
        while not self._over.is_set():
            with self._lock:
                if not self._left:
                    return
                self._left -= 1
            with WeirProcess(**self._environment) as process:
                process.wait_until_ready()
                self._urls[number] = process.url
                most = chance.randint(1, 60)
                while self._answers[process.url] < most and not self._over.is_set():
                    time.sleep(0.002)
                time.sleep(chance.uniform(0.0, 0.1))
                process.process.kill()
                process.process.wait()
                self._urls[number] = ""

    def _call(self, number: int) -> None:
        chance = random.Random(1_000 + number)
        while not self._over.is_set():
            url = chance.choice(self._urls)
            if not url:
                time.sleep(0.01)
                continue
            name = uuid.uuid4().hex
            try:
                whole = _ask(url, name, chance)
            except httpx2.TransportError:
                whole = False
                time.sleep(0.02)
            (self._whole if whole else self._cut).add(name)
            self._answers[url] += whole


def _ask(url: str, name: str, chance: random.Random) -> bool:
    """Whether the answer came in whole."""
    stream = chance.random() < 0.5
    body = {
        "model": chance.choice(["quick", "slow"]),
        "messages": [{"role": "user", "content": "Hello!"}],
        "stream": stream,
    }
    where, headers = f"{url}/v1/chat/completions", {"x-request-id": name}
    with httpx2.stream("POST", where, json=body, headers=headers, timeout=20) as answer:
        text = answer.read()
    assert answer.headers["x-request-id"] == name
    assert answer.status_code == 200, text
    return text.endswith(b"data: [DONE]\n\n") if stream else text.endswith(b"}")


def _environment(single: Single, upstream: FakeUpstream, directory: Path) -> dict[str, str]:
    price = {"input": 1_000.0, "output": 2_000.0}
    file = directory / "weir.yaml"
    models = [("quick", "gpt-4o-mini"), ("slow", "ticks-6-15")]
    file.write_text(
        yaml.safe_dump(
            {
                "upstreams": [{"name": "fake", "base_url": upstream.base_url}],
                "models": [
                    {"name": name, "upstream": "fake", "upstream_model": there, "price": price}
                    for name, there in models
                ],
                **RULES,
            }
        )
    )
    return {
        "WEIR_CONFIG": str(file),
        "REDIS_URL": single.url,
        "LEASE_SECONDS": str(LEASE_SECONDS),
        "LEDGER_RECORDS": "1000000",
        "OPENAI_MAX_RETRIES": "0",
    }


def until_nothing_is_held(client: Any) -> dict[str, Any]:
    """What is held for requests under way, once it is nothing or the time is over."""
    began = time.monotonic()
    while True:
        held: dict[str, Any] = {}
        for tag in (TENANT, "*"):
            for kind in ("open", "leases"):
                name = f"weir:{{{tag}}}:{kind}"
                if client.exists(name):
                    held[name] = client.hgetall(name) if kind == "open" else client.zrange(name, 0, -1)
        for key in client.scan_iter("weir:*:concurrent:*"):
            held[key.decode()] = client.get(key)
        for key in client.scan_iter("weir:*:budget:*"):
            if client.hexists(key, "held"):
                held[key.decode()] = client.hgetall(key)
        if not held or time.monotonic() - began > SWEPT_SECONDS:
            return held
        time.sleep(0.05)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=50)
    options = parser.parse_args()
    found = Killing(options.kills).run()
    abandoned = sum(record.error_code == "abandoned" for record in found.records)
    entered = {record.request_id for record in found.records}
    faults = found.faults()
    print(f"kills             {found.kills} in {found.seconds:.0f} s, {CALLERS} callers, {SLOTS} processes")
    print(f"whole answers     {len(found.whole):,}, all with one record: {'no' if faults else 'yes'}")
    print(f"cut or not begun  {len(found.cut):,}, {len(entered & found.cut):,} of them with one record")
    print(f"records           {len(found.records):,}, {abandoned:,} of them settled by another process")
    for fault in faults:
        print(f"FAULT             {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
