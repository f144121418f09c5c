"""The file of keys is read again when it changes, and a bad one changes nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import structlog

from service.auth import KeyRing, hash_key
from service.config import KeyConfig, read_keys
from service.errors import AuthenticationFailed
from service.keywatch import KeyWatch


def yaml_of(*names: str) -> str:
    entries = "".join(f"  - {{name: {n}, sha256: {hash_key(n)}}}\n" for n in names)
    return f"keys:\n{entries}" if names else "keys: []\n"


def write(path: Path, text: str) -> None:
    """As careful writers do: another file, moved into its place."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


def watch_of(path: Path, always: tuple[KeyConfig, ...] = ()) -> tuple[KeyWatch, KeyRing]:
    ring = KeyRing(read_keys(path, always))
    return KeyWatch(ring, path, always), ring


def known(ring: KeyRing, name: str) -> bool:
    try:
        ring.principal(f"Bearer {name}")
    except AuthenticationFailed:
        return False
    return True


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys.yaml"
    path.write_text(yaml_of("anna"))
    return path


def test_a_changed_file_replaces_the_keys(path: Path) -> None:
    watch, ring = watch_of(path)
    write(path, yaml_of("bert", "carl"))
    watch.look()
    assert (known(ring, "anna"), known(ring, "bert"), known(ring, "carl")) == (False, True, True)


def test_a_file_written_in_place_replaces_the_keys(path: Path) -> None:
    watch, ring = watch_of(path)
    path.write_text(yaml_of("anna", "bert"))
    watch.look()
    assert known(ring, "bert")


def test_an_unchanged_file_is_not_read_again(path: Path) -> None:
    watch, ring = watch_of(path)
    with structlog.testing.capture_logs() as logged:
        watch.look()
        watch.look()
    assert logged == []
    assert known(ring, "anna")


def test_a_swapped_symlink_as_in_a_mounted_secret_is_noticed(tmp_path: Path) -> None:
    for version, name in (("..v1", "anna"), ("..v2", "bert")):
        (tmp_path / version).mkdir()
        (tmp_path / version / "keys.yaml").write_text(yaml_of(name))
    data, path = tmp_path / "..data", tmp_path / "keys.yaml"
    data.symlink_to("..v1")
    path.symlink_to("..data/keys.yaml")
    same_time = (tmp_path / "..v1" / "keys.yaml").stat().st_mtime_ns
    os.utime(tmp_path / "..v2" / "keys.yaml", ns=(same_time, same_time))
    watch, ring = watch_of(path)
    (tmp_path / "..new").symlink_to("..v2")
    (tmp_path / "..new").replace(data)
    watch.look()
    assert (known(ring, "anna"), known(ring, "bert")) == (False, True)


@pytest.mark.parametrize(
    "text",
    [
        "keys: [",
        "keys: 7\n",
        "keys:\n  - {name: x, sha256: not-a-hash}\n",
        "kees: []\n",
        "keys: 2024-99-99\n",
        "keys: " + "[" * 5_000,
        "\x00",
        yaml_of("bert", "bert"),
    ],
    ids=["yaml", "type", "hash", "field", "date", "depth", "nul", "twice"],
)
def test_a_bad_file_keeps_the_keys_and_says_so_once(path: Path, text: str) -> None:
    watch, ring = watch_of(path)
    write(path, text)
    with structlog.testing.capture_logs() as logged:
        watch.look()
        watch.look()
    assert known(ring, "anna")
    events: list[Any] = [(e["event"], e["log_level"], e["kept"]) for e in logged]
    assert events == [("keys_refused", "error", 1)]
    assert hash_key("bert") not in str(logged)


def test_a_file_of_other_letters_than_utf_8_keeps_the_keys(path: Path) -> None:
    watch, ring = watch_of(path)
    path.write_bytes(b"keys: [] # \xff")
    watch.look()
    assert known(ring, "anna")


def test_a_good_file_after_a_bad_one_is_taken(path: Path) -> None:
    watch, ring = watch_of(path)
    write(path, "keys: [")
    watch.look()
    write(path, yaml_of("bert"))
    watch.look()
    assert (known(ring, "anna"), known(ring, "bert")) == (False, True)


def test_a_file_that_vanished_keeps_the_keys_until_it_is_back(path: Path) -> None:
    watch, ring = watch_of(path)
    path.unlink()
    watch.look()
    assert known(ring, "anna")
    path.write_text(yaml_of("bert"))
    watch.look()
    assert (known(ring, "anna"), known(ring, "bert")) == (False, True)


def test_an_emptied_list_takes_every_key_away(path: Path) -> None:
    watch, ring = watch_of(path)
    write(path, yaml_of())
    watch.look()
    assert len(ring) == 0


def test_the_keys_of_the_configuration_stay_beside_the_files(path: Path) -> None:
    always = (KeyConfig(name="root", sha256=hash_key("root")),)
    watch, ring = watch_of(path, always)
    write(path, yaml_of("bert"))
    watch.look()
    assert (known(ring, "root"), known(ring, "bert"), known(ring, "anna")) == (True, True, False)


def test_a_file_that_repeats_a_key_of_the_configuration_is_refused(path: Path) -> None:
    always = (KeyConfig(name="root", tenant="ours", sha256=hash_key("root")),)
    watch, ring = watch_of(path, always)
    write(path, yaml_of("root"))
    watch.look()
    assert ring.principal("Bearer root").tenant == "ours"
    assert known(ring, "anna")
