"""`python -m dashboards` writes the JSON of all dashboards into the chart; `--check` only compares."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Final

from dashboards.catalogue import BOARDS
from dashboards.grafana import render

FOLDER: Final = Path(__file__).resolve().parent.parent / "helm/weir/files/dashboards"


def files() -> dict[str, str]:
    """What has to be in the folder: names and contents."""
    return {f"{board.name}.json": render(board, BOARDS) for board in BOARDS}


def stale(folder: Path = FOLDER) -> list[str]:
    """Names of files that are missing, different, or not of a dashboard."""
    found = {path.name: path.read_text() for path in folder.glob("*.json")}
    wanted = files()
    return sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))


def write(folder: Path = FOLDER) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    wanted = files()
    for path in folder.glob("*.json"):
        if path.name not in wanted:
            path.unlink()
    for name, text in wanted.items():
        (folder / name).write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dashboards", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where a file is not as the code is"
    )
    if parser.parse_args().check:
        different = stale()
        for name in different:
            print(f"{FOLDER / name} is not as the code is: run `python -m dashboards`", file=sys.stderr)
        return 1 if different else 0
    write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
