"""Logs: JSON lines to standard output, coloured text on a terminal; never a prompt, an answer or a key.

Everything goes through one chain of processors: our own events, those of uvicorn, gunicorn and every
other library that uses the standard library's logging, warnings, and errors that nobody caught. The
canonical line of each request alone is encoded without the chain, by `service.canonical`.
"""

from __future__ import annotations

import atexit
import logging
import mmap
import os
import struct
import sys
import tempfile
import threading
import time
import traceback
import warnings
from contextlib import suppress
from contextvars import ContextVar
from fcntl import LOCK_EX, LOCK_UN, lockf
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import IO, Any, BinaryIO, Final, Literal, NamedTuple, TypeAlias

import msgspec
import structlog
from structlog.typing import EventDict, ExcInfo, Processor, WrappedLogger

from service.credentials import CREDENTIAL

Level: TypeAlias = Literal["debug", "info", "warning", "error", "critical"]

LEVELS: Final = ("debug", "info", "warning", "error", "critical")
MOST_LEVEL_SECONDS: Final = 86_400
"""A level that was changed for longer would be forgotten."""
MOST_FRAMES: Final = 20
MOST_CHAINED: Final = 5
MOST_LETTERS: Final = 1_000
"""Of an error's own words: some quote what they were given."""


class TraceIds(NamedTuple):
    """The ids of a request's trace and span, as W3C writes them; empty where there is none."""

    trace_id: str
    span_id: str


request_id_of_task: ContextVar[str] = ContextVar("request_id_of_task", default="")
"""The request that this task serves: put into every line that is logged meanwhile."""

trace_of_task: ContextVar[TraceIds | None] = ContextVar("trace_of_task", default=None)
"""The trace of that request, likewise."""

_UNWRITABLE: Final = (TypeError, ValueError, RecursionError)
"""What has no form in JSON: an unknown type, half a surrogate pair, a list inside itself."""
_NUMBERS: Final = logging.getLevelNamesMapping()
_QUIET: Final = ("uvicorn.error", "uvicorn.access", "httpx2", "httpcore2", "openai", "asyncio")
"""What they say below a warning, our own events say better."""


class _BoundLogger(structlog.make_filtering_bound_logger(logging.INFO)):  # type: ignore[misc]
    """What all of our loggers are. They stay once they were used, so a new level is a new base of it."""


def configure(level: str, form: Literal["auto", "json", "console"]) -> None:
    """Set up all logging of this process; may be called again to change it."""
    console = form == "console" or (form == "auto" and sys.stdout.isatty())
    shared: list[Processor] = [
        structlog.stdlib.add_log_level if console else _add_level,
        _add_ids,
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
        render = [structlog.processors.ExceptionRenderer(_of_exc_info), _render_json]
    lines = None if console else json_lines() or BufferedLines(open_raw(sys.stdout))
    structlog.configure(
        processors=[*shared, *render],
        wrapper_class=_BoundLogger,
        logger_factory=structlog.PrintLoggerFactory(sys.stdout) if lines is None else lines,
        cache_logger_on_first_use=True,
    )
    _bridge(lines, shared, render)
    set_level(level)
    if lines is not None:
        _take_over()


def set_level(level: str) -> None:
    """Change the level of this process, whose logging `configure` has set up."""
    number = _NUMBERS[level.upper()]
    _BoundLogger.__bases__ = (structlog.make_filtering_bound_logger(number),)
    logging.getLogger().setLevel(number)
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(number, logging.WARNING))


def json_lines() -> BufferedLines | None:
    """Where this process's lines go; None if `configure` has not set up JSON."""
    factory = structlog.get_config()["logger_factory"]
    return factory if isinstance(factory, BufferedLines) else None


def open_raw(stream: IO[str]) -> BinaryIO:
    """The stream's own file, without a buffer whose lock a thread could hold at the process's end."""
    return open(stream.fileno(), "wb", buffering=0, closefd=False)


