"""The programs that tests run: those of `make tools`, else those of this machine."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HELMS = ("helm", "helm4")
WHERE = {
    "nginx": "Debian's nginx-light has it",
    "prometheus": "Debian's prometheus has it",
    "promtool": "Debian's prometheus has it",
    "amtool": "Debian's prometheus-alertmanager has it",
    "prometheus-alertmanager": "Debian's prometheus-alertmanager has it",
    "openssl": "Debian's openssl has it",
    "redis-server": "Debian's redis-server has it",
    "initdb": "Debian's postgresql has it",
    "shellcheck": "Debian's shellcheck has it",
}


def find(name: str) -> str | None:
    for own in (f"tools/{name}", f"{name}/bin/{name}"):
        path = ROOT / ".venv" / own
        if path.is_file():
            return str(path)
    # Debian keeps PostgreSQL's own programs by version, the latest first.
    postgres = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: int(p.parent.name), reverse=True
    )
    return shutil.which(name, path=":".join((os.environ["PATH"], "/usr/sbin", *map(str, postgres))))


def need(name: str) -> str:
    """Its path. Without it the test is skipped; in CI, where all are installed, it fails."""
    path = find(name)
    if path is None:
        reason = f"{name} is not there; {WHERE.get(name, '`make tools` builds it where Go is')}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path
