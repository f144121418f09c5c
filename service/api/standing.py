"""Headers that tell callers how near they are to their limits and budgets."""

from __future__ import annotations

from functools import lru_cache

from service.domain import Standing, Window


def standing_headers(standing: Standing) -> list[tuple[bytes, bytes]]:
    """`x-ratelimit-*` as OpenAI sends them, for the tightest limit of each kind, and budgets that warn."""
    headers: list[tuple[bytes, bytes]] = []
    if standing.requests is not None:
        headers += _window(b"requests", standing.requests)
    if standing.tokens is not None:
        headers += _window(b"tokens", standing.tokens)
    headers += [
        (
            b"x-weir-budget-warning",
            f"{b.name}; used={b.used_ratio:.3f}; remaining_usd={b.remaining_usd:.4f}".encode(),
        )
        for b in standing.budgets
        if b.warns
    ]
    return headers


def _window(kind: bytes, window: Window) -> tuple[tuple[bytes, bytes], ...]:
    limit, remaining, reset = _names(kind)
    return (
        (limit, str(window.limit).encode()),
        (remaining, str(window.remaining).encode()),
        (reset, duration(window.reset_seconds).encode()),
    )


@lru_cache(maxsize=2)
def _names(kind: bytes) -> tuple[bytes, bytes, bytes]:
    return (b"x-ratelimit-limit-" + kind, b"x-ratelimit-remaining-" + kind, b"x-ratelimit-reset-" + kind)


def duration(seconds: float) -> str:
    """As OpenAI writes it: `17ms`, `8.64s`, `6m0s`."""
    if seconds < 1:
        return f"{round(seconds * 1000)}ms"
    minutes, rest = divmod(seconds, 60)
    shown = f"{rest:.3f}".rstrip("0").rstrip(".")
    return f"{minutes:.0f}m{shown}s" if minutes else f"{shown}s"
