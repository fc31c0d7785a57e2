"""Bringing a mesh up in a cluster, and removing it: the steps, in the order that costs the least time.

Images are built while the cluster boots, and are in its nodes before anything asks for them. Nothing that was
made is undone when a later step fails: what is there is what the reason can be looked for in, and `up` again
goes on from it. What `down` may remove is written down before it is made.
"""

from __future__ import annotations

import base64
import secrets
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from meshdemo import names
from meshdemo.apps.model import GATEWAY
from meshdemo.control.discovered import declared
from meshdemo.control.kubernetes import kept
from meshdemo.control.kubernetes.kept import pack
from meshdemo.errors import BadInput, Failed, MeshdemoError, Missing
from meshdemo.kube import ApiError, Cluster, Manifest
from meshdemo.resources import DEFAULT_POLICY
from meshdemo.runtime.base import Step, UpOptions
from meshdemo.runtime.kubernetes import apply, images, kind_cluster, manifests, record
from meshdemo.runtime.kubernetes.kind import CLEAR_S, Kind
from meshdemo.runtime.kubernetes.kind_cluster import NODE_PORTS
from meshdemo.runtime.kubernetes.record import Record
from meshdemo.runtime.kubernetes.specs import deployment_of
from meshdemo.runtime.local import spec as specs
from meshdemo.runtime.local.ports import check_gateway_port
from meshdemo.runtime.steps import pause

if TYPE_CHECKING:
    from meshdemo.runtime.kubernetes.runtime import KubernetesRuntime

