"""The objects of a mesh, brought to the cluster in the order in which they need each other."""

from __future__ import annotations

from functools import cached_property, partial
from typing import TYPE_CHECKING

from meshdemo import names
from meshdemo.apps.model import GATEWAY
from meshdemo.control.discovered import declared
from meshdemo.errors import Failed
from meshdemo.kube import ApiError, Manifest
from meshdemo.resources import DEFAULT_POLICY
from meshdemo.runtime.kubernetes import apply, manifests, seed
from meshdemo.runtime.kubernetes.asked import Asked
from meshdemo.runtime.kubernetes.delivery import Work
from meshdemo.runtime.kubernetes.kind import Tell
from meshdemo.runtime.kubernetes.kind_cluster import NODE_PORTS
from meshdemo.runtime.local import spec as specs
from meshdemo.runtime.steps import pause

if TYPE_CHECKING:
    from meshdemo.runtime.kubernetes.runtime import KubernetesRuntime

# What a part of the mesh that may be left out (Prometheus, Grafana, watch) consists of.
_OPTIONAL_KINDS = (
    "Deployment", "Service", "ConfigMap", "RoleBinding", "Role", "ClusterRoleBinding", "ClusterRole",
    "ServiceAccount",
)  # fmt: skip


class Rollout:
    """One `up` at work on the objects. `runs`: there is a mesh already."""

    def __init__(self, runtime: KubernetesRuntime, asked: Asked, *, runs: bool) -> None:
        self._runtime, self._asked, self._runs = runtime, asked, runs

    @cached_property
    def _objects(self) -> list[Manifest]:
        runtime = self._runtime
        site = manifests.Site(
            namespace=runtime.namespace,
            images=self._asked.references,
            scaled_by_others=frozenset(self._autoscaled()),
            observability=self._asked.observes,
            rules=str(self._asked.extra.get("prometheus_rules") or ""),
            grafana=self._asked.extra.get("grafana") or {},
            node_ports={name: port for name, port in NODE_PORTS.items() if name in runtime.record.ports},
            gateway_api=runtime.cluster.serves("HTTPRoute"),
            service_monitor=runtime.cluster.serves("ServiceMonitor"),
            prometheus_rule=runtime.cluster.serves("PrometheusRule"),
            storage=self._storage,
            watch=DEFAULT_POLICY.read_text() if self._asked.watches else None,
        )
        return manifests.objects(self._spec, site)

    @cached_property
    def _storage(self) -> bool:
        """Does the cluster make volumes by itself? Where it did once, what they hold is not given up."""
        runtime = self._runtime
        labels = f"{names.MESH}={self._asked.name}"
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
        return self._asked.wanted(self._runtime.spec_map.find())

    def prepare(self, tell: Tell) -> None:
        """Everything but what runs: namespace, state, accounts and rights, services."""
        cluster, namespace = self._runtime.cluster, self._runtime.namespace
        tell("namespace")
        first = manifests.namespace(self._asked.name, namespace)
        apply.apply(cluster, [first], timeout_s=self._asked.left_s())
        parts = [one for one in self._objects if one["kind"] != "Deployment"]
        state = [one for one in parts if manifests.is_state(one)]
        for manifest in state:
            seed.make_once(cluster, manifest, namespace)
        seed.fill(cluster, self._asked.name, namespace)
        self._runtime.spec_map.store(self._spec)
        tell("services and rights")
        rest = [one for one in parts if one not in state and one["kind"] != "Namespace"]
        keeping = [name for name, service in self._spec.app.services.items() if service.keeps]
        if keeping and not self._storage:
            self._runtime.notes.append(
                f"the cluster has no default StorageClass: what {', '.join(keeping)} keeps goes with its pods"
            )
        apply.apply(cluster, rest, timeout_s=self._asked.left_s())
        for component in self._asked.left_out if self._runs else ():
            tell(f"without {component}")
            self._remove(component)

    def _remove(self, component: str) -> None:
        """Remove a part of the mesh that may be left out, and wait until it is gone."""
        cluster, namespace = self._runtime.cluster, self._runtime.namespace
        labels = f"{names.MESH}={self._asked.name},app.kubernetes.io/component={component}"
        for kind in _OPTIONAL_KINDS:
            for one in cluster.find(kind, namespace, labels=labels):
                cluster.delete(kind, one["metadata"]["name"], namespace)
        while cluster.find("Pod", namespace, labels=labels) and self._asked.left_s() > 1:
            pause(0.2)

    @cached_property
    def _view(self) -> apply.View:
        return apply.View(self._runtime.cluster, self._runtime.namespace)

    def start(self, key: str) -> Work:
        """Starts what a Deployment runs, and waits until it is ready."""

        def run(tell: Tell) -> None:
            name = key.replace("/", "-")
            deployments = [one for one in self._objects if one["kind"] == "Deployment"]
            self._runtime.cluster.apply(next(o for o in deployments if o["metadata"]["name"] == name))
            apply.await_rollout(
                self._runtime.cluster, self._runtime.namespace, [name],
                timeout_s=self._asked.left_s(), tell=tell, view=self._view,
            )  # fmt: skip

        return run

    def observe(self, tell: Tell) -> None:
        """Prometheus and Grafana are welcome and not needed: nobody waits for them."""
        for deployment in self._objects:
            if (
                deployment["kind"] == "Deployment"
                and deployment["metadata"]["name"] in manifests.OBSERVABILITY
            ):
                self._runtime.cluster.apply(deployment)

    def look_at_observability(self, tell: Tell) -> None:
        """Say what is missing of Prometheus and Grafana. Their images are large and may be on their way."""
        runtime = self._runtime
        for name, why in runtime.unavailable().items():
            runtime.notes.append(f"{name}: {why}; the mesh works without it")

    def request(self, tell: Tell) -> None:
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
            if self._asked.left_s() <= 1:
                raise Failed(
                    f"{problem} after {self._asked.options.timeout_s:g} s", "`meshdemo logs` may tell why"
                )
            pause(0.2)
        if GATEWAY not in runtime.record.ports:
            runtime.notes.append(
                "the gateway has no port on this machine; to reach it: "
                f"kubectl port-forward -n {runtime.namespace} service/{GATEWAY} 8081:80"
            )
        control, rate = runtime.control(), specs.initial_load(self._spec)
        if rate is not None and (self._asked.options.rps is not None or control.intent().load_rps is None):
            tell("setting the load")
            control.set_load(rate)
