"""What we ask of a pod: the Pod Security Standard `restricted`, a read-only root and named owners."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Spec = dict[str, Any]

_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}


def faults(spec: Spec) -> list[str]:
    """One line for each thing that a pod's spec lacks."""
    return [*_pod(spec), *(fault for c in _containers(spec) for fault in _container(spec, c))]


def _containers(spec: Spec) -> list[Spec]:
    return [*spec.get("initContainers", []), *spec["containers"]]


def _pod(spec: Spec) -> Iterator[str]:
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(name):
            yield f"{name} is on"
    for volume in spec.get("volumes", []):
        if not (set(volume) - {"name"}) <= _VOLUMES:
            yield f"volume {volume['name']}: kind"
    if spec.get("automountServiceAccountToken") is not False:
        yield "automountServiceAccountToken"
    context = spec.get("securityContext", {})
    if not context.get("fsGroup"):
        yield "fsGroup: who owns volumes"
    if context.get("fsGroupChangePolicy") != "OnRootMismatch":
        yield "fsGroupChangePolicy: each start would change every file's owner"


def _container(spec: Spec, container: Spec) -> Iterator[str]:
    own = container.get("securityContext", {})
    context = spec.get("securityContext", {}) | own
    wanted = {
        "runAsNonRoot": context.get("runAsNonRoot") is True,
        "runAsUser": bool(context.get("runAsUser")),
        "runAsGroup": bool(context.get("runAsGroup")),
        "seccompProfile": context.get("seccompProfile", {}).get("type") in ("RuntimeDefault", "Localhost"),
        "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is False,
        "capabilities.drop": "ALL" in (own.get("capabilities", {}).get("drop") or []),
        "capabilities.add": set(own.get("capabilities", {}).get("add") or []) <= {"NET_BIND_SERVICE"},
        "privileged": own.get("privileged", None) is False,
        "readOnlyRootFilesystem": own.get("readOnlyRootFilesystem") is True,
        "hostPort": not any(port.get("hostPort") for port in container.get("ports", [])),
    }
    for name, good in wanted.items():
        if not good:
            yield f"container {container['name']}: {name}"
