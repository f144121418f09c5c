"""One line for each event, whoever logs it. In processes of their own: logging belongs to a process."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from typing import Any

import pytest

from service.logging import BufferedLines
from tests.running import ROOT

PRELUDE = """
import logging, structlog
from service.logging import configure, request_id_of_task
configure({level!r}, {form!r})
log = structlog.get_logger("weir")
"""


def printed(program: str, *, level: str = "info", form: str = "json") -> list[str]:
    """What `program` writes to standard output; nothing may go to standard error."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE.format(level=level, form=form) + program],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.removesuffix("\n").split("\n") if done.stdout else []


def lines(program: str, *, level: str = "info") -> list[dict[str, Any]]:
    return [json.loads(line) for line in printed(program, level=level)]


def test_a_line_begins_with_time_level_and_event() -> None:
    (line,) = printed('log.info("started", zebra=1, apple="ä")')
    decoded = json.loads(line)
    assert list(decoded) == ["timestamp", "level", "event", "zebra", "apple"]
    assert decoded["timestamp"].endswith("Z")
    assert (decoded["level"], decoded["event"], decoded["apple"]) == ("info", "started", "ä")


def test_every_line_of_a_request_names_it() -> None:
    first, own, foreign, last = lines(
        """
log.info("before")
token = request_id_of_task.set("req-1")
log.info("during")
logging.getLogger("some.library").warning("its words")
request_id_of_task.reset(token)
log.info("after")
"""
    )
    assert "request_id" not in first
    assert own["request_id"] == foreign["request_id"] == "req-1"
    assert "request_id" not in last


def test_every_line_of_a_request_names_its_trace() -> None:
    own, foreign, without_span = lines(
        """
from service.logging import TraceIds, trace_of_task
trace_of_task.set(TraceIds("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"))
log.info("during")
logging.getLogger("some.library").warning("its words")
trace_of_task.set(TraceIds("0af7651916cd43dd8448eb211c80319c", ""))
log.info("no spans here")
"""
    )
    for line in (own, foreign):
        assert (line["trace_id"], line["span_id"]) == ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331")
    assert without_span["trace_id"] == own["trace_id"]
    assert "span_id" not in without_span


def test_a_request_id_given_by_hand_stays() -> None:
    (line,) = lines('request_id_of_task.set("of-task"); log.info("x", request_id="given")')
    assert line["request_id"] == "given"


@pytest.mark.parametrize("name", ["uvicorn.error", "gunicorn.error", "some.library"])
def test_libraries_write_through_the_same_renderer(name: str) -> None:
    (line,) = lines(f'logging.getLogger({name!r}).error("port %d is taken", 80)')
    assert list(line)[:3] == ["timestamp", "level", "event"]
    assert (line["level"], line["event"], line["logger"]) == ("error", "port 80 is taken", name)


def test_chatty_libraries_are_heard_only_when_something_is_wrong() -> None:
    found = lines(
        """
for name in ("uvicorn.access", "httpx2", "openai", "asyncio"):
    logging.getLogger(name).info("chatter")
    logging.getLogger(name).warning("trouble")
"""
    )
    assert [line["event"] for line in found] == ["trouble"] * 4


@pytest.mark.parametrize(
    ("level", "heard"),
    [
        ("debug", ["debug", "info", "warning", "error", "critical"]),
        ("warning", ["warning", "error", "critical"]),
        ("critical", ["critical"]),
    ],
)
def test_lines_below_the_level_are_not_written(level: str, heard: list[str]) -> None:
    found = lines(
        """
for level in ("debug", "info", "warning", "error", "critical"):
    getattr(log, level)("own")
    getattr(logging.getLogger("library"), level)("foreign")
""",
        level=level,
    )
    assert [(line["event"], line["level"]) for line in found] == [
        (who, at) for at in heard for who in ("own", "foreign")
    ]


