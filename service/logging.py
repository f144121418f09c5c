"""Logs: JSON lines to standard output, coloured text on a terminal; never a prompt, an answer or a key.

Everything goes through one chain of processors: our own events, and those of uvicorn, gunicorn and
every other library that uses the standard library's logging.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import sys
import threading
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, BinaryIO, Final, Literal

import msgspec
import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

request_id_of_task: ContextVar[str] = ContextVar("request_id_of_task", default="")
"""The request that this task serves: put into every line that is logged meanwhile."""

_UNWRITABLE: Final = (TypeError, ValueError, RecursionError)
"""What has no form in JSON: an unknown type, half a surrogate pair, a list inside itself."""
_LEVELS: Final = logging.getLevelNamesMapping()
_QUIET: Final = ("uvicorn.error", "uvicorn.access", "httpx2", "httpcore2", "openai", "asyncio")
"""What they say below a warning, our own events say better."""


_TRACEBACK: Final = structlog.tracebacks.ExceptionDictTransformer(show_locals=False, max_frames=20)
"""Without local variables: keys and prompts are among them."""


def configure(level: str, form: Literal["auto", "json", "console"]) -> None:
    """Set up all logging of this process; may be called again to change it."""
    console = form == "console" or (form == "auto" and sys.stdout.isatty())
    shared: list[Processor] = [
        structlog.stdlib.add_log_level if console else _add_level,
        _add_request_id,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="timestamp"),
    ]
    render: list[Processor]
    if console:
        render = [
            structlog.dev.ConsoleRenderer(
                colors=sys.stdout.isatty(), exception_formatter=structlog.dev.plain_traceback
            )
        ]
    else:
        render = [structlog.processors.ExceptionRenderer(_TRACEBACK), _render_json]
    number = _LEVELS[level.upper()]
    structlog.configure(
        processors=[*shared, *render],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.PrintLoggerFactory(sys.stdout)
        if console
        else BufferedLines(sys.stdout.buffer),
        cache_logger_on_first_use=True,
    )
    _bridge(number, shared, render)


class BufferedLines:
    """A structlog logger, and its factory, that writes several lines at once.

    A write for each request's line costs a tenth of the throughput. Lines wait up to
    `DELAY_SECONDS`; one that tells of trouble takes all that wait along at once, and so does the
    end of the process.
    """

    DELAY_SECONDS: Final = 0.05
    MOST_BYTES: Final = 64 * 1024

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._waiting: list[bytes] = []
        self._size = 0
        self._lock = threading.Lock()
        self._timer: asyncio.TimerHandle | None = None
        atexit.register(self.flush)

    def __call__(self, *_: Any) -> BufferedLines:
        return self

    def msg(self, line: bytes) -> None:
        with self._lock:
            self._waiting += (line, b"\n")
            self._size += len(line) + 1
        if self._size >= self.MOST_BYTES:
            self.flush()
        elif self._timer is None:
            try:
                loop = asyncio.get_running_loop()
            except RuntimeError:
                self.flush()
            else:
                self._timer = loop.call_later(self.DELAY_SECONDS, self.flush)

    debug = info = msg

    def urgent(self, line: bytes) -> None:
        self.msg(line)
        self.flush()

    warning = error = critical = exception = urgent

    def flush(self) -> None:
        self._timer = None
        with self._lock:
            waiting, self._waiting, self._size = self._waiting, [], 0
            if waiting:
                # Whoever reads the log may have gone: that must not cost anybody an answer.
                with suppress(OSError):
                    self._stream.write(b"".join(waiting))
                    self._stream.flush()


def _bridge(level: int, shared: list[Processor], render: list[Processor]) -> None:
    """Let the standard library's loggers write through the same chain."""
    last = render[-1]

    def as_text(logger: WrappedLogger, name: str, event: EventDict) -> str:
        rendered = last(logger, name, event)
        return rendered.decode() if isinstance(rendered, bytes) else str(rendered)

    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *render[:-1],
                as_text,
            ],
        )
    )
    logging.raiseExceptions = False  # a log that cannot be written is no fault of the request
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in ("uvicorn", "uvicorn.error", "gunicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))


def _add_level(logger: WrappedLogger, name: str, event: EventDict) -> EventDict:
    event["level"] = name
    return event


def _add_request_id(logger: WrappedLogger, name: str, event: EventDict) -> EventDict:
    request_id = request_id_of_task.get()
    if request_id:
        event.setdefault("request_id", request_id)
    return event


def _render_json(logger: WrappedLogger, name: str, event: EventDict) -> bytes:
    """One line of JSON; time, level and event come first, for people who read it raw."""
    first = {k: event.pop(k, None) for k in ("timestamp", "level", "event")}
    ordered = {**first, **event}
    try:
        return msgspec.json.encode(ordered)
    except _UNWRITABLE:
        return msgspec.json.encode({k: _plain(v) for k, v in ordered.items()})


def _plain(value: Any) -> Any:
    try:
        msgspec.json.encode(value)
    except _UNWRITABLE:
        return ascii(value)
    return value
