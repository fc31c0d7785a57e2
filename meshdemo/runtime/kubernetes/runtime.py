"""The kubernetes runtime as commands use it: what runs in the cluster, and changing it.

All state is in the cluster; this machine remembers where that is (`record`). The control plane is reached
through the API server (`forward`), so that whoever may use the cluster may use the mesh, from anywhere.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from http.client import HTTPConnection, HTTPException
from typing import TYPE_CHECKING, Any

from meshdemo import names
from meshdemo.apps.model import GATEWAY
from meshdemo.control.discovered import instance_of
from meshdemo.control.kubernetes import kept
from meshdemo.control.kubernetes.state import mesh_state
from meshdemo.errors import BadInput, Failed, Missing
from meshdemo.kube import ApiError, Cluster, Manifest
from meshdemo.names import PLAIN_PORT, PREFIX
from meshdemo.runtime.kubernetes import apply, observability, record
from meshdemo.runtime.kubernetes.forward import Forward
from meshdemo.runtime.kubernetes.specs import SpecMap, deployment_of, patch_env
from meshdemo.runtime.local import spec as specs
from meshdemo.runtime.steps import pause

if TYPE_CHECKING:
    from meshdemo.apps.model import App
    from meshdemo.control.client import ControlClient
    from meshdemo.control.model import Instance, MeshState, WorkloadRevision
    from meshdemo.runtime.base import Step, UpOptions
    from meshdemo.runtime.kubernetes.record import Record

CONTROL_PLANE = "control-plane"
WATCH_LEASE = "meshdemo-watch"
OVERRIDE = PREFIX + "instance-env"  # annotation of a pod whose environment deviates from its workload's

_ROLLOUT_S = 120.0  # for pods to be replaced or added in a mesh that runs
_EFFECT_S = 15.0  # for the control plane to have seen it
_LOOK_S = 0.1
_ANSWER_S = 1.0


class KubernetesRuntime:
    """A mesh in a cluster."""

    def __init__(self, name: str, kind: str) -> None:
        self.name = name
        self.kind = kind
        self.notes: list[str] = []  # what `up` could not do, and the mesh can do without; what `down` left
        self._forward: Forward | None = None
        self._seen: tuple[float, list[Instance]] = (-_LOOK_S, [])
        self._at_home_only = False  # other namespaces may not be looked at

    # -- how to reach it -----------------------------------------------------------------------------------

    @cached_property
    def record(self) -> Record:
        """What this machine remembers. Raises Missing if it knows no such mesh."""
        found = record.load(self.name)
        if found is None:
            raise Missing(f"no mesh '{self.name}' is running", f"run `meshdemo up --name {self.name}`")
        return found

    @cached_property
    def cluster(self) -> Cluster:
        """The mesh's cluster. Raises Missing if it does not answer."""
        self.record.connect(patience_s=0).version()  # one that is gone is told at once
        return self.record.connect()

    @property
    def namespace(self) -> str:
        """The mesh's namespace."""
        return self.record.namespace

    @cached_property
    def spec_map(self) -> SpecMap:
        """The spec, where the cluster keeps it."""
        return SpecMap(self.cluster, self.name, self.namespace)

    def control(self) -> ControlClient:
        """A client of the control plane's API, through a port forward that lives as long as this process."""
        from meshdemo.control.client import ControlClient

        if self._forward is None:
            stored = self.cluster.get("Secret", kept.API, self.namespace)
            if stored is None or "token" not in stored.get("data", {}):
                self.spec_map.load()  # says what is missing
                raise Missing(f"mesh '{self.name}' is not complete", f"run `meshdemo up --name {self.name}`")
            self._token = base64.b64decode(stored["data"]["token"]).decode()
            self._forward = Forward(self.cluster, self.namespace, self._control_pod, names.API_PORT)
        # A control plane that is being replaced is away for a few seconds.
        return ControlClient(self._forward.url, self._token, retry_s=20.0)

    def _control_pod(self) -> str:
        labels = f"{names.MESH}={self.name},app.kubernetes.io/component={CONTROL_PLANE}"
        pods = self.cluster.find("Pod", self.namespace, labels=labels)
        ready = [pod["metadata"]["name"] for pod in pods if apply.is_ready(pod)]
        if not ready:
            raise Missing(f"the control plane of mesh '{self.name}' is not ready", "see `meshdemo logs`")
        return str(ready[0])

    # -- up and down ---------------------------------------------------------------------------------------

    def steps(self, options: UpOptions) -> Sequence[Step]:
        """The steps that bring the mesh up, or bring a running one to what `options` ask for."""
        from meshdemo.runtime.kubernetes.up import steps

        return steps(self, options)

    def down(self) -> list[str]:
        """Remove all that `up` made; what was removed, in words. Nothing running is fine."""
        from meshdemo.runtime.kubernetes.down import remove

        found = record.load(self.name)
        return remove(found, self.notes) if found else []

    # -- what runs -----------------------------------------------------------------------------------------

    def app(self) -> App:
        """The app that runs, with the services of injected pods."""
        return self._mesh().app

    def instances(self) -> list[Instance]:
        """The instances, whether ready or not; those on their way out are no more.

        Whoever asks again and again is told what was seen a tenth of a second ago.
        """
        seen_at, seen = self._seen
        if time.monotonic() - seen_at > _LOOK_S:
            seen = self._look()
            self._seen = (time.monotonic(), seen)
        return seen

    def _look(self) -> list[Instance]:
        return [one for one in self._mesh().instances if not one.leaving]

    def _mesh(self) -> MeshState:
        declared = self.spec_map.load().app
        pods = self._everywhere("Pod", f"{names.MESH}={self.name},{names.SERVICE}")
        places = {self.namespace, *(pod["metadata"]["namespace"] for pod in pods)}
        slices = [one for place in sorted(places) for one in self.cluster.find("EndpointSlice", place)]
        services = [one for place in sorted(places) for one in self.cluster.find("Service", place)]
        return mesh_state(self.name, self.namespace, declared, pods, slices, services)

    def _everywhere(self, kind: str, labels: str) -> list[Manifest]:
        """Objects of the whole cluster, or of the mesh's namespace for those who may not see more."""
        if not self._at_home_only:
            try:
                return self.cluster.find(kind, labels=labels)
            except ApiError as error:
                if error.status != 403:
                    raise
                self._at_home_only = True
        return self.cluster.find(kind, self.namespace, labels=labels)

    def where(self, instance: str) -> tuple[str, str]:
        """The pod of an instance, and its namespace."""
        return names.parted(instance, self.namespace)

    def endpoints(self) -> dict[str, str | None]:
        """URLs by name."""
        ports = self.record.ports.keys() - self.unavailable().keys()
        found: dict[str, str | None] = dict.fromkeys(("gateway", "dashboard", "prometheus", "grafana"))
        for name in (GATEWAY, "prometheus", "grafana"):
            if name in ports and self.cluster.get("Service", name, self.namespace):
                host = "localhost" if name == GATEWAY else "127.0.0.1"
                found[name] = f"http://{host}:{self.record.ports[name]}/"
        return found

    def unavailable(self) -> dict[str, str]:
        """Why an endpoint that the mesh should have is not there, by name."""
        return observability.unavailable(self.cluster, self.name, self.namespace)

    def revisions(self, service: str, version: str) -> list[WorkloadRevision]:
        """Revisions of a workload, oldest first; the last is the current one."""
        return list(self.spec_map.load().workload(service, version).revisions)

    # -- changes -------------------------------------------------------------------------------------------

    def set_env(
        self,
        service: str,
        version: str | None,
        env: dict[str, str | None],
        *,
        reason: str,
        instance: str | None = None,
        expires_at: float | None = None,
        fault_id: str | None = None,
    ) -> WorkloadRevision:
        """Roll out a new revision with these variables set (None: unset), no request failing.

        With several versions the revision of the last one is returned. A revision of a single instance
        (`instance`) is not among `revisions`: its pod is replaced by one with another environment, under
        another name (`WorkloadRevision.instance`), and that ends with the next rollback.
        """
        lasts_s = None if expires_at is None else expires_at - time.time()
        if expires_at is not None:
            # It lasts so long from when it is felt, and pods take a while to start: until then, longer.
            expires_at += 2 * _ROLLOUT_S

        def change(workload: specs.WorkloadSpec, instance: str | None) -> specs.WorkloadSpec:
            if fault_id is None:
                return specs.with_env(workload, env, instance=instance, reason=reason, now=time.time())
            variables = {name: value for name, value in env.items() if value is not None}
            fault = specs.AppFault(id=fault_id, instance=instance, env=variables, expires_at=expires_at)
            return specs.with_fault(workload, fault, reason=reason, now=time.time())

        spec = self.spec_map.load()
        if instance is not None:
            one = self._change_one(instance, change, reason)
            self._let_it_last(fault_id, lasts_s)
            return one
        versions = [version] if version else spec.versions(service)
        spec.workload(service, version or next(iter(versions), ""))  # says what is wrong with the names
        rolled = self._roll(service, versions, lambda workload: change(workload, None))
        self._let_it_last(fault_id, lasts_s)
        return rolled[-1]

    def _let_it_last(self, fault_id: str | None, seconds: float | None) -> None:
        """A fault that is felt from now on ends after so many seconds."""
        if fault_id is None or seconds is None:
            return
        ends = time.time() + seconds
        self.spec_map.change(lambda spec: specs.ending(spec, fault_id, ends))

    def faults(self) -> list[str]:
        """The ids of the faults in workloads' environments."""
        workloads = self.spec_map.load().workloads.values()
        return list(dict.fromkeys(fault.id for one in workloads for fault in one.faults))

    def end_faults(self, ids: Collection[str] | None, *, reason: str) -> list[str]:
        """Take these faults (None: all) out of the workloads that carry them; those that there were."""
        ended: list[str] = []
        for workload in self.spec_map.load().workloads.values():
            mine = [fault for fault in workload.faults if ids is None or fault.id in ids]
            ended += [fault.id for fault in mine]
            change = _without([fault.id for fault in mine], reason)
            if any(fault.instance is None for fault in mine):
                self._roll(workload.service, [workload.version], change)
            elif mine:
                self._end_in_pods(
                    workload, {fault.instance for fault in mine if fault.instance}, change, reason
                )
        return list(dict.fromkeys(ended))

    def _end_in_pods(
        self,
        workload: specs.WorkloadSpec,
        instances: Collection[str],
        change: Callable[[specs.WorkloadSpec], specs.WorkloadSpec],
        reason: str,
    ) -> None:
        """End faults of single pods: those that are still there are replaced."""
        for pod in self._pods(workload.service, workload.version):
            if (name := pod["metadata"]["name"]) in instances:
                self._change_one(name, lambda its, _: change(its), reason)
        self.spec_map.change(lambda spec: spec.replacing(change(spec.workloads[workload.key])))

    def rollback(self, service: str, version: str, revision: int, *, reason: str) -> WorkloadRevision:
        """Roll out again what `revision` ran with, as a new revision."""

        def change(workload: specs.WorkloadSpec) -> specs.WorkloadSpec:
            return specs.rolled_back(workload, revision, reason=reason, now=time.time())

        event = ("RolledBack", f"to revision {revision}: {reason}")
        rolled = self._roll(service, [version], change, event=event)
        for pod in self._pods(service, version):
            if OVERRIDE in pod["metadata"].get("annotations", {}):
                self.restart(pod["metadata"]["name"], reason=reason)
        return rolled[-1]

    def _roll(
        self,
        service: str,
        versions: Sequence[str],
        change: Callable[[specs.WorkloadSpec], specs.WorkloadSpec],
        *,
        event: tuple[str, str] | None = None,
    ) -> list[WorkloadRevision]:
        """Change workloads, in the spec and then in the cluster; returns when all pods are new."""
        before: dict[str, specs.WorkloadSpec] = {}

        def changed(spec: specs.MeshSpec) -> specs.MeshSpec:
            before.clear()
            for version in versions:
                old = spec.workload(service, version)
                before[version] = old
                new = change(old)
                if new.current.revision != old.current.revision:
                    new = specs.uniform(new)  # the rollout replaces pods that deviate by plain ones
                spec = spec.replacing(new)
            return spec

        spec = self.spec_map.change(changed)
        after = {version: spec.workload(service, version) for version in versions}
        for version, new in after.items():
            if new.current.revision != before[version].current.revision:
                deployment = patch_env(self.cluster, self.namespace, before[version], new)
                if event:
                    self.cluster.event(deployment, *event)
        apply.await_rollout(
            self.cluster, self.namespace, [deployment_of(new) for new in after.values()], timeout_s=_ROLLOUT_S
        )
        revisions = {version: new.current.revision for version, new in after.items()}

        def runs_it(row: Any) -> bool:
            concerned = row["service"] == service and row["version"] in revisions
            return not concerned or row["revision"] >= revisions[row["version"]]

        self._await_effect(f"the new revision of {service}", runs_it)
        return [new.current for new in after.values()]

    def restart(self, instance: str, *, reason: str) -> None:
        """Replace one instance's pod; returns when its replacement is ready.

        One that answers finishes what it was asked; one that hangs is killed, so that whoever waits for it
        learns so at once and asks another.
        """
        pod = self._pod(instance)
        self.cluster.event(pod, "Restarted", reason)
        grace_s = None if self._answers(instance, pod) else 1
        kept = len(apply.siblings(self.cluster, pod))
        name, namespace = self.where(instance)
        self.cluster.delete("Pod", name, namespace, grace_s=grace_s)
        self._await_gone(instance)
        ours = self.spec_map.load().workloads
        labels = pod["metadata"]["labels"]
        key = f"{labels[names.SERVICE]}/{labels[names.VERSION]}"
        if namespace == self.namespace and key in ours:
            name = deployment_of(ours[key])
            apply.await_rollout(self.cluster, self.namespace, [name], timeout_s=_ROLLOUT_S)
        else:
            apply.await_siblings(self.cluster, pod, kept, timeout_s=_ROLLOUT_S)
        self._await_effect(f"the replacement of {instance}", lambda row: row["ready"])

    def _answers(self, instance: str, pod: Manifest) -> bool:
        """Does its workload answer its health check just now? What speaks no HTTP cannot be asked."""
        mesh = self._mesh()
        found = next((one for one in mesh.instances if one.id == instance), None)
        service = mesh.app.services[found.service] if found else None
        if (
            service is None
            or service.protocol != "http"
            or (service.found and service.healthz not in service.open_paths)
        ):
            return apply.is_ready(pod)
        name, namespace = self.where(instance)
        tunnel = Forward(self.cluster, namespace, lambda: name, PLAIN_PORT)
        connection = HTTPConnection("127.0.0.1", tunnel.port, timeout=_ANSWER_S)
        try:
            connection.request("GET", service.healthz)
            return connection.getresponse().status == 200
        except (OSError, HTTPException):
            return False
        finally:
            connection.close()
            tunnel.close()

    def _await_gone(self, instance: str) -> None:
        """Wait until a deleted pod is on its way out, so that nobody takes it for its own replacement."""
        name, namespace = self.where(instance)
        give_up = time.monotonic() + _EFFECT_S
        while time.monotonic() < give_up:
            pod = self.cluster.get("Pod", name, namespace)
            if pod is None or "deletionTimestamp" in pod["metadata"]:
                return
            pause(_LOOK_S)

    def scale(self, service: str, version: str, instances: int, *, reason: str) -> None:
        """Change the number of instances; returns when all are ready, or gone."""
        name = deployment_of(self.spec_map.load().workload(service, version))
        if owner := apply.autoscalers(self.cluster, self.namespace).get(name):
            raise Failed(
                f"the autoscaler {owner} decides how many instances of {service} {version} there are",
                "change its bounds, or remove it",
            )
        self.spec_map.change(
            lambda spec: spec.replacing(specs.scaled(spec.workload(service, version), instances))
        )
        deployment = self.cluster.patch("Deployment", name, self.namespace, {"spec": {"replicas": instances}})
        about = {"apiVersion": "apps/v1", "kind": "Deployment", **deployment}
        self.cluster.event(about, "Scaled", f"to {instances}: {reason}")
        apply.await_rollout(self.cluster, self.namespace, [name], timeout_s=_ROLLOUT_S)
        self._await_effect(f"{instances} instances of {service} {version}", lambda row: row["ready"])

    def crash(self, instance: str) -> None:
        """Kill the workload's processes of an instance (SIGKILL)."""
        self._signal(instance, "KILL")

    def hang(self, instance: str) -> None:
        """Stop the workload's processes of an instance without killing them (SIGSTOP)."""
        self._signal(instance, "STOP")

    def unhang(self, instance: str) -> None:
        """Let the stopped processes of an instance go on (SIGCONT)."""
        self._signal(instance, "CONT")

    def _signal(self, instance: str, name: str) -> None:
        from meshdemo.runtime.kubernetes.forward import run

        pod_name, namespace = self.where(instance)
        pod = self._pod(instance)
        containers = [one["name"] for one in pod["spec"]["containers"]]
        container = "app" if "app" in containers else containers[0]
        # To all processes but PID 1, which a container's own processes cannot kill or stop, and this shell.
        run(self.cluster, namespace, pod_name, container, ["sh", "-c", f"kill -{name} -1"])

    def load(self) -> float | None:
        """The rate (requests/s) of each instance that makes load, unless the intent has another."""
        return specs.initial_load(self.spec_map.load())

    def set_load(self, rps: float) -> None:
        """Set the rate of every instance that makes load; it outlives a restart of the instance."""
        specs.check_rps(self.app(), rps)
        self.control().set_load(rps)
        self.spec_map.change(lambda spec: spec.model_copy(update={"rps": rps}))

    # -- one instance that deviates ------------------------------------------------------------------------

    def _change_one(
        self,
        instance: str,
        change: Callable[[specs.WorkloadSpec, str], specs.WorkloadSpec],
        reason: str,
    ) -> WorkloadRevision:
        """Put a pod with another environment in the place of one, without its workload noticing a gap.

        The new pod takes traffic as soon as it is ready, since it carries its service's labels. Then it is
        made one of the ReplicaSet's own, with the old pod marked as the cheapest to lose; the ReplicaSet has
        one too many and removes exactly that one, with all the grace that a pod gets.

        Args:
            change: of the workload, and told what the new pod is called; what the old one carries is then
                already the new one's.
        """
        from meshdemo.control.model import WorkloadRevision

        old = self._pod(instance)
        labels = old["metadata"]["labels"]
        service, version = labels[names.SERVICE], labels[names.VERSION]
        name = f"{service}-{version}-{format(time.time_ns() // 1_000_000, 'x')[-7:]}"
        before: list[specs.WorkloadSpec] = []

        def remember(now: specs.MeshSpec) -> specs.MeshSpec:
            before[:] = [now.workload(service, version)]
            return now.replacing(change(specs.renamed(before[0], instance, name), name))

        after = self.spec_map.change(remember).workload(service, version)
        deviation = after.overrides.get(name)
        revision, wanted = after.of(name)
        if deviation is None:
            # Nothing is left in which it would differ: its ReplicaSet makes such pods.
            self.restart(instance, reason=reason)
            return after.current
        new = _pod_like(old, name, after.current.env, deviation.env, revision, reason)
        try:
            self.cluster.create("Pod", new, self.namespace)
            self._await_pod(name)
        except BaseException:
            self.cluster.delete("Pod", name, self.namespace)
            self.spec_map.change(lambda now: now.replacing(before[0]))
            raise
        cheapest = {"metadata": {"annotations": {"controller.kubernetes.io/pod-deletion-cost": "-1000"}}}
        self.cluster.patch("Pod", instance, self.namespace, cheapest)
        template = {"metadata": {"labels": {"pod-template-hash": labels["pod-template-hash"]}}}
        self.cluster.patch("Pod", name, self.namespace, template)
        self._await_gone(instance)
        self._await_effect(f"{name} in the place of {instance}", lambda row: row["ready"])
        return WorkloadRevision(
            service=service, version=version, revision=revision, env=wanted, created_at=time.time(),
            reason=reason, instance=name,
        )  # fmt: skip

    def _await_pod(self, name: str) -> None:
        give_up = time.monotonic() + _ROLLOUT_S
        while True:
            pod = self._pod(name)
            if apply.is_ready(pod):
                return
            troubles = list(apply.pod_troubles(pod))
            if time.monotonic() > give_up:
                why = str(troubles[0]) if troubles else "no reason given"
                raise Failed(f"{name} is not ready after {_ROLLOUT_S:.0f} s: {why}")
            pause(0.2)

    # -- looking -------------------------------------------------------------------------------------------

    def _pods(self, service: str, version: str | None = None) -> list[Manifest]:
        return self.cluster.find("Pod", self.namespace, labels=apply.selector(self.name, service, version))

    def _pod(self, instance: str) -> Manifest:
        name, namespace = self.where(instance)
        pod = self.cluster.get("Pod", name, namespace)
        if pod is None or names.SERVICE not in pod["metadata"].get("labels", {}):
            known = ", ".join(one.id for one in self.instances()) or "none"
            raise BadInput(f"no instance '{instance}'; there are: {known}")
        return {"apiVersion": "v1", "kind": "Pod", **pod}

    def _await_effect(self, what: str, right: Callable[[Any], bool]) -> None:
        """Wait until the control plane knows what the cluster shows, and every sidecar runs with it."""
        give_up = time.monotonic() + _EFFECT_S
        while True:
            shown = {one.id: one for one in self._look() if one.ready}
            status = self.control().status()
            rows = {row["id"]: row for row in status["instances"] if row["ready"]}
            done = rows.keys() == shown.keys() and all(
                right(row) and row["connected"] and row["acked"] for row in rows.values()
            )
            if done:
                return
            if time.monotonic() > give_up:
                nacks = "; ".join(f"{nack['instance']}: {nack['error']}" for nack in status["nacks"])
                raise Failed(
                    f"the control plane does not show {what} within {_EFFECT_S:.0f} s"
                    + (nacks and f": {nacks}"),
                    "`meshdemo status` and `meshdemo logs` tell more",
                )
            pause(_LOOK_S)

    # -- logs and locks ------------------------------------------------------------------------------------

    def logs(self, service: str | None, follow: bool) -> Iterator[tuple[str, str]]:
        """(source, line) of instances, sidecars and the control plane, by time."""
        from meshdemo.runtime.kubernetes.logs import read

        app = self.app()
        if service is not None and service not in app.services:
            raise BadInput(f"no service '{service}'; there are: {', '.join(app.services)}")
        control_plane = f"{names.MESH}={self.name},app.kubernetes.io/component={CONTROL_PLANE}"

        def pods() -> list[Manifest]:
            found = self._everywhere("Pod", f"{names.MESH}={self.name},{names.SERVICE}")
            if service is None:
                return found + self.cluster.find("Pod", self.namespace, labels=control_plane)
            ids = {one.id for one in self._mesh().instances if one.service == service}
            return [one for one in found if instance_of(one, self.namespace) in ids]

        yield from read(self.cluster, self.namespace, pods, follow)

    def watch_lock(self) -> AbstractContextManager[None]:
        """Held while a watch runs; raises Failed naming the holder if another one holds it."""
        from meshdemo.runtime.kubernetes.lease import held

        return held(self.cluster, WATCH_LEASE, self.namespace, f"a `meshdemo watch` of mesh '{self.name}'")

    def identity(self) -> str | None:
        """What tells this mesh from one brought up under its name later; None: there is none any more."""
        found = record.load(self.name)
        if found is None:
            return None
        # Anew each time: another cluster may have taken the place of the one that was spoken to.
        secret = found.connect(patience_s=0).get("Secret", kept.API, found.namespace)
        return None if secret is None else str(secret["metadata"]["uid"])