OLDEST = (1, 30)  # native sidecars and the `sleep` of preStop by default
_GONE_S = 120.0
_SAY_WHY_S = 2.0  # so long before the time is over a step gives up, to say why
_WATCH = "watch"
# What a part of the mesh that may be left out (Prometheus, Grafana, watch) consists of.
_OPTIONAL_KINDS = (
    "Deployment", "Service", "ConfigMap", "RoleBinding", "Role", "ClusterRoleBinding", "ClusterRole",
    "ServiceAccount",
)  # fmt: skip


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
        # What was injected is shown as part of the app, and is not ours to bring up.
        self._options = options = replace(options, app=declared(options.app))
        self._extra = options.extra
        self._deadline = time.monotonic() + max(options.timeout_s - _SAY_WHY_S, options.timeout_s / 2)
        before = record.load(options.name)
        if before is not None and before.kind != runtime.kind:
            raise Failed(
                f"mesh '{options.name}' runs on the runtime '{before.kind}', not '{runtime.kind}'",
                f"run `meshdemo down --name {options.name}` first, or use another --name",
            )
        self._before = before
        base_image = self._extra.get("base_image") or (before.base_image if before else None)
        registry = self._extra.get("registry") or (before.registry if before else None)
        for value in (base_image, registry):
            if value:
                images.check_reference(value)
        self._base_image, self._registry = base_image, registry
        # What the user does not say stays as it was.
        self._observes = self._asked("observability", before.observability if before else True)
        self._watches = self._asked("watch", before.watch if before else False)
        self._running: specs.MeshSpec | None = None
        self._recipes = images.recipes(options.app, base_image or images.BASE_IMAGE)
        self._references = {name: recipe.reference(registry) for name, recipe in self._recipes.items()}
        # Wrong options are refused before anything is begun.
        self._wanted(None)
        self._check_gateway_port()

    def _asked(self, name: str, otherwise: bool) -> bool:
        asked = self._extra.get(name)
        return otherwise if asked is None else bool(asked)

    def _wanted(self, running: specs.MeshSpec | None) -> specs.MeshSpec:
        return specs.wanted(self._options, running, now=time.time(), runs_images=True)

    def _check_gateway_port(self) -> None:
        """Raises BadInput for a port that cannot be had."""
        asked = self._extra.get("gateway_port")
        if asked is None:
            return
        if self._runtime.kind != "kind":
            raise BadInput(
                f"--gateway-port {asked}: there is no such port on the runtime 'kubernetes'",
                "reach the gateway with `kubectl port-forward`, an Ingress or a Service of your own",
            )
        before = self._before
        if before is None:
            check_gateway_port(asked)
        elif before.ports.get(GATEWAY) != asked:
            now = before.ports.get(GATEWAY)
            raise BadInput(
                f"--gateway-port {asked}: the kind cluster '{before.cluster}' has "
                + (f"its gateway at port {now}" if now else "no port for it"),
                "ports are given when the cluster is made: `meshdemo down` first, or leave the option out",
            )

    # -- is there anything to do? --------------------------------------------------------------------------

    def nothing_to_do(self) -> bool:
        """Is the mesh as it is asked for already?"""
        if self._before is None:
            return False
        try:
            self._running = running = self._runtime.spec_map.find()
            if running is None:
                return False
            wanted = self._wanted(running)
            if specs.differences(running, wanted):
                return False
            cluster, namespace = self._runtime.cluster, self._runtime.namespace
            labels = f"{names.MESH}={self._options.name}"
            found = cluster.find("Deployment", namespace, labels=labels)
            kinds = ["ServiceMonitor", *(["PrometheusRule"] if self._extra.get("prometheus_rules") else [])]
            if any(
                cluster.serves(kind) and not cluster.find(kind, namespace, labels=labels) for kind in kinds
            ):
                return False
        except (Missing, ApiError):
            return False
        there = {one["metadata"]["name"]: one for one in found}
        expected = {deployment_of(one) for one in wanted.workloads.values()} | {images.CONTROL_PLANE, GATEWAY}
        expected |= {_WATCH} if self._watches else set()
        welcome = set(manifests.OBSERVABILITY) if self._observes else set()
        used = {
            container["image"] for one in found for container in one["spec"]["template"]["spec"]["containers"]
        }
        return (
            expected | welcome <= there.keys()
            and not self._left_out & there.keys()
            and all(apply.rolled_out(there[name]) for name in expected)
            and set(self._references.values()) - {self._references[images.SIDECAR]} <= used
        )

    # -- the steps -----------------------------------------------------------------------------------------

    def steps(self) -> list[Step]:
        """All of them."""
        on_kind = self._runtime.kind == "kind"
        found: list[Step] = []

        def step(
            title: str, run: Callable[[Callable[[str], None]], None], *after: Step, settle_s: float = 5.0
        ) -> Step:
            detail, titles = _Detail(), [one.title for one in after]
            made = Step(title, lambda: run(detail.tell), after=titles, detail=detail, settle_s=settle_s)
            found.append(made)
            return made

        if on_kind:
            self._kind  # noqa: B018 - what is missing is said before anything is begun
        self._builder  # noqa: B018
        if not on_kind:
            self._remember(Record(kind="kubernetes", mesh=self._options.name, context=self._context()))
        elif self._before is not None:
            self._remember(self._before)

        title = "Making the kind cluster" if on_kind and self._makes_cluster else "Reaching the cluster"
        # A cluster that is half made is removed again, and that takes a while.
        cluster = step(title, self._reach, settle_s=CLEAR_S + 5.0)
        builds = [step(f"Building {names}", self._build(group)) for names, group in self._groups()]
        there = builds
        welcome: list[Step] = []
        if on_kind:
            there = [
                step("Loading the images into the nodes", self._load(self._references.values()), *builds)
            ]
            if self._observes and (known := self._observability_at_hand()):
                welcome = [step("Loading Prometheus and Grafana into the nodes", self._load(known), *there)]
        elif self._registry:
            there = [
                step(f"Pushing {name} to {self._registry}", self._push(name), build)
                for build, (_, group) in zip(builds, self._groups(), strict=True)
                for name in group
            ]
        base = step("Preparing the namespace", self._prepare, cluster)
        needs = [base, *there]
        ready = [
            step("Starting the control plane", self._start(images.CONTROL_PLANE), *needs),
            step("Starting the gateway", self._start(GATEWAY), *needs),
        ]
        for key, workload in self._wanted(self._running).workloads.items():
            count = "1 instance" if workload.instances == 1 else f"{workload.instances} instances"
            name = f"Starting {workload.service} {workload.version} ({count})"
            ready.append(step(name, self._start(key), *needs))
        if self._watches:
            ready.append(step("Starting watch in the cluster", self._start(_WATCH), *needs))
        observed = (
            step("Starting Prometheus and Grafana", self._observe, base, *welcome) if self._observes else None
        )
        request = step("Sending a request through the mesh", self._request, *ready)
        if observed is not None:
            step("Looking at Prometheus and Grafana", self._look_at_observability, observed, request)
        return found

    @property
    def _left_out(self) -> set[str]:
        """Parts that are not to run."""
        observability = () if self._observes else manifests.OBSERVABILITY
        return {*observability, *(() if self._watches else (_WATCH,))}

    def _context(self) -> str | None:
        return self._extra.get("context") or (self._before.context if self._before else None)

    def _left(self) -> float:
        """Seconds until the time that the user gave is over."""
        return max(1.0, self._deadline - time.monotonic())

    def _remember(self, now: Record) -> None:
        said = {
            "registry": self._registry, "base_image": self._base_image,
            "observability": self._observes, "watch": self._watches,
        }  # fmt: skip
        record.save(now.model_copy(update=said))
        self._runtime.__dict__.pop("record", None)

    # -- the cluster ---------------------------------------------------------------------------------------

    @cached_property
    def _kind(self) -> Kind:
        return Kind()

    @cached_property
    def _makes_cluster(self) -> bool:
        return self._options.name not in self._kind.clusters()

    def _reach(self, tell: Callable[[str], None]) -> None:
        if self._runtime.kind == "kind":
            self._reach_kind(tell)
        try:
            self._runtime.cluster.deadline = self._deadline
            version = self._runtime.cluster.version()
        except MeshdemoError:
            if self._before is None and self._runtime.kind != "kind":
                record.forget(
                    self._options.name
                )  # nothing was made, and another --context may be the right one
            raise
        if version < OLDEST:
            raise Missing(
                f"the cluster runs Kubernetes {version[0]}.{version[1]}",
                f"meshdemo needs {OLDEST[0]}.{OLDEST[1]} or newer (native sidecar containers)",
            )

    def _reach_kind(self, tell: Callable[[str], None]) -> None:
        name = self._options.name
        access = record.kubeconfig(name)
        ours = self._before is not None and self._before.made_cluster
        if not self._makes_cluster and not (ours and not access.exists()):
            if self._before is None:
                self._remember(Record(kind="kind", mesh=name, cluster=name))
            self._kind.export(name, access)
            return
        if not self._makes_cluster:
            self._kind.delete(name, access)  # an `up` that was killed left half of it
        kind_cluster.make(
            self._kind,
            name,
            gateway=self._extra.get("gateway_port"),
            workers=int(self._extra.get("workers") or 0),
            image=self._extra.get("kind_image"),
            remember=self._remember,
            timeout_s=self._left,
            tell=tell,
        )

    # -- images --------------------------------------------------------------------------------------------

    @cached_property
    def _builder(self) -> images.Builder:
        return images.Builder()

    def _groups(self) -> list[tuple[str, list[str]]]:
        """Images by what they share: those of one group are built one after another, since the second finds
        the requirements of the first installed."""
        programs = [name for name in self._recipes if name not in {images.CONTROL_PLANE, images.SIDECAR}]
        groups = [[images.CONTROL_PLANE], [images.SIDECAR], programs]
        return [(", ".join(group), group) for group in groups if group]

    def _build(self, group: Sequence[str]) -> Callable[[Callable[[str], None]], None]:
        def run(tell: Callable[[str], None]) -> None:
            for name in group:
                self._builder.build(self._recipes[name], self._references[name], tell)

        return run

    def _observability_at_hand(self) -> list[str]:
        """The images of Prometheus and Grafana that Docker has here; nodes pull the others."""
        wanted = (manifests.PROMETHEUS_IMAGE, manifests.GRAFANA_IMAGE)
        return [image for image in wanted if self._builder.has(image)]

    def _load(self, wanted: Iterable[str]) -> Callable[[Callable[[str], None]], None]:
        """Load what the nodes lack; they take images long before Kubernetes is up on them."""
        images_wanted = list(wanted)

        def run(tell: Callable[[str], None]) -> None:
            with tempfile.TemporaryDirectory(prefix="meshdemo-") as folder:
                archive = Path(folder) / "images.tar"
                if self._makes_cluster:  # its nodes lack everything, and are not there yet
                    tell("saving")
                    self._builder.save(images_wanted, archive)
                lacking = self._lacking(images_wanted, tell)
                needed = sorted({image for images_of in lacking.values() for image in images_of})
                if not needed:
                    return
                if not archive.exists():
                    tell("saving")
                    self._builder.save(needed, archive)
                tell("loading")
                nodes = [node for node, images_of in lacking.items() if images_of]
                self._kind.load(self._options.name, archive, nodes)

        return run

    def _lacking(self, wanted: Sequence[str], tell: Callable[[str], None]) -> dict[str, list[str]]:
        """Which images each node lacks, once all of them can say so."""
        expected = 1 + int(self._extra.get("workers") or 0) if self._makes_cluster else 1
        while True:
            nodes = self._kind.nodes(self._options.name)
            try:
                lacking = {node: self._kind.missing(node, wanted) for node in nodes}
                if len(nodes) >= expected:
                    return lacking
            except (Failed, ValueError):
                if self._left() <= 1:
                    raise
            tell("waiting for the nodes")
            pause(0.5)

    def _push(self, name: str) -> Callable[[Callable[[str], None]], None]:
        return partial(self._builder.push, self._references[name])

    # -- the objects ---------------------------------------------------------------------------------------

    @cached_property
    def _objects(self) -> list[Manifest]:
        runtime = self._runtime
        site = manifests.Site(
            namespace=runtime.namespace,
            images=self._references,
            scaled_by_others=frozenset(self._autoscaled()),
            observability=self._observes,
            rules=str(self._extra.get("prometheus_rules") or ""),
            grafana=self._extra.get("grafana") or {},
            node_ports={name: port for name, port in NODE_PORTS.items() if name in runtime.record.ports},
            gateway_api=runtime.cluster.serves("HTTPRoute"),
            service_monitor=runtime.cluster.serves("ServiceMonitor"),
            prometheus_rule=runtime.cluster.serves("PrometheusRule"),
            storage=self._storage,
            watch=DEFAULT_POLICY.read_text() if self._watches else None,
        )
        return manifests.objects(self._spec, site)

    @cached_property
    def _storage(self) -> bool:
        """Does the cluster make volumes by itself? Where it did once, what they hold is not given up."""
        runtime = self._runtime
        labels = f"{names.MESH}={self._options.name}"
        if runtime.cluster.find("PersistentVolumeClaim", runtime.namespace, labels=labels):
            return True
        try:
            classes = runtime.cluster.find("StorageClass")
        except ApiError as error:
            if error.status != 403:
                raise
            classes = []
        return any(
            one["metadata"].get("annotations", {}).get("storageclass.kubernetes.io/is-default-class")
            == "true"
            for one in classes
        )

    def _autoscaled(self) -> dict[str, str]:
        return apply.autoscalers(self._runtime.cluster, self._runtime.namespace)

    @cached_property
    def _spec(self) -> specs.MeshSpec:
        return self._wanted(self._runtime.spec_map.find())

    def _prepare(self, tell: Callable[[str], None]) -> None:
        """Everything but what runs: namespace, state, accounts and rights, services."""
        cluster, namespace = self._runtime.cluster, self._runtime.namespace
        tell("namespace")
        first = manifests.namespace(self._options.name, namespace)
        apply.apply(cluster, [first], timeout_s=self._left())
        parts = [one for one in self._objects if one["kind"] != "Deployment"]
        state = [one for one in parts if manifests.is_state(one)]
        for manifest in state:
            _make_once(cluster, manifest, namespace)
        _fill_state(cluster, self._options.name, namespace)
        self._runtime.spec_map.store(self._spec)
        tell("services and rights")
        rest = [one for one in parts if one not in state and one["kind"] != "Namespace"]
        keeping = [name for name, service in self._spec.app.services.items() if service.keeps]
        if keeping and not self._storage:
            self._runtime.notes.append(
                f"the cluster has no default StorageClass: what {', '.join(keeping)} keeps goes with its pods"
            )
        apply.apply(cluster, rest, timeout_s=self._left())
        for component in self._left_out if self._running else ():
            tell(f"without {component}")
            self._remove(component)

    def _remove(self, component: str) -> None:
        """Remove a part of the mesh that may be left out, and wait until it is gone."""
        cluster, namespace = self._runtime.cluster, self._runtime.namespace
        labels = f"{names.MESH}={self._options.name},app.kubernetes.io/component={component}"
        for kind in _OPTIONAL_KINDS:
            for one in cluster.find(kind, namespace, labels=labels):
                cluster.delete(kind, one["metadata"]["name"], namespace)
        while cluster.find("Pod", namespace, labels=labels) and self._left() > 1:
            pause(0.2)

    @cached_property
    def _view(self) -> apply.View:
        return apply.View(self._runtime.cluster, self._runtime.namespace)

    def _start(self, key: str) -> Callable[[Callable[[str], None]], None]:
        def run(tell: Callable[[str], None]) -> None:
            name = key.replace("/", "-")
            deployments = [one for one in self._objects if one["kind"] == "Deployment"]
            self._runtime.cluster.apply(next(o for o in deployments if o["metadata"]["name"] == name))
            apply.await_rollout(
                self._runtime.cluster, self._runtime.namespace, [name],
                timeout_s=self._left(), tell=tell, view=self._view,
            )  # fmt: skip

        return run

    def _observe(self, tell: Callable[[str], None]) -> None:
        """Prometheus and Grafana are welcome and not needed: nobody waits for them."""
        for deployment in self._objects:
            if (
                deployment["kind"] == "Deployment"
                and deployment["metadata"]["name"] in manifests.OBSERVABILITY
            ):
                self._runtime.cluster.apply(deployment)

    def _look_at_observability(self, tell: Callable[[str], None]) -> None:
        """Say what is missing of Prometheus and Grafana. Their images are large and may be on their way."""
        runtime = self._runtime
        for name, why in runtime.unavailable().items():
            runtime.notes.append(f"{name}: {why}; the mesh works without it")

    def _request(self, tell: Callable[[str], None]) -> None:
        """See a request go through the mesh, and let the load begin."""
        from meshdemo.runtime.kubernetes.forward import Forward
        from meshdemo.runtime.local.through import request_through

        runtime = self._runtime
        app = declared(runtime.app())  # what injected services answer, nobody knows
        while True:
            found = [one for one in runtime.instances() if one.service in app.services]
            # A caller's own outbound port, brought to this machine.
            tunnels = []
            near = []
            for one in found:
                if one.ready and app.services[one.service].calls:
                    pod, namespace = runtime.where(one.id)
                    tunnels.append(Forward(runtime.cluster, namespace, partial(str, pod), one.outbound_port))
                    here = {"host": "127.0.0.1", "outbound_port": tunnels[-1].port}
                    one = one.model_copy(update=here)  # noqa: PLW2901
                near.append(one)
            try:
                problem = request_through(app, near)
            finally:
                for tunnel in tunnels:
                    tunnel.close()
            if not problem:
                break
            tell(problem)
            if self._left() <= 1:
                raise Failed(f"{problem} after {self._options.timeout_s:g} s", "`meshdemo logs` may tell why")
            pause(0.2)
        if GATEWAY not in runtime.record.ports:
            runtime.notes.append(
                "the gateway has no port on this machine; to reach it: "
                f"kubectl port-forward -n {runtime.namespace} service/{GATEWAY} 8081:80"
            )
        control, rate = runtime.control(), specs.initial_load(self._spec)
        if rate is not None and (self._options.rps is not None or control.intent().load_rps is None):
            tell("setting the load")
            control.set_load(rate)


