"""One command sets the version everywhere."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from deploy.release import PLACES, ROOT, bump, current, main

ELSEWHERE = ("CHANGELOG.md", "requirements/", "tests/", "docs/e2e.md", "pyproject.toml", "docs/releasing.md")
"""What may name this number and mean another: histories, locks, fixtures, bounds."""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for place in PLACES:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / place, tmp_path / place)
    return tmp_path


def test_the_new_version_stands_wherever_the_old_one_did(copy: Path) -> None:
    old = current(copy)
    assert bump("7.8.9", copy) == list(PLACES)
    assert current(copy) == "7.8.9"
    for place in PLACES:
        text = (copy / place).read_text()
        assert "7.8.9" in text
        assert not re.search(rf"(?<![\d.]){re.escape(old)}(?![\d.])", text)


def test_a_file_that_does_not_name_it_stops_everything(copy: Path) -> None:
    stray = copy / PLACES[-1]
    stray.write_text("nothing")
    before = current(copy)
    with pytest.raises(SystemExit, match=PLACES[-1]):
        bump("7.8.9", copy)
    assert current(copy) == before


def test_no_other_file_names_it() -> None:
    pattern = re.compile(rf"(?<![\d.]){re.escape(current())}(?![\d.])")
    naming = [
        name
        for name in _files()
        if name not in PLACES and not name.startswith(ELSEWHERE) and pattern.search(_text(ROOT / name))
    ]
    assert naming == []


def test_only_a_version_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["next"]) == 2
    assert "VERSION=X.Y.Z" in capsys.readouterr().err


def _files() -> list[str]:
    """Those that git knows; where this is no checkout, as in a source archive, all but what is made here."""
    known = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if known.returncode == 0 and known.stdout:
        return known.stdout.split()
    found = [path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file()]
    made = ("build", "__pycache__")
    return [
        path.as_posix()
        for path in found
        if not any(part in made or (part.startswith(".") and part != ".ci") for part in path.parts[:-1])
    ]


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
