"""Whether Prometheus and Grafana are there, which a mesh in a cluster may do without."""

from __future__ import annotations

from meshdemo import names
from meshdemo.kube import Cluster
from meshdemo.runtime.kubernetes import apply
from meshdemo.runtime.kubernetes.manifests import OBSERVABILITY


def unavailable(cluster: Cluster, mesh: str, namespace: str) -> dict[str, str]:
    """Why they are not to be reached, of those that the mesh should have, by name and on one line each.

    Raises ApiError.
    """
    found = {}
    for name in OBSERVABILITY:
        deployment = cluster.get("Deployment", name, namespace)
        if deployment is None or deployment.get("status", {}).get("readyReplicas"):
            continue
        labels = f"{names.MESH}={mesh},{names.COMPONENT}={name}"
        pods = cluster.find("Pod", namespace, labels=labels)
        troubles = [trouble for pod in pods for trouble in apply.pod_troubles(pod)]
        found[name] = " ".join(_words(troubles[0]).split()) if troubles else "not ready yet"
    return found


def _words(trouble: apply.Trouble) -> str:
    if trouble.family == "ErrImagePull":
        return f"image not available ({trouble.reason}: {trouble.message})"
    return f"not ready ({trouble.about}: {trouble.reason}: {trouble.message})"
