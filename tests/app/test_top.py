"""`python -m service top` beside a real service: its figures, and the terminal before, during and after."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from typing import Any, Self

import openai
import pytest
from rich.console import Console

from service.config import FileConfig
from service.telemetry import exposition
from service.top.figures import Series
from service.top.scraping import Answer, read
from service.top.screen import screen
from service.top.watch import Report, Watch
from tests.fakes.upstream import COMPLETION_TOKENS, PROMPT_TOKENS, FakeUpstream
from tests.running import ROOT, RunningWeir, WeirProcess, configuration, free_port

HELLO: Any = [{"role": "user", "content": "Hello!"}]
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[()][A-Z0-9]")


# -- its figures ---------------------------------------------------------------------------------


def scraped(weir: RunningWeir) -> dict[str, Answer]:
    body, _ = exposition(weir.registry)("text/plain")
    return {"http://pod:9000/metrics": read(body.decode())}


def report_of(weir: RunningWeir) -> Report:
    """Of all that was counted since the start, as of ten seconds."""
    empty: dict[str, Answer] = {url: begun(answer) for url, answer in scraped(weir).items()}
    watch = Watch(list(empty))
    watch.take(0.0, empty)
    watch.take(10.0, scraped(weir))
    return watch.report(0.0)


def begun(answer: Answer) -> dict[Series, float]:
    """The same process before its first request."""
    assert isinstance(answer, dict)
    return {
        series: value for series, value in answer.items() if not series.name.startswith(("gen_ai", "weir"))
    }


def test_it_shows_what_a_real_service_did(upstream: FakeUpstream) -> None:
    file = FileConfig.model_validate(
        {
            "upstreams": [{"name": "main", "base_url": upstream.base_url}],
            "models": [
                {"name": "gpt-4o-mini", "upstream": "main", "price": {"input": 100.0, "output": 1_000.0}},
                {"name": "status-500", "upstream": "main"},
            ],
        }
    )
    with RunningWeir(configuration(file=file, openai_max_retries=0, cache_ttl=0)) as weir:
        client = weir.sdk()
        for _ in range(3):
            for _chunk in client.chat.completions.create(model="gpt-4o-mini", messages=HELLO, stream=True):
                pass
        with pytest.raises(openai.APIStatusError):
            client.chat.completions.create(model="status-500", messages=HELLO)
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="unheard-of", messages=HELLO)
        weir.records(5)
        report = report_of(weir)
        usd = 3 * (PROMPT_TOKENS * 100.0 + COMPLETION_TOKENS * 1_000.0) / 1_000_000
        assert report.requests_per_second == pytest.approx(0.5)
        assert {o.outcome: o.per_second for o in report.outcomes} == pytest.approx(
            {"success": 0.3, "upstream_error": 0.1, "client_error": 0.1}
        )
        assert report.error_ratio == pytest.approx(0.25)
        assert report.input_tokens_per_second == pytest.approx(3 * PROMPT_TOKENS / 10)
        assert report.output_tokens_per_second == pytest.approx(3 * COMPLETION_TOKENS / 10)
        assert report.usd_per_hour == pytest.approx(usd * 360)
        (tenant,) = report.tenants
        assert tenant.tenant == "default"
        assert tenant.usd_per_hour == pytest.approx(usd * 360)
        assert report.models[0].model == "gpt-4o-mini"
        assert report.models[0].requests_per_second == pytest.approx(0.3)
        first, whole = report.time_to_first_token_seconds, report.duration_seconds
        assert first.p95 is not None
        assert whole.p50 is not None
        console = Console(width=80, force_terminal=False, highlight=False)
        with console.capture() as captured:
            console.print(screen(report, 24))
        text = captured.get()
        assert len(text.splitlines()) <= 24
        for what in ("0.50", "25.0 %", "success", "upstream_error", "gpt-4o-mini", f"${usd * 360:.2f}/h"):
            assert what in text


# -- as a program --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def service() -> Iterator[WeirProcess]:
    with WeirProcess() as process:
        process.wait_until_ready()
        ask(process)
        yield process


def ask(service: WeirProcess) -> None:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="any", max_retries=0) as client:
        client.chat.completions.create(model="simulator", messages=HELLO)


def environment(**values: str) -> dict[str, str]:
    """As in the image: no HOME, nothing written."""
    keep = {k: v for k, v in os.environ.items() if k == "PATH" or k.startswith("COVERAGE")}
    return {**keep, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", **values}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "service", "top", *arguments]


def printed(*arguments: str, **values: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), env=environment(**values), cwd="/", capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("values", [{}, {"FORCE_COLOR": "1", "TERM": "xterm-256color"}, {"TERM": "dumb"}])
def test_once_prints_one_report_without_control_codes(service: WeirProcess, values: dict[str, str]) -> None:
    done = printed(service.admin_url, "--once", "--interval", "0.2", **values)
    assert (done.returncode, done.stderr) == (0, "")
    assert "requests/s" in done.stdout
    assert "1 pod" in done.stdout
    assert "\x1b" not in done.stdout


def test_without_a_terminal_it_prints_once_too_and_the_address_is_that_of_the_environment(
    service: WeirProcess,
) -> None:
    for values in ({"WEIR_ADMIN_URL": service.admin_url}, {"ADMIN_PORT": str(service.admin_port)}):
        done = printed("--interval", "0.2", **values)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("requests/s") == 1


def test_json_has_the_same_for_scripts(service: WeirProcess) -> None:
    done = printed(service.admin_url, f"127.0.0.1:{free_port()}", "--json", "--interval", "0.2")
    report = json.loads(done.stdout)
    assert [pod["away"] for pod in report["pods"]] == [None, "connection refused"]
    assert report["seconds"] >= 0.2
    assert list(report["versions"].values()) == [1]


def test_where_nobody_answers_it_ends_with_1_and_says_what_to_do() -> None:
    done = printed(f"127.0.0.1:{free_port()}")
    assert (done.returncode, done.stdout) == (1, "")
    assert "connection refused" in done.stderr
    assert "kubectl port-forward deploy/weir 9000" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_port_of_the_api_is_told_from_the_admin_port(service: WeirProcess) -> None:
    done = printed(service.url)
    assert done.returncode == 1
    assert "404" in done.stderr
    assert "admin port" in done.stderr


@pytest.mark.parametrize(
    "arguments", [["ftp://pod"], ["127.0.0.1:9000", "--interval", "0"], ["--interval", "x"]]
)
def test_what_cannot_be_meant_ends_with_2(arguments: list[str]) -> None:
    done = printed(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr


def test_who_serves_loads_neither_the_view_nor_rich() -> None:
    with WeirProcess("serve", PYTHONPROFILEIMPORTTIME="1") as process:
        process.wait_until_ready()
        ask(process)
        process.terminate()
        assert process.wait() == 0
        loaded = {
            line.rpartition("|")[2].strip() for line in process.error_lines if line.startswith("import time:")
        }
    assert "service.serve" in loaded
    assert not {name for name in loaded if name.startswith(("service.top", "rich."))}


# -- in a terminal -------------------------------------------------------------------------------


class Terminal:
    """`top` in a pseudo-terminal of its own; `text` is all that it wrote, without control codes."""

    def __init__(self, *arguments: str, columns: int = 80, lines: int = 24, **values: str) -> None:
        self._master, self._slave = pty.openpty()
        self.resize(columns, lines)
        self.before = termios.tcgetattr(self._slave)
        self.written = ""
        self.process = subprocess.Popen(
            command(*arguments),
            env=environment(**{"TERM": "xterm-256color"} | values),
            cwd="/",
            stdin=self._slave,
            stdout=self._slave,
            stderr=self._slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)
        os.close(self._slave)

    @property
    def text(self) -> str:
        return CONTROL.sub("", self.written)

    @property
    def attributes(self) -> Any:
        return termios.tcgetattr(self._slave)

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def press(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def wait_for(self, text: str) -> None:
        """Until it has written this since the last call."""
        self.written = ""
        until = time.monotonic() + 30
        while text not in self.text:
            self._read(until - time.monotonic())

    def wait(self) -> int:
        until = time.monotonic() + 30
        while self.process.poll() is None:
            if select.select([self._master], [], [], 0.05)[0]:
                self._read(until - time.monotonic())
        while select.select([self._master], [], [], 0)[0]:
            self._read(1)
        return self.process.returncode

    def _read(self, seconds: float) -> None:
        assert seconds > 0, self.written
        if select.select([self._master], [], [], seconds)[0]:
            self.written += os.read(self._master, 65_536).decode("utf-8", "replace")


def left_clean(terminal: Terminal) -> None:
    assert "\x1b[?1049l" in terminal.written, "the screen that was there before is shown again"
    assert "\x1b[?25h" in terminal.written, "the cursor too"
    assert terminal.attributes == terminal.before
    assert "Traceback" not in terminal.text


@pytest.mark.parametrize("end", ["q", "ctrl-c", "terminated"])
def test_it_ends_with_0_and_a_clean_terminal(service: WeirProcess, end: str) -> None:
    with Terminal(service.admin_url, "--interval", "0.2") as terminal:
        terminal.wait_for("last ")
        assert not terminal.attributes[3] & termios.ECHO
        terminal.written = ""
        if end == "terminated":
            terminal.process.send_signal(signal.SIGTERM)
        else:
            terminal.press(b"q" if end == "q" else b"\x03")
        assert terminal.wait() == 0
        left_clean(terminal)


def test_it_follows_the_service(service: WeirProcess) -> None:
    with Terminal(service.admin_url, "--interval", "0.2") as terminal:
        terminal.wait_for("last ")
        ask(service)
        terminal.wait_for("simulator")
        terminal.press(b"Q")
        assert terminal.wait() == 0
        left_clean(terminal)


def test_it_follows_the_terminals_size_at_once(service: WeirProcess) -> None:
    with Terminal(service.admin_url, "--interval", "3600") as terminal:
        terminal.wait_for("q ends")
        assert "─" * 80 in terminal.text
        assert "─" * 81 not in terminal.text
        terminal.resize(120, 40)
        terminal.wait_for("─" * 120)
        terminal.press(b"x")  # a key that means nothing
        terminal.wait_for("q ends")
        terminal.press(b"q")
        assert terminal.wait() == 0
        left_clean(terminal)


def test_a_pod_that_goes_is_told_and_the_view_goes_on(service: WeirProcess) -> None:
    with WeirProcess() as other:
        other.wait_until_ready()
        with Terminal(service.admin_url, other.admin_url, "--interval", "0.2") as terminal:
            terminal.wait_for("2 pods")
            other.terminate()
            assert other.wait() == 0
            terminal.wait_for("1 of 2 pods")
            terminal.wait_for(f"{other.admin_url}/metrics: connection refused")
            ask(service)
            terminal.wait_for("simulator")
            terminal.press(b"q")
            assert terminal.wait() == 0


def test_colours_are_for_who_wants_them(service: WeirProcess) -> None:
    colour = re.compile(r"\x1b\[(?:\d+;)*3[0-7]m")
    for no_color, wanted in (("", True), ("1", False)):
        with Terminal(service.admin_url, "--interval", "0.2", NO_COLOR=no_color) as terminal:
            terminal.wait_for("last ")
            ask(service)
            terminal.wait_for("success")
            assert bool(colour.search(terminal.written)) is wanted
            terminal.press(b"q")
            assert terminal.wait() == 0


def test_a_terminal_that_can_nothing_gets_one_report(service: WeirProcess) -> None:
    with Terminal(service.admin_url, "--interval", "0.2", TERM="dumb") as terminal:
        assert terminal.wait() == 0
        assert "requests/s" in terminal.text
        assert "\x1b" not in terminal.written