def _make_once(cluster: Cluster, manifest: Manifest, namespace: str) -> None:
    try:
        cluster.create(manifest["kind"], manifest, namespace)
    except ApiError as error:
        if error.status != 409:
            raise


def _fill_state(cluster: Cluster, mesh: str, namespace: str) -> None:
    """Make what the mesh starts from and nobody but it may know: its root certificate, the API's token."""
    from meshdemo.control.identity import Authority

    api = cluster.get("Secret", kept.API, namespace) or {}
    if "token" not in (api.get("data") or {}):
        token = base64.b64encode(secrets.token_urlsafe(32).encode()).decode()
        cluster.patch("Secret", kept.API, namespace, {"data": {"token": token}}, merge="merge")
    authority = cluster.get("Secret", kept.AUTHORITY, namespace) or {}
    if "ca.pem.gz" in (authority.get("data") or {}):
        return
    with tempfile.TemporaryDirectory(prefix="meshdemo-") as name:
        folder = Path(name)
        trust = Authority(folder, mesh, time.time()).trust
        made = {f"{path.name}.gz": pack(path.read_bytes()) for path in folder.iterdir()}
    cluster.patch("ConfigMap", kept.TRUST, namespace, {"data": {"trust.pem": trust.decode()}}, merge="merge")
    # Last: it says that all is there.
    cluster.patch("Secret", kept.AUTHORITY, namespace, {"data": made}, merge="merge")


# -- down --------------------------------------------------------------------------------------------------


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
