"""The kubernetes runtime as commands use it: what runs in the cluster, and changing it.

All state is in the cluster; this machine remembers where that is (`record`). The control plane is reached
through the API server (`forward`), so that whoever may use the cluster may use the mesh, from anywhere.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from http.client import HTTPConnection, HTTPException
from typing import TYPE_CHECKING, Any

from meshdemo import names
from meshdemo.apps.model import GATEWAY
from meshdemo.control import kubernetes as k8s
from meshdemo.errors import BadInput, Failed, Missing
from meshdemo.kube import ApiError, Cluster, Manifest
from meshdemo.names import PLAIN_PORT, PREFIX
from meshdemo.runtime.kubernetes import apply, record
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
        self.notes: list[str] = []  # what `up` could not do, and the mesh can do without
        self._forward: Forward | None = None
        self._seen: tuple[float, list[Instance]] = (-_LOOK_S, [])

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
            stored = self.cluster.get("Secret", k8s.API, self.namespace)
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
        from meshdemo.runtime.kubernetes.up import remove

        found = record.load(self.name)
        return remove(found) if found else []

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
        labels = f"{names.MESH}={self.name},{names.SERVICE}"
        pods = self.cluster.find("Pod", self.namespace, labels=labels)
        slices = self.cluster.find("EndpointSlice", self.namespace)
        services = self.cluster.find("Service", self.namespace)
        return k8s.mesh_state(self.name, self.namespace, declared, pods, slices, services)

    def endpoints(self) -> dict[str, str | None]:
        """URLs by name."""
        ports = self.record.ports
        found: dict[str, str | None] = dict.fromkeys(("gateway", "dashboard", "prometheus", "grafana"))
        for name in (GATEWAY, "prometheus", "grafana"):
            if name in ports and self.cluster.get("Service", name, self.namespace):
                host = "localhost" if name == GATEWAY else "127.0.0.1"
                found[name] = f"http://{host}:{ports[name]}/"
        return found

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
        spec = self.spec_map.load()
        lasts_s = None if expires_at is None else expires_at - time.time()
        if expires_at is not None:
            # It lasts so long from when it is felt, and pods take a while to start: until then, longer.
            expires_at += 2 * _ROLLOUT_S
        if instance is not None:
            one = self._set_env_of_one(spec, instance, env, reason, expires_at, fault_id)
            self._let_it_last(fault_id, lasts_s)
            return one
        versions = [version] if version else spec.versions(service)
        spec.workload(service, version or next(iter(versions), ""))  # says what is wrong with the names

        def change(workload: specs.WorkloadSpec) -> specs.WorkloadSpec:
            return specs.with_env(workload, env, instance=None, reason=reason, now=time.time())

        def timer(workload: specs.WorkloadSpec) -> specs.Timer | None:
            if expires_at is None:
                return None
            return specs.timer_for(workload, env, instance=None, expires_at=expires_at, fault_id=fault_id)

        rolled = self._roll(service, versions, change, timer=timer)
        self._let_it_last(fault_id, lasts_s)
        return rolled[-1]

    def _let_it_last(self, fault_id: str | None, seconds: float | None) -> None:
        """A fault that is felt from now on ends after so many seconds."""
        if seconds is None:
            return
        ends = {"expires_at": time.time() + seconds}

        def begin(spec: specs.MeshSpec) -> specs.MeshSpec:
            timers = tuple(
                timer.model_copy(update=ends) if timer.fault_id == fault_id else timer
                for timer in spec.timers
            )
            return spec.model_copy(update={"timers": timers})

        self.spec_map.change(begin)

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
        timer: Callable[[specs.WorkloadSpec], specs.Timer | None] = lambda _: None,
        event: tuple[str, str] | None = None,
    ) -> list[WorkloadRevision]:
        """Change workloads, in the spec and then in the cluster; returns when all pods are new."""
        before: dict[str, specs.WorkloadSpec] = {}

        def changed(spec: specs.MeshSpec) -> specs.MeshSpec:
            before.clear()
            for version in versions:
                old = spec.workload(service, version)
                before[version] = old
                timers = [*spec.timers, *filter(None, [timer(old)])]
                spec = spec.replacing(change(old)).model_copy(update={"timers": tuple(timers)})
            return spec

        spec = self.spec_map.change(changed)
        after = {version: spec.workload(service, version) for version in versions}
        for version, new in after.items():
            if new.current != before[version].current:
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
        self.cluster.delete("Pod", instance, self.namespace, grace_s=grace_s)
        self._await_gone(instance)
        ours = self.spec_map.load().workloads
        labels = pod["metadata"]["labels"]
        key = f"{labels[names.SERVICE]}/{labels[names.VERSION]}"
        if key in ours:
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
        if service is None or service.protocol != "http":
            return apply.is_ready(pod)
        tunnel = Forward(self.cluster, self.namespace, lambda: instance, PLAIN_PORT)
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
        give_up = time.monotonic() + _EFFECT_S
        while time.monotonic() < give_up:
            pod = self.cluster.get("Pod", instance, self.namespace)
            if pod is None or "deletionTimestamp" in pod["metadata"]:
                return
            pause(_LOOK_S)

    def scale(self, service: str, version: str, instances: int, *, reason: str) -> None:
        """Change the number of instances; returns when all are ready, or gone."""
        name = deployment_of(self.spec_map.load().workload(service, version))
        if owner := autoscalers(self.cluster, self.namespace).get(name):
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

        self._pod(instance)
        # To all processes but PID 1, which a container's own processes cannot kill or stop, and this shell.
        run(self.cluster, self.namespace, instance, "app", ["sh", "-c", f"kill -{name} -1"])

    def set_load(self, rps: float) -> None:
        """Set the rate of every instance that makes load; it outlives a restart of the instance."""
        specs.check_rps(self.app(), rps)
        self.control().set_load(rps)
        self.spec_map.change(lambda spec: spec.model_copy(update={"rps": rps}))

    # -- one instance that deviates ------------------------------------------------------------------------

    def _set_env_of_one(
        self,
        spec: specs.MeshSpec,
        instance: str,
        env: Mapping[str, str | None],
        reason: str,
        expires_at: float | None,
        fault_id: str | None,
    ) -> WorkloadRevision:
        """Put a pod with another environment in the place of one, without its workload noticing a gap.

        The new pod takes traffic as soon as it is ready, since it carries its service's labels. Then it is
        made one of the ReplicaSet's own, with the old pod marked as the cheapest to lose; the ReplicaSet has
        one too many and removes exactly that one, with all the grace that a pod gets.
        """
        from meshdemo.control.model import WorkloadRevision

        old = self._pod(instance)
        labels = old["metadata"]["labels"]
        service, version = labels[names.SERVICE], labels[names.VERSION]
        workload = spec.workload(service, version)
        deviation = json.loads(old["metadata"].get("annotations", {}).get(OVERRIDE, "{}"))
        wanted = specs.apply_env(specs.apply_env(workload.current.env, deviation), env)
        if wanted == workload.current.env:
            # Nothing is left in which it would differ: its ReplicaSet makes such pods.
            self.restart(instance, reason=reason)
            return workload.current
        name = f"{deployment_of(workload)}-{format(time.time_ns() // 1_000_000, 'x')[-7:]}"
        revisions: list[int] = []

        def remember(now: specs.MeshSpec) -> specs.MeshSpec:
            its = now.workload(service, version)
            revisions[:] = [its.last_revision + 1]
            timers = list(now.timers)
            if expires_at is not None:
                timers.append(
                    specs.timer_for(its, env, instance=None, expires_at=expires_at, fault_id=fault_id)
                    .model_copy(update={"instance": name})
                )  # fmt: skip
            its = its.model_copy(update={"last_revision": revisions[0]})
            return now.replacing(its).model_copy(update={"timers": tuple(timers)})

        self.spec_map.change(remember)
        new = _pod_like(old, name, env, revisions[0], reason)
        self.cluster.create("Pod", new, self.namespace)
        try:
            self._await_pod(name)
        except BaseException:
            self.cluster.delete("Pod", name, self.namespace)
            raise
        cheapest = {"metadata": {"annotations": {"controller.kubernetes.io/pod-deletion-cost": "-1000"}}}
        self.cluster.patch("Pod", instance, self.namespace, cheapest)
        template = {"metadata": {"labels": {"pod-template-hash": labels["pod-template-hash"]}}}
        self.cluster.patch("Pod", name, self.namespace, template)
        self._await_gone(instance)
        self._await_effect(f"{name} in the place of {instance}", lambda row: row["ready"])
        return WorkloadRevision(
            service=service, version=version, revision=revisions[0], env=wanted, created_at=time.time(),
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
        pod = self.cluster.get("Pod", instance, self.namespace)
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
        selectors = [apply.selector(self.name, service)]
        if service is None:
            selectors.append(f"{names.MESH}={self.name},app.kubernetes.io/component={CONTROL_PLANE}")
        yield from read(self.cluster, self.namespace, selectors, follow)

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
        secret = found.connect(patience_s=0).get("Secret", k8s.API, found.namespace)
        return None if secret is None else str(secret["metadata"]["uid"])


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


def _pod_like(
    old: Manifest, name: str, env: Mapping[str, str | None], revision: int, reason: str
) -> Manifest:
    """A pod like another one, but for its name, its environment, and the label its ReplicaSet goes by."""
    meta, spec = old["metadata"], json.loads(json.dumps(old["spec"]))
    spec.pop("nodeName", None)
    spec.pop("ephemeralContainers", None)
    containers = spec["containers"]
    app = next(container for container in containers if container["name"] == "app")
    kept = [variable for variable in app.get("env", []) if variable["name"] not in env]
    app["env"] = kept + [{"name": key, "value": value} for key, value in env.items() if value is not None]
    return {
        "metadata": {
            "name": name,
            "labels": {key: value for key, value in meta["labels"].items() if key != "pod-template-hash"},
            "annotations": {
                **meta.get("annotations", {}),
                names.REVISION: str(revision),
                OVERRIDE: json.dumps(env),
                PREFIX + "reason": reason,
            },
        },
        "spec": spec,
    }
