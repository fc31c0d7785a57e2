"""Bringing a mesh up in a cluster: the steps, in the order that costs the least time.

Images are built while the cluster boots, and go into its nodes as soon as these take any, which they do long
before the cluster is made. Nothing that was made is undone when a later step fails: what is there is what the
reason can be looked for in, and `up` again goes on from it. What `down` may remove is written down before it
is made.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING

from meshdemo import names
from meshdemo.apps.model import GATEWAY
from meshdemo.errors import MeshdemoError, Missing
from meshdemo.kube import ApiError
from meshdemo.runtime.base import Step, UpOptions
from meshdemo.runtime.kubernetes import apply, images, kind_cluster, manifests, record
from meshdemo.runtime.kubernetes.asked import WATCH, Asked
from meshdemo.runtime.kubernetes.delivery import Delivery, Loading, Work
from meshdemo.runtime.kubernetes.kind import CLEAR_S, Kind, Tell
from meshdemo.runtime.kubernetes.record import Record
from meshdemo.runtime.kubernetes.rollout import Rollout
from meshdemo.runtime.kubernetes.specs import deployment_of
from meshdemo.runtime.local import spec as specs
from meshdemo.runtime.steps import pause

if TYPE_CHECKING:
    from meshdemo.runtime.kubernetes.runtime import KubernetesRuntime

OLDEST = (1, 30)  # native sidecars and the `sleep` of preStop by default
_NETWORK_S = 15.0  # a node has its addresses 1 to 3 s after its cluster is there
_NODES_S = 90.0  # a worker of kind is ready 10 to 20 s after it has joined


def steps(runtime: KubernetesRuntime, options: UpOptions) -> Sequence[Step]:
    """The steps that bring the mesh up, or bring a running one to what `options` ask for."""
    up = _Up(runtime, options)
    if up.nothing_to_do():
        return []
    return up.steps()


class _Detail:
    """What a step is doing right now; written by its thread, read by whoever shows it."""

    def __init__(self) -> None:
        self.text = ""

    def __call__(self) -> str:
        return self.text

    def tell(self, text: str) -> None:
        self.text = text


class _Up:
    """One `up` at work: what its steps share."""

    def __init__(self, runtime: KubernetesRuntime, options: UpOptions) -> None:
        self._runtime = runtime
        self._asked = Asked(runtime.kind, options)
        self._running: specs.MeshSpec | None = None
        self._made = threading.Event()  # the cluster

    # -- is there anything to do? --------------------------------------------------------------------------

    def nothing_to_do(self) -> bool:
        """Is the mesh as it is asked for already?"""
        if self._asked.before is None:
            return False
        try:
            self._running = running = self._runtime.spec_map.find()
            if running is None:
                return False
            wanted = self._asked.wanted(running)
            if specs.differences(running, wanted):
                return False
            cluster, namespace = self._runtime.cluster, self._runtime.namespace
            labels = f"{names.MESH}={self._asked.name}"
            found = cluster.find("Deployment", namespace, labels=labels)
            kinds = [
                "ServiceMonitor",
                *(["PrometheusRule"] if self._asked.extra.get("prometheus_rules") else []),
            ]
            if any(
                cluster.serves(kind) and not cluster.find(kind, namespace, labels=labels) for kind in kinds
            ):
                return False
        except (Missing, ApiError):
            return False
        there = {one["metadata"]["name"]: one for one in found}
        expected = {deployment_of(one) for one in wanted.workloads.values()} | {images.CONTROL_PLANE, GATEWAY}
        expected |= {WATCH} if self._asked.watches else set()
        welcome = set(manifests.OBSERVABILITY) if self._asked.observes else set()
        used = {
            container["image"] for one in found for container in one["spec"]["template"]["spec"]["containers"]
        }
        return (
            expected | welcome <= there.keys()
            and not self._asked.left_out & there.keys()
            and all(apply.rolled_out(there[name]) for name in expected)
            and set(self._asked.references.values()) - {self._asked.references[images.SIDECAR]} <= used
        )

    # -- the steps -----------------------------------------------------------------------------------------

    def steps(self) -> list[Step]:
        """All of them."""
        asked, on_kind = self._asked, self._asked.on_kind
        found: list[Step] = []

        def step(
            title: str, run: Work, *after: Step, undo: Callable[[], None] | None = None, settle_s: float = 5.0
        ) -> Step:
            detail, titles = _Detail(), [one.title for one in after]
            made = Step(
                title, lambda: run(detail.tell), undo=undo, after=titles, detail=detail, settle_s=settle_s
            )
            found.append(made)
            return made

        if on_kind:
            self._kind  # noqa: B018 - what is missing is said before anything is begun
        delivery = Delivery(asked.recipes, asked.references)
        rollout = Rollout(self._runtime, asked, runs=self._running is not None)
        if not on_kind:
            self._remember(Record(kind="kubernetes", mesh=asked.name, context=asked.context))
        elif asked.before is not None:
            self._remember(asked.before)

        if on_kind and self._makes_cluster:
            # One that is half made is removed again, and that takes a while.
            cluster = step("Making the kind cluster", self._reach, settle_s=CLEAR_S + 5.0)
            if not asked.workers:
                step("Setting up the pods' network", self._give_network, cluster)
        else:
            cluster = step("Reaching the cluster", self._reach)
        builds = [step(f"Building {names}", delivery.build(group)) for names, group in delivery.groups()]
        there = builds
        welcome: list[Step] = []
        if on_kind:
            loading = Loading(self._kind, delivery.builder, asked.name, asked.references.values())
            if self._makes_cluster:
                saved = step("Saving the images", loading.save, *builds, undo=loading.remove)
                offer = partial(loading.offer, 1 + asked.workers, self._made)
                there = [step("Loading the images while the nodes boot", offer, saved)]
            there = [step("Loading the images into the nodes", loading.load, cluster, *there)]
            if asked.observes and (known := delivery.observability_at_hand()):
                also = Loading(self._kind, delivery.builder, asked.name, known)
                welcome = [step("Loading Prometheus and Grafana into the nodes", also.load, *there)]
            if self._makes_cluster and asked.workers:
                there = [*there, step("Waiting for the nodes", self._spread, cluster)]
        elif asked.registry:
            there = [
                step(f"Pushing {name} to {asked.registry}", delivery.push(name), build)
                for build, (_, group) in zip(builds, delivery.groups(), strict=True)
                for name in group
            ]
        base = step("Preparing the namespace", rollout.prepare, cluster)
        needs = [base, *there]
        ready = [
            step("Starting the control plane", rollout.start(images.CONTROL_PLANE), *needs),
            step("Starting the gateway", rollout.start(GATEWAY), *needs),
        ]
        for key, workload in asked.wanted(self._running).workloads.items():
            count = "1 instance" if workload.instances == 1 else f"{workload.instances} instances"
            name = f"Starting {workload.service} {workload.version} ({count})"
            ready.append(step(name, rollout.start(key), *needs))
        if asked.watches:
            ready.append(step("Starting watch in the cluster", rollout.start(WATCH), *needs))
        observed = (
            step("Starting Prometheus and Grafana", rollout.observe, base, *welcome)
            if asked.observes
            else None
        )
        request = step("Sending a request through the mesh", rollout.request, *ready)
        if observed is not None:
            step("Looking at Prometheus and Grafana", rollout.look_at_observability, observed, request)
        return found

    def _remember(self, now: Record) -> None:
        self._asked.remember(now)
        self._runtime.__dict__.pop("record", None)

    # -- the cluster ---------------------------------------------------------------------------------------

    @cached_property
    def _kind(self) -> Kind:
        return Kind()

    @cached_property
    def _makes_cluster(self) -> bool:
        return self._asked.name not in self._kind.clusters()

    def _reach(self, tell: Tell) -> None:
        if self._asked.on_kind:
            self._reach_kind(tell)
        self._made.set()
        try:
            self._runtime.cluster.deadline = self._asked.deadline
            version = self._runtime.cluster.version()
        except MeshdemoError:
            if self._asked.before is None and not self._asked.on_kind:
                record.forget(self._asked.name)  # nothing was made; another --context may be the right one
            raise
        if version < OLDEST:
            raise Missing(
                f"the cluster runs Kubernetes {version[0]}.{version[1]}",
                f"meshdemo needs {OLDEST[0]}.{OLDEST[1]} or newer (native sidecar containers)",
            )

    def _give_network(self, tell: Tell) -> None:
        """Spare the only node of a new cluster the wait for kind's own network, which comes in any case."""
        cluster = self._runtime.cluster
        until = time.monotonic() + _NETWORK_S
        while time.monotonic() < until:
            for node in cluster.find("Node"):
                ranges = node["spec"].get("podCIDRs")
                if ranges and (api := cluster.get("Service", "kubernetes", "default")):
                    self._kind.give_network(node["metadata"]["name"], ranges, api["spec"]["clusterIP"])
                    return
            pause(0.1)

    def _spread(self, tell: Tell) -> None:
        """kind waits for its first node alone, and the first worker that is ready would get all pods."""
        expected = 1 + self._asked.workers
        until = time.monotonic() + min(_NODES_S, self._asked.left_s() / 2)  # the mesh can do with fewer
        while apply.nodes_boot(self._runtime.cluster, expected) and time.monotonic() < until:
            pause(0.5)

    def _reach_kind(self, tell: Tell) -> None:
        name = self._asked.name
        access = record.kubeconfig(name)
        ours = self._asked.before is not None and self._asked.before.made_cluster
        if not self._makes_cluster and not (ours and not access.exists()):
            if self._asked.before is None:
                self._remember(Record(kind="kind", mesh=name, cluster=name))
            self._kind.export(name, access)
            return
        if not self._makes_cluster:
            self._kind.delete(name, access)  # an `up` that was killed left half of it
        kind_cluster.make(
            self._kind,
            name,
            gateway=self._asked.extra.get("gateway_port"),
            workers=self._asked.workers,
            image=self._asked.extra.get("kind_image"),
            remember=self._remember,
            timeout_s=self._asked.left_s,
            tell=tell,
        )
