"""Where a call goes: circuits, choice, budgets of repeats, pools of keys, the configuration's models."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from service.config import FileConfig, KeyConfig
from service.domain import ANONYMOUS, Principal
from service.errors import (
    ModelNotFound,
    RequestDeadline,
    StreamTruncated,
    UpstreamError,
    UpstreamMisconfigured,
    UpstreamProtocolError,
    UpstreamRateLimited,
    UpstreamRejected,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from service.ports import Target
from service.refusals import Failure
from service.routing.breaker import PAUSE_MOST_SECONDS, Breaker, Cause, Circuit
from service.routing.catalogue import MOST_MADE_UP, Conditions, ModelCatalogue, matches
from service.routing.keys import KeyPool
from service.routing.places import (
    DECAY_SECONDS,
    HEDGE_LEAST_LATENCIES,
    HEDGE_LEAST_SECONDS,
    KEPT_LATENCIES,
    Condition,
    Peer,
    Place,
    Strategy,
    choose,
)
from service.routing.probing import Prober
from service.routing.retries import SAVED, RetryBudget
from service.routing.routes import Route, failure_of
from service.telemetry import Metrics
from service.upstreams.making import make_upstreams
from tests.running import configuration
from tests.unit.ports import Clock, ScriptedUpstream

PAUSE = 5.0
WINDOW = 30.0


def breaker(clock: Clock, changes: list[Circuit] | None = None) -> Breaker:
    return Breaker(
        window_seconds=WINDOW,
        min_calls=5,
        failure_ratio=0.5,
        pause_seconds=PAUSE,
        clock=clock,
        on_change=changes.append if changes is not None else lambda _: None,
    )


def call(tested: Breaker, *, good: bool) -> None:
    ticket = tested.begin()
    if good:
        tested.succeeded(ticket)
    else:
        tested.failed(ticket)


def opened(clock: Clock) -> Breaker:
    tested = breaker(clock)
    for _ in range(5):
        call(tested, good=False)
    assert tested.state is Circuit.OPEN
    return tested


# -- the circuit breaker -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ends", "state"),
    [
        ("ffff", Circuit.CLOSED),
        ("fffff", Circuit.OPEN),
        ("ssfff", Circuit.OPEN),
        ("sssff", Circuit.CLOSED),
        ("sssfff", Circuit.OPEN),
        ("fffssss", Circuit.CLOSED),
    ],
)
def test_a_circuit_opens_when_half_of_five_and_more_calls_fail(ends: str, state: Circuit) -> None:
    tested = breaker(Clock())
    for end in ends:
        call(tested, good=end == "s")
    assert tested.state is state


def test_what_is_older_than_the_window_does_not_count() -> None:
    clock = Clock()
    tested = breaker(clock)
    for _ in range(4):
        call(tested, good=False)
    clock.now += WINDOW
    call(tested, good=False)
    assert tested.admits
    for _ in range(4):
        call(tested, good=False)
    assert not tested.admits


def test_a_stream_that_breaks_turns_its_success_into_a_failure() -> None:
    tested = breaker(Clock())
    tickets = []
    for _ in range(6):
        tickets.append(tested.begin())
        tested.succeeded(tickets[-1])
    for ticket in tickets[:2]:
        tested.broke(ticket)
    assert tested.admits, "two of six"
    tested.broke(tickets[2])
    assert not tested.admits, "three of six"
    tested.close()
    for ticket in tickets[3:] * 5:
        tested.broke(ticket)
    assert tested.admits, "they are of before"


def test_an_open_circuit_admits_nobody_and_then_one_at_a_time() -> None:
    clock = Clock()
    tested = opened(clock)
    assert (tested.admits, tested.open_seconds) == (False, PAUSE)
    clock.now += PAUSE - 1
    assert (tested.admits, tested.open_seconds) == (False, 1.0)
    clock.now += 1
    assert (tested.admits, tested.open_seconds) == (True, 0.0)
    probe = tested.begin()
    assert (tested.state, tested.admits) == (Circuit.HALF_OPEN, False)
    tested.left(probe)
    assert tested.admits, "its caller left, so the next one finds out"
    tested.succeeded(tested.begin())
    assert (tested.state, tested.admits) == (Circuit.CLOSED, True)


def test_an_open_circuit_is_shown_as_half_open_once_its_pause_is_over() -> None:
    clock = Clock()
    tested = opened(clock)
    clock.now += PAUSE - 1
    assert tested.shown is Circuit.OPEN
    clock.now += 1
    assert (tested.shown, tested.state) == (Circuit.HALF_OPEN, Circuit.OPEN)
    call(tested, good=False)
    assert tested.shown is Circuit.OPEN


def test_the_pause_doubles_up_to_a_bound_and_begins_anew_after_a_success() -> None:
    clock = Clock()
    tested = opened(clock)
    pauses = []
    for _ in range(6):
        pauses.append(tested.open_seconds)
        clock.now += pauses[-1]
        call(tested, good=False)
        assert tested.state is Circuit.OPEN
    assert pauses == [5, 10, 20, 40, PAUSE_MOST_SECONDS, PAUSE_MOST_SECONDS]
    clock.now += PAUSE_MOST_SECONDS
    call(tested, good=True)
    for _ in range(5):
        call(tested, good=False)
    assert tested.open_seconds == PAUSE


def test_calls_of_before_the_outage_neither_close_nor_open_nor_free_anything() -> None:
    clock = Clock()
    tested = breaker(clock)
    old = [tested.begin() for _ in range(30)]
    for _ in range(5):
        call(tested, good=False)
    clock.now += PAUSE
    probe = tested.begin()
    tested.left(old.pop())
    assert not tested.admits, "the probe still runs"
    tested.succeeded(old.pop())
    assert not tested.admits
    tested.failed(old.pop())
    assert tested.state is Circuit.HALF_OPEN
    tested.succeeded(probe)
    for ticket in old:
        tested.failed(ticket)
    assert tested.admits, "they hung all the time; the upstream is well since then"


def test_a_probe_that_was_overtaken_says_nothing() -> None:
    clock = Clock()
    tested = opened(clock)
    clock.now += PAUSE
    probe = tested.begin()
    tested.open_for(60, Cause.ASKED)
    tested.succeeded(probe)
    assert (tested.state, tested.open_seconds) == (Circuit.OPEN, 60)


def test_who_is_told_to_wait_waits_for_the_longer_time() -> None:
    clock = Clock()
    tested = opened(clock)
    tested.open_for(1.0, Cause.FLEET)
    assert (tested.open_seconds, tested.cause) == (PAUSE, Cause.FAILURES)
    tested.open_for(20.0, Cause.FLEET)
    assert tested.open_seconds == 20.0


def test_each_change_is_told_once() -> None:
    clock, changes = Clock(), list[Circuit]()
    tested = breaker(clock, changes)
    for _ in range(9):
        call(tested, good=False)
    clock.now += PAUSE
    call(tested, good=True)
    tested.close()
    assert changes == [Circuit.OPEN, Circuit.HALF_OPEN, Circuit.CLOSED]


class Model:
    """The breaker in a few plain lines: every call that ended is kept with its time."""

    def __init__(self) -> None:
        self.now, self.pause, self.until, self.period = 0.0, PAUSE, 0.0, 0
        self.state, self.probe = "closed", False
        self.ends: list[tuple[int, bool]] = []

    def admits(self) -> bool:
        return self.state == "closed" or (self.now >= self.until and not self.probe)

    def begin(self) -> int:
        if self.state == "open":
            self.state, self.period = "half_open", self.period + 1
        if self.state == "half_open":
            self.probe = True
        return self.period

    def end(self, period: int, how: str) -> None:
        if period != self.period:
            return
        if how == "left":
            self.probe = False
        elif self.state == "half_open":
            self.probe = False
            if how == "good":
                self.state, self.pause, self.ends, self.period = "closed", PAUSE, [], self.period + 1
            else:
                self._open(min(self.pause * 2, PAUSE_MOST_SECONDS))
        else:
            self.ends.append((int(self.now / 3), how == "good"))
            recent = [good for at, good in self.ends if at > int(self.now / 3) - 10]
            if how == "bad" and len(recent) >= 5 and recent.count(False) * 2 >= len(recent):
                self._open(PAUSE)

    def _open(self, pause: float) -> None:
        self.state, self.pause, self.until, self.ends = "open", pause, self.now + pause, []
        self.period += 1


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("wait"), st.integers(0, 40)),
        st.tuples(st.just("begin"), st.just(0)),
        st.tuples(st.sampled_from(["good", "bad", "bad", "left"]), st.integers(0, 9)),
    ),
    max_size=120,
)


@settings(max_examples=300)
@given(STEPS)
def test_the_breaker_is_its_model(steps: list[tuple[str, int]]) -> None:
    clock, model = Clock(0.0), Model()
    tested = breaker(clock)
    running: list[tuple[int, int]] = []
    for what, number in steps:
        if what == "wait":
            clock.now += number
            model.now += number
        elif what == "begin":
            if tested.admits:
                running.append((tested.begin(), model.begin()))
        elif running:
            ticket, period = running.pop(number % len(running))
            {"good": tested.succeeded, "bad": tested.failed, "left": tested.left}[what](ticket)
            model.end(period, what)
        assert (tested.state.value, tested.admits) == (model.state, model.admits())
        half_open = [t for t, p in running if model.state == "half_open" and p == model.period]
        assert len(half_open) <= 1, "one probe at a time"


# -- the choice ----------------------------------------------------------------------------------


def place(
    name: str, *, weight: float = 1.0, region: str | None = None, most: int | None = None, model: str = "m"
) -> Place:
    clock = Clock()
    target = Target(ScriptedUpstream(name=name), model)
    return Place(
        target, Condition(Peer(name, most=most, region=region), Breaker(clock=clock), clock=clock), weight
    )


def shut(closed: Place) -> None:
    closed.condition.breaker.open_for(1_000)


A, B, C = "abc"
STRATEGIES: list[Strategy] = ["ordered", "weighted", "least_busy", "fastest"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_only_places_that_may_be_asked_are_chosen(strategy: Strategy) -> None:
    places = [place(A), place(B), place(C), place("full", most=0)]
    shut(places[0])
    for _ in range(30):
        assert choose(places, strategy, avoid=[places[2]]) is places[1]
    shut(places[1])
    assert choose(places, strategy, avoid=[places[2]]) is None
    assert choose(places, strategy) is places[2]


def test_a_single_place_is_asked_while_it_may_be() -> None:
    only = place(A)
    assert choose([only], "fastest") is only
    assert choose([only], "ordered", avoid=[only]) is None
    shut(only)
    assert choose([only], "ordered") is None


def test_ordered_takes_the_first() -> None:
    places = [place(A), place(B)]
    assert choose(places, "ordered") is places[0]
    shut(places[0])
    assert choose(places, "ordered") is places[1]


def test_weights_are_shares() -> None:
    places = [place(A, weight=3), place(B, weight=1)]
    chosen = Counter(choose(places, "weighted") for _ in range(4_000))
    assert 2_800 < chosen[places[0]] < 3_200


def test_the_least_busy_is_the_one_with_the_fewest_calls_for_its_weight() -> None:
    places = [place(A, weight=2), place(B)]
    for _ in range(30):
        found = choose(places, "least_busy")
        assert found is not None
        found.condition.begin()
    assert [p.condition.running for p in places] == [20, 10]
    for _ in range(20):
        places[0].condition.end()
    assert choose(places, "least_busy") is places[0]


def test_the_fastest_is_the_one_where_a_call_meets_the_least() -> None:
    slow, quick = place(A), place(B)
    slow.condition.answered(1.0)
    quick.condition.answered(0.1)
    assert all(choose([slow, quick], "fastest") is quick for _ in range(20))
    for _ in range(20):
        quick.condition.begin()
    assert choose([slow, quick], "fastest") is slow


def test_of_many_two_are_compared_so_that_not_all_go_to_one() -> None:
    places = [place(str(n)) for n in range(8)]
    for number, each in enumerate(places):
        each.condition.answered(0.1 + number / 100)
    chosen = Counter(choose(places, "fastest") for _ in range(2_000))
    assert len(chosen) == 7, "all but the slowest"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_those_of_the_region_go_first(strategy: Strategy) -> None:
    places = [place(A, region="us"), place(B, region="eu"), place(C)]
    assert choose(places, strategy, region="eu") is places[1]
    assert choose(places, strategy, session="s", region="eu") is places[1]
    shut(places[1])
    assert choose(places, strategy, region="eu") in (places[0], places[2])
    assert choose(places, "ordered", region="asia") is places[0]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_place_that_goes_takes_only_its_own_sessions(strategy: Strategy) -> None:
    places = [place(A), place(B), place(C), place("d")]
    sessions = [f"tenant\nconversation-{n}" for n in range(2_000)]
    before = {s: choose(places, strategy, session=s) for s in sessions}
    assert before == {s: choose(places[::-1], strategy, session=s) for s in sessions}, "whatever the order"
    counts = Counter(before.values())
    assert all(400 < counts[p] < 600 for p in places)
    shut(places[2])
    after = {s: choose(places, strategy, session=s) for s in sessions}
    assert all(after[s] is before[s] for s in sessions if before[s] is not places[2])
    moved = Counter(after[s] for s in sessions if before[s] is places[2])
    assert all(100 < moved[p] < 240 for p in places if p is not places[2]), "spread over all that are left"
    places[2].condition.breaker.close()
    assert before == {s: choose(places, strategy, session=s) for s in sessions}


def test_sessions_are_shared_by_weight() -> None:
    places = [place(A, weight=3), place(B, weight=1)]
    chosen = Counter(choose(places, "ordered", session=f"s{n}") for n in range(4_000))
    assert 2_800 < chosen[places[0]] < 3_200


@given(
    st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=6),
    st.sampled_from(STRATEGIES),
    st.sampled_from(["", "s1", "s2"]),
)
def test_a_place_is_found_whenever_there_is_one(
    states: list[tuple[bool, bool, bool]], strategy: Strategy, session: str
) -> None:
    places = [place(str(n), most=0 if full else None) for n, (_, full, _) in enumerate(states)]
    avoid = [p for p, (_, _, tried) in zip(places, states, strict=True) if tried]
    for one, (closed, _, _) in zip(places, states, strict=True):
        if closed:
            shut(one)
    good = [p for p, flags in zip(places, states, strict=True) if not any(flags)]
    found = choose(places, strategy, session=session, avoid=avoid)
    assert found in good if good else found is None


def test_the_calls_that_one_upstream_may_have_are_those_of_all_its_models() -> None:
    peer = Peer(A, most=2)
    one, other = (Condition(peer, Breaker()) for _ in range(2))
    one.begin()
    assert not peer.full
    other.begin()
    assert peer.full
    one.end()
    assert (peer.full, peer.running, one.running, other.running) == (False, 1, 0, 1)


# -- latencies -----------------------------------------------------------------------------------


def test_a_slow_answer_counts_at_once_and_fades() -> None:
    clock = Clock()
    condition = Condition(Peer(A), Breaker(clock=clock), clock=clock)
    condition.answered(0.1)
    condition.answered(5.0)
    assert condition.latency_seconds == 5.0
    clock.now += DECAY_SECONDS
    condition.answered(0.1)
    assert 1.8 < condition.latency_seconds < 2.0
    clock.now += 10 * DECAY_SECONDS
    condition.answered(0.1)
    assert condition.latency_seconds == pytest.approx(0.1, rel=0.01)


def test_one_slow_answer_keeps_nobody_away_for_ever() -> None:
    clock = Clock()
    slow, quick = (
        Place(Target(ScriptedUpstream(name=n), "m"), Condition(Peer(n), Breaker(), clock=clock)) for n in "ab"
    )
    slow.condition.answered(30.0)
    quick.condition.answered(0.2)
    assert choose([slow, quick], "fastest") is quick
    for _ in range(60):
        clock.now += 1
        quick.condition.answered(0.2)
    assert choose([slow, quick], "fastest") is slow


@given(st.lists(st.floats(0.001, 600), max_size=300))
def test_late_is_what_is_slower_than_95_of_the_last_100(latencies: list[float]) -> None:
    condition = Condition(Peer(A), Breaker())
    for seconds in latencies:
        condition.answered(seconds)
    late, recent = condition.late_seconds, latencies[-KEPT_LATENCIES:]
    if len(recent) < HEDGE_LEAST_LATENCIES:
        assert late is None
        return
    assert late is not None
    assert late >= HEDGE_LEAST_SECONDS
    assert sum(seconds > late for seconds in recent) <= 0.05 * len(recent)
    if late > HEDGE_LEAST_SECONDS:
        assert sum(seconds >= late for seconds in recent) > 0.05 * len(recent)


def test_what_was_given_up_counts_for_what_is_late() -> None:
    condition = Condition(Peer(A), Breaker())
    for _ in range(90):
        condition.answered(0.1)
    for _ in range(10):
        condition.given_up(0.5)
    assert condition.late_seconds == 0.5
    assert condition.latency_seconds < 0.2


# -- repeats and keys ----------------------------------------------------------------------------


@given(st.lists(st.integers(0, 5), min_size=1, max_size=400))
def test_an_outage_is_not_amplified(wishes: list[int]) -> None:
    budget, repeats = RetryBudget(), 0
    for calls, wished in enumerate(wishes, 1):
        budget.called()
        repeats += sum(budget.take() for _ in range(wished))
        assert repeats <= SAVED + 0.1 * calls


def test_with_every_call_failing_at_most_a_tenth_more_is_asked() -> None:
    budget, repeats = RetryBudget(), 0
    for _ in range(10_000):
        budget.called()
        repeats += budget.take() + budget.take()
    assert 850 < repeats < 1_000


def test_a_repeat_that_was_not_made_is_there_for_others() -> None:
    budget = RetryBudget()
    while budget.take():
        pass
    budget.give_back()
    assert [budget.take(), budget.take()] == [True, False]
    for _ in range(2 * int(SAVED)):
        budget.give_back()
    assert sum(1 for _ in iter(budget.take, False)) == SAVED


def test_keys_are_taken_in_turn() -> None:
    pool = KeyPool(["a", "b", "c"])
    assert [pool.take() for _ in range(5)] == ["a", "b", "c", "a", "b"]
    assert KeyPool([]).take() is None


def test_a_key_that_rests_is_left_out_until_its_time_is_over() -> None:
    clock = Clock()
    pool = KeyPool(["a", "b"], clock)
    assert pool.rest("a", 10)
    assert [pool.take() for _ in range(3)] == ["b", "b", "b"]
    assert not pool.rest("b", 5), "no other one is ready"
    assert pool.take() == "b", "all rest: the one whose rest is over first"
    clock.now += 10
    assert {pool.take(), pool.take()} == {"a", "b"}


def test_a_shorter_rest_shortens_none() -> None:
    clock = Clock()
    pool = KeyPool(["a", "b"], clock)
    pool.rest("a", 300)
    pool.rest("a", 1)
    clock.now += 2
    assert {pool.take() for _ in range(4)} == {"b"}


@pytest.mark.parametrize("keys", [[], ["a"], ["a", "a"]])
def test_a_single_key_never_rests(keys: list[str]) -> None:
    """Also where the configuration names one twice: else the call would go again with the key that failed."""
    pool = KeyPool(keys)
    assert not pool.rest(keys[0] if keys else None, 60)
    assert pool.take() == (keys[0] if keys else None)


@given(
    st.integers(2, 5),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 20), st.integers(0, 10)), max_size=60),
)
def test_a_resting_key_is_handed_out_only_when_all_rest(
    count: int, steps: list[tuple[int, int, int]]
) -> None:
    clock = Clock(0.0)
    keys = [f"k{n}" for n in range(count)]
    pool, until = KeyPool(keys, clock), dict.fromkeys(keys, 0.0)
    for number, seconds, passes in steps:
        key = keys[number % count]
        ready = pool.rest(key, seconds)
        until[key] = max(until[key], clock.now + max(seconds, 1))
        assert ready == any(end <= clock.now for end in until.values())
        taken = pool.take()
        assert taken is not None
        if ready:
            assert until[taken] <= clock.now
        else:
            assert until[taken] == min(until.values())
        clock.now += passes


# -- routes and failures -------------------------------------------------------------------------


def test_what_a_caller_is_told_when_nobody_may_be_asked() -> None:
    places = [place(A), place(B)]
    places[0].condition.breaker.open_for(30)
    places[1].condition.breaker.open_for(7)
    error = Route("m", places).closed()
    assert (error.status, error.retry, error.retry_after_seconds) == (503, True, 7.0)
    assert "failed of late" in error.message
    full = Route("m", [place(A, most=0)]).closed()
    assert full.retry_after_seconds == 1.0
    assert "as many calls as they may" in full.message


def test_who_asks_for_time_limits_the_rate_until_a_call_has_found_it_well() -> None:
    places = [place(A), place(B)]
    for one in places:
        one.condition.breaker.open_for(0, Cause.ASKED)
    tickets = [one.condition.begin() for one in places]
    route = Route("m", places)
    assert isinstance(route.closed(), UpstreamRateLimited), "somebody finds out"
    places[0].condition.breaker.failed(tickets[0])
    assert isinstance(route.closed(), UpstreamUnavailable)


def test_a_route_sticks_only_where_it_is_told_to() -> None:
    places = [place(A), place(B)]
    sticky, loose = Route("m", places, sticky=True), Route("m", places)
    sessions = [f"s{n}" for n in range(50)]
    assert {loose.choose(s, ()) for s in sessions} == {places[0]}
    assert {sticky.choose(s, ()) for s in sessions} == set(places)
    assert sticky.choose("", ()) is places[0]


def rejected(code: Any = None, message: str = "no", status: int = 400) -> UpstreamRejected:
    return UpstreamRejected(status, {"message": message, "code": code})


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (UpstreamRateLimited("slow"), Failure.RATE_LIMIT),
        (UpstreamUnavailable("down"), Failure.UNAVAILABLE),
        (UpstreamTimeout("late"), Failure.UNAVAILABLE),
        (UpstreamProtocolError("html"), Failure.UNAVAILABLE),
        (UpstreamMisconfigured("key"), Failure.UNAVAILABLE),
        (StreamTruncated("cut"), Failure.UNAVAILABLE),
        (UpstreamError("500"), Failure.UNAVAILABLE),
        (RequestDeadline("over"), None),
        (rejected(), None),
        (rejected(7), None),
        (rejected("invalid_value"), None),
        (rejected("context_length_exceeded"), Failure.CONTEXT_LENGTH),
        (rejected("string_above_max_length"), Failure.CONTEXT_LENGTH),
        (rejected("content_filter"), Failure.CONTENT_FILTER),
        (rejected("content_policy_violation"), Failure.CONTENT_FILTER),
        (rejected(None, "This model's maximum context length is 8192 tokens."), Failure.CONTEXT_LENGTH),
        (rejected(400, "the prompt exceeds the Context Window"), Failure.CONTEXT_LENGTH),
        (UpstreamRejected(400, {"type": "context_length_exceeded", "code": None}), Failure.CONTEXT_LENGTH),
    ],
)
def test_what_kind_of_failure_it_is(error: UpstreamError, failure: Failure | None) -> None:
    assert failure_of(error) is failure


# -- the catalogue -------------------------------------------------------------------------------


def file(*models: dict[str, Any], upstreams: tuple[str, ...] = ("one", "two")) -> FileConfig:
    return FileConfig.model_validate(
        {
            "upstreams": [{"name": n, "base_url": f"http://{n}.internal/v1"} for n in upstreams],
            "models": list(models),
        }
    )


def catalogue(given: FileConfig, conditions: Conditions | None = None, **values: Any) -> ModelCatalogue:
    known = configuration(file=given, **values)
    return ModelCatalogue(known, make_upstreams(known), conditions)


PATTERNS = file(
    {"name": "gpt-4o", "upstream": "one"},
    {"name": "gpt-*", "upstream": "two"},
    {"name": "org/[a]*", "upstream": "two", "upstream_model": "theirs"},
)


@pytest.mark.parametrize(
    ("name", "upstream", "there"),
    [
        ("gpt-4o", "one", "gpt-4o"),
        ("gpt-4o-mini", "two", "gpt-4o-mini"),
        ("gpt-", "two", "gpt-"),
        ("org/[a]", "two", "theirs"),
    ],
)
def test_a_name_of_the_file_goes_before_the_patterns(name: str, upstream: str, there: str) -> None:
    target = catalogue(PATTERNS).resolve(name).first
    assert (target.upstream.name, target.model, target.name) == (upstream, there, name)


@pytest.mark.parametrize("name", ["gpt", "xgpt-4", "org/a", "org/ab", "GPT-4"])
def test_what_no_pattern_is_for_is_not_served(name: str) -> None:
    with pytest.raises(ModelNotFound):
        catalogue(PATTERNS).resolve(name)


@pytest.mark.parametrize(
    ("patterns", "name", "fits"),
    [
        (("a", "b"), "b", True),
        (("a", "b"), "ab", False),
        (("a*",), "a", True),
        (("*",), "", True),
        (("a.c",), "abc", False),
        (("a?c", "[ab]"), "abc", False),
        (("a?c", "[ab]"), "[ab]", True),
        (("*/x",), "a/b/x", True),
        (("a*c|d",), "axd", False),
    ],
)
def test_only_the_star_stands_for_other_letters(patterns: tuple[str, ...], name: str, fits: bool) -> None:
    assert matches(patterns, name) is fits


def test_made_up_names_are_bounded_and_push_no_configured_place_out() -> None:
    conditions = Conditions()
    tested = catalogue(PATTERNS, conditions)
    known = tested.resolve("gpt-4o").places[0].condition
    used = tested.resolve("gpt-used").places[0].condition
    tested.resolve("org/[a]")
    for number in range(MOST_MADE_UP * 2):
        tested.resolve(f"gpt-{number}")
        if number % 500 == 0:
            assert tested.resolve("gpt-used").places[0].condition is used, "in use"
    assert conditions.find("one", "gpt-4o") is known
    assert conditions.find("two", "theirs") is not None
    assert conditions.find("two", "gpt-0") is None
    assert len(conditions.items()) <= MOST_MADE_UP + 2


def test_of_open_circuits_of_made_up_names_nothing_is_left_when_they_are_forgotten() -> None:
    metrics = Metrics(CollectorRegistry(), "1", models=["gpt-4o"])
    tested = catalogue(PATTERNS, Conditions(metrics.circuit, metrics.forget_circuit))
    for number in range(MOST_MADE_UP * 2):
        shut(tested.resolve(f"gpt-{number}").places[0])
    assert len(metrics._circuit_labels) == MOST_MADE_UP
    assert gauge(metrics, "two", "_other") == {"open": 1, "half_open": 0, "closed": 0}
    assert {labels["model"] for labels in circuits(metrics)} == {"_other"}


def test_the_circuits_metric_names_what_is_configured_and_puts_the_rest_together() -> None:
    metrics = Metrics(CollectorRegistry(), "1", models=["known"])
    metrics.circuit("u", "known", Circuit.OPEN)
    assert gauge(metrics, "u", "known") == {"open": 1, "half_open": 0, "closed": 0}
    metrics.circuit("u", "known", Circuit.HALF_OPEN)
    assert gauge(metrics, "u", "known") == {"open": 0, "half_open": 1, "closed": 0}
    metrics.circuit("u", "known", Circuit.CLOSED)
    assert gauge(metrics, "u", "known") == {"open": 0, "half_open": 0, "closed": 1}
    metrics.circuit("u", "made-up", Circuit.OPEN)
    metrics.circuit("u", "another", Circuit.OPEN)
    metrics.circuit("u", "another", Circuit.CLOSED)
    assert gauge(metrics, "u", "_other") == {"open": 1, "half_open": 0, "closed": 0}
    metrics.know(["made-up"])
    metrics.circuit("u", "made-up", Circuit.CLOSED)
    assert gauge(metrics, "u", "_other") == {"open": 0, "half_open": 0, "closed": 1}, "under its old label"
    metrics.circuit("u", "made-up", Circuit.OPEN)
    assert gauge(metrics, "u", "made-up") == {"open": 1, "half_open": 0, "closed": 0}, "it has one by now"
    assert gauge(metrics, "u", "_other") == {"open": 0, "half_open": 0, "closed": 1}, "the other name's"


def test_a_place_that_is_retired_takes_the_label_along_under_which_it_was_shown() -> None:
    metrics = Metrics(CollectorRegistry(), "1")
    metrics.circuit("u", "m", Circuit.OPEN)
    metrics.circuit("u", "other", Circuit.OPEN)
    metrics.know(["m"])
    metrics.circuit("u", "m", Circuit.CLOSED)
    metrics.forget_circuit("u", "m")
    assert gauge(metrics, "u", "_other") == {"open": 1, "half_open": 0, "closed": 0}, "the other one"
    metrics.circuit("u", "other", Circuit.CLOSED)
    metrics.forget_circuit("u", "other")
    metrics.forget_circuit("u", "never open")
    assert circuits(metrics) == []


def circuits(metrics: Metrics) -> list[dict[str, str]]:
    families = (f for f in metrics.registry.collect() if f.name == "weir_circuit_state")
    return [sample.labels for family in families for sample in family.samples]


def gauge(metrics: Metrics, upstream: str, model: str) -> dict[str, float | None]:
    labels = {"upstream": upstream, "model": model}
    return {
        state.value: metrics.registry.get_sample_value("weir_circuit_state", labels | {"state": state.value})
        for state in (Circuit.OPEN, Circuit.HALF_OPEN, Circuit.CLOSED)
    }


def test_of_places_that_left_the_configuration_nothing_is_left() -> None:
    metrics = Metrics(CollectorRegistry(), "1", models=["gpt-4o", "gpt-5", "theirs"])
    conditions = Conditions(metrics.circuit, metrics.forget_circuit)
    before = catalogue(PATTERNS, conditions)
    for name in ("gpt-4o", "gpt-5", "org/[a]"):
        shut(before.resolve(name).places[0])
    catalogue(PATTERNS, conditions).forget_others()
    assert {labels["model"] for labels in circuits(metrics)} == {"gpt-4o", "gpt-5", "theirs"}
    catalogue(
        file({"name": "other", "upstream": "one"}, {"name": "gpt-*", "upstream": "two"}), conditions
    ).forget_others()
    assert {labels["model"] for labels in circuits(metrics)} == {"gpt-5"}
    assert conditions.find("one", "gpt-4o") is None
    after = catalogue(PATTERNS, conditions)
    assert not after.resolve("gpt-5").places[0].admits
    assert after.resolve("gpt-4o").places[0].admits
    shut(after.resolve("gpt-4o").places[0])
    assert gauge(metrics, "one", "gpt-4o") == {"open": 1, "half_open": 0, "closed": 0}


def test_a_named_place_that_a_pattern_may_still_make_up_is_kept_like_those() -> None:
    conditions = Conditions()
    own = (
        catalogue(file({"name": "gpt-4o", "upstream": "two"}), conditions)
        .resolve("gpt-4o")
        .places[0]
        .condition
    )
    after = catalogue(file({"name": "gpt-*", "upstream": "two"}), conditions)
    after.forget_others()
    assert after.resolve("gpt-4o").places[0].condition is own
    for number in range(MOST_MADE_UP + 1):
        after.resolve(f"gpt-{number}")
    assert conditions.find("two", "gpt-4o") is None


def test_made_up_names_are_as_bounded_when_the_bound_is_lower() -> None:
    conditions = Conditions()
    peer = conditions.peer("u", most=None, region=None)
    conditions.most_made_up = 5
    for number in range(5):
        conditions.of(peer, f"made-up-{number}", made_up=True)
    conditions.most_made_up = 2
    conditions.of(peer, "latest", made_up=True)
    assert [model for (_, model), _ in conditions.items()] == ["made-up-4", "latest"]
    for name in ("a", "b", "c"):
        conditions.of(peer, name)
    conditions.keep([("u", "a")], lambda _upstream, _model: True)
    assert [model for (_, model), _ in conditions.items()] == ["a", "b", "c"]


def test_a_reload_forgets_no_open_circuit() -> None:
    heard: list[tuple[str, str, Circuit]] = []
    conditions = Conditions(lambda *change: heard.append(change))
    before = catalogue(PATTERNS, conditions).resolve("gpt-4o").places[0]
    shut(before)
    after = catalogue(PATTERNS, conditions).resolve("gpt-4o").places[0]
    assert after is not before
    assert not after.admits
    assert heard == [("one", "gpt-4o", Circuit.OPEN)]


def test_a_key_may_use_the_models_that_it_names_and_to_it_there_are_no_others() -> None:
    tested = catalogue(PATTERNS)
    anna = Principal("anna", "team", models=("gpt-4o", "gpt-4o-*"))
    tested.check(anna, "gpt-4o")
    tested.check(anna, "gpt-4o-mini")
    tested.check(ANONYMOUS, "anything")
    with pytest.raises(ModelNotFound) as caught:
        tested.check(anna, "gpt-5")
    with pytest.raises(ModelNotFound) as unknown:
        tested.resolve("nothing")
    assert caught.value.message.replace("gpt-5", "nothing") == unknown.value.message


async def test_the_list_shows_a_principal_what_it_may_use() -> None:
    tested = catalogue(
        file(
            {"name": "big", "upstream": "one", "aliases": ["large"]},
            {"name": "small", "upstream": "two"},
        )
    )

    async def seen_by(*models: str) -> list[str]:
        return [m["id"] for m in await tested.models(Principal("k", "t", models=models))]

    assert await seen_by() == ["big", "large", "small"]
    assert await seen_by("large", "s*") == ["large", "small"]
    assert await seen_by("none") == []


async def test_for_patterns_the_upstream_is_asked_and_one_that_is_silent_lists_none() -> None:
    class Lists(ScriptedUpstream):
        async def models(self) -> list[dict[str, Any]]:
            return [{"id": name} for name in ("gpt-4o", "gpt-5", "other")]

    class Silent(ScriptedUpstream):
        async def models(self) -> list[dict[str, Any]]:
            raise UpstreamUnavailable("no")

    known = configuration(file=PATTERNS)
    for upstream, expected in ((Lists(name="two"), ["gpt-4o", "gpt-5"]), (Silent(name="two"), ["gpt-4o"])):
        tested = ModelCatalogue(known, {"one": ScriptedUpstream(name="one"), "two": upstream})
        assert [m["id"] for m in await tested.models(ANONYMOUS)] == expected


# -- the configuration ---------------------------------------------------------------------------


TWO = [{"upstream": "one"}, {"upstream": "two"}]


@pytest.mark.parametrize(
    ("models", "sentence"),
    [
        ([{"name": "m"}], "model 'm' needs one of upstream and upstreams"),
        ([{"name": "m", "upstream": "one", "upstreams": TWO}], "needs one of upstream and upstreams"),
        ([{"name": "m", "upstreams": TWO, "upstream_model": "x"}], "each has its own `model`"),
        ([{"name": "m*", "upstream": "one", "aliases": ["n"]}], "takes no aliases"),
        ([{"name": "m", "upstream": "three"}], "names the upstream 'three', which is not one of one, two"),
        ([{"name": "m", "upstreams": [*TWO, {"upstream": "one"}]}], "names the upstream 'one' twice"),
        ([{"name": "m", "upstream": "one", "hedge": True}], "hedge needs a second upstream"),
        ([{"name": "m", "upstream": "one", "strategy": "best"}], "'ordered', 'weighted', 'least_busy'"),
        ([{"name": "m", "upstreams": [{"upstream": "one", "weight": 0}]}], "greater than 0"),
        (
            [{"name": "m", "upstream": "one", "fallbacks": {"unavailable": ["n"]}}],
            "model 'm' falls back to 'n', which is no other model of this file",
        ),
        ([{"name": "m", "upstream": "one", "fallbacks": {"rate_limit": ["m"]}}], "no other model"),
        (
            [{"name": "m", "upstream": "one", "aliases": ["n"], "fallbacks": {"rate_limit": ["n"]}}],
            "no other model",
        ),
        (
            [
                {"name": "m", "upstream": "one", "fallbacks": {"content_filter": ["n*"]}},
                {"name": "n*", "upstream": "one"},
            ],
            "no other model",
        ),
        ([{"name": "m", "upstream": "one", "fallbacks": {"down": ["m"]}}], "fallbacks.down"),
    ],
)
def test_a_wrong_model_is_refused_in_a_clear_sentence(models: list[dict[str, Any]], sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        file(*models)
    assert sentence in str(caught.value)


def test_a_good_model_with_everything_is_taken() -> None:
    given = file(
        {
            "name": "m",
            "upstreams": [*TWO, {"upstream": "one", "model": "other", "weight": 2}],
            "hedge": True,
            "sticky": True,
            "strategy": "fastest",
            "fallbacks": {"context_length": ["n"], "unavailable": ["alias"]},
        },
        {"name": "n", "upstream": "two", "aliases": ["alias"]},
    )
    route = catalogue(given).resolve("m")
    assert [(p.target.upstream.name, p.target.model, p.weight) for p in route.places] == [
        ("one", "m", 1.0),
        ("two", "m", 1.0),
        ("one", "other", 2.0),
    ]
    assert (route.hedge, route.sticky, route.strategy) == (True, True, "fastest")
    assert route.stand_ins == {Failure.CONTEXT_LENGTH: ("n",), Failure.UNAVAILABLE: ("alias",)}


def test_a_health_path_is_for_the_direct_kind() -> None:
    upstream = {"name": "u", "base_url": "http://u.internal/v1", "health_path": "/models"}
    FileConfig.model_validate({"upstreams": [upstream]})
    with pytest.raises(ValueError, match="upstream 'u': a health_path is for the kind direct alone"):
        FileConfig.model_validate({"upstreams": [{**upstream, "kind": "openai_sdk"}]})


def test_a_keys_models_are_its_owners_rights() -> None:
    from service.auth import KeyRing, hash_key

    def ring(*models: str) -> KeyRing:
        return KeyRing([KeyConfig(name="k", sha256=hash_key("secret"), models=models)])

    assert ring("a", "b*").principal("Bearer secret").models == ("a", "b*")
    assert ring().replace([KeyConfig(name="k", sha256=hash_key("secret"), models=("a",))]), "a change"


def test_every_strategy_of_the_configuration_is_known_here() -> None:
    from typing import get_args

    from service.config import ModelConfig

    assert list(get_args(ModelConfig.model_fields["strategy"].annotation)) == STRATEGIES
    assert all(a != b for a, b in pairwise(STRATEGIES))


class Unwell(ScriptedUpstream):
    """An upstream whose probe has a fault of our own."""

    async def is_well(self, path: str) -> bool:
        raise ZeroDivisionError


class Well(ScriptedUpstream):
    async def is_well(self, path: str) -> bool:
        return True


async def test_a_probe_with_a_fault_of_ours_ends_no_process_and_no_other_probe() -> None:
    conditions = Conditions()
    watched = {"one": (Unwell(), "/health"), "two": (Well(), "/health"), "three": (ScriptedUpstream(), "/")}
    breakers = {}
    for name in watched:
        breakers[name] = conditions.of(conditions.peer(name, most=None, region=None), "m").breaker
        breakers[name].open_for(60)
    await Prober(conditions, lambda: watched).probe()
    assert {name: b.state for name, b in breakers.items()} == {
        "one": Circuit.OPEN,
        "two": Circuit.CLOSED,
        "three": Circuit.OPEN,
    }
