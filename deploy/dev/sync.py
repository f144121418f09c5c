"""Which source files changed, and the archive that carries them into a pod."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

Snapshot = dict[str, tuple[int, int]]
"""Each source file by its path below the root, with what changes when it is written: time and size."""


@dataclass(frozen=True)
class Changes:
    written: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.written or self.removed)


def scan(root: Path, folder: str = "service") -> Snapshot:
    found: Snapshot = {}
    for path in sorted((root / folder).rglob("*.py")):
        try:
            status = path.stat()
        except FileNotFoundError:  # an editor replaces a file by removing it first
            continue
        found[path.relative_to(root).as_posix()] = (status.st_mtime_ns, status.st_size)
    return found


def changes(before: Snapshot, after: Snapshot) -> Changes:
    return Changes(
        written=tuple(name for name, state in after.items() if before.get(name) != state),
        removed=tuple(name for name in before if name not in after),
    )


def archive(root: Path, names: Iterable[str]) -> bytes:
    """A tar of these files. One that is gone by now is left out: the next scan finds it removed."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name in names:
            try:
                content = (root / name).read_bytes()
            except FileNotFoundError:
                continue
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o644
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()