class BufferedLines:
    """A structlog logger, and its factory, that hands lines to a thread, which writes several at once.

    A write for each request's line costs a tenth of the throughput, and a reader of the pipe that does
    not read would hold up every request. So lines wait for the thread: up to `DELAY_SECONDS`, less
    when one tells of trouble. While nobody reads, up to `MOST_LINES` wait; further ones are dropped and
    counted. The end of the process writes what waits, and gives a reader that does not read
    `END_SECONDS`.

    The queues are those whose `put` may interrupt another: signal handlers log too.
    """

    DELAY_SECONDS: Final = 0.05
    END_SECONDS: Final = 2.0
    MOST_BYTES: Final = 64 * 1024
    MOST_LINES: Final = 10_000

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._taking_turns: IO[bytes] | None = None
        self._dropped = 0
        self._closed = False
        self._reset()
        atexit.register(self.close)
        os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        """Begin with nothing; after a fork what waits is the parent's, and so is the thread."""
        self._lines: SimpleQueue[bytes | None] = SimpleQueue()
        self._hurry: SimpleQueue[None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.RLock()

    def share(self) -> None:
        """Take turns with processes that are forked from now on: else lines would run into each other."""
        self._taking_turns = tempfile.TemporaryFile()  # noqa: SIM115  # for as long as the process

    def __call__(self, *_: Any) -> BufferedLines:
        return self

    def msg(self, line: bytes) -> None:
        if self._thread is None and not self._begin():
            return self._write([line])
        if self._lines.qsize() >= self.MOST_LINES:
            self._drop(1)
        else:
            self._lines.put(line)

    debug = info = msg

    def urgent(self, line: bytes) -> None:
        self.msg(line)
        if self._hurry.empty():
            self._hurry.put(None)

    warning = error = critical = exception = urgent

    def take_dropped(self) -> int:
        """Lines that were dropped since the last call."""
        with self._lock:
            dropped, self._dropped = self._dropped, 0
        return dropped

    def close(self) -> None:
        """Write what waits; later lines are written by whoever logs them. For the end of the process."""
        thread = self._thread
        self._closed = True
        if thread is None:
            return
        self._lines.put(None)
        self._hurry.put(None)
        thread.join(self.END_SECONDS)
        if not thread.is_alive():
            self._thread = None

    def _begin(self) -> bool:
        """Whether a thread writes."""
        with self._lock:
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name="log", daemon=True)
                try:
                    self._thread.start()
                except RuntimeError:  # the interpreter ends
                    self._thread, self._closed = None, True
        return self._thread is not None

    def _run(self) -> None:
        lines, hurry = self._lines, self._hurry
        line = lines.get()
        while line is not None:
            if lines.qsize() < self.MOST_LINES // 2:
                with suppress(Empty):
                    hurry.get(timeout=self.DELAY_SECONDS)
            block, size = [line], len(line)
            with suppress(Empty):
                while size < self.MOST_BYTES and (line := lines.get_nowait()) is not None:
                    block.append(line)
                    size += len(line)
            self._write(block)
            if line is not None:
                line = lines.get()

    def _write(self, block: list[bytes]) -> None:
        data = memoryview(b"\n".join([*block, b""]))
        # Whoever reads the log may have gone: that must not cost anybody an answer.
        try:
            if self._taking_turns is not None:
                lockf(self._taking_turns, LOCK_EX)
            try:
                while data:
                    written = self._stream.write(data)
                    if written is None:  # not ready, where somebody made it not wait
                        time.sleep(self.DELAY_SECONDS)
                    else:
                        data = data[written:]
            finally:
                if self._taking_turns is not None:
                    lockf(self._taking_turns, LOCK_UN)
        except OSError:
            self._drop(len(block))

    def _drop(self, lines: int) -> None:
        with self._lock:
            self._dropped += lines


