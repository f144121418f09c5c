"""Time limits touch their own cancellation and nobody else's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from service.deadlines import Deadline, IdleTimeout, Interrupt, Sweep
from service.errors import CallerGone, UpstreamTimeout

GONE = CallerGone("gone")
STALLED = UpstreamTimeout("stalled")


def stalled() -> UpstreamTimeout:
    return STALLED


def gone() -> CallerGone:
    return GONE


AN_AGE = 3600.0
AT_ONCE = 0.01


async def waits(interrupt: list[Interrupt], entered: asyncio.Event) -> None:
    mine = Interrupt()
    interrupt.append(mine)
    entered.set()
    try:
        await asyncio.Event().wait()
    except BaseException as error:
        mine.translate(type(error))
        raise


async def begun() -> tuple[asyncio.Task[None], Interrupt]:
    made: list[Interrupt] = []
    entered = asyncio.Event()
    task = asyncio.create_task(waits(made, entered))
    await entered.wait()
    return task, made[0]


async def test_fire_ends_the_wait_with_its_error() -> None:
    task, interrupt = await begun()
    interrupt.fire(GONE)
    with pytest.raises(CallerGone):
        await task
    assert task.cancelling() == 0, "the task goes on as if it had never been cancelled"


async def test_a_foreign_cancellation_passes() -> None:
    task, _ = await begun()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


@pytest.mark.parametrize("fired_first", [True, False])
async def test_a_foreign_cancellation_at_the_same_time_wins(fired_first: bool) -> None:
    task, interrupt = await begun()
    if fired_first:
        interrupt.fire(GONE)
    task.cancel()
    if not fired_first:
        interrupt.fire(GONE)
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_the_first_error_counts() -> None:
    task, interrupt = await begun()
    interrupt.fire(GONE)
    interrupt.fire(STALLED)
    with pytest.raises(CallerGone):
        await task
    assert task.cancelling() == 0


async def test_an_error_of_the_block_itself_is_not_replaced() -> None:
    interrupt = Interrupt()
    interrupt.translate(ValueError)
    interrupt.translate(None)


async def test_a_task_that_is_being_cancelled_may_still_be_interrupted() -> None:
    """The one who cleans up after a cancellation waits too, and is ended in the same way."""
    cleaning = asyncio.Event()
    made: list[Interrupt] = []
    ended: list[BaseException] = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            try:
                await waits(made, cleaning)
            except BaseException as error:
                ended.append(error)
            raise

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    await cleaning.wait()
    made[0].fire(GONE)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended == [GONE]


# -- one timer for all limits --------------------------------------------------------------------


class Woken:
    """An entry that notes when it was woken, and wants to be woken `again` seconds later."""

    def __init__(self, again: float | None = None, then: Callable[[], None] | None = None) -> None:
        self.times: list[float] = []
        self.seen = asyncio.Event()
        self._again = again
        self._then = then

    def due(self, now: float) -> float | None:
        self.times.append(now)
        self.seen.set()
        if self._then is not None:
            self._then()
        return None if self._again is None else now + self._again


def now() -> float:
    return asyncio.get_running_loop().time()


async def test_an_entry_is_woken_at_its_time_and_once() -> None:
    sweep, soon, later = Sweep(), Woken(), Woken()
    at = now() + 0.01
    sweep.add(soon, at)
    sweep.add(later, at + AN_AGE)
    await soon.seen.wait()
    assert soon.times[0] >= at
    assert (len(soon.times), len(later.times), len(sweep)) == (1, 0, 1)


async def test_an_entry_may_ask_to_be_woken_again() -> None:
    sweep, entry = Sweep(), Woken(again=0.0)
    sweep.add(entry, now())
    for _ in range(3):
        await entry.seen.wait()
        entry.seen.clear()
    assert len(sweep) == 1
    sweep.discard(entry)
    assert len(sweep) == 0


async def test_an_entry_that_was_taken_out_is_not_woken() -> None:
    sweep, out, other = Sweep(), Woken(), Woken()
    sweep.add(out, now())
    sweep.add(other, now())
    sweep.discard(out)
    sweep.discard(out)
    await other.seen.wait()
    assert out.times == []


async def test_an_entry_that_leaves_while_it_is_woken_stays_out() -> None:
    sweep = Sweep()
    leaving = Woken(again=0.0, then=lambda: sweep.discard(leaving))
    sweep.add(leaving, now())
    await leaving.seen.wait()
    assert len(sweep) == 0


async def test_the_timer_rests_without_entries_and_starts_again() -> None:
    sweep = Sweep()
    for _ in range(2):
        entry = Woken()
        sweep.add(entry, now())
        await entry.seen.wait()
        assert sweep._timer is None


# -- limits --------------------------------------------------------------------------------------


async def test_a_deadline_ends_the_wait_with_its_error() -> None:
    sweep = Sweep()
    with pytest.raises(UpstreamTimeout) as caught, Deadline(sweep, now() + AT_ONCE, stalled):
        await asyncio.Event().wait()
    assert caught.value is STALLED
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    assert len(sweep) == 0


async def test_a_deadline_that_was_kept_leaves_nothing_behind() -> None:
    sweep = Sweep()
    with Deadline(sweep, now() + AN_AGE, stalled):
        await asyncio.sleep(0)
    assert len(sweep) == 0


async def test_a_wait_that_lasts_too_long_ends_with_the_error() -> None:
    sweep = Sweep()
    with pytest.raises(UpstreamTimeout) as caught, IdleTimeout(sweep, AT_ONCE, stalled) as idle:
        idle.waiting()
        await asyncio.Event().wait()
    assert caught.value is STALLED
    assert len(sweep) == 0


async def test_each_wait_counts_by_itself_and_a_slow_readers_time_does_not() -> None:
    with IdleTimeout(Sweep(), 10.0, stalled) as idle:
        start = now()
        assert idle.due(start + 100.0) == start + 110.0, "nobody waits for the upstream"
        idle.waiting()
        since = idle._since
        assert since is not None
        assert idle.due(since + 9.0) == since + 10.0, "looked at again when this wait would be too long"
        idle.arrived()
        assert idle.due(since + 10.0) == since + 20.0
        idle.waiting()
        again = idle._since
        assert again is not None
        assert idle.due(again + 9.9) == again + 10.0
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


@pytest.mark.parametrize("limit", [IdleTimeout, Deadline])
async def test_a_foreign_cancellation_passes_through_a_limit(limit: type[IdleTimeout | Deadline]) -> None:
    sweep, entered = Sweep(), asyncio.Event()

    async def work() -> None:
        with limit(sweep, now() + AN_AGE, stalled):
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await entered.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(sweep) == 0


@pytest.mark.parametrize("limit", [IdleTimeout, Deadline])
async def test_an_error_inside_passes_through_a_limit(limit: type[IdleTimeout | Deadline]) -> None:
    sweep = Sweep()
    with pytest.raises(ValueError, match="mine"), limit(sweep, now() + AN_AGE, stalled):
        raise ValueError("mine")
    assert len(sweep) == 0


async def test_of_two_limits_at_once_the_outer_one_counts() -> None:
    sweep = Sweep()
    at = now() + AT_ONCE
    with pytest.raises(CallerGone), Deadline(sweep, at, gone), Deadline(sweep, at, stalled):
        await asyncio.Event().wait()
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