def test_values_that_have_no_json_are_written_all_the_same() -> None:
    (line,) = lines(
        """
loop = []; loop.append(loop)
log.info("odd", thing=object, half="\\ud83d", pairs={(1, 2): 3}, loop=loop, number=10**30, fine=[1, None])
"""
    )
    assert line["thing"] == "<class 'object'>"
    assert line["half"] == "'\\ud83d'"
    assert line["pairs"] == "{(1, 2): 3}"
    assert line["loop"] == "[[...]]"
    assert line["fine"] == [1, None]


@pytest.mark.parametrize(
    "logged",
    ['log.exception("failed")', 'logging.getLogger("library").exception("failed")'],
    ids=["own", "foreign"],
)
def test_an_exception_is_a_field_with_its_frames(logged: str) -> None:
    (line,) = lines(
        f"""
try:
    raise ValueError("a reason")
except ValueError:
    {logged}
"""
    )
    assert (line["event"], line["level"]) == ("failed", "error")
    exception = line["exception"]
    assert (exception["type"], exception["message"]) == ("ValueError", "a reason")
    assert exception["frames"] == [{"file": "<string>", "line": 8, "function": "<module>"}]
    assert "chain" not in exception


def failing(program: str) -> dict[str, Any]:
    """The `exception` of a line that tells of what `program` raises."""
    indented = "".join(f"    {line}\n" for line in program.strip().splitlines())
    (line,) = lines(f"try:\n{indented}except BaseException:\n    log.exception('failed')\n")
    exception: dict[str, Any] = line["exception"]
    return exception


def test_what_an_error_came_from_is_told_too() -> None:
    exception = failing(
        """
try:
    try:
        raise KeyError("first")
    except KeyError:
        raise OSError("second")
except OSError as error:
    raise ExceptionGroup("third", [ValueError("fourth")]) from error
"""
    )
    assert (exception["type"], exception["message"]) == ("ExceptionGroup", "third (1 sub-exception)")
    told = [(link["relation"], link["type"], link["message"]) for link in exception["chain"]]
    assert told == [
        ("member", "ValueError", "fourth"),
        ("cause", "OSError", "second"),
        ("context", "KeyError", "'first'"),
    ]
    assert exception["chain"][1]["frames"][0]["line"] == 11


def test_an_error_that_comes_from_itself_and_a_deep_one_are_told_of_within_bounds() -> None:
    exception = failing(
        """
def deep(n):
    if n == 0:
        raise ValueError("bottom")
    try:
        deep(n - 1)
    except ValueError as error:
        raise ValueError(f"at {n}") from error
try:
    deep(50)
except ValueError as error:
    error.__cause__.__cause__.__context__ = error
    raise
"""
    )
    assert len(exception["chain"]) == 5
    assert all(len(link["frames"]) <= 20 for link in exception["chain"])
    recursion = failing("def f(): f()\nf()")
    assert (recursion["type"], len(recursion["frames"])) == ("RecursionError", 20)


def test_an_errors_line_holds_no_local_variables_and_no_keys() -> None:
    exception = failing(
        """
prompt = "a private question"
raise RuntimeError("sk-abcdefgh12345 and Bearer s3cret-token at redis://user:pass@host:6379/0 " + "x" * 5000)
"""
    )
    text = json.dumps(exception)
    for secret in ("a private question", "sk-abcdefgh", "s3cret", "user:pass"):
        assert secret not in text
    assert exception["message"].startswith("*** and *** at redis://***@host:6379/0 x")
    assert len(exception["message"]) == 1000


WORDS = "gsk_abcdefghijklmnop1234 weir-abcDEF123456789 OPENAI_API_KEY=s3cret-a Authorization: Basic s3cretab"


