"""What `inject` puts into a pod template: the sidecar of a mesh, and the labels by which it knows the pod."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from meshdemo.errors import BadInput
from meshdemo.names import (
    MESH,
    PROTOCOL,
    PROTOCOLS,
    RECORD,
    SERVICE,
    SKIP_INBOUND,
    SKIP_OUTBOUND,
    TOLD_PROTOCOL,
    TOLD_SKIPPED,
    VERSION,
    numbers,
    protocols,
)
from meshdemo.runtime.kubernetes import images
from meshdemo.runtime.kubernetes.inject import Additions, PodTemplate
from meshdemo.runtime.kubernetes.pieces import sidecar
from meshdemo.runtime.local.paths import home

# Where a pod template says which service it is part of, in this order; else it is named like its workload.
_SERVICE_LABELS = ("app.kubernetes.io/name", "app", "k8s-app")
_VERSION_LABELS = ("app.kubernetes.io/version", "version")


def default_image(mesh: str) -> str:
    """The sidecar's image as `up` builds it, or built it for this mesh."""
    if not (home() / mesh / RECORD).exists():
        return images.sidecar(images.BASE_IMAGE).reference(None)
    from meshdemo.runtime.kubernetes import record  # not loaded for nothing

    known = record.load(mesh)
    assert known is not None
    return images.sidecar(known.base_image or images.BASE_IMAGE).reference(known.registry)


def unknown(mesh: str) -> str:
    """What whoever injects should know if this machine knows of no such mesh in a cluster; '' if it does."""
    if (home() / mesh / RECORD).exists():
        return ""
    others = sorted(path.parent.name for path in home().glob(f"*/{RECORD}"))
    return (
        f"this machine knows no mesh '{mesh}' in a cluster ("
        + (f"but {', '.join(others)}: see --name" if others else "`meshdemo up --runtime kind` makes one")
        + f"); such pods start once there is a mesh '{mesh}' in their cluster"
    )


def additions(pod: PodTemplate, mesh: str, image: str) -> Additions:
    """What this pod template gets.

    Raises:
        BadInput: one of its annotations makes no sense.
    """
    parts = _parts(mesh, image, _ports(pod, SKIP_INBOUND), _ports(pod, SKIP_OUTBOUND))
    labels = {
        MESH: mesh,
        SERVICE: next((pod.labels[key] for key in _SERVICE_LABELS if pod.labels.get(key)), pod.name),
        VERSION: next((pod.labels[key] for key in _VERSION_LABELS if pod.labels.get(key)), "v1"),
    }
    return Additions(
        init_containers=parts["init_containers"],
        volumes=parts["volumes"],
        labels={key: value for key, value in labels.items() if key not in pod.labels},
        annotations=_told(pod),
    )


def ours(mesh: str, image: str) -> Additions:
    """What `uninject` takes away, whatever a single pod got of it."""
    parts = _parts(mesh, image, (), ())
    return Additions(
        init_containers=parts["init_containers"],
        volumes=parts["volumes"],
        labels={MESH: mesh, SERVICE: "", VERSION: ""},
        annotations={TOLD_PROTOCOL: "", TOLD_SKIPPED: ""},
    )


@lru_cache(maxsize=64)
def _parts(
    mesh: str, image: str, skip_inbound: tuple[int, ...], skip_outbound: tuple[int, ...]
) -> dict[str, Any]:
    """Rendered once for the many workloads that get the same."""
    return sidecar(mesh, image, skip_inbound=skip_inbound, skip_outbound=skip_outbound)


def _told(pod: PodTemplate) -> dict[str, str]:
    """What the owner says and the control plane must know, for the pods: an annotation of a workload is not
    one of its pods."""
    told = {}
    if (protocol := pod.annotations.get(PROTOCOL)) is not None:
        try:
            meant = protocols(protocol)
        except ValueError as error:
            raise BadInput(
                f"{pod.kind} {pod.name}: annotation {PROTOCOL}: '{error}' is no protocol",
                f"one of {', '.join(PROTOCOLS)}; PORT=PROTOCOL for any port but the first of its Service",
            ) from None
        told[TOLD_PROTOCOL] = ",".join(f"{port}={one}" if port else one for port, one in meant.items())
    if skipped := _ports(pod, SKIP_INBOUND):
        told[TOLD_SKIPPED] = ",".join(map(str, skipped))
    return told


def _ports(pod: PodTemplate, annotation: str) -> tuple[int, ...]:
    try:
        return numbers(pod.annotations.get(annotation, ""))
    except ValueError as error:
        raise BadInput(
            f"{pod.kind} {pod.name}: annotation {annotation}: '{error}' is no port",
            "give ports from 1 to 65535, separated by commas",
        ) from None
