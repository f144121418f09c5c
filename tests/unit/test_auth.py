"""Who calls: credentials and principals."""

from __future__ import annotations

import hashlib

import pytest

from service.auth import KeyRing, OpenDoor, hash_key, make_key
from service.config import KeyConfig
from service.domain import ANONYMOUS, Principal
from service.errors import AuthenticationFailed


def key(name: str, secret: str, tenant: str = "team") -> KeyConfig:
    return KeyConfig(name=name, tenant=tenant, sha256=hash_key(secret))


RING = [key("anna", "weir-anna"), key("bert", "weir-bert", "other")]


@pytest.mark.parametrize(
    "header",
    ["Bearer weir-anna", "bearer weir-anna", "BEARER weir-anna", "Bearer   weir-anna  "],
)
def test_a_known_key_is_its_owner(header: str) -> None:
    assert KeyRing(RING).principal(header) == Principal("anna", "team")


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "weir-anna",
        "Basic weir-anna",
        "Bearer",
        "Bearer ",
        "Bearerweir-anna",
        "Bearer weir-ann",
        "Bearer weir-anna weir-bert",
        "Bearer " + hash_key("weir-anna"),
        "Bearer " + "0" * 64,
        "Bearer ä€\udcff",
    ],
)
def test_anything_else_is_refused(header: str | None) -> None:
    with pytest.raises(AuthenticationFailed) as caught:
        KeyRing(RING).principal(header)
    assert caught.value.status == 401
    assert "weir-" not in caught.value.message, "what was sent is not sent back"


def test_a_ring_without_keys_lets_nobody_in() -> None:
    with pytest.raises(AuthenticationFailed):
        KeyRing([]).principal("Bearer ")


def test_replacing_the_keys_takes_effect_at_once() -> None:
    ring = KeyRing(RING)
    ring.replace([key("carl", "weir-carl")])
    assert len(ring) == 1
    assert ring.principal("Bearer weir-carl").name == "carl"
    with pytest.raises(AuthenticationFailed):
        ring.principal("Bearer weir-anna")


def test_the_ring_does_not_hold_the_keys_themselves() -> None:
    assert "weir-anna" not in repr(vars(KeyRing(RING)))


@pytest.mark.parametrize("header", [None, "", "Bearer anything", "nonsense"])
def test_an_open_door_takes_everybody_as_anonymous(header: str | None) -> None:
    assert OpenDoor().principal(header) is ANONYMOUS


def test_keys_are_long_random_and_kept_as_their_sha256() -> None:
    keys = {make_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(k.startswith("weir-") and len(k) >= 48 for k in keys)
    assert hash_key("weir-anna") == hashlib.sha256(b"weir-anna").hexdigest()