class LogLevel:
    """The level of this process and of those forked from it, which may be changed for a while.

    The wish is in memory that they share; each follows it at its next heartbeat, and returns by itself.
    """

    _WISH: Final = struct.Struct("di")

    def __init__(self, configured: str) -> None:
        self.configured = configured
        self._memory = mmap.mmap(-1, self._WISH.size)
        self._applied = configured

    @property
    def level(self) -> str:
        """The one that is wanted now."""
        until, index = self._WISH.unpack_from(self._memory)
        return LEVELS[index] if time.monotonic() < until else self.configured

    def change(self, level: str, seconds: float) -> None:
        """Want `level` for so many seconds."""
        self._WISH.pack_into(self._memory, 0, time.monotonic() + seconds, LEVELS.index(level))
        log = structlog.get_logger("weir")
        log.warning("log_level_changed", to=level, seconds=seconds)
        self.follow()

    def follow(self) -> None:
        """Apply what is wanted to this process."""
        level = self.level
        if level != self._applied:
            self._applied = level
            set_level(level)
            if level == self.configured:
                log = structlog.get_logger("weir")
                log.warning("log_level_returned", to=level)

    def tell(self) -> dict[str, object]:
        until, _ = self._WISH.unpack_from(self._memory)
        left = max(until - time.monotonic(), 0.0)
        return {"level": self.level, "configured": self.configured, "seconds_left": round(left, 1) or None}


class Frame(msgspec.Struct):
    """A place in the code."""

    file: str
    line: int
    function: str


class Linked(msgspec.Struct, omit_defaults=True):
    """An error that another one came from, or that is one of a group's."""

    relation: Literal["cause", "context", "member"]
    type: str
    message: str
    frames: list[Frame]


class ExceptionInfo(msgspec.Struct, omit_defaults=True):
    """An error as a line tells of it. Without local variables: keys and prompts are among them."""

    type: str
    message: str
    frames: list[Frame]
    """The innermost last, at most 20 of them."""
    chain: list[Linked] = []


def exception_info(error: BaseException) -> ExceptionInfo:
    """What the log tells of an error."""
    chain = [Linked(relation, *_described(other)) for relation, other in _linked(error)]
    return ExceptionInfo(*_described(error), chain)


def _linked(error: BaseException) -> list[tuple[Literal["cause", "context", "member"], BaseException]]:
    """The errors that it came from, and those of a group, the nearest first."""
    found: list[tuple[Literal["cause", "context", "member"], BaseException]] = []
    seen, waiting = {id(error)}, [error]
    while waiting and len(found) < MOST_CHAINED:
        at = waiting.pop(0)
        others: list[tuple[Literal["cause", "context", "member"], BaseException]] = []
        if isinstance(at, BaseExceptionGroup):
            others += [("member", member) for member in at.exceptions]
        if at.__cause__ is not None:
            others.append(("cause", at.__cause__))
        elif at.__context__ is not None and not at.__suppress_context__:
            others.append(("context", at.__context__))
        for relation, other in others:
            if id(other) not in seen:
                seen.add(id(other))
                found.append((relation, other))
                waiting.append(other)
    return found[:MOST_CHAINED]


def _described(error: BaseException) -> tuple[str, str, list[Frame]]:
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    try:
        words = str(error)
    except Exception:  # noqa: BLE001  # an error whose words fail is told of all the same
        words = "(its words cannot be read)"
    frames = [
        Frame(frame.filename, frame.lineno or 0, frame.name)
        for frame in traceback.extract_tb(error.__traceback__)[-MOST_FRAMES:]
    ]
    # Cut before too: some quote all that they were given. What is beyond may begin inside a key.
    return name, _clean(words[: 2 * MOST_LETTERS])[:MOST_LETTERS], frames


def _clean(words: str) -> str:
    """Words that are not our own, without keys and credentials."""
    return CREDENTIAL.sub("***", words)


def _of_exc_info(exc_info: ExcInfo) -> ExceptionInfo:
    return exception_info(exc_info[1])


