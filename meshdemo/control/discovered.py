"""Services that no app file declares: other people's pods that `inject` gave a sidecar.

What an app file would say is told by the cluster: which pods a Service leads to (EndpointSlices), on which
port, in which protocol, and which paths the kubelet probes. Pure.

Whatever is not in the mesh's own namespace bears its namespace's name, too: the Service `web` of `shop` is
`web.shop`, and has nothing to do with another `web`.

A name is an identity here, so a pod does not get one by saying so: it is called like the Service that selects
it (whoever may write Services has vouched for it), never like a label of ours. A pod that no Service leads to
is in the mesh as a caller, under the name of its service account, which is what its token proves: all such
pods of one account are one caller.

The protocol is what the pods' annotation says, else the port's `appProtocol`, else the first word of its
name, else HTTP or gRPC if the kubelet probes it so, else what is usual on that port. Where nothing says it,
each connection is looked at, for which a protocol whose server speaks first has to wait: the last resort.

Of a Service the first port is in the mesh. The pods' other ports are reached as they were before; so are
those of a headless Service, whose callers speak to single pods, which the mesh does not tell apart.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from meshdemo.apps.model import GATEWAY, App, Found, Protocol, Service, Workload
from meshdemo.kube import Manifest
from meshdemo.names import PROTOCOL, PROTOCOLS, SERVICE, TOLD_PROTOCOL, VERSION, qualified

_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
_NOBODYS_PORT = 1  # of a pod that nobody calls
_OURS = "meshdemo-"  # what the names of the containers begin with that `inject` adds
_PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
INJECTED = "injected"  # stands for the image of a workload that is not ours to start
_NOT_HTTP = frozenset(("tcp", "https", "tls"))
# What is no HTTP, where nobody says otherwise, so that nobody waits: SMTP, MySQL, Galera, PostgreSQL, Redis,
# Elasticsearch's transport, memcached; as Linkerd has them (https://linkerd.io/2/features/protocol-detection/).
_NOT_LOOKED_INTO = frozenset((25, 587, 3306, 4444, 5432, 6379, 9300, 11211))
_BY_PROTOCOL: Mapping[str, Protocol] = {
    "http": "http", "kubernetes.io/ws": "http", "ws": "http",
    "grpc": "grpc", "http2": "grpc", "h2c": "grpc", "kubernetes.io/h2c": "grpc",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Discovered:
    """The app with what was found besides it."""

    app: App
    service_of: Mapping[str, str] = field(default_factory=dict)  # instance -> service
    ports: Mapping[str, int] = field(default_factory=dict)  # service -> the port that callers use
    also: tuple[
        tuple[str, str, int], ...
    ] = ()  # service, and an address and port of another Service of its pods


def namespace_of(manifest: Manifest, home: str) -> str:
    """The namespace of an object of a cluster."""
    return str(manifest["metadata"].get("namespace") or home)


def instance_of(pod: Manifest, home: str) -> str:
    """What the mesh calls a pod."""
    return qualified(str(pod["metadata"]["name"]), namespace_of(pod, home), home)


def version_of(pod: Manifest) -> str:
    """A pod's version, as a name: other people's labels hold dots and capitals."""
    label = str(pod["metadata"].get("labels", {}).get(VERSION, "v1")).lower()
    name = re.sub(r"[^a-z0-9]+", "-", label).strip("-")[:40]
    return name if _NAME.fullmatch(name) else f"v-{name}"[:40].strip("-") if name else "v1"


def account_of(pod: Manifest) -> str:
    """The service account that a pod runs under: what its token proves."""
    return str(pod.get("spec", {}).get("serviceAccountName") or "default")


def caller_of(account: str) -> str:
    """What the pods of an account are called that no Service leads to.

    Not like the account itself: that is often a Service's name, of which they would get the identity.
    """
    return f"account-{account}"


def declared(app: App) -> App:
    """An app without what was only discovered."""
    ours = {
        name: service
        for name, service in app.services.items()
        if any(workload.image != INJECTED for workload in service.versions.values())
    }
    return app.model_copy(update={"services": ours})


def discover(
    app: App,
    pods: Iterable[Manifest],
    slices: Iterable[Manifest],
    services: Iterable[Manifest],
    home: str,
) -> Discovered:
    """The declared app and, besides it, a service for every undeclared pod with a sidecar.

    Args:
        home: the mesh's namespace, where the declared app is.
    """
    places: dict[str, _Place] = {}
    for pod in pods:
        namespace = namespace_of(pod, home)
        if namespace != home or pod["metadata"].get("labels", {}).get(SERVICE) not in app.services:
            place = places.setdefault(namespace, _Place(namespace, home))
            place.pods[pod["metadata"]["name"]] = pod
    if not places:
        return Discovered(app)
    for one in slices:
        if (where := namespace_of(one, home)) in places:
            places[where].slices.append(one)
    for one in services:
        if (where := namespace_of(one, home)) in places:
            places[where].services.append(one)
    for place in places.values():
        place.discover({*app.services, GATEWAY} if place.namespace == home else set())
    found = {name: service for place in places.values() for name, service in place.found.items()}
    # Who calls whom is not written down anywhere, so they may all call each other.
    names = [*found]
    open_to_each_other = {
        name: service.model_copy(update={"calls": [other for other in names if other != name]})
        for name, service in found.items()
    }
    return Discovered(
        app.model_copy(update={"services": {**app.services, **open_to_each_other}}),
        {pod: name for place in places.values() for pod, name in place.service_of.items()},
        {name: port for place in places.values() for name, port in place.ports.items()},
        tuple(one for place in places.values() for one in place.also),
    )


class _Place:
    """What is found in one namespace."""

    def __init__(self, namespace: str, home: str) -> None:
        self.namespace, self._home = namespace, home
        self.pods: dict[str, Manifest] = {}
        self.slices: list[Manifest] = []
        self.services: list[Manifest] = []
        self.found: dict[str, Service] = {}
        self.service_of: dict[str, str] = {}
        self.ports: dict[str, int] = {}
        self.also: list[tuple[str, str, int]] = []

    def discover(self, taken: set[str]) -> None:
        """Find the services. `taken`: names within this namespace that are the mesh's own."""
        service_of: dict[str, str] = {}  # both names within the namespace
        waiting: set[str] = set()
        besides = {port for other in self.services for port in _targets(other, self.slices)}
        for one in sorted(self.services, key=lambda one: str(one["metadata"]["name"])):
            name = str(one["metadata"]["name"])
            wanted = (one["spec"].get("ports") or [None])[0]
            if name in taken or not _NAME.fullmatch(name) or wanted is None or not _address(one):
                continue
            members, target = _behind(name, wanted, self.slices)
            selected = {pod for pod, manifest in self.pods.items() if _selects(one, manifest)}
            # Those get their name in a moment, and no other before.
            waiting |= selected - set(members)
            members = [pod for pod in members if pod in selected and pod not in service_of]
            if not members or target is None:
                continue
            service_of.update(dict.fromkeys(members, name))
            behind = [self.pods[pod] for pod in members]
            protocol = _protocol(wanted, target, behind)
            found = _service(target, protocol or "http", behind, detect=protocol is None, besides=besides)
            self._add(name, found, wanted["port"])
        self._look_for_other_ways(service_of)
        taken = taken | {str(one["metadata"]["name"]) for one in self.services}
        callers: dict[str, list[Manifest]] = {}
        for pod_name, pod in self.pods.items():
            if pod_name in service_of or pod_name in waiting:
                continue
            name = caller_of(account_of(pod))
            # What a Service is called is no caller's, too. An account whose name is none of ours is left out:
            # made into one, it could be another account's.
            if name not in taken and _NAME.fullmatch(name):
                service_of[pod_name] = name
                callers.setdefault(name, []).append(pod)
        for name, of in callers.items():
            self._add(name, _service(_NOBODYS_PORT, "http", of, besides=besides), None)
        self.service_of = {self._called(pod): self._called(name) for pod, name in service_of.items()}

    def _look_for_other_ways(self, service_of: Mapping[str, str]) -> None:
        """Find other Services, and other ports of one, that lead to the same port of the same pods."""
        for one in self.services:
            name, address = str(one["metadata"]["name"]), _address(one)
            for port in (one["spec"].get("ports") or ()) if address else ():
                members, target = _behind(name, port, self.slices)
                owners = {service_of.get(pod, "") for pod in members if pod in self.pods}
                owner = self._called(next(iter(owners))) if len(owners) == 1 else ""
                known = owner in self.found and self.found[owner].port == target
                if known and (owner, self.ports[owner]) != (self._called(name), port["port"]):
                    self.also.append((owner, address, port["port"]))

    def _add(self, name: str, service: Service, port: int | None) -> None:
        self.found[self._called(name)] = service
        if port is not None:
            self.ports[self._called(name)] = port

    def _called(self, name: str) -> str:
        return qualified(name, self.namespace, self._home)


