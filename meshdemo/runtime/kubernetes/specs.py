"""What must run, as the cluster remembers it: the mesh's spec, in a ConfigMap.

It is changed with optimistic concurrency, and is the same value as on the local runtime
(`meshdemo.runtime.local.spec`): revisions of workloads, how many instances, faults. A rollout of a new
environment is a patch of the workload's Deployment; the command line makes it, and so does the control plane
when a fault that was set for a time is over.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from pydantic import ValidationError

from meshdemo.control.kubernetes.kept import SPEC
from meshdemo.control.model import WorkloadRevision
from meshdemo.errors import Failed, Missing
from meshdemo.kube import ApiError, Cluster, Manifest
from meshdemo.names import PREFIX, REVISION
from meshdemo.runtime.local.spec import MeshSpec, WorkloadSpec

REASON = PREFIX + "reason"
CHANGE_CAUSE = "kubernetes.io/change-cause"  # what `kubectl rollout history` shows
_ATTEMPTS = 10


class SpecMap:
    """The spec of one mesh in its cluster."""

    def __init__(self, cluster: Cluster, mesh: str, namespace: str) -> None:
        self._cluster, self._mesh, self._namespace = cluster, mesh, namespace

    def find(self) -> MeshSpec | None:
        """The spec; None if there is none (yet). Raises Failed if it cannot be read."""
        stored = self._cluster.get("ConfigMap", SPEC, self._namespace)
        return parsed(stored) if stored else None

    def load(self) -> MeshSpec:
        """The spec. Raises Missing if the mesh is not there."""
        spec = self.find()
        if spec is None:
            raise Missing(
                f"no mesh '{self._mesh}' in the namespace '{self._namespace}' of {self._cluster.url}",
                f"run `meshdemo up --name {self._mesh}`",
            )
        return spec

    def change(self, fn: Callable[[MeshSpec], MeshSpec]) -> MeshSpec:
        """Change the spec; `fn` is called again if somebody else changed it at the same moment."""
        for _ in range(_ATTEMPTS):
            stored = self._cluster.get("ConfigMap", SPEC, self._namespace)
            before = parsed(stored) if stored else None
            if stored is None or before is None:
                self.load()  # says what is missing
                continue
            after = fn(before)
            if after == before:
                return after
            if self._write(after, stored["metadata"]["resourceVersion"]):
                return after
        raise Failed(f"the spec of mesh '{self._mesh}' is changed by others all the time", "try again")

    def store(self, spec: MeshSpec) -> None:
        """Store a spec, whatever was there."""
        self._write(spec, None)

    def _write(self, spec: MeshSpec, version: str | None) -> bool:
        body: Manifest = {"data": {"spec.json": spec.model_dump_json()}}
        if version is not None:
            body["metadata"] = {"resourceVersion": version}
        try:
            self._cluster.patch("ConfigMap", SPEC, self._namespace, body, merge="merge")
        except ApiError as error:
            if error.status == 409:
                return False
            raise
        return True


def parsed(stored: Manifest) -> MeshSpec | None:
    """The spec that a ConfigMap holds; None if it holds none. Raises Failed if it cannot be read."""
    text = (stored.get("data") or {}).get("spec.json")
    if text is None:
        return None
    try:
        return MeshSpec.model_validate(json.loads(text))
    except (ValueError, ValidationError) as error:
        raise Failed(
            f"the ConfigMap {SPEC} does not hold a mesh that this version of meshdemo can read: {error}",
            "take the mesh down with the version that made it, and up again",
        ) from error


# -- rolling out an environment ----------------------------------------------------------------------------


def deployment_of(workload: WorkloadSpec) -> str:
    """The name of a workload's Deployment."""
    return f"{workload.service}-{workload.version}"


def env_patch(before: Mapping[str, str], now: WorkloadRevision) -> Manifest:
    """A strategic merge patch of a Deployment that brings its pods to a revision of its workload."""
    changed = [{"name": name, "value": value} for name, value in now.env.items() if before.get(name) != value]
    gone = [{"name": name, "$patch": "delete"} for name in before if name not in now.env]
    note = f"revision {now.revision}: {now.reason}"
    return {
        "metadata": {"annotations": {CHANGE_CAUSE: note}},
        "spec": {
            "template": {
                "metadata": {"annotations": {REVISION: str(now.revision), REASON: now.reason}},
                "spec": {"containers": [{"name": "app", "env": [*changed, *gone]}]},
            }
        },
    }


def patch_env(cluster: Cluster, namespace: str, before: WorkloadSpec, after: WorkloadSpec) -> Manifest:
    """Roll out what has changed from one spec of a workload to the other; the Deployment as it is then."""
    name = deployment_of(after)
    patch = env_patch(before.current.env, after.current)
    deployment = cluster.patch("Deployment", name, namespace, patch)
    return {"apiVersion": "apps/v1", "kind": "Deployment", **deployment}
