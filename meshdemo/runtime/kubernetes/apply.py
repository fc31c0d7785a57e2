"""Applying manifests, and waiting until what they ask for runs.

Waiting is where things go wrong, and the cluster knows why: the state of pods and their containers,
conditions, events and the last lines of logs. All of that goes into the error, and a wait that cannot succeed
ends at once.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from meshdemo.errors import Failed
from meshdemo.kube import ApiError, Cluster, Manifest
from meshdemo.names import MESH, SERVICE, VERSION
from meshdemo.runtime.steps import pause

_LOG_LINES = 4
_LOOK_S = 0.2
# How long a trouble that may pass by itself may last, and what it is called.
_GRACE_S = {
    "ErrImagePull": 20.0, "ImagePullBackOff": 20.0, "ErrImageNeverPull": 5.0, "InvalidImageName": 0.0,
    "CreateContainerConfigError": 15.0, "CreateContainerError": 15.0,
    # A node that is short of time may fail to start a container; it tries again after 10 s, and 20 s later.
    "RunContainerError": 35.0, "StartError": 35.0,
    "CrashLoopBackOff": 5.0, "Unschedulable": 30.0, "ReplicaFailure": 10.0, "VolumePending": 90.0,
}  # fmt: skip
_REMEDIES = {
    "ErrImagePull": "make the image available to the cluster: --registry pushes it where nodes can pull it",
    "CrashLoopBackOff": "the log lines above say why the program ends",
    "Unschedulable": "make room on the nodes, or ask for fewer copies with --replicas",
    "VolumePending": "the cluster's default StorageClass makes no volume: `kubectl describe pvc` says why",
    "ReplicaFailure": "the cluster's admission rules or quotas refuse the pods",
}


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why a pod (or a Deployment) is not there yet."""

    about: str  # `service-b-v1-abc`
    reason: str  # machine-readable, of Kubernetes
    message: str
    log: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = "".join(f"\n  | {line}" for line in self.log)
        return f"{self.about}: {self.reason}: {self.message}{lines}"

    @property
    def family(self) -> str:
        """One word for reasons that take turns while the trouble is the same."""
        if "Image" in self.reason:
            return "ErrImagePull"
        return "StartError" if self.reason == "RunContainerError" else self.reason

    @property
    def remedy(self) -> str:
        """What to do about it."""
        return _REMEDIES.get(self.family, "`meshdemo logs` and `kubectl describe pod` tell more")


# -- applying ----------------------------------------------------------------------------------------------


def apply(cluster: Cluster, manifests: Iterable[Manifest], *, timeout_s: float) -> None:
    """Apply manifests in their order; the namespace may be on its way out, that is waited for.

    Raises Failed with the server's words.
    """
    give_up = time.monotonic() + timeout_s
    for manifest in manifests:
        if manifest["kind"] == "Namespace":
            _await_namespace_gone(cluster, manifest["metadata"]["name"], give_up)
            _apply_namespace(cluster, manifest)
        else:
            cluster.apply(manifest)


def _apply_namespace(cluster: Cluster, manifest: Manifest) -> None:
    name = manifest["metadata"]["name"]
    try:
        cluster.apply(manifest)
    except ApiError as error:
        if error.status != 403:
            raise
        if _exists(cluster, name):
            return  # somebody made it for us; whether it allows what we need shows soon enough
        raise Failed(
            f"you may not create the namespace '{name}': {error.message}",
            f"have an administrator create it, label it pod-security.kubernetes.io/enforce=privileged and "
            f"give you rights in it, then run `meshdemo up --name {name}` again",
        ) from error


def _exists(cluster: Cluster, namespace: str) -> bool:
    try:
        return cluster.get("Namespace", namespace) is not None
    except ApiError:
        return False


