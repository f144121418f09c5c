"""Closes circuits early: asks an upstream that was found failing whether it is well again.

Without this an open circuit lets one call of a caller through after each pause. With a `health_path` nobody's
call is needed, and a pause that has grown to a minute is not waited for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Final, Protocol, runtime_checkable

import structlog

from service.ports import Upstream
from service.routing.breaker import Breaker, Cause, Circuit
from service.routing.catalogue import Conditions

PROBE_SECONDS: Final = 2.0
TIMEOUT_SECONDS: Final = 5.0

log = structlog.get_logger("weir")


@runtime_checkable
class Probed(Protocol):
    """An upstream that can be asked how it is."""

    async def is_well(self, path: str) -> bool:
        """Whether a GET of `path`, below its base URL, is answered with 200. Never raises."""
        ...


class Prober:
    """Asks once in `PROBE_SECONDS` while a circuit is open.

    `watched` gives the upstreams of now that have a health path, by name.
    """

    def __init__(
        self, conditions: Conditions, watched: Callable[[], Mapping[str, tuple[Upstream, str]]]
    ) -> None:
        self._conditions = conditions
        self._watched = watched

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(PROBE_SECONDS)
            await self.probe()

    async def probe(self) -> None:
        """Ask each upstream that was found failing, once. Never raises."""
        names = {name for (name, _), condition in self._conditions.items() if _failed(condition.breaker)}
        if names:
            watched = self._watched()
            await asyncio.gather(*(self._ask(name, *watched[name]) for name in names if name in watched))

    async def _ask(self, name: str, upstream: Upstream, path: str) -> None:
        if not isinstance(upstream, Probed):
            return
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                well = await upstream.is_well(path)
        except TimeoutError:
            well = False
        except Exception:  # a fault of ours must not end a process that serves
            log.exception("probe_failed", upstream=name)
            return
        log.debug("upstream_probed", upstream=name, well=well)
        if not well:
            return
        for (of, _), condition in self._conditions.items():
            if of == name and _failed(condition.breaker):
                condition.breaker.close()


def _failed(breaker: Breaker) -> bool:
    """An upstream that only asked for time is well already, and shall have it."""
    return breaker.state is Circuit.OPEN and breaker.cause is not Cause.ASKED
