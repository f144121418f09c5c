"""Sets the version everywhere it stands: `python -m deploy.release X.Y.Z`; `make bump` runs it."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = "service/__init__.py"
PLACES = (
    SOURCE,
    "helm/weir/Chart.yaml",
    "helm/weir/README.md",
    "deploy/gitops/argocd-application.yaml",
    "deploy/gitops/flux-helmrelease.yaml",
    "deploy/cloudrun/service.yaml",
    "deploy/values/production.yaml",
    "docs/deploying.md",
)
"""All files that name the version of this release. Fixtures and the change log name those of others."""


def current(root: Path = ROOT) -> str:
    found: list[str] = re.findall(r'__version__ = "(.+)"', (root / SOURCE).read_text())
    return found[0]


def bump(version: str, root: Path = ROOT) -> list[str]:
    """Put `version` in the place of the current one. Returns the files that were changed."""
    pattern = re.compile(rf"(?<![\d.]){re.escape(current(root))}(?![\d.])")
    texts = {}
    for place in PLACES:
        texts[place], count = pattern.subn(version, (root / place).read_text())
        if not count:
            raise SystemExit(f"weir: {place} does not name the version {current(root)}; nothing was changed")
    for place, text in texts.items():
        (root / place).write_text(text)
    return list(texts)


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1 or not re.fullmatch(r"\d+\.\d+\.\d+", arguments[0]):
        print("weir: make bump VERSION=X.Y.Z", file=sys.stderr)
        return 2
    print("\n".join(bump(arguments[0])))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