def _await_namespace_gone(cluster: Cluster, name: str, give_up: float) -> None:
    while True:
        try:
            found = cluster.get("Namespace", name)
        except ApiError as error:
            if error.status == 403:
                return
            raise
        if found is None or "deletionTimestamp" not in found["metadata"]:
            return
        if time.monotonic() > give_up:
            conditions = found.get("status", {}).get("conditions", [])
            said = "; ".join(c["message"] for c in conditions if c["status"] == "True") or "no reason given"
            raise Failed(
                f"the namespace '{name}' is being deleted since {found['metadata']['deletionTimestamp']} "
                f"and still there: {said}",
                "once it is gone, run `meshdemo up` again",
            )
        pause(0.5)


# -- waiting -----------------------------------------------------------------------------------------------


class View:
    """The Deployments and pods of a namespace, for several threads that wait: looked at once for all of them.

    While a cluster boots, its API server has enough to do.
    """

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self._cluster, self._namespace = cluster, namespace
        self._looking = threading.Lock()
        self._looked_at = -math.inf
        self._seen: tuple[Sequence[Manifest], Sequence[Manifest]] = ((), ())

    def look(self, *, after: float) -> tuple[Sequence[Manifest], Sequence[Manifest]]:
        """Deployments and pods as they are, or were a moment ago; not before `after` (monotonic clock)."""
        with self._looking:
            now = time.monotonic()
            if self._looked_at <= after or now - self._looked_at >= _LOOK_S:
                find = partial(self._cluster.find, namespace=self._namespace)
                self._seen = (find("Deployment"), find("Pod"))
                self._looked_at = now
            return self._seen


def await_rollout(
    cluster: Cluster,
    namespace: str,
    deployments: Sequence[str],
    *,
    timeout_s: float,
    tell: Callable[[str], None] = lambda _: None,
    view: View | None = None,
) -> None:
    """Wait until these Deployments run what they ask for: every pod new, ready, and no old one serving.

    `view`: shared with others that wait in this namespace.

    Raises Failed with the reason as soon as it is beyond doubt, and in any case after `timeout_s`.
    """
    view = view or View(cluster, namespace)
    began = time.monotonic()
    give_up = began + timeout_s
    since: dict[tuple[str, str], float] = {}
    while True:
        listed, all_pods = view.look(after=began)
        found = {one["metadata"]["name"]: one for one in listed if one["metadata"]["name"] in deployments}
        missing = [name for name in deployments if name not in found]
        waiting = [one for one in found.values() if not (rolled_out(one) and _all_there(one, all_pods))]
        if not waiting and not missing:
            return
        tell(_progress(found.values()))
        now = time.monotonic()
        pods = [pod for one in waiting for pod in newest(_pods_of(one, all_pods))]
        troubles = [*_of_deployments(waiting), *(t for pod in pods for t in pod_troubles(pod))]
        booting = any(trouble.reason == "Unschedulable" for trouble in troubles) and nodes_boot(cluster)
        since = {
            (trouble.about, trouble.family): since.get((trouble.about, trouble.family), now)
            for trouble in troubles
        }
        for trouble in troubles:
            if booting and trouble.reason == "Unschedulable":
                continue
            if now - since[trouble.about, trouble.family] >= _GRACE_S.get(trouble.reason, timeout_s):
                raise _failed(cluster, namespace, trouble, pods)
        if now > give_up:
            if troubles:
                raise _failed(cluster, namespace, troubles[0], pods)
            names = ", ".join([*missing, *(one["metadata"]["name"] for one in waiting)])
            raise Failed(
                f"{names}: not ready within {timeout_s:.0f} s{_last_events(cluster, namespace, pods)}",
                "a higher --timeout waits longer; `meshdemo up` again goes on from here",
            )
        pause(_LOOK_S)


def _all_there(deployment: Manifest, pods: Iterable[Manifest]) -> bool:
    """Do the pods themselves bear out what a Deployment's status says? It lags behind a pod's deletion."""
    ready = [pod for pod in _pods_of(deployment, pods) if is_ready(pod)]
    return bool(len(ready) == deployment["spec"].get("replicas", 1))


