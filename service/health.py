"""How the parts fare, seen from the requests that went through them: for `/health` and for people."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import msgspec

from service.domain import Outcome, RequestRecord
from service.errors import CallerGone, WeirError


class UpstreamState(msgspec.Struct):
    """What was last seen of one upstream; times are seconds since 1970, UTC."""

    kind: str
    status: str = "unused"
    last_success_at: float | None = None
    last_failure_at: float | None = None
    last_failure: str | None = None


class UpstreamHealth:
    """Notes the end of each attempt. Names only: no address and no key gets here."""

    def __init__(self, upstreams: Iterable[tuple[str, str]], clock: Callable[[], float] = time.time) -> None:
        self.states = {name: UpstreamState(kind) for name, kind in upstreams}
        self._clock = clock

    def know(self, upstreams: Iterable[tuple[str, str]]) -> None:
        """These are the upstreams from now on; what was seen of those that stay is kept."""
        known = self.states
        self.states = {
            name: known[name] if name in known and known[name].kind == kind else UpstreamState(kind)
            for name, kind in upstreams
        }

    def attempted(self, record: RequestRecord, error: WeirError | None) -> None:
        state = self.states.get(record.upstream)
        if state is None or isinstance(error, CallerGone):
            return
        if error is None or error.outcome is Outcome.CLIENT_ERROR:
            state.status, state.last_success_at = "ok", self._clock()
        else:
            state.status, state.last_failure_at = "failing", self._clock()
            state.last_failure = error.code
