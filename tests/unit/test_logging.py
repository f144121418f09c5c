"""One line for each event, whoever logs it. In processes of their own: logging belongs to a process."""

from __future__ import annotations

import asyncio
import io
import json
import os
import subprocess
import sys
import threading
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
    (exception,) = line["exception"]
    assert (exception["exc_type"], exception["exc_value"]) == ("ValueError", "a reason")
    assert exception["frames"]


def test_an_event_with_line_ends_is_one_line() -> None:
    (line,) = lines('log.info("a\\nb", more="c\\r\\nd\\u2028")')
    assert (line["event"], line["more"]) == ("a\nb", "c\r\nd\u2028")


# -- several lines in one write ------------------------------------------------------------------


class Written(io.BytesIO):
    """A stream that notes each write, and tells of the first one."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.seen = asyncio.Event()

    def write(self, data: Any, /) -> int:
        self.writes.append(bytes(data))
        self.seen.set()
        return super().write(data)


async def test_lines_of_a_running_loop_are_written_together_and_soon() -> None:
    stream = Written()
    lines = BufferedLines(stream)
    lines.info(b"one")
    lines.info(b"two")
    assert stream.writes == []
    await stream.seen.wait()
    assert stream.writes == [b"one\ntwo\n"]
    stream.seen.clear()
    lines.info(b"three")
    await stream.seen.wait()
    assert stream.writes[1:] == [b"three\n"]


@pytest.mark.parametrize("level", ["warning", "error", "critical", "exception"])
async def test_a_line_of_trouble_is_written_at_once_after_those_before_it(level: str) -> None:
    stream = Written()
    lines = BufferedLines(stream)
    lines.info(b"before")
    getattr(lines, level)(b"trouble")
    assert b"".join(stream.writes) == b"before\ntrouble\n"


async def test_many_lines_do_not_wait_for_the_time_to_pass() -> None:
    stream = Written()
    lines = BufferedLines(stream)
    for _ in range(100):
        lines.info(b"x" * 1023)
    assert sum(map(len, stream.writes)) == BufferedLines.MOST_BYTES


def test_outside_of_a_loop_each_line_is_written_at_once() -> None:
    stream = Written()
    BufferedLines(stream).info(b"line")
    assert stream.writes == [b"line\n"]


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
    written = stream.getvalue().split(b"\n")[:-1]
    assert sorted(set(written)) == [b"a" * 50, b"b" * 50, b"c" * 50]
    assert len(written) == 600


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


def test_a_log_that_nobody_reads_any_more_fails_nobody() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb", buffering=0) as broken:
        lines = BufferedLines(broken)
        lines.warning(b"lost")
        lines.info(b"lost too")
        lines.flush()
