"""An answer as the bytes that a store keeps: facts about it, then its body, compressed where that helps.

"WC", version, flags, length of the facts, CRC-32 of all else; the facts as MessagePack; the body
"""

from __future__ import annotations

import struct
import zlib
from typing import Final

import msgspec

from service.domain import Usage

VERSION: Final = 1
COMPRESS_ABOVE_BYTES: Final = 1024
_COMPRESSED: Final = 1
_HEAD: Final = struct.Struct(">2sBBH")
_SUM: Final = struct.Struct(">I")
_START: Final = _HEAD.size + _SUM.size
_MAGIC: Final = b"WC"
_NAME_LETTERS: Final = 1_000


class Entry(msgspec.Struct, frozen=True):
    """A whole, good answer; and what is in the books about the call that brought it."""

    body: bytes
    stored_at: float
    """Seconds since 1970 by the clock of the pod that kept it; only `Cache-Control: max-age` looks at it."""
    model: str = ""
    """Which model the answer says it is of."""
    id: str | None = None
    finish_reason: str | None = None
    usage: Usage | None = None
    """What the call used, and whoever is answered from here does not."""

    def age_seconds(self, now: float) -> float:
        return max(now - self.stored_at, 0.0)


class _Facts(msgspec.Struct, array_like=True):
    size: int
    """Bytes of the body as it was."""
    stored_at: float
    model: str
    id: str | None
    finish_reason: str | None
    usage: tuple[int, int, int, int, int, int, int] | None


_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(_Facts).decode


def pack(entry: Entry) -> bytes:
    usage = entry.usage
    counts = (
        (
            usage.input_tokens,
            usage.output_tokens,
            usage.cached_input_tokens,
            usage.cache_write_tokens,
            usage.reasoning_tokens,
            usage.audio_input_tokens,
            usage.audio_output_tokens,
        )
        if usage is not None
        else None
    )
    facts = _encode(
        _Facts(
            len(entry.body),
            entry.stored_at,
            entry.model[:_NAME_LETTERS],
            entry.id[:_NAME_LETTERS] if entry.id is not None else None,
            entry.finish_reason[:_NAME_LETTERS] if entry.finish_reason is not None else None,
            counts,
        )
    )
    body, flags = entry.body, 0
    if len(body) > COMPRESS_ABOVE_BYTES:
        smaller = zlib.compress(body, 1)
        if len(smaller) < len(body):
            body, flags = smaller, _COMPRESSED
    head = _HEAD.pack(_MAGIC, VERSION, flags, len(facts))
    sum_of_all = zlib.crc32(body, zlib.crc32(facts, zlib.crc32(head)))
    return b"".join((head, _SUM.pack(sum_of_all), facts, body))


def unpack(packed: bytes) -> Entry | None:
    """None if the bytes are no entry of this version, or not as they were written."""
    try:
        magic, version, flags, length = _HEAD.unpack_from(packed)
        (sum_of_all,) = _SUM.unpack_from(packed, _HEAD.size)
        if magic != _MAGIC or version != VERSION or flags > _COMPRESSED:
            return None
        if zlib.crc32(memoryview(packed)[_START:], zlib.crc32(packed[: _HEAD.size])) != sum_of_all:
            return None
        facts = _decode(memoryview(packed)[_START : _START + length])
        body = packed[_START + length :]
        if flags:
            # Never more than it says to be, whatever the bytes are.
            body = zlib.decompressobj().decompress(body, facts.size + 1)
    except (struct.error, zlib.error, msgspec.DecodeError, ValueError, OverflowError):
        return None
    if len(body) != facts.size:
        return None
    return Entry(
        body,
        facts.stored_at,
        facts.model,
        facts.id,
        facts.finish_reason,
        Usage(*facts.usage) if facts.usage is not None else None,
    )
