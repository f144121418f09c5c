"""Reads the files of the configuration again when one of them changes. A bad one changes nothing.

The files are WEIR_CONFIG, WEIR_KEYS_FILE and those of upstreams' keys that WEIR_CONFIG names. What `stat`
says of the file behind all symlinks is compared, because a mounted ConfigMap or Secret changes by the swap
of one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, TypeAlias

import msgspec
import structlog

from service.config import Configuration, join, read_config
from service.errors import ConfigurationError

LOOK_SECONDS: Final = 1.0

log = structlog.get_logger("weir")

_Mark: TypeAlias = tuple[int, int, int] | None


class Status(msgspec.Struct, frozen=True):
    """Which configuration is in use, and how the last try to read another one ended. Times since 1970."""

    version: str
    loaded_at: float
    tried_at: float
    refused: bool = False


class Reading(msgspec.Struct, frozen=True):
    """What the files hold: another configuration, and why they, or a part of them, were refused."""

    found: Configuration | None = None
    refused: str | None = None


class ConfigFiles:
    """The files as they were last seen, and the last good configuration.

    For one thread at a time; `status` may be read from any.
    """

    def __init__(self, good: Configuration, clock: Callable[[], float] = time.time) -> None:
        self.good = good
        self.status = Status(good.version, clock(), clock())
        self._clock = clock
        settings = good.settings
        self._always = [path for path in (settings.weir_config, settings.weir_keys_file) if path is not None]
        self._named = good.file.key_files
        # They may have changed since the start read them: the first look reads them in any case.
        self._seen: dict[Path, _Mark] | None = None

    def __bool__(self) -> bool:
        return bool(self._always)

    @property
    def changed(self) -> bool:
        return self._seen is None or _marks((*self._always, *self._named)) != self._seen

    def read(self) -> Reading:
        """Read and check all as at the start. Where WEIR_CONFIG is bad, keys are read anew all the same."""
        good = self.good
        # Before they are read, so that what changes meanwhile is seen at the next look.
        self._named = good.file.key_files
        self._seen = _marks((*self._always, *self._named))
        try:
            file, version = read_config(good.settings)
            self._named |= file.key_files
            self._seen = _marks(self._named) | self._seen
            found = join(good.settings, file, version)
        except ConfigurationError as error:
            return Reading(self._with_new_keys(), error.message)
        except Exception as error:  # a fault of ours must not end a process that serves
            log.exception("config_failed")
            return Reading(None, f"internal error: {type(error).__name__}")
        return Reading(found if found != good else None)

    def accept(self, reading: Reading) -> None:
        """What was read is in use from now on."""
        now, refused = self._clock(), reading.refused is not None
        if reading.found is not None:
            self.good = reading.found
        loaded = self.status.loaded_at if reading.found is None else now
        self.status = Status(self.good.version, loaded, now, refused)

    def tell(self) -> dict[str, object]:
        """For people, and for what compares pods: no names, no addresses, and why is in the log."""
        status = self.status
        return {
            "status": "stale" if status.refused else "current",
            "version": status.version or None,
            "loaded_at": _time(status.loaded_at),
            "tried_at": _time(status.tried_at),
            "last_try": "refused" if status.refused else "good",
        }

    def follow(self) -> None:
        """For a process that serves nothing by itself: keep up with the files."""
        if self.changed:
            self.accept(self.read())

    def _with_new_keys(self) -> Configuration | None:
        """The last good YAML with the keys of now: to revoke one waits for no correction of the YAML."""
        good = self.good
        try:
            found = join(good.settings, good.file, good.version)
        except ConfigurationError:
            return None
        return found if found != good else None


class ConfigWatch:
    """Looks once a second, and hands a good configuration to `adopt`.

    `tell` hears of each try whether it was good.
    """

    def __init__(
        self,
        files: ConfigFiles,
        adopt: Callable[[Configuration], Awaitable[None]],
        tell: Callable[[bool], None],
    ) -> None:
        self._files = files
        self._adopt = adopt
        self._tell = tell

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await self.look()

    async def look(self) -> None:
        files = self._files
        if not files.changed:
            return
        reading = await asyncio.to_thread(files.read)  # a long file takes as long as many requests
        reading = await self._adopted(reading)
        news = reading.found is not None or reading.refused is not None or files.status.refused
        files.accept(reading)
        if news:
            self._tell_of(reading)

    async def _adopted(self, reading: Reading) -> Reading:
        if reading.found is None:
            return reading
        try:
            await self._adopt(reading.found)
        except ConfigurationError as error:
            return Reading(None, error.message)
        except Exception as error:  # a fault of ours must not end the process, which serves as before
            log.exception("config_failed")
            return Reading(None, f"internal error: {type(error).__name__}")
        return reading

    def _tell_of(self, reading: Reading) -> None:
        good = self._files.good
        if reading.refused is not None:
            log.error(
                "config_refused",
                reason=reading.refused,
                kept=good.version,
                new_keys=reading.found is not None,
            )
        else:
            log.info(
                "config_loaded",
                version=good.version,
                upstreams={u.name: u.kind.value for u in good.upstreams},
                models=len(good.file.models),
                keys=len(good.keys),
            )
        self._tell(reading.refused is None)


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, tz=UTC).isoformat(timespec="seconds")


def _marks(paths: Iterable[Path]) -> dict[Path, _Mark]:
    return {path: _mark(path) for path in paths}


def _mark(path: Path) -> _Mark:
    try:
        found = path.stat()
    except (OSError, ValueError):  # a name with a NUL in it
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