@pytest.mark.parametrize(
    "code",
    [
        f"try: raise RuntimeError('{WORDS}')\nexcept RuntimeError: log.exception('failed')",
        f"import logging; logging.getLogger('lib').warning('%s', '{WORDS}')",
        f"import warnings; warnings.warn('{WORDS}', stacklevel=1)",
    ],
)
def test_no_words_of_others_bring_keys_into_a_line(code: str) -> None:
    text = "\n".join(printed(code))
    assert text.count("***") == 4
    for secret in ("gsk_", "abcDEF", "s3cret"):
        assert secret not in text


def test_an_error_without_words_of_its_own_is_told_of() -> None:
    exception = failing(
        """
class Odd(Exception):
    def __str__(self):
        raise TypeError
raise Odd
"""
    )
    assert (exception["type"], exception["message"]) == ("__main__.Odd", "(its words cannot be read)")


def test_a_warning_of_python_is_a_line() -> None:
    (line,) = lines('import warnings; warnings.warn("old", DeprecationWarning, stacklevel=1)')
    assert (line["event"], line["level"]) == ("python_warning", "warning")
    assert (line["category"], line["message"], line["file"]) == ("DeprecationWarning", "old", "<string>")


def test_an_error_in_a_thread_is_a_line() -> None:
    (line,) = lines(
        """
import threading
def fail(): raise ValueError("alone")
thread = threading.Thread(target=fail, name="lonely")
thread.start(); thread.join()
"""
    )
    assert (line["event"], line["level"], line["thread"]) == ("uncaught_exception", "error", "lonely")
    assert line["exception"]["message"] == "alone"


def test_an_error_that_ends_the_process_is_a_line_and_still_ends_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE.format(level="info", form="json") + 'raise RuntimeError("at boot")'],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (1, "")
    line = json.loads(done.stdout)
    assert (line["event"], line["level"]) == ("uncaught_exception", "critical")
    assert (line["exception"]["type"], line["exception"]["message"]) == ("RuntimeError", "at boot")


def test_an_error_that_python_cannot_raise_is_a_line() -> None:
    (line,) = lines(
        """
class Bad:
    def __del__(self): raise ValueError("too late")
bad = Bad(); del bad
"""
    )
    assert (line["event"], line["level"]) == ("unraisable_exception", "error")
    assert line["exception"]["message"] == "too late"


def test_an_event_with_line_ends_is_one_line() -> None:
    (line,) = lines('log.info("a\\nb", more="c\\r\\nd\\u2028")')
    assert (line["event"], line["more"]) == ("a\nb", "c\r\nd\u2028")


# -- several lines in one write ------------------------------------------------------------------


class Written(io.BytesIO):
    """A stream that notes each write, and tells of it; while it is `closed_gate`, it takes none."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self._changed = threading.Condition()
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()

    def write(self, data: Any, /) -> int:
        self.entered.set()
        assert self.gate.wait(20)
        with self._changed:
            self.writes.append(bytes(data))
            self._changed.notify_all()
        return super().write(data)

    def wait_for(self, writes: int) -> list[bytes]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.writes) >= writes, 20), self.writes
            return list(self.writes)


def test_lines_are_written_together_and_soon() -> None:
    stream = Written()
    stream.gate.clear()
    lines = BufferedLines(stream)
    lines.info(b"first")
    assert stream.entered.wait(20)  # it is about to write the first alone
    for line in (b"one", b"two", b"three"):
        lines.info(line)
    stream.gate.set()
    assert stream.wait_for(2) == [b"first\n", b"one\ntwo\nthree\n"]


@pytest.mark.parametrize("level", ["warning", "error", "critical", "exception"])
def test_a_line_of_trouble_is_written_at_once_after_those_before_it(
    level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BufferedLines, "DELAY_SECONDS", 3600.0)
    stream = Written()
    lines = BufferedLines(stream)
    lines.info(b"before")
    getattr(lines, level)(b"trouble")
    while sum(map(len, stream.wait_for(1))) < len(b"before\ntrouble\n"):
        stream.wait_for(len(stream.writes) + 1)
    assert stream.getvalue() == b"before\ntrouble\n"


def test_a_write_is_bounded() -> None:
    stream = Written()
    stream.gate.clear()
    lines = BufferedLines(stream)
    lines.info(b"first")
    assert stream.entered.wait(20)
    for _ in range(200):
        lines.info(b"x" * 1023)
    stream.gate.set()
    lines.close()
    assert len(stream.getvalue()) == 6 + 200 * 1024
    assert max(map(len, stream.writes)) <= BufferedLines.MOST_BYTES + 1024


def test_the_end_writes_what_still_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BufferedLines, "DELAY_SECONDS", 3600.0)
    stream = Written()
    lines = BufferedLines(stream)
    for number in range(1000):
        lines.info(b"%d" % number)
    lines.close()
    assert stream.getvalue().split() == [b"%d" % number for number in range(1000)]


def test_after_the_end_each_line_is_written_by_whoever_logs_it() -> None:
    stream = Written()
    lines = BufferedLines(stream)
    lines.info(b"before")
    lines.close()
    lines.info(b"after")
    assert stream.getvalue() == b"before\nafter\n"


def test_the_end_of_the_process_writes_what_still_waits() -> None:
    found = lines(
        """