def rolled_out(deployment: Manifest) -> bool:
    """Does a Deployment run what it asks for, and nothing else?"""
    spec, status = deployment["spec"], deployment.get("status", {})
    wanted = spec.get("replicas", 1)
    return bool(
        status.get("observedGeneration", 0) >= deployment["metadata"].get("generation", 1)
        and status.get("updatedReplicas", 0) == wanted
        and status.get("readyReplicas", 0) == wanted
        and status.get("replicas", 0) == wanted
    )


def siblings(cluster: Cluster, pod: Manifest) -> list[Manifest]:
    """The pods that are kept by what keeps this one (a ReplicaSet, a StatefulSet), it included, and stay."""
    keeper = _keeper(pod)
    if keeper is None:
        return []
    meta = pod["metadata"]
    found = cluster.find("Pod", meta["namespace"], labels=f"{MESH}={meta['labels'][MESH]}")
    return [one for one in found if _keeper(one) == keeper and "deletionTimestamp" not in one["metadata"]]


def await_siblings(cluster: Cluster, pod: Manifest, wanted: int, *, timeout_s: float) -> None:
    """Wait until so many siblings of a pod that was deleted are ready. Raises Failed with the reason."""
    give_up = time.monotonic() + timeout_s
    while True:
        there = siblings(cluster, pod)
        if sum(map(is_ready, there)) >= wanted:
            return
        if time.monotonic() > give_up:
            for trouble in (trouble for one in there for trouble in pod_troubles(one)):
                raise _failed(cluster, pod["metadata"]["namespace"], trouble, there)
            raise Failed(f"nothing has taken the place of {pod['metadata']['name']} in {timeout_s:.0f} s")
        pause(0.2)


def _keeper(pod: Manifest) -> str | None:
    owners = pod["metadata"].get("ownerReferences") or ()
    return next((owner["uid"] for owner in owners if owner.get("controller")), None)


def _progress(deployments: Iterable[Manifest]) -> str:
    said = []
    for one in deployments:
        ready, wanted = one.get("status", {}).get("readyReplicas", 0), one["spec"].get("replicas", 1)
        said.append(f"{one['metadata']['name']} {ready}/{wanted}")
    return ", ".join(sorted(said))


def _pods_of(deployment: Manifest, pods: Iterable[Manifest]) -> list[Manifest]:
    wanted = deployment["spec"]["selector"]["matchLabels"].items()
    return [pod for pod in pods if wanted <= pod["metadata"].get("labels", {}).items()]


def newest(pods: Sequence[Manifest]) -> list[Manifest]:
    """Those that a Deployment makes now: what is wrong with its pods of before is why there are new ones."""
    made = [pod for pod in pods if _hash_of(pod) is not None]
    now = _hash_of(max(made, key=_made)) if made else None
    return [pod for pod in pods if _hash_of(pod) in {None, now}]


def _hash_of(pod: Manifest) -> str | None:
    label: str | None = pod["metadata"].get("labels", {}).get("pod-template-hash")
    return label


def _made(pod: Manifest) -> str:
    return str(pod["metadata"].get("creationTimestamp", ""))


def nodes_boot(cluster: Cluster, expected: int = 1) -> bool:
    """Is one of the `expected` nodes not there or not ready yet? Then there may soon be more room."""
    try:
        nodes = cluster.find("Node")
    except ApiError:
        return False
    return len(nodes) < expected or any(
        condition["type"] == "Ready" and condition["status"] != "True"
        for node in nodes
        for condition in node["status"].get("conditions", [])
    )


# -- what is wrong -----------------------------------------------------------------------------------------


