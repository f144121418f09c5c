"""The view itself: asks, draws, listens to keys, and gives the terminal back as it was."""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Final

import msgspec
from rich.console import Console
from rich.live import Live

from service.top.scraping import SECONDS, Round
from service.top.screen import screen
from service.top.watch import Watch

HINT: Final = "q ends"
LEAST_PATIENCE_SECONDS: Final = 2.0
END_KEYS: Final = b"qQ\x03\x04"
"""Also Ctrl-C and Ctrl-D, where they come as letters."""
NO_TERMINAL: Final = ("dumb", "unknown")


class NobodyAnswers(Exception):
    """No pod gave metrics at the start; the text says what to do."""


def top(urls: Sequence[str], *, interval_seconds: float, once: bool, as_json: bool) -> None:
    """Shows the pods at `urls` until it is told to end. Raises NobodyAnswers."""
    watch = Watch(urls)
    first = Round(urls)
    first.wait()
    watch.take(time.monotonic(), first.answers)
    if len(watch.away) == len(urls):
        raise NobodyAnswers(_advice(watch.away))
    if once or as_json or not _has_terminal():
        time.sleep(interval_seconds)
        _print_once(watch, urls, as_json=as_json)
    else:
        _View(watch, urls, interval_seconds).run()


def _has_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM", "") not in NO_TERMINAL


def _print_once(watch: Watch, urls: Sequence[str], *, as_json: bool) -> None:
    second = Round(urls)
    second.wait()
    watch.take(time.monotonic(), second.answers)
    report = watch.report(time.time())
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(report)).decode())
        return
    _console().print(screen(report))


def _console() -> Console:
    # Told, and not guessed: FORCE_COLOR and the like must put no control codes into a file.
    return Console(force_terminal=sys.stdout.isatty(), highlight=False)


def _advice(away: dict[str, str]) -> str:
    lines = [f"{url}: {why}" for url, why in away.items()]
    return "\n".join(
        (
            *lines,
            "Weir's admin port must be reachable from here. On a cluster, either of:",
            "  kubectl port-forward deploy/weir 9000    # then, beside it: python -m service top",
            "  kubectl exec -it deploy/weir -- python -m service top",
        )
    )


class _View:
    """A whole terminal, drawn anew after each round, each key and each change of its size."""

    def __init__(self, watch: Watch, urls: Sequence[str], interval_seconds: float) -> None:
        self._watch = watch
        self._urls = urls
        self._interval = interval_seconds
        self._ended = False
        self._wakes, self._waker = os.pipe()
        os.set_blocking(self._wakes, False)
        os.set_blocking(self._waker, False)

    def run(self) -> None:
        console = _console()
        with (
            _keys_at_once(sys.stdin.fileno()),
            self._signals(),
            Live(console=console, screen=True, auto_refresh=False, redirect_stdout=False) as live,
        ):
            self._loop(console, live)

    def _loop(self, console: Console, live: Live) -> None:
        asked: Round | None = None
        began = time.monotonic()
        while not self._ended:
            now = time.monotonic()
            if asked is None and now >= began + self._interval:
                asked, began = Round(self._urls, self._wake), now
            if asked is not None and (asked.done or now >= began + self._patience()):
                self._watch.take(now, asked.answers)
                asked = None
            report = self._watch.report(time.time())
            hint = HINT if report.seconds else f"{HINT}; the first figures come in {self._interval:g} s"
            live.update(screen(report, console.size.height, hint), refresh=True)
            self._wait(max(began + self._interval - now, 0.05))

    def _patience(self) -> float:
        """Seconds for a round; whoever was away before holds the view up no more than an interval."""
        return max(self._interval, LEAST_PATIENCE_SECONDS) if self._watch.away else SECONDS

    def _wait(self, seconds: float) -> None:
        """For a key, an answer, a signal, or so long."""
        keyboard = sys.stdin.fileno()
        ready, _, _ = select.select([keyboard, self._wakes], [], [], seconds)
        if self._wakes in ready:
            os.read(self._wakes, 1024)
        if keyboard in ready:
            keys = os.read(keyboard, 1024)
            if not keys or any(key in END_KEYS for key in keys):  # none: the terminal is gone
                self._ended = True

    def _wake(self) -> None:
        with suppress(BlockingIOError):  # then it is full of reasons to wake up
            os.write(self._waker, b".")

    def _end(self, sig: int, frame: FrameType | None) -> None:
        self._ended = True

    @contextmanager
    def _signals(self) -> Iterator[None]:
        resized: Callable[[int, FrameType | None], None] = lambda sig, frame: None  # noqa: E731
        # Ctrl-C too: a KeyboardInterrupt may come where exceptions are lost, in a finalizer for one.
        ends = dict.fromkeys((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), self._end)
        handlers = {signal.SIGWINCH: resized, **ends}
        # Handlers run when Python gets to it: a signal just before the wait would be heard of after it.
        woken = signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)
        before = {sig: signal.signal(sig, handler) for sig, handler in handlers.items()}
        try:
            yield
        finally:
            signal.set_wakeup_fd(woken)
            for sig, handler in before.items():
                signal.signal(sig, handler)


@contextmanager
def _keys_at_once(terminal: int) -> Iterator[None]:
    """Keys come without Enter, and are not shown; Ctrl-C interrupts as ever."""
    before = termios.tcgetattr(terminal)
    tty.setcbreak(terminal)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