import asyncio
async def main():
    log.info("last words")
asyncio.run(main())
"""
    )
    assert [line["event"] for line in found] == ["last words"]


def test_lines_of_many_threads_stay_whole() -> None:
    stream = Written()
    lines = BufferedLines(stream)

    def write(name: bytes) -> None:
        for _ in range(200):
            lines.info(name * 50)

    threads = [threading.Thread(target=write, args=(name,)) for name in (b"a", b"b", b"c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines.close()
    written = stream.getvalue().split(b"\n")[:-1]
    assert sorted(set(written)) == [b"a" * 50, b"b" * 50, b"c" * 50]
    assert len(written) == 600


def test_a_signal_handler_may_log_while_a_line_is_logged() -> None:
    found = lines(
        """
import signal, threading
count = 0
def handle(*_):
    global count
    count += 1
    log.warning("in_handler")
signal.signal(signal.SIGALRM, handle)
signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
told = 0
while count < 200:
    told += 1
    log.warning("outside")
signal.setitimer(signal.ITIMER_REAL, 0)
log.info("counts", outside=told, inside=count)
"""
    )
    counts = found.pop()
    events = [line["event"] for line in found]
    assert len(events) >= 1
    assert events.count("in_handler") <= counts["inside"]


def test_while_nobody_reads_lines_wait_up_to_a_bound_and_further_ones_are_counted() -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader, "rb") as pipe, os.fdopen(writer, "wb", buffering=0) as stalled:
        lines = BufferedLines(stalled)
        line = b"x" * 999
        for _ in range(BufferedLines.MOST_LINES + 1000):
            lines.warning(line)  # which returns: else this test hangs
        assert lines._lines.qsize() <= BufferedLines.MOST_LINES
        dropped = 0
        while not dropped:
            lines.warning(line)
            dropped += lines.take_dropped()
        assert lines.take_dropped() == 0
        # Somebody reads again: all that waited comes, whole.
        first = pipe.readline()
        assert first == line + b"\n"
        lines.info(b"again")
        while lines.take_dropped():  # until there is room
            assert pipe.readline() == line + b"\n"
            lines.info(b"again")
        rest = iter(pipe.readline, b"again\n")
        assert all(text == line + b"\n" for text in rest)
        lines.close()


def test_a_process_whose_log_nobody_reads_ends_all_the_same() -> None:
    program = PRELUDE.format(level="info", form="json") + (
        "from service.logging import BufferedLines\n"
        "BufferedLines.END_SECONDS = 0.1\n"
        "for _ in range(2000): log.info('x' * 500)\n"
        "import sys; print('logged', file=sys.stderr, flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == b"logged\n"
        assert process.wait(60) == 0


def test_a_stream_that_does_not_wait_loses_nothing() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with os.fdopen(reader, "rb") as pipe, os.fdopen(writer, "wb", buffering=0) as stream:
        lines = BufferedLines(stream)
        for number in range(2000):
            lines.info(b"%0100d" % number)
        assert [pipe.readline() for _ in range(2000)] == [b"%0100d\n" % n for n in range(2000)]
        lines.close()
        assert lines.take_dropped() == 0


def test_what_waits_at_a_fork_is_written_once_and_both_write_on() -> None:
    found = lines(
        """
