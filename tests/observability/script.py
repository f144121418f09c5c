"""What is asked in the run, and when: the same each time, from one seed."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Iterator
from typing import Final

import msgspec

from service.domain import Outcome
from tests.observability.asking import EMBEDDINGS, GENERATE, RESPONSES, TURN, TURN_STREAM, Ask
from tests.observability.providers import Directions
from tests.observability.settings import AZURE, EMBEDDER, GPT, LAB, LLAMA, MINI, OPENAI, REASONER, VLLM

Kind = Callable[[], Ask]
FIRSTS: Final = (0.15, 0.15, 0.15, 0.2, 0.2, 0.32, 0.32, 0.4, 0.6)
"""Seconds to the first token: between the edges of buckets."""
QUESTIONS: Final = 12
"""That come again and again, and are answered from the cache."""


class Script:
    """Makes the requests. `usual` are those of every day, `faults` those of which something goes wrong.

    Of each model far more are usual than not: which of them come one after another at one pod is chance, and
    a circuit that opens is no part of the script.
    """

    def __init__(self, seed: int = 7) -> None:
        self._random = random.Random(seed)
        self._numbers = itertools.count(1)
        self.usual: dict[Kind, float] = {
            self.chat: 30,
            self.big_chat: 20,
            self.whole: 10,
            self.reasoning: 20,
            self.llama: 12,
            self.lab: 14,
            self.embedding: 10,
            self.again: 8,
            self.turn: 2,
            self.turn_stream: 2,
            self.generated: 2,
            self.response: 2,
            self.audio: 3,
        }
        self.faults: dict[Kind, float] = {
            self.slow_first: 1.5,
            self.unknown_model: 1,
            self.broken_body: 0.5,
            self.wrong_key: 0.5,
            self.refused_there: 1,
            self.moved: 2,
            self.repeated: 1,
            self.stood_in: 1.5,
            self.limited_there: 1,
            self.left_before: 0.7,
            self.left_in_the_middle: 2,
            self.failed: 1,
            self.late: 0.3,
            self.late_first: 1,
            self.impatient: 0.7,
            self.stalled: 0.7,
            self.cut: 1.5,
        }

    def opening(self) -> tuple[list[Ask], list[Ask]]:
        """Some of each usual kind, then one of each fault: so that all series are there from the beginning.

        In this order, and the good ones outnumber the others by far, else circuits would open.
        """
        return [kind() for kind in self.usual for _ in range(4)], [kind() for kind in self.faults]

    def timed(
        self, seconds: float, rate: Callable[[float], float], fault_share: float
    ) -> Iterator[tuple[float, Ask]]:
        """Requests with the time at which each is sent; `rate` is requests/s at a time."""
        at = 0.0
        while (at := at + 1 / max(rate(at), 0.1)) < seconds:
            kinds = self.faults if self._random.random() < fault_share else self.usual
            kind = self._random.choices(list(kinds), list(kinds.values()))[0]
            yield at, kind()

    # -- every day -----------------------------------------------------------------------------------

    def chat(self) -> Ask:
        return Ask(self._told(), MINI, "acme-web")

    def big_chat(self) -> Ask:
        return Ask(self._told(longer=2), GPT, "globex-app")

    def whole(self) -> Ask:
        told = self._told(cached=False)
        return Ask(
            _with(told, written=told.input // 4), MINI, self._one("acme-web", "globex-app"), stream=False
        )

    def reasoning(self) -> Ask:
        told = self._told(longer=2)
        return Ask(_with(told, reasoning=told.output * 3 // 4), REASONER, "acme-web", stream=False)

    def llama(self) -> Ask:
        return Ask(self._told(cached=False), LLAMA, "acme-batch")

    def lab(self) -> Ask:
        return Ask(self._told(cached=False), LAB, "globex-app")

    def embedding(self) -> Ask:
        told = Directions(id=self._id(), input=self._random.randrange(50, 900), first=0.02)
        return Ask(told, EMBEDDER, "acme-batch", route=EMBEDDINGS, stream=False)

    def again(self) -> Ask:
        number = self._random.randrange(QUESTIONS)
        told = Directions(
            id=f"question-{number}", input=300 + number, output=80 + number, first=0.05, pace=0.002
        )
        return Ask(told, MINI, "acme-web", stream=False, keep=True)

    def turn(self) -> Ask:
        return Ask(self._told(), MINI, "globex-app", route=TURN, stream=False)

    def turn_stream(self) -> Ask:
        return Ask(self._told(), MINI, "globex-app", route=TURN_STREAM)

    def generated(self) -> Ask:
        return Ask(self._told(), MINI, "acme-web", route=GENERATE, stream=False)

    def response(self) -> Ask:
        return Ask(self._told(), GPT, "acme-web", route=RESPONSES, stream=False)

    def audio(self) -> Ask:
        told = self._told()
        told = _with(told, audio_input=told.input // 2, audio_output=told.output // 2, cached=0)
        return Ask(told, GPT, "globex-app", stream=False)

    # -- what goes wrong -----------------------------------------------------------------------------

    def slow_first(self) -> Ask:
        """The first upstream is late, and another one is asked beside it.

        One in twenty at most, or being late is what the model does.
        """
        told = _with(self._told(), first=0.15)
        return Ask(_with(told, faults={OPENAI: ("late-1500",)}), GPT, "globex-app")

    def unknown_model(self) -> Ask:
        return Ask(self._told(), "gpt-9", "acme-web", stream=False, expect=Outcome.CLIENT_ERROR)

    def broken_body(self) -> Ask:
        return Ask(self._told(), "", "acme-web", stream=False, expect=Outcome.CLIENT_ERROR, broken_body=True)

    def wrong_key(self) -> Ask:
        return Ask(self._told(), MINI, "acme-web", stream=False, expect=Outcome.CLIENT_ERROR, wrong_key=True)

    def refused_there(self) -> Ask:
        told = _with(self._told(), faults={OPENAI: ("400",)})
        return Ask(told, REASONER, "acme-web", stream=False, expect=Outcome.CLIENT_ERROR)

    def moved(self) -> Ask:
        """The first upstream fails, the second answers."""
        return Ask(_with(self._told(), faults={OPENAI: ("503",)}), MINI, "acme-web")

    def repeated(self) -> Ask:
        """Fails once, and goes well when it is tried again."""
        ask = self.embedding()
        return dataclasses.replace(ask, told=_with(ask.told, faults={OPENAI: ("503", "")}))

    def stood_in(self) -> Ask:
        """Too long for the model: another one stands in."""
        told = _with(self._told(longer=4), faults={OPENAI: ("too-long", "")})
        return Ask(told, GPT, "globex-app", answered_by=MINI)

    def limited_there(self) -> Ask:
        told = _with(self._told(), faults={VLLM: ("429",)})
        return Ask(told, LAB, "globex-app", expect=Outcome.RATE_LIMITED)

    def left_before(self) -> Ask:
        told = _with(self._told(), faults={OPENAI: ("silence",)})
        return Ask(
            told, REASONER, "acme-web", stream=False, expect=Outcome.CLIENT_DISCONNECTED, leaves="before"
        )

    def left_in_the_middle(self) -> Ask:
        told = _with(self._told(), faults={OPENAI: ("hold",), AZURE: ("hold",)})
        return Ask(told, MINI, "acme-web", expect=Outcome.CLIENT_DISCONNECTED, leaves="middle")

    def failed(self) -> Ask:
        told = _with(self._told(), faults={OPENAI: (self._one("500", "broken"),)})
        return Ask(told, REASONER, "acme-web", stream=False, expect=Outcome.UPSTREAM_ERROR)

    def impatient(self) -> Ask:
        """The caller's own time for an answer is over before there is one."""
        told = _with(self._told(), faults={OPENAI: ("silence",)})
        return Ask(told, REASONER, "acme-web", stream=False, expect=Outcome.TIMEOUT, patience_seconds=1.2)

    def late(self) -> Ask:
        told = _with(self._told(), faults={VLLM: ("silence",)})
        return Ask(told, LAB, "globex-app", expect=Outcome.TIMEOUT)

    def late_first(self) -> Ask:
        """A good answer, and its first token comes later than the objective wants."""
        return Ask(_with(self._told(), first=2.7), MINI, "acme-web")

    def stalled(self) -> Ask:
        told = _with(self._told(), faults={VLLM: ("hold",)})
        return Ask(told, LLAMA, "acme-batch", expect=Outcome.TIMEOUT)

    def cut(self) -> Ask:
        told = _with(self._told(), faults={OPENAI: ("drop",), AZURE: ("drop",)})
        return Ask(told, MINI, "acme-web", expect=Outcome.STREAM_TRUNCATED)

    # -- apart from the rest -------------------------------------------------------------------------

    def capped(self) -> Ask:
        """Its key may make a few requests, and no more."""
        return Ask(_with(self._told(), first=0.02, pace=0.0), MINI, "acme-capped", stream=False)

    def trial(self) -> Ask:
        """One call spends more than its key's budget is."""
        told = Directions(id=self._id(), input=20_000, output=200, first=0.02)
        return Ask(told, MINI, "globex-trial", stream=False)

    def rush(self) -> Ask:
        """One of many that come at once."""
        return Ask(
            _with(self._told(), first=0.9, pace=0.0), MINI, self._one("acme-web", "acme-batch"), stream=False
        )

    def endless(self) -> Ask:
        """A stream that does not end before its pod does."""
        told = _with(self._told(), faults={OPENAI: ("hold",), AZURE: ("hold",)})
        return Ask(told, MINI, "acme-web", expect=Outcome.STREAM_TRUNCATED)

    def unheard(self) -> Ask:
        """A question that is still open when its pod ends."""
        told = _with(self._told(), faults={OPENAI: ("silence",)})
        return Ask(told, REASONER, "acme-web", stream=False, expect=Outcome.INTERNAL_ERROR)

    # ------------------------------------------------------------------------------------------------

    def _told(self, *, longer: int = 1, cached: bool = True) -> Directions:
        pick = self._random
        given = int(pick.lognormvariate(6, 0.7)) * longer + 20
        chunks = pick.randrange(4, 12)
        return Directions(
            id=self._id(),
            input=given,
            output=chunks * pick.randrange(4, 24) * longer,
            cached=given // 2 if cached and pick.random() < 0.4 else 0,
            first=pick.choice(FIRSTS),
            pace=pick.choice((0.01, 0.02, 0.03)),
            chunks=chunks,
        )

    def _id(self) -> str:
        return f"r{next(self._numbers)}"

    def _one(self, *values: str) -> str:
        return self._random.choice(values)


def waves(base: float, swing: float, period: float) -> Callable[[float], float]:
    """A rate that goes up and down."""
    return lambda at: base + swing * math.sin(2 * math.pi * at / period)


def _with(told: Directions, **changes: object) -> Directions:
    return msgspec.structs.replace(told, **changes)
