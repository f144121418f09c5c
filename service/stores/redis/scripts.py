"""The Lua scripts beside this file: each runs with no other in between, by the server's clock."""

from __future__ import annotations

from importlib.resources import files
from typing import Final

from service.stores.redis.link import Script


def _read(*names: str, repeatable: bool = True) -> Script:
    """Those that need what another file defines name it before themselves."""
    sources = [files(__package__).joinpath(f"{name}.lua").read_text(encoding="utf-8") for name in names]
    return Script("\n".join(sources), repeatable=repeatable)


RESERVE: Final = _read("clock", "reserve")
SETTLE: Final = _read("clock", "settle")
RELEASE: Final = _read("clock", "release")
RENEW: Final = _read("renew")
EXPIRED: Final = _read("expired")
APPEND: Final = _read("append")
LOAD: Final = _read("load")
LIST: Final = _read("list")
DELETE: Final = _read("delete", repeatable=False)
IDS: Final = Script("return redis.call('ZRANGE', KEYS[1], 0, -1)")
LOAD_SOME: Final = _read("load_some")
ERASE: Final = _read("erase", repeatable=False)
ERASE_ANSWERS: Final = _read("erase_answers", repeatable=False)
READ_SUMS: Final = _read("read_sums")
REMEMBER: Final = Script("return redis.call('SADD', KEYS[1], unpack(ARGV))")
LOCK: Final = Script(
    "return redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) and 1 or 0", repeatable=False
)
MEMBERS: Final = Script("return redis.call('SMEMBERS', KEYS[1])")
