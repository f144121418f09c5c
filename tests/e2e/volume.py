"""A volume for Redis' own claim: of the cluster's default class, else a directory of one node."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.e2e.cluster import Images, get, kubectl

PATH = "/tmp/weir-e2e-redis"  # on the node, and emptied at the end
WORKSHOP = "weir-e2e-volume"
DEFAULT_CLASS = "storageclass.kubernetes.io/is-default-class"
PERSISTENCE = "redis.embedded.persistence"


@contextmanager
def volume(images: Images, namespace: str, claim: str = "weir-redis") -> Iterator[tuple[str, ...]]:
    """Values with which the chart's claim of that name gets a volume that outlives pods."""
    values = ("--set", f"{PERSISTENCE}.enabled=true,{PERSISTENCE}.size=1Gi")
    classes = get("storageclasses")["items"]
    if any(c["metadata"].get("annotations", {}).get(DEFAULT_CLASS) == "true" for c in classes):
        yield values
        return
    node = _schedulable()
    kubectl("delete", "namespace", WORKSHOP, "--ignore-not-found")
    kubectl("create", "namespace", WORKSHOP)
    try:
        _on_node(images, node, "empty", f"rm -rf {PATH}/* && chown 999:999 {PATH}")
        _apply(_directory(namespace, claim, node))
        yield (*values, "--set", f"{PERSISTENCE}.storageClass=-")
    finally:
        kubectl("delete", "persistentvolume", namespace, "--ignore-not-found", "--wait=false")
        _on_node(images, node, "clear", f"rm -rf {PATH}/*")
        kubectl("delete", "namespace", WORKSHOP, "--wait=false")


def _schedulable() -> str:
    """A node that takes any pod: a control plane's is often tainted."""
    for node in get("nodes")["items"]:
        taints = {taint["effect"] for taint in node["spec"].get("taints", [])}
        if not node["spec"].get("unschedulable") and taints.isdisjoint({"NoSchedule", "NoExecute"}):
            name: str = node["metadata"]["name"]
            return name
    raise AssertionError("no node takes a pod that tolerates nothing")


def _apply(what: dict[str, Any]) -> None:
    kubectl("apply", "-f", "-", given=json.dumps(what))


def _directory(name: str, claim: str, node: str) -> dict[str, Any]:
    """A volume that is kept for one claim; where its name is the namespace's, runs do not meet."""
    term = {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}]}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name},
        "spec": {
            "capacity": {"storage": "1Gi"},
            "accessModes": ["ReadWriteOnce"],
            "hostPath": {"path": PATH},
            "claimRef": {"name": claim, "namespace": name},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [term]}},
        },
    }


def _on_node(images: Images, node: str, name: str, command: str) -> None:
    """Run a command as root on a node's directory."""
    _apply(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "namespace": WORKSHOP},
            "spec": {
                "nodeName": node,
                "restartPolicy": "Never",
                "containers": [
                    {
                        "name": "shell",
                        "image": images.redis,
                        "imagePullPolicy": images.pull_policy,
                        "command": ["sh", "-c", command],
                        "securityContext": {"runAsUser": 0},
                        "volumeMounts": [{"name": "directory", "mountPath": PATH}],
                    }
                ],
                "volumes": [
                    {"name": "directory", "hostPath": {"path": PATH, "type": "DirectoryOrCreate"}},
                ],
            },
        }
    )
    kubectl(
        *("wait", "-n", WORKSHOP, f"pod/{name}", "--for=jsonpath={.status.phase}=Succeeded"),
        "--timeout=120s",
    )
