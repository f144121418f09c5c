"""Changed files of the configuration are read again; bad ones change nothing, and are told of once."""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.auth import hash_key
from service.config import Configuration, load
from service.configwatch import ConfigFiles, ConfigWatch
from service.errors import ConfigurationError
from tests.mounts import Mount
from tests.running import settings as settings_of

SECRET = "sk-secret-0123456789"


def yaml_of(*models: str, more: str = "") -> str:
    entries = "".join(f"  - {{name: {m}, upstream: one}}\n" for m in models)
    return f"upstreams:\n  - {{name: one, base_url: 'http://127.0.0.1:1/v1'}}\nmodels:\n{entries}{more}"


def keys_of(*names: str) -> str:
    entries = "".join(f"  - {{name: {n}, sha256: {hash_key(n)}}}\n" for n in names)
    return f"keys:\n{entries}" if names else "keys: []\n"


def with_key_file(path: Path) -> str:
    return (
        "upstreams:\n"
        f"  - {{name: one, base_url: 'http://127.0.0.1:1/v1', api_key_file: {path}}}\n"
        "models: [{name: a, upstream: one}]\n"
    )


class Watched:
    """A watch whose configurations are listed instead of served."""

    def __init__(self, config: Path | None = None, keys: Path | None = None, **values: Any) -> None:
        self.files = ConfigFiles(load(settings_of(weir_config=config, weir_keys_file=keys, **values)))
        self.adopted: list[Configuration] = []
        self.told: list[bool] = []
        self.adopt_fails: Exception | None = None
        self._watch = ConfigWatch(self.files, self._adopt, self.told.append)

    async def _adopt(self, configuration: Configuration) -> None:
        if self.adopt_fails is not None:
            raise self.adopt_fails
        self.adopted.append(configuration)

    async def look(self) -> list[Any]:
        """What one look logs."""
        with structlog.testing.capture_logs() as logged:
            await self._watch.look()
        return logged

    @property
    def models(self) -> list[str]:
        return [m.name for m in self.files.good.file.models]

    @property
    def keys(self) -> list[str]:
        return [k.name for k in self.files.good.keys]


@pytest.fixture
def mount(tmp_path: Path) -> Mount:
    return Mount(tmp_path / "config", weir_yaml=yaml_of("a"))


@pytest.fixture
async def watched(mount: Mount) -> Watched:
    found = Watched(mount.path("weir_yaml"))
    assert await found.look() == []
    return found


async def test_a_swapped_mount_is_noticed(mount: Mount, watched: Watched) -> None:
    mount.write(weir_yaml=yaml_of("a", "b"))
    (logged,) = await watched.look()
    assert watched.models == ["a", "b"]
    assert watched.adopted == [watched.files.good]
    assert watched.told == [True]
    assert (logged["event"], logged["models"], logged["version"]) == (
        "config_loaded",
        2,
        watched.files.good.version,
    )


async def test_a_swap_to_a_file_of_the_same_time_and_size_is_noticed(mount: Mount, watched: Watched) -> None:
    before = mount.path("weir_yaml").stat()
    mount.write(weir_yaml=yaml_of("b"))
    os.utime(mount.path("weir_yaml"), ns=(before.st_mtime_ns, before.st_mtime_ns))
    after = mount.path("weir_yaml").stat()
    assert (after.st_mtime_ns, after.st_size) == (before.st_mtime_ns, before.st_size)
    await watched.look()
    assert watched.models == ["b"]


async def test_what_changed_between_the_start_and_the_first_look_is_noticed(mount: Mount) -> None:
    watched = Watched(mount.path("weir_yaml"))
    mount.write(weir_yaml=yaml_of("b"))
    await watched.look()
    assert watched.models == ["b"]


async def test_a_file_that_is_written_in_place_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "weir.yaml"
    path.write_text(yaml_of("a"))
    watched = Watched(path)
    await watched.look()
    path.write_text(yaml_of("a", "b"))
    await watched.look()
    assert watched.models == ["a", "b"]


async def test_the_same_again_is_no_news(mount: Mount, watched: Watched) -> None:
    mount.write(weir_yaml=yaml_of("a"))
    assert await watched.look() == []
    assert (watched.adopted, watched.told) == ([], [])


async def test_without_a_change_nothing_is_read(watched: Watched) -> None:
    def fail() -> Any:
        raise AssertionError("it was read")

    watched.files.read = fail  # type: ignore[method-assign]
    assert await watched.look() == []