import os, sys
BufferedLines.DELAY_SECONDS = 0.5
log.info("before")
child = os.fork()
log.info("child" if child == 0 else "parent")
if child == 0:
    sys.exit()
os.waitpid(child, 0)
""".replace("import os", "from service.logging import BufferedLines\nimport os")
    )
    assert sorted(line["event"] for line in found) == ["before", "child", "parent"]


def test_lines_of_several_processes_do_not_run_into_each_other() -> None:
    program = PRELUDE.format(level="info", form="json") + (
        "import os, sys\n"
        "from service.logging import json_lines\n"
        "json_lines().share()\n"
        "children = [os.fork(), os.fork()]\n"
        "for number in range(3000): log.info('x' * 700, number=number)\n"
        "if 0 not in children: [os.waitpid(child, 0) for child in children]\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        numbers = Counter(json.loads(line)["number"] for line in process.stdout)
    # A fork of a fork is a process too: four of them.
    assert numbers == dict.fromkeys(range(3000), 4)


def test_a_log_that_nobody_reads_any_more_fails_nobody() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb", buffering=0) as broken:
        lines = BufferedLines(broken)
        lines.warning(b"lost")
        lines.info(b"lost too")
        lines.close()
        assert lines.take_dropped() == 2


# -- the set-up ----------------------------------------------------------------------------------


def test_configuring_again_changes_the_level_and_doubles_nothing() -> None:
    found = lines('configure("error", "json"); log.info("unheard"); logging.getLogger("x").error("once")')
    assert [line["event"] for line in found] == ["once"]


@pytest.mark.parametrize("form", ["console", "auto"])
def test_the_console_form_is_text_and_auto_is_json_away_from_a_terminal(form: str) -> None:
    (line,) = printed('log.info("started", port=8000)', form=form)
    assert line.startswith("{") is (form == "auto")
    assert "started" in line
    assert "\x1b" not in line, "no colours where there is no terminal"


# -- the level, while it runs --------------------------------------------------------------------


def test_a_changed_level_is_that_of_all_loggers_and_returns_by_itself() -> None:
    found = lines(
        """
import time
from service.logging import LogLevel
library = logging.getLogger("library")
def tell(text):
    log.debug("own " + text); library.debug("foreign " + text); log.info("heard")
level = LogLevel("info")
tell("before")
level.change("debug", 1)
assert level.tell()["configured"] == "info"
tell("meanwhile")
logging.getLogger("asyncio").info("chatter"); logging.getLogger("uvicorn.error").debug("chatter")
while level.level == "debug": time.sleep(0.01)
level.follow()
assert level.tell() == {"level": "info", "configured": "info", "seconds_left": None}
tell("after")
"""
    )
    assert [line["event"] for line in found if line["event"] != "heard"] == [
        "log_level_changed",
        "own meanwhile",
        "foreign meanwhile",
        "log_level_returned",
    ]
    assert len(found) == 7


def test_a_changed_level_reaches_forked_processes() -> None:
    found = lines(
        """
import os
from service.logging import LogLevel
level = LogLevel("info")
to_child, from_parent = os.pipe()[::-1]
child = os.fork()
if child == 0:
    os.read(from_parent, 1)
    level.follow()
    log.debug("child")
    raise SystemExit
level.change("debug", 60)
os.write(to_child, b"x")
os.waitpid(child, 0)
"""
    )
    assert {line["event"] for line in found} == {"log_level_changed", "child"}, "in whichever order"
    assert len(found) == 2
