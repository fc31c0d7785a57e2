"""The instances of the mesh, from pods, EndpointSlices and Services. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from meshdemo.apps.model import GATEWAY, App
from meshdemo.control.discovered import discover, instance_of, namespace_of, version_of
from meshdemo.control.model import Instance, MeshState
from meshdemo.kube import Manifest, key_of
from meshdemo.names import COMPONENT, GATEWAY_PORT, PLAIN_PORT, PROXY_PORT, REVISION, SERVICE, qualified

_OF_SERVICE = "kubernetes.io/service-name"  # the label of an EndpointSlice
_OVER = frozenset(("Succeeded", "Failed"))  # phases of pods that do not come back


def mesh_state(
    mesh: str,
    namespace: str,
    app: App,
    pods: Iterable[Manifest],
    slices: Iterable[Manifest],
    services: Iterable[Manifest],
) -> MeshState:
    """What the control plane is told of the mesh: the declared app, and what was injected besides it.

    An instance is ready when its service's EndpointSlice says so and its pod is not on its way out: the pod
    shows the latter at once, the EndpointSlice a moment later, and each such moment costs requests.
    """
    slices = list(slices)
    serving = {
        (
            _called(one["metadata"].get("labels", {}).get(_OF_SERVICE), one, namespace),
            endpoint["targetRef"]["name"],
        )
        for one in slices
        for endpoint in one.get("endpoints") or ()
        if (endpoint.get("conditions") or {}).get("ready") and endpoint.get("targetRef")
    }
    services = list(services)
    at_the_edge, pods = _parted(pods, namespace)
    whole = discover(app, pods, slices, services, namespace)
    ours, app = app.services, whole.app
    addresses = {
        name: one["spec"]["clusterIP"]
        for one in services
        if (name := _called(one["metadata"]["name"], one, namespace)) in app.services
        and one["spec"].get("clusterIP", "None") != "None"
        and (name in ours or name in whole.ports)
    }
    instances = []
    for pod in sorted(pods, key=key_of):
        meta, labels = pod["metadata"], pod["metadata"].get("labels", {})
        label, pod_id = labels.get(SERVICE, ""), instance_of(pod, namespace)
        # The label names a service of the app alone: for that the pod's token must be of its account.
        at_home = namespace_of(pod, namespace) == namespace
        name = label if at_home and label in ours else whole.service_of.get(pod_id, "")
        service = app.services.get(name)
        if service is None or pod.get("status", {}).get("phase") in _OVER:
            continue
        revision = meta.get("annotations", {}).get(REVISION, "1")
        instances.append(
            Instance(
                id=pod_id,
                service=name,
                version=version_of(pod),
                revision=int(revision) if revision.isdigit() else 1,
                further=whole.further.get(pod_id, ()) if name == whole.service_of.get(pod_id) else (),
                host=pod.get("status", {}).get("podIP", ""),
                inbound_port=service.port,
                outbound_port=PROXY_PORT,
                metrics_port=PLAIN_PORT,
                app_port=service.port,
                ready=_is_ready(pod, (name, meta["name"]) in serving, called=name in addresses),
                restarts=_restarts(pod),
                leaving="deletionTimestamp" in meta,
            )
        )
    return MeshState(
        mesh=mesh,
        namespace=namespace,
        app=app,
        instances=tuple(instances),
        gateways=tuple(_gateway(pod) for pod in sorted(at_the_edge, key=key_of)),
        addresses=addresses,
        ports=dict(whole.ports),
        also=whole.also,
    )


def _called(name: Any, of: Manifest, home: str) -> str:
    """What the mesh calls a service that an object of its namespace names."""
    return qualified(str(name), namespace_of(of, home), home)


def _parted(pods: Iterable[Manifest], home: str) -> tuple[list[Manifest], list[Manifest]]:
    """The gateway's pods, and the others; one that merely calls itself so is neither."""
    edge: list[Manifest] = []
    others: list[Manifest] = []
    for pod in pods:
        labels = pod["metadata"].get("labels", {})
        if labels.get(SERVICE) != GATEWAY or namespace_of(pod, home) != home:
            others.append(pod)
        elif labels.get(COMPONENT) == GATEWAY and pod.get("status", {}).get("phase") not in _OVER:
            edge.append(pod)
    return edge, others


def _gateway(pod: Manifest) -> Instance:
    return Instance(
        id=pod["metadata"]["name"],
        service=GATEWAY,
        version=version_of(pod),
        host=pod.get("status", {}).get("podIP", ""),
        inbound_port=0,
        outbound_port=GATEWAY_PORT,
        metrics_port=PLAIN_PORT,
        app_port=0,
        ready=_is_ready(pod, serves=False, called=False),
        leaving="deletionTimestamp" in pod["metadata"],
    )


def _restarts(pod: Manifest) -> int:
    """How often the kubelet has started a container of a pod again; its sidecar is an init container."""
    status = pod.get("status", {})
    containers = (*(status.get("containerStatuses") or ()), *(status.get("initContainerStatuses") or ()))
    return sum(one.get("restartCount", 0) for one in containers)


def _is_ready(pod: Manifest, serves: bool, *, called: bool) -> bool:
    """May a pod be sent requests? Of one that no Service leads to (it only calls), its own state tells."""
    if "deletionTimestamp" in pod["metadata"]:
        return False
    conditions = pod.get("status", {}).get("conditions") or ()
    return serves or (not called and any(c["type"] == "Ready" and c["status"] == "True" for c in conditions))