def _without(ids: Collection[str], reason: str) -> Callable[[specs.WorkloadSpec], specs.WorkloadSpec]:
    return lambda workload: specs.without_faults(workload, ids, reason=reason, now=time.time())


def _pod_like(
    old: Manifest,
    name: str,
    env: Mapping[str, str],
    deviation: Mapping[str, str | None],
    revision: int,
    reason: str,
) -> Manifest:
    """A pod like another one, but for its name, its environment, and the label its ReplicaSet goes by.

    Args:
        env: what its workload runs with.
        deviation: in what this pod differs from that (None: has it not).
    """
    meta, spec = old["metadata"], json.loads(json.dumps(old["spec"]))
    spec.pop("nodeName", None)
    spec.pop("ephemeralContainers", None)
    containers = spec["containers"]
    app = next(container for container in containers if container["name"] == "app")
    # What an earlier deviation has set goes as well.
    set_before = json.loads(meta.get("annotations", {}).get(OVERRIDE, "{}"))
    ours = {**dict.fromkeys(set_before), **env, **deviation}
    kept = [variable for variable in app.get("env", []) if variable["name"] not in ours]
    app["env"] = kept + [{"name": key, "value": value} for key, value in ours.items() if value is not None]
    return {
        "metadata": {
            "name": name,
            "labels": {key: value for key, value in meta["labels"].items() if key != "pod-template-hash"},
            "annotations": {
                **meta.get("annotations", {}),
                names.REVISION: str(revision),
                OVERRIDE: json.dumps(deviation),
                PREFIX + "reason": reason,
            },
        },
        "spec": spec,
    }
