"""The developer's round on a cluster without skaffold: build, install, sync, forward, logs, until Ctrl-C.

    python3 -m deploy.dev.round --image REPOSITORY:TAG [--build COMMAND] [--values FILE ...]

It needs helm and kubectl on the path and a cluster that they point to, and nothing from outside the standard
library. The release stays when it ends.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from deploy.dev.sync import Changes, archive, changes, scan

ROOT = Path(__file__).resolve().parents[2]
NAMESPACE = "weir-dev"
RELEASE = "weir"
API_PORT, ADMIN_PORT = 8000, 9000
LOOK_EVERY_SECONDS = 0.2


def helm_arguments(image: str, values: Sequence[str], started: float) -> list[str]:
    repository, _, tag = image.rpartition(":")
    sets = {
        "image.registry": "",
        "image.repository": repository,
        "image.tag": tag,
        # The tag is always the same, so this is what brings a new pod with the new image.
        "podAnnotations.weir\\.dev/built": f"at-{started:.0f}",
    }
    return [
        *("helm", "upgrade", "--install", RELEASE, "helm/weir"),
        *("--namespace", NAMESPACE, "--create-namespace"),
        *(part for file in ("deploy/values/dev.yaml", *values) for part in ("--values", file)),
        *(part for name, value in sets.items() for part in ("--set-string", f"{name}={value}")),
    ]


def kubectl(*arguments: str) -> list[str]:
    return ["kubectl", "--namespace", NAMESPACE, *arguments]


def forward(service: str, port: int, local: int) -> list[str]:
    return kubectl("port-forward", "--address", "127.0.0.1", f"service/{service}", f"{local}:{port}")


def taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


class Children:
    """Commands that run beside this one: each is started again when it ends, and none outlives it."""

    def __init__(self, first: list[str], *others: list[str]) -> None:
        self._commands = (first, *others)
        self.running: list[subprocess.Popen[bytes]] = []

    def revive(self) -> bool:
        """Start what does not run, and all of them where the first has ended. Was it so?"""
        first_ended = bool(self.running) and self.running[0].poll() is not None
        if first_ended:
            self.stop()
        for place, command in enumerate(self._commands):
            if place == len(self.running):
                self.running.append(self._start(command))
            elif self.running[place].poll() is not None:
                self.running[place] = self._start(command)
        return first_ended

    def stop(self) -> None:
        for process in self.running:
            process.terminate()
        for process in self.running:
            process.wait()
        self.running = []

    def _start(self, command: list[str]) -> subprocess.Popen[bytes]:
        # A forward breaks at each connection that comes while the service starts, and says so at length.
        quiet = subprocess.DEVNULL if "port-forward" in command else None
        # A group of its own: Ctrl-C ends it through `stop`, in order.
        return subprocess.Popen(command, stdout=quiet, stderr=quiet, start_new_session=True)  # noqa: S603  # ours


def send(change: Changes) -> bool:
    """Carry a change into the pod. False: there is no pod to carry it to just now."""
    orders: list[tuple[list[str], bytes]] = []
    if change.removed:
        orders.append((["rm", "-f", *change.removed], b""))
    if change.written:
        # Not with the times of here: byte code of old could be taken for the new file's.
        unpack = ["tar", "--extract", "--touch", "--no-same-owner", "--file", "-"]
        orders.append((unpack, archive(ROOT, change.written)))
    pod = kubectl("exec", "--stdin", f"deployment/{RELEASE}", "--container", "weir", "--")
    for order, content in orders:
        if subprocess.run([*pod, *order], input=content, check=False).returncode:  # noqa: S603  # ours
            return False
    print(f"weir: synced {', '.join((*change.written, *change.removed))}", flush=True)
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m deploy.dev.round", description=__doc__.split("\n")[0])
    parser.add_argument("--image", required=True, help="image of the dev target, as the nodes know it")
    parser.add_argument("--build", help="command that builds this image and loads it into the nodes")
    parser.add_argument("--values", action="append", default=[], help="further file of values")
    options = parser.parse_args(arguments)

    for port in (API_PORT, ADMIN_PORT):
        if taken(port):
            print(f"weir: 127.0.0.1:{port} is taken; end what listens there", file=sys.stderr)
            return 1
    built = scan(ROOT)  # before the build: what is written while it runs is sent afterwards
    steps = [
        *([shlex.split(options.build)] if options.build else []),
        helm_arguments(options.image, options.values, time.time()),
        kubectl("rollout", "status", f"deployment/{RELEASE}", "--timeout", "5m"),
    ]
    for step in steps:
        if code := subprocess.run(step, cwd=ROOT, check=False).returncode:  # noqa: S603  # the developer's own
            return code
    children = Children(
        kubectl("logs", "--follow", "--since", "1s", f"deployment/{RELEASE}", "--container", "weir"),
        forward("weir", 80, API_PORT),
        forward("weir-metrics", 9000, ADMIN_PORT),
    )
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    print(f"weir: http://127.0.0.1:{API_PORT}, metrics at port {ADMIN_PORT}; Ctrl-C ends it", flush=True)
    sent = built
    try:
        while True:
            if children.revive():
                sent = built  # logs end with their container, and a new one has the image's files
            now = scan(ROOT)
            if (change := changes(sent, now)) and send(change):
                sent = now
            time.sleep(LOOK_EVERY_SECONDS)
    except KeyboardInterrupt:
        return 0
    finally:
        children.stop()


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
