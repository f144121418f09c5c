"""A directory of files as Kubernetes mounts a ConfigMap or Secret: all of them change by one rename."""

from __future__ import annotations

from pathlib import Path


class Mount:
    """`root/NAME` -> `..data/NAME`, `..data` -> a directory of one version."""

    def __init__(self, root: Path, **files: str) -> None:
        """Names of files with `_` for the dot."""
        self._root = root
        self._version = 0
        self._last: Path | None = None
        root.mkdir(parents=True, exist_ok=True)
        self.write(**files)

    def path(self, name: str) -> Path:
        return self._root / name.replace("_", ".")

    def write(self, **files: str | bytes) -> None:
        """These are the files now, and there are no others."""
        self._version += 1
        directory = self._root / f"..2026_11_25_{self._version:09d}"
        directory.mkdir()
        for name, content in files.items():
            file = directory / name.replace("_", ".")
            file.write_bytes(content.encode() if isinstance(content, str) else content)
        beside = self._root / "..data_tmp"
        beside.symlink_to(directory.name)
        beside.rename(self._root / "..data")
        for name in files:
            link = self.path(name)
            if not link.is_symlink():
                link.symlink_to(Path("..data") / link.name)
        if self._last is not None:
            for file in self._last.iterdir():
                file.unlink()
            self._last.rmdir()
        self._last = directory
