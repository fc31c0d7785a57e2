"""Removing a mesh from a cluster: what `up` made, and nothing else."""

from __future__ import annotations

import time

from meshdemo import names
from meshdemo.errors import Failed, MeshdemoError
from meshdemo.kube import ApiError, Cluster, Manifest
from meshdemo.runtime.kubernetes import record
from meshdemo.runtime.kubernetes.kind import Kind
from meshdemo.runtime.kubernetes.record import Record

_GONE_S = 120.0


def remove(found: Record, notes: list[str]) -> list[str]:
    """Remove what `up` made; what was removed, in words. What stays goes into `notes`."""
    removed: list[str] = []
    kind = Kind() if found.kind == "kind" else None
    if kind is not None and found.cluster not in kind.clusters():
        pass  # somebody has removed it, and the mesh with it
    elif kind is not None and found.made_cluster and found.cluster:
        kind.delete(found.cluster, record.kubeconfig(found.mesh))
        removed.append(f"kind cluster {found.cluster}")
    else:
        try:
            found.connect(patience_s=0).version()  # one that is gone is told at once
        except MeshdemoError as error:
            folder = record.kubeconfig(found.mesh).parent
            raise Failed(error.message, f"{error.remedy}; if it is gone for good, remove {folder}") from error
        removed += _remove_objects(found.connect(), found, notes)
    record.forget(found.mesh)
    return removed


def _remove_objects(cluster: Cluster, found: Record, notes: list[str]) -> list[str]:
    removed = []
    labels = f"{names.MESH}={found.mesh}"
    for kind in ("ClusterRoleBinding", "ClusterRole", "IngressClass", "GatewayClass"):
        for one in _all_of(cluster, kind, labels):
            cluster.delete(kind, one["metadata"]["name"])
            removed.append(f"{kind} {one['metadata']['name']}")
    namespace = cluster.get("Namespace", found.namespace)
    if namespace is None:
        return [*removed, *_remove_handouts(cluster, found, notes)]
    if namespace["metadata"].get("labels", {}).get(names.MESH) != found.mesh:
        raise Failed(
            f"the namespace '{found.namespace}' is not of this mesh, so it stays",
            "remove from it by hand what is labelled " + labels,
        )
    cluster.delete("Namespace", found.namespace)
    give_up = time.monotonic() + _GONE_S
    while cluster.get("Namespace", found.namespace) is not None:
        if time.monotonic() > give_up:
            raise Failed(f"the namespace '{found.namespace}' is still there after {_GONE_S:.0f} s")
        time.sleep(0.5)
    return [*removed, f"namespace {found.namespace}", *_remove_handouts(cluster, found, notes)]


def _all_of(cluster: Cluster, kind: str, labels: str) -> list[Manifest]:
    """All objects of a kind that the cluster may not have."""
    try:
        return cluster.find(kind, labels=labels)
    except ApiError as error:
        if error.status != 404:
            raise
        return []


def _remove_handouts(cluster: Cluster, found: Record, notes: list[str]) -> list[str]:
    """Remove what the control plane gave to other namespaces. (It is gone by now, so nothing comes back.)

    Pods there that were injected are their owners', and stay; that goes into `notes`.
    """
    removed = []
    labels = f"{names.MESH}={found.mesh}"
    try:
        handouts = cluster.find("ConfigMap", labels=labels)
        pods = cluster.find("Pod", labels=f"{labels},{names.SERVICE}")
    except ApiError as error:
        if error.status != 403:
            raise
        notes.append(f"whether other namespaces have something of it is not known: {error.message}")
        return []
    for one in handouts:
        name, namespace = one["metadata"]["name"], one["metadata"]["namespace"]
        if namespace != found.namespace:
            cluster.delete("ConfigMap", name, namespace)
            removed.append(f"ConfigMap {name} in {namespace}")
    if still := sorted({pod["metadata"]["namespace"] for pod in pods} - {found.namespace}):
        notes.append(
            f"pods with a sidecar of this mesh stay in {', '.join(still)} and work until they are replaced; "
            "`meshdemo uninject` takes the sidecar out of their manifests"
        )
    return removed
