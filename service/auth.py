"""Who calls: a credential becomes a principal.

Only the SHA-256 of a key is ever held. A presented key is hashed before it is looked up, so the
time of the look-up tells nothing about the keys, and the last comparison is in constant time too.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from typing import Final

from service.config import KeyConfig
from service.domain import ANONYMOUS, Principal
from service.errors import AuthenticationFailed

KEY_PREFIX: Final = "weir-"
_BEARER: Final = "bearer "
_SHA256: Final = hashlib.sha256()
"""Copied for each key: OpenSSL takes longer to find the algorithm than to hash a key."""


class OpenDoor:
    """Everybody is the anonymous principal; a key that is sent along is not looked at."""

    def principal(self, authorization: str | None) -> Principal:
        return ANONYMOUS


class KeyRing:
    """API keys by their hashes; `replace` swaps all of them at once while requests go on."""

    def __init__(self, keys: Iterable[KeyConfig]) -> None:
        self._principals: dict[bytes, Principal] = {}
        self.replace(keys)

    def replace(self, keys: Iterable[KeyConfig]) -> bool:
        """True if that changed anything."""
        before, self._principals = (
            self._principals,
            {
                bytes.fromhex(k.sha256): Principal(
                    name=k.name, tenant=k.tenant, priority=k.priority, admin=k.admin, models=k.models
                )
                for k in keys
            },
        )
        return before != self._principals

    def __len__(self) -> int:
        return len(self._principals)

    def principal(self, authorization: str | None) -> Principal:
        """The owner of `Authorization: Bearer KEY`. Raises AuthenticationFailed."""
        if not authorization:
            raise AuthenticationFailed("You sent no API key: use the header `Authorization: Bearer KEY`.")
        if authorization[: len(_BEARER)].lower() != _BEARER:
            raise AuthenticationFailed("The Authorization header must read `Bearer KEY`.")
        digest = _digest(authorization[len(_BEARER) :].strip())
        known = digest if digest in self._principals else bytes(len(digest))
        if not hmac.compare_digest(digest, known):
            raise AuthenticationFailed("The API key is not known here.")
        return self._principals[digest]


def hash_key(key: str) -> str:
    """The form in which a key is kept: the SHA-256 of its UTF-8, in hex."""
    return _digest(key).hex()


def _digest(key: str) -> bytes:
    hashing = _SHA256.copy()
    hashing.update(key.encode("utf-8", "surrogateescape"))
    return hashing.digest()


def make_key() -> str:
    """A new key with 256 bits of randomness."""
    return KEY_PREFIX + secrets.token_urlsafe(32)