class _Handler(logging.Handler):
    """Of the standard library's loggers: through the same processors to the same lines."""

    def __init__(self, lines: BufferedLines, processors: list[Processor]) -> None:
        super().__init__()
        self._lines = lines
        self._processors = processors

    def emit(self, record: logging.LogRecord) -> None:
        try:
            told: Any = {"event": _clean(record.getMessage()), "logger": record.name}
            if record.exc_info:
                told["exc_info"] = record.exc_info
            if record.stack_info:
                told["stack"] = record.stack_info
            for processor in self._processors:
                told = processor(None, record.levelname.lower(), told)
            tell = self._lines.urgent if record.levelno >= logging.WARNING else self._lines.msg
            tell(told)
        except Exception:  # noqa: BLE001  # a line that cannot be written is no fault of the request
            self.handleError(record)


def _bridge(lines: BufferedLines | None, shared: list[Processor], render: list[Processor]) -> None:
    """Let the standard library's loggers write through the same chain."""
    handler: logging.Handler
    if lines is None:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(
            structlog.stdlib.ProcessorFormatter(
                foreign_pre_chain=[structlog.stdlib.add_logger_name, _clean_event, *shared],
                processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
            )
        )
    else:
        handler = _Handler(lines, [*shared, *render])
    logging.raiseExceptions = False  # a log that cannot be written is no fault of the request
    logging.getLogger().handlers[:] = [handler]
    for name in ("uvicorn", "uvicorn.error", "gunicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True


def _take_over() -> None:
    """Lines instead of text on standard error: of warnings, and of errors that nobody caught."""
    log = structlog.get_logger("weir")

    def warned(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: Any = None,
        line: str | None = None,
    ) -> None:
        log.warning(
            "python_warning",
            category=category.__name__,
            message=_clean(str(message)),
            file=filename,
            line=lineno,
        )

    def uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            log.info("interrupted")
            return
        log.critical("uncaught_exception", exc_info=error.with_traceback(trace))

    def in_thread(args: threading.ExceptHookArgs) -> None:
        name = args.thread.name if args.thread is not None else None
        log.error("uncaught_exception", thread=name, exc_info=args.exc_value)

    def unraisable(args: sys.UnraisableHookArgs) -> None:
        log.error("unraisable_exception", where=args.err_msg or repr(args.object), exc_info=args.exc_value)

    warnings.showwarning = warned
    sys.excepthook = uncaught
    threading.excepthook = in_thread
    sys.unraisablehook = unraisable


def _clean_event(logger: WrappedLogger, name: str, event: EventDict) -> EventDict:
    event["event"] = _clean(str(event["event"]))
    return event


def _add_level(logger: WrappedLogger, name: str, event: EventDict) -> EventDict:
    event["level"] = "error" if name == "exception" else name
    return event


def _add_ids(logger: WrappedLogger, name: str, event: EventDict) -> EventDict:
    request_id = request_id_of_task.get()
    if request_id:
        event.setdefault("request_id", request_id)
    trace = trace_of_task.get()
    if trace is not None:
        event.setdefault("trace_id", trace.trace_id)
        if trace.span_id:
            event.setdefault("span_id", trace.span_id)
    return event


def _render_json(logger: WrappedLogger, name: str, event: EventDict) -> bytes:
    """One line of JSON; time, level and event come first, for people who read it raw."""
    first = {k: event.pop(k, None) for k in ("timestamp", "level", "event")}
    return encode({**first, **event})


def encode(fields: dict[str, Any]) -> bytes:
    """JSON of all fields; of those that have no form in it, their text."""
    try:
        return msgspec.json.encode(fields)
    except _UNWRITABLE:
        return msgspec.json.encode({k: _plain(v) for k, v in fields.items()})


def _plain(value: Any) -> Any:
    try:
        msgspec.json.encode(value)
    except _UNWRITABLE:
        return ascii(value)
    return value