def pod_troubles(pod: Manifest) -> Iterator[Trouble]:
    """What keeps a pod from being ready, as far as its own state tells. Pure."""
    name, status = pod["metadata"]["name"], pod.get("status", {})
    if "deletionTimestamp" in pod["metadata"]:
        return
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            reason, message = condition.get("reason", "Unschedulable"), condition.get("message", "")
            yield Trouble(name, "VolumePending" if "PersistentVolumeClaim" in message else reason, message)
    for container in (*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])):
        state = container.get("state", {})
        about = f"{name} ({container['name']})"
        if waiting := state.get("waiting"):
            if (reason := waiting.get("reason")) in _GRACE_S:
                message = _why_ended(container) or waiting.get("message", "")
                # One that the node could not even start is no program that ends.
                last = container.get("lastState", {}).get("terminated", {}).get("reason")
                never = reason == "CrashLoopBackOff" and last == "StartError"
                yield Trouble(about, "StartError" if never else reason, message)
        elif (ended := state.get("terminated")) and ended.get("exitCode"):
            yield Trouble(about, ended.get("reason", "Error"), _why_ended(container))


def _why_ended(container: Mapping[str, Any]) -> str:
    for state in (container.get("state", {}), container.get("lastState", {})):
        if ended := state.get("terminated"):
            restarts = container.get("restartCount", 0)
            again = f", {restarts} times" if restarts > 1 else ""
            said = f": {ended['message'].strip()}" if ended.get("message") else ""
            return f"{ended.get('reason', 'ended')} with exit status {ended['exitCode']}{again}{said}"
    return ""


def _of_deployments(deployments: Iterable[Manifest]) -> Iterator[Trouble]:
    for one in deployments:
        for condition in one.get("status", {}).get("conditions", []):
            if condition["type"] == "ReplicaFailure" and condition["status"] == "True":
                yield Trouble(one["metadata"]["name"], "ReplicaFailure", condition.get("message", ""))


def _failed(cluster: Cluster, namespace: str, trouble: Trouble, pods: Iterable[Manifest]) -> Failed:
    pod, _, container = trouble.about.partition(" (")
    log: tuple[str, ...] = ()
    if container:
        log = tuple(_log(cluster, namespace, pod, container.rstrip(")")))
    full = Trouble(trouble.about, trouble.reason, trouble.message or "no message", log)
    its = [one for one in pods if one["metadata"]["name"] == pod]
    events = "" if log else _last_events(cluster, namespace, its)
    return Failed(f"{full}{events}", trouble.remedy)


def _log(cluster: Cluster, namespace: str, pod: str, container: str) -> list[str]:
    for previous in (False, True):
        try:
            said = list(cluster.logs(namespace, pod, container, tail=_LOG_LINES, previous=previous))
        except ApiError:
            continue
        if said:
            return said
    return []


def _last_events(cluster: Cluster, namespace: str, pods: Iterable[Manifest]) -> str:
    said = []
    for pod in pods:
        name = pod["metadata"]["name"]
        try:
            events = cluster.find("Event", namespace, fields=f"involvedObject.name={name},type=Warning")
        except ApiError:
            continue
        said += [f"\n  {name}: {event.get('reason')}: {event.get('message')}" for event in events[-2:]]
    return "".join(said[:4])


# -- pods as instances -------------------------------------------------------------------------------------


def selector(mesh: str, service: str | None = None, version: str | None = None) -> str:
    """The label selector of the pods of a mesh, a service or a version."""
    parts = [f"{MESH}={mesh}", f"{SERVICE}={service}" if service else SERVICE]
    return ",".join([*parts, f"{VERSION}={version}"] if version else parts)


def is_ready(pod: Manifest) -> bool:
    """Does a pod take traffic, and is to stay?"""
    conditions = pod.get("status", {}).get("conditions", [])
    ready = any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)
    return ready and "deletionTimestamp" not in pod["metadata"]


def autoscalers(cluster: Cluster, namespace: str) -> dict[str, str]:
    """Which Deployments have an autoscaler: Deployment -> HorizontalPodAutoscaler."""
    try:
        found = cluster.find("HorizontalPodAutoscaler", namespace)
    except ApiError as error:
        if error.status in {403, 404}:
            return {}
        raise
    targets = ((one["spec"]["scaleTargetRef"], one["metadata"]["name"]) for one in found)
    return {target["name"]: name for target, name in targets if target.get("kind") == "Deployment"}
