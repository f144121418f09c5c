"""deploy/dev: what `make dev-cluster` syncs, installs and keeps running."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import tarfile
from itertools import pairwise
from pathlib import Path

import pytest

from deploy.dev.round import Children, forward, helm_arguments, taken
from deploy.dev.sync import Changes, archive, changes, scan
from tests.deploy.rendering import check_environment, check_schema, render
from tests.running import ROOT, free_port


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "service/api").mkdir(parents=True)
    (tmp_path / "service/one.py").write_text("one = 1\n")
    (tmp_path / "service/api/two.py").write_text("two = 2\n")
    (tmp_path / "service/notes.txt").write_text("no source\n")
    (tmp_path / "other.py").write_text("elsewhere = 1\n")
    return tmp_path


def test_sources_below_the_folder_are_found_and_nothing_else(tree: Path) -> None:
    assert set(scan(tree)) == {"service/one.py", "service/api/two.py"}


def test_the_projects_own_sources_are_found() -> None:
    assert "service/__main__.py" in scan(ROOT)
    assert "service/api/system.py" in scan(ROOT)


def test_nothing_changed(tree: Path) -> None:
    found = changes(scan(tree), scan(tree))
    assert found == Changes()
    assert not found


def test_a_changed_a_new_and_a_removed_file(tree: Path) -> None:
    before = scan(tree)
    (tree / "service/one.py").write_text("one = 11\n")
    (tree / "service/three.py").write_text("")
    (tree / "service/api/two.py").unlink()
    found = changes(before, scan(tree))
    assert set(found.written) == {"service/one.py", "service/three.py"}
    assert found.removed == ("service/api/two.py",)
    assert found


def test_a_change_of_the_same_length_is_seen_by_its_time(tree: Path) -> None:
    before = scan(tree)
    path = tree / "service/one.py"
    status = path.stat()
    path.write_text("one = 2\n")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert changes(before, scan(tree)).written == ("service/one.py",)


def test_the_archive_unpacks_to_the_same_files(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    pod = tmp_path_factory.mktemp("app")
    content = archive(tree, ["service/one.py", "service/api/two.py", "service/gone.py"])
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert tar.getnames() == ["service/one.py", "service/api/two.py"]
    unpack = ["tar", "--extract", "--touch", "--no-same-owner", "--file", "-"]
    subprocess.run(unpack, input=content, cwd=pod, check=True)
    assert (pod / "service/api/two.py").read_text() == "two = 2\n"
    # New where it is unpacked: byte code that is older there is not taken for it.
    assert (pod / "service/one.py").stat().st_mtime > 1_000_000_000


def test_what_is_installed_is_the_dev_image_and_a_new_pod_each_time() -> None:
    command = helm_arguments("localhost/weir:dev", ["deploy/dev/cluster.yaml"], started=1_700_000_000.4)
    files = [word for flag, word in pairwise(command) if flag == "--values"]
    sets = dict(word.split("=", 1) for flag, word in pairwise(command) if flag == "--set-string")
    assert files == ["deploy/values/dev.yaml", "deploy/dev/cluster.yaml"]
    rendered = render(*files, sets=sets)
    check_schema(rendered)
    check_environment(rendered.environment())
    assert rendered.server["image"] == "localhost/weir:dev"
    images = [c["image"] for _, _, spec in rendered.pods() for c in spec["containers"]]
    assert all(image.startswith("localhost/") for image in images)
    pod = rendered.one("Deployment")["spec"]["template"]["metadata"]
    assert pod["annotations"]["weir.dev/built"] == "at-1700000000"


def test_a_registry_with_a_port_is_no_tag() -> None:
    command = helm_arguments("127.0.0.1:5000/team/weir:dev", [], started=0)
    assert "image.repository=127.0.0.1:5000/team/weir" in command
    assert "image.tag=dev" in command


def test_forwards_listen_on_this_machine_alone_and_lead_to_services_that_exist() -> None:
    command = forward("weir", 80, 8000)
    assert command[command.index("--address") + 1] == "127.0.0.1"
    assert command[-1] == "8000:80"
    source = (ROOT / "deploy/dev/round.py").read_text()
    for service in render("deploy/values/dev.yaml").all("Service"):
        name, port = service["metadata"]["name"], service["spec"]["ports"][0]["port"]
        assert f'forward("{name}", {port}, ' in source or name == "weir-redis"


def test_a_port_that_somebody_has_is_seen() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        assert taken(other.getsockname()[1])
    assert not taken(free_port())


def test_a_child_that_ends_is_started_again_and_none_is_left() -> None:
    children = Children(["sleep", "600"], ["true"])
    assert children.revive() is False
    first, second = children.running
    second.wait()
    assert children.revive() is False  # the first goes on
    assert children.running[0] is first
    assert children.running[1] is not second
    children.stop()
    assert first.returncode is not None
    assert children.running == []


def test_where_the_first_child_ends_all_are_started_anew() -> None:
    children = Children(["true"], ["sleep", "600"])
    children.revive()
    first, second = children.running
    first.wait()
    assert children.revive() is True
    assert second.returncode is not None
    assert children.running[1] is not second
    children.stop()