def _address(service: Manifest) -> str:
    """The address of a Service's name; '' where that stands for its pods themselves (a headless one)."""
    address = str(service["spec"].get("clusterIP", ""))
    return "" if address == "None" else address


def _selects(service: Manifest, pod: Manifest) -> bool:
    """Does a Service itself select a pod? One without a selector leads to wherever its EndpointSlices, which
    others may write, say."""
    selector = service["spec"].get("selector") or {}
    return bool(selector) and selector.items() <= pod["metadata"].get("labels", {}).items()


def _behind(name: str, wanted: Mapping[str, Any], slices: Sequence[Manifest]) -> tuple[list[str], int | None]:
    """The pods that a Service leads to, ready or not, and their port."""
    members: list[str] = []
    target: int | None = None
    for one in slices:
        if one["metadata"].get("labels", {}).get("kubernetes.io/service-name") != name:
            continue
        for port in one.get("ports") or ():
            if (port.get("name") or "") == (wanted.get("name") or ""):
                target = port.get("port", target)
        for endpoint in one.get("endpoints") or ():
            if (endpoint.get("targetRef") or {}).get("kind") == "Pod":
                members.append(endpoint["targetRef"]["name"])
    return members, target


def _targets(service: Manifest, slices: Sequence[Manifest]) -> set[int]:
    """The pods' ports that a Service leads to."""
    name = service["metadata"]["name"]
    return {
        int(port["port"])
        for one in slices
        if one["metadata"].get("labels", {}).get("kubernetes.io/service-name") == name
        for port in one.get("ports") or ()
        if port.get("port") and port.get("protocol", "TCP") == "TCP"
    }


