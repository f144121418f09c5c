"""Reads the file of API keys again when it changes, so that a rotated Secret needs no restart."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

import structlog

from service.auth import KeyRing
from service.config import KeyConfig, read_keys
from service.errors import ConfigurationError

LOOK_SECONDS: Final = 1.0

log = structlog.get_logger("weir")


class KeyWatch:
    """Looks at the file once a second. A bad file is refused and logged; the last good keys stay.

    It compares what `stat` says of the file behind all symlinks, because a mounted Secret changes
    by the swap of one.
    """

    def __init__(self, ring: KeyRing, path: Path, always: tuple[KeyConfig, ...] = ()) -> None:
        self._ring = ring
        self._path = path
        self._always = always
        # The file may have changed since the start read it: the first look reads it in any case.
        self._seen: tuple[int, ...] | None = ()

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self.look()

    def look(self) -> None:
        mark = self._mark()
        if mark == self._seen:
            return
        self._seen = mark
        try:
            keys = read_keys(self._path, self._always)
        except ConfigurationError as error:
            log.error("keys_refused", reason=error.message, kept=len(self._ring))
            return
        if self._ring.replace(keys):
            log.info("keys_replaced", keys=len(keys))

    def _mark(self) -> tuple[int, int, int] | None:
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size