BAD = {
    "yaml": "upstreams: [",
    "type": "models: 7\n",
    "unknown field": yaml_of("a", more="modells: []\n"),
    "twice": yaml_of("a", "a"),
    "no such upstream": yaml_of("a").replace("upstream: one", "upstream: two"),
    "limit twice": yaml_of("a", more="limits: [{name: l, requests: 1}, {name: l, requests: 2}]\n"),
    "date": "keys: 2024-99-99\n",
    "depth": "keys: " + "[" * 5_000,
    "nul": "\x00",
    "no environment": yaml_of("a").replace("/v1'", "/v1', api_key_env: NOT_THERE"),
    "no key file": yaml_of("a").replace("/v1'", "/v1', api_key_file: /not/there"),
    "key in the wrong place": yaml_of("a").replace("/v1'", f"/v1', api_key_env: {SECRET}"),
    "key in the place of a file": yaml_of("a").replace("/v1'", f"/v1', api_key_file: {SECRET}"),
    "key in an unknown field": yaml_of("a").replace("/v1'", f"/v1', api_key: {SECRET}"),
    "key in a list": yaml_of("a").replace("/v1'", f"/v1', api_keys: [{SECRET}]"),
    "latin-1": b"models: [] # \xff",
    "none": None,
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
async def test_a_bad_file_is_refused_and_told_of_once(
    mount: Mount, watched: Watched, bad: str | None
) -> None:
    good = watched.files.good
    mount.write(**({} if bad is None else {"weir_yaml": bad}))
    (logged,) = await watched.look()
    assert (logged["event"], logged["log_level"], logged["kept"]) == ("config_refused", "error", good.version)
    assert logged["reason"]
    assert SECRET not in str(logged)
    assert await watched.look() == []
    assert (watched.adopted, watched.told) == ([], [False])
    assert watched.files.good is good
    assert watched.files.tell()["status"] == "stale"
    mount.write(weir_yaml=yaml_of("b"))
    await watched.look()
    assert (watched.models, watched.told) == (["b"], [False, True])
    assert watched.files.tell()["status"] == "current"


async def test_the_old_file_once_more_ends_what_a_bad_one_began(mount: Mount, watched: Watched) -> None:
    mount.write(weir_yaml="models: [")
    await watched.look()
    mount.write(weir_yaml=yaml_of("a"))
    (logged,) = await watched.look()
    assert logged["event"] == "config_loaded"
    assert (watched.adopted, watched.told) == ([], [False, True])


@pytest.mark.parametrize("error", [ConfigurationError("no place"), RuntimeError(SECRET)])
async def test_what_cannot_be_made_ready_is_refused(mount: Mount, watched: Watched, error: Exception) -> None:
    watched.adopt_fails = error
    mount.write(weir_yaml=yaml_of("b"))
    logged = await watched.look()
    assert logged[-1]["event"] == "config_refused"
    assert SECRET not in logged[-1]["reason"]
    assert (watched.models, watched.told) == (["a"], [False])


async def test_a_new_key_of_an_upstream_is_noticed(tmp_path: Path) -> None:
    secret = Mount(tmp_path / "secret", key_txt="first")
    config = Mount(tmp_path / "config", weir_yaml=with_key_file(secret.path("key_txt")))
    watched = Watched(config.path("weir_yaml"))
    await watched.look()
    secret.write(key_txt="second")
    logged = await watched.look()
    (upstream,) = watched.files.good.upstreams
    assert watched.files.good.api_keys(upstream) == ("second",)
    assert "second" not in str(logged)


async def test_a_key_file_that_comes_late_is_waited_for(
    mount: Mount, watched: Watched, tmp_path: Path
) -> None:
    mount.write(weir_yaml=with_key_file(tmp_path / "late" / "key.txt"))
    await watched.look()
    assert watched.told == [False]
    Mount(tmp_path / "late", key_txt="found")
    await watched.look()
    assert watched.told == [False, True]
    assert watched.files.good.api_keys(watched.files.good.upstreams[0]) == ("found",)


async def test_a_key_file_that_went_is_refused_and_its_key_kept(tmp_path: Path) -> None:
    secret = Mount(tmp_path / "secret", key_txt="first")
    config = Mount(tmp_path / "config", weir_yaml=with_key_file(secret.path("key_txt")))
    watched = Watched(config.path("weir_yaml"))
    await watched.look()
    secret.write()
    await watched.look()
    assert watched.told == [False]
    assert watched.files.good.api_keys(watched.files.good.upstreams[0]) == ("first",)


async def test_a_bad_yaml_beside_a_good_key_file_is_told_of_once(tmp_path: Path) -> None:
    secret = Mount(tmp_path / "secret", key_txt="first")
    config = Mount(tmp_path / "config", weir_yaml=with_key_file(secret.path("key_txt")))
    watched = Watched(config.path("weir_yaml"))
    config.write(weir_yaml="models: [")
    await watched.look()
    assert await watched.look() == []
    assert watched.told == [False]
    secret.write(key_txt="second")
    await watched.look()
    assert watched.files.good.api_keys(watched.files.good.upstreams[0]) == ("second",)


class TestKeysFile:
    """WEIR_KEYS_FILE, alone and beside WEIR_CONFIG."""

    @pytest.fixture
    def keys(self, tmp_path: Path) -> Mount:
        return Mount(tmp_path / "keys", keys_yaml=keys_of("anna"))

    async def test_alone_it_is_enough(self, keys: Mount) -> None:
        watched = Watched(keys=keys.path("keys_yaml"))
        await watched.look()
        keys.write(keys_yaml=keys_of("bert"))
        await watched.look()
        assert (watched.keys, watched.told) == (["bert"], [True])

    async def test_an_emptied_list_takes_every_key_away_and_lets_nobody_in(self, keys: Mount) -> None:
        watched = Watched(keys=keys.path("keys_yaml"))
        keys.write(keys_yaml=keys_of())
        await watched.look()
        assert watched.keys == []
        assert not watched.files.good.open_to_all

    async def test_the_keys_of_both_files_are_one_list(self, mount: Mount, keys: Mount) -> None:
        mount.write(weir_yaml=yaml_of("a", more=keys_of("root")))
        watched = Watched(mount.path("weir_yaml"), keys.path("keys_yaml"))
        keys.write(keys_yaml=keys_of("bert"))
        await watched.look()
        assert watched.keys == ["root", "bert"]
        mount.write(weir_yaml=yaml_of("a", more=keys_of("boss")))
        await watched.look()
        assert watched.keys == ["boss", "bert"]

    async def test_a_name_in_both_is_refused(self, mount: Mount, keys: Mount) -> None:
        watched = Watched(mount.path("weir_yaml"), keys.path("keys_yaml"))
        mount.write(weir_yaml=yaml_of("b", more=keys_of("anna")))
        (logged,) = await watched.look()
        assert (watched.models, watched.keys, watched.told) == (["a"], ["anna"], [False])
        assert hash_key("anna") not in str(logged)

    async def test_a_bad_yaml_does_not_keep_a_key_from_being_revoked(self, mount: Mount, keys: Mount) -> None:
        watched = Watched(mount.path("weir_yaml"), keys.path("keys_yaml"))
        await watched.look()
        mount.write(weir_yaml="models: [")
        await watched.look()
        keys.write(keys_yaml=keys_of("bert"))
        (logged,) = await watched.look()
        assert (watched.models, watched.keys) == (["a"], ["bert"])
        assert [a.keys for a in watched.adopted] == [watched.files.good.keys]
        assert (logged["event"], logged["new_keys"]) == ("config_refused", True)
        assert watched.told == [False, False], "the YAML is still bad"

    async def test_a_bad_list_keeps_the_keys(self, keys: Mount) -> None:
        watched = Watched(keys=keys.path("keys_yaml"))
        keys.write(keys_yaml="keys: [{name: x, sha256: no-hash}]\n")
        await watched.look()
        assert (watched.keys, watched.told) == (["anna"], [False])


async def test_the_last_key_cannot_go_where_strangers_could_come_in(mount: Mount) -> None:
    mount.write(weir_yaml=yaml_of("a", more=keys_of("anna")))
    watched = Watched(mount.path("weir_yaml"), host="0.0.0.0")
    mount.write(weir_yaml=yaml_of("a"))
    await watched.look()
    assert (watched.keys, watched.told) == (["anna"], [False])


async def test_without_files_there_is_nothing_to_watch() -> None:
    assert not ConfigFiles(load(settings_of()))


def test_what_is_told_names_the_version_and_the_last_try(mount: Mount) -> None:
    now = 1_000.0
    files = ConfigFiles(load(settings_of(weir_config=mount.path("weir_yaml"))), clock=lambda: now)
    first = files.tell()
    assert first["loaded_at"] == first["tried_at"] == "1970-01-01T00:16:40+00:00"
    now = 2_000.0
    mount.write(weir_yaml="models: [")
    files.follow()
    assert files.tell() == first | {
        "status": "stale",
        "last_try": "refused",
        "tried_at": "1970-01-01T00:33:20+00:00",
    }
    now = 3_000.0
    mount.write(weir_yaml=yaml_of("b"))
    files.follow()
    told = files.tell()
    assert (told["status"], told["last_try"]) == ("current", "good")
    assert told["loaded_at"] == told["tried_at"] == "1970-01-01T00:50:00+00:00"
    assert told["version"] != first["version"]


Step = tuple[str, Any]
steps = st.lists(
    st.one_of(
        st.tuples(st.just("good"), st.integers(1, 5)),
        st.tuples(st.just("bad"), st.sampled_from(sorted(BAD.keys() - {"depth"}))),
        st.tuples(st.just("look"), st.none()),
    ),
    max_size=20,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=steps)
def test_after_any_files_the_last_good_one_that_was_seen_is_in_use(steps: list[Step]) -> None:
    async def run(root: Path) -> None:
        mount = Mount(root, weir_yaml=yaml_of("m0"))
        watched = Watched(mount.path("weir_yaml"))
        lies: str | None = "m0"
        """The model of the file that is there; None for a bad one."""
        expected = "m0"
        for kind, value in (*steps, ("look", None)):
            if kind == "good":
                lies = f"m{value}"
                mount.write(weir_yaml=yaml_of(lies))
            elif kind == "bad":
                lies, content = None, BAD[value]
                mount.write(**({} if content is None else {"weir_yaml": content}))
            else:
                await watched.look()
                expected = lies or expected
                assert watched.models == [expected]
                assert watched.files.status.refused == (lies is None)
                assert [a.file.models[0].name for a in watched.adopted][-1:] in ([], [expected])

    with tempfile.TemporaryDirectory() as directory, structlog.testing.capture_logs():
        asyncio.run(run(Path(directory)))