def _protocol(port: Mapping[str, Any], target: int, pods: Sequence[Manifest]) -> Protocol | None:
    """What a port speaks; None if nothing says it."""
    for pod in pods:
        annotations = pod["metadata"].get("annotations") or {}
        told = str(annotations.get(PROTOCOL) or annotations.get(TOLD_PROTOCOL) or "").lower()
        if told in PROTOCOLS:
            return cast(Protocol, told)
    said = str(port.get("appProtocol") or "").lower()
    if said in _BY_PROTOCOL:
        return _BY_PROTOCOL[said]
    prefix = re.split(r"[^a-z0-9]", str(port.get("name") or ""))[0]
    if said or prefix in _NOT_HTTP:
        return "tcp"
    if prefix in _BY_PROTOCOL:
        return _BY_PROTOCOL[prefix]
    probed = [probe for probe in _probes(pods) if probe.port == target and not probe.tls]
    for kind, protocol in (("grpc", "grpc"), ("httpGet", "http")):
        if any(probe.kind == kind for probe in probed):
            return cast(Protocol, protocol)
    return "tcp" if {target, port.get("port")} & _NOT_LOOKED_INTO else None


@dataclass(frozen=True, slots=True)
class _Probe:
    """How the kubelet asks a container. `path`: of an HTTP probe without TLS."""

    kind: str  # httpGet, tcpSocket, grpc
    port: int
    path: str
    tls: bool


def _probes(pods: Iterable[Manifest]) -> Iterator[_Probe]:
    """The probes of these pods' containers that come by the network."""
    for container in (one for pod in pods for one in _containers(pod)):
        numbers = {one.get("name"): one.get("containerPort") for one in container.get("ports") or ()}
        for probe in (container.get(kind) or {} for kind in _PROBES):
            for kind in ("httpGet", "tcpSocket", "grpc"):
                if (how := probe.get(kind)) is not None:
                    port = numbers.get(how.get("port"), how.get("port"))
                    if isinstance(port, int):
                        tls = how.get("scheme", "HTTP") != "HTTP"
                        yield _Probe(kind, port, str(how.get("path") or "/"), tls)


def _service(
    port: int,
    protocol: Protocol,
    pods: Sequence[Manifest],
    *,
    detect: bool = False,
    besides: Collection[int] = (),
) -> Service:
    """`besides`: other ports that Services of the namespace lead to."""
    probes = list(_probes(pods))
    probed = sorted(
        {one.path for one in probes if one.kind == "httpGet" and one.port == port and not one.tls}
    )
    named = {
        one["containerPort"]
        for pod in pods
        for container in _containers(pod)
        for one in container.get("ports") or ()
        if one.get("protocol", "TCP") == "TCP" and one.get("containerPort")
    }
    aside = (named | {one.port for one in probes} | set(besides)) - {port}
    return Service(
        port=port,
        protocol=protocol,
        healthz=probed[0] if probed else "/healthz",
        metrics=None,
        open_paths={path: ["GET"] for path in probed},
        versions={version_of(pod): Workload(image=INJECTED) for pod in pods},
        found=Found(
            detect=detect,
            grpc_probe=any(one.kind == "grpc" and one.port == port for one in probes),
            aside=tuple(sorted(aside)),
        ),
    )


def _containers(pod: Manifest) -> list[Manifest]:
    """The containers of a pod that are its owner's and stay."""
    spec = pod.get("spec", {})
    sidecars = [one for one in spec.get("initContainers") or () if one.get("restartPolicy") == "Always"]
    return [one for one in (*(spec.get("containers") or ()), *sidecars) if not one["name"].startswith(_OURS)]
