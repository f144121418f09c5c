"""The compose stack as the tests see it: its files, a prepared copy of them, the programs that read them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests.programs import ROOT, need

COMPOSE = ROOT / "deploy/compose"
_VARIABLE = re.compile(r"\$\{(\w+)(?::?-((?:[^{}]|\$\{[^{}]*\})*)|:\?[^}]*|:\+[^}]*)?\}")


def document(path: str) -> Any:
    """A YAML file of the stack."""
    return yaml.safe_load((COMPOSE / path).read_text())


def defaults(text: str) -> str:
    """`text` with the defaults that it names in place of variables; those that have none become `given`."""
    return _VARIABLE.sub(lambda found: "given" if found[2] is None else defaults(found[2]), text)


def prepare(folder: Path) -> Path:
    """A copy of the stack in `folder`, beside the chart's files, after ./init.sh."""
    need("openssl")
    copy = folder / "deploy/compose"
    mine = shutil.ignore_patterns(".env", "weir.env", "certs", "keys")
    shutil.copytree(COMPOSE, copy, ignore=mine)
    for name in ("rules", "dashboards"):
        files = ROOT / "helm/weir/files" / name
        if files.exists():
            shutil.copytree(files, folder / "helm/weir/files" / name)
        else:  # git keeps no empty folder
            (folder / "helm/weir/files" / name).mkdir(parents=True)
    init(copy)
    return copy


def init(copy: Path) -> str:
    return subprocess.run(["./init.sh"], cwd=copy, check=True, capture_output=True, text=True).stdout
