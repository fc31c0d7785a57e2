"""Services that no app file declares: other people's pods that `inject` gave a sidecar.

What an app file would say is told by the cluster: which pods a Service leads to (EndpointSlices), on which
port, in which protocol, and which paths the kubelet probes. Pure.

Whatever is not in the mesh's own namespace bears its namespace's name, too: the Service `web` of `shop` is
`web.shop`, and has nothing to do with another `web`.

A name is an identity here, so a pod does not get one by saying so: it is called like the Service that selects
it (whoever may write Services has vouched for it), never like a label of ours. A pod that no Service leads to
is in the mesh as a caller, under the name of its service account, which is what its token proves: all such
pods of one account are one caller.

The protocol of a port is what the pods' annotation says, else its `appProtocol`, else the first word of its
name, else HTTP or gRPC if the kubelet probes it so, else what is usual on that port. Where nothing says it,
each connection is looked at, for which a protocol whose server speaks first has to wait: the last resort.

Every TCP port of a Service is in the mesh, all of them as that one service. Of several Services that lead to
a pod it bears the name of the widest; the others are further ways to it, by other ports, or to some of its
pods alone. What stays as it was before:
- ports that no Service leads to, and those that the pods' owner had skipped;
- those of a headless Service, whose callers speak to single pods, which the mesh does not tell apart: the
  members of a StatefulSet find each other so, and not all of them have a sidecar while it is rolled out. (The
  first port of a Service with an address is in the mesh nevertheless.)
- ports that the kubelet probes by TLS: it has no certificate of the mesh.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from meshdemo.apps.model import GATEWAY, App, Found, FurtherPort, Protocol, Service, Workload, further_key
from meshdemo.kube import Manifest
from meshdemo.names import (
    PROTOCOL,
    SERVICE,
    SKIP_INBOUND,
    TOLD_PROTOCOL,
    TOLD_SKIPPED,
    VERSION,
    numbers,
    protocols,
    qualified,
)

_NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
_NOBODYS_PORT = 1  # of a pod that nobody calls
_OURS = "meshdemo-"  # what the names of the containers begin with that `inject` adds
_PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
_HOOKS = ("postStart", "preStop")
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
    # Other ways than that: service, address, port, and the key of the further port (none: the first).
    also: tuple[tuple[str, str, int, str], ...] = ()
    further: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # instance -> those it has


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
        {pod: ports for place in places.values() for pod, ports in place.further.items()},
    )


@dataclass(frozen=True, slots=True)
class _Way:
    """A port of a Service, and where it leads."""

    said: Mapping[str, Any]  # as the Service has it
    called: int
    target: int
    pods: frozenset[str]


@dataclass(slots=True)
class _Owner:
    """A Service whose name pods of the mesh have. `past`: those of their ports that are not in the mesh."""

    members: list[str]
    first: _Way | None
    further: dict[int, _Way]
    past: frozenset[int]
    parts: dict[str, _Way] = field(default_factory=dict)  # ways to some of the members, by their Service

    def has(self, target: int) -> bool:
        """Is a port of the pods in the mesh?"""
        return target in self.further or (self.first is not None and self.first.target == target)


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
        self.also: list[tuple[str, str, int, str]] = []
        self.further: dict[str, tuple[str, ...]] = {}

    def discover(self, taken: set[str]) -> None:
        """Find the services. `taken`: names within this namespace that are the mesh's own."""
        service_of: dict[str, str] = {}  # both names within the namespace
        waiting: set[str] = set()
        owners: dict[str, _Owner] = {}
        ways = {str(one["metadata"]["name"]): _ways(one, self.slices) for one in self.services}
        for one in sorted(self.services, key=_width):
            name = str(one["metadata"]["name"])
            if name in taken or not _NAME.fullmatch(name) or not _address(one) or not _tcp(one):
                continue
            members = _members(name, self.slices)
            selected = {pod for pod, manifest in self.pods.items() if _selects(one, manifest)}
            # Those get their name in a moment, and no other before.
            waiting |= selected - set(members)
            members = [pod for pod in members if pod in selected and pod not in service_of]
            if not members or not ways[name]:
                continue
            service_of.update(dict.fromkeys(members, name))
            owners[name] = self._owner(members, ways[name], ways)
        self._look_for_other_ways(service_of, owners, ways)
        besides = {way.target for found in ways.values() for way in found}
        for name, owner in owners.items():
            self._add(name, owner, besides)
        taken = taken | {str(one["metadata"]["name"]) for one in self.services}
        callers: dict[str, list[str]] = {}
        for pod_name, pod in self.pods.items():
            if pod_name in service_of or pod_name in waiting:
                continue
            name = caller_of(account_of(pod))
            # What a Service is called is no caller's, too. An account whose name is none of ours is left out:
            # made into one, it could be another account's.
            if name not in taken and _NAME.fullmatch(name):
                service_of[pod_name] = name
                callers.setdefault(name, []).append(pod_name)
        for name, members in callers.items():
            self._add(name, _Owner(members, None, {}, frozenset()), besides)
        self.service_of = {self._called(pod): self._called(name) for pod, name in service_of.items()}

    def _owner(self, members: list[str], its: Sequence[_Way], ways: Mapping[str, Sequence[_Way]]) -> _Owner:
        behind = [self.pods[pod] for pod in members]
        one_by_one = {
            way.target
            for one in self.services
            if _headless(one) and any(_selects(one, pod) for pod in behind)
            for way in ways[str(one["metadata"]["name"])]
            if not way.pods.isdisjoint(members)
        }
        past = _skipped(behind) | {probe.port for probe in _probes(behind) if probe.tls}
        in_mesh = [way for way in its if way.target not in past and not way.pods.isdisjoint(members)]
        first = next(iter(in_mesh), None)
        owner = _Owner(members, first, {}, frozenset(past | one_by_one))
        for way in in_mesh:
            if not owner.has(way.target) and way.target not in owner.past:
                owner.further[way.target] = way
        return owner

    def _look_for_other_ways(
        self, service_of: Mapping[str, str], owners: Mapping[str, _Owner], ways: Mapping[str, Sequence[_Way]]
    ) -> None:
        """Find other Services, and other ports of one, that lead to the same pods."""
        for one in self.services:
            name, address = str(one["metadata"]["name"]), _address(one)
            for way in ways[name] if address else ():
                of = {service_of.get(pod, "") for pod in way.pods if pod in self.pods}
                owner = owners.get(next(iter(of))) if len(of) == 1 else None
                if owner is None or way is owner.first:
                    continue
                chosen = all(_selects(one, self.pods[pod]) for pod in way.pods if pod in self.pods)
                if not owner.has(way.target) and chosen and owner.first and way.target not in owner.past:
                    owner.further[way.target] = way
                if not owner.has(way.target):
                    continue
                key = further_key(way.target) if way.target in owner.further else ""
                if not self._leads_to_all(one, way, owner):
                    key = further_key(way.target, name)
                    owner.parts[name] = way
                (called,) = of
                self.also.append((self._called(called), address, way.called, key))

    def _leads_to_all(self, service: Manifest, way: _Way, owner: _Owner) -> bool:
        """Does a Service lead to all members that have the port?

        As its selector says, where it has one: EndpointSlices do not all know of a new pod at the same time.
        """
        further = owner.further.get(way.target)
        return all(
            pod in way.pods or _selects(service, self.pods[pod])
            for pod in owner.members
            if further is None or pod in further.pods
        )

    def _add(self, name: str, owner: _Owner, besides: Collection[int]) -> None:
        pods = [self.pods[pod] for pod in owner.members]
        first = _port(owner.first, pods, first=True) if owner.first else None
        further = [(_port(way, pods, first=False), way) for way in owner.further.values()]
        whole = {one.port: one for one in (first, *(port for port, _ in further)) if one}
        further += [
            (whole[way.target].model_copy(update={"part": of}), way) for of, way in owner.parts.items()
        ]
        self.found[self._called(name)] = _service(first, [port for port, _ in further], pods, besides)
        if owner.first is not None:
            self.ports[self._called(name)] = owner.first.called
        for pod in owner.members:
            its = tuple(port.key for port, way in further if pod in way.pods)
            if its:
                self.further[self._called(pod)] = its

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


def _width(service: Manifest) -> tuple[int, str]:
    """Whoever asks less of a pod's labels leads to more of them (`db` before `db-primary`), now and later."""
    return len(service["spec"].get("selector") or ()), str(service["metadata"]["name"])


def _headless(service: Manifest) -> bool:
    return str(service["spec"].get("clusterIP")) == "None"


def _tcp(service: Manifest) -> list[Mapping[str, Any]]:
    """The ports of a Service that can be in the mesh."""
    return [one for one in service["spec"].get("ports") or () if one.get("protocol", "TCP") == "TCP"]


def _of(name: str, slices: Iterable[Manifest]) -> list[Manifest]:
    """The EndpointSlices of a Service."""
    return [
        one for one in slices if one["metadata"].get("labels", {}).get("kubernetes.io/service-name") == name
    ]


def _pods_of(one: Manifest) -> list[str]:
    """The pods in an EndpointSlice, ready or not."""
    return [
        endpoint["targetRef"]["name"]
        for endpoint in one.get("endpoints") or ()
        if (endpoint.get("targetRef") or {}).get("kind") == "Pod"
    ]


def _members(name: str, slices: Iterable[Manifest]) -> list[str]:
    """The pods that a Service leads to, ready or not."""
    return list(dict.fromkeys(pod for one in _of(name, slices) for pod in _pods_of(one)))


def _ways(service: Manifest, slices: Iterable[Manifest]) -> list[_Way]:
    """The TCP ports of a Service that lead to pods, in its order."""
    of = _of(str(service["metadata"]["name"]), slices)
    found = []
    for said in _tcp(service):
        pods: dict[int, set[str]] = {}
        for one in of:
            for port in one.get("ports") or ():
                if (port.get("name") or "") == (said.get("name") or "") and port.get("port"):
                    pods.setdefault(int(port["port"]), set()).update(_pods_of(one))
        if pods:
            # A named target may be different ports of different pods; a call leads to one of them.
            target = max(pods, key=lambda port: (len(pods[port]), -port))
            found.append(_Way(said, int(said["port"]), target, frozenset(pods[target])))
    return found


def _annotation(pod: Manifest, *keys: str) -> str:
    annotations = pod["metadata"].get("annotations") or {}
    return next((str(annotations[key]) for key in keys if annotations.get(key)), "")


def _skipped(pods: Iterable[Manifest]) -> set[int]:
    """The ports whose traffic passes by the sidecars of these pods."""
    found: set[int] = set()
    for pod in pods:
        with contextlib.suppress(ValueError):  # `inject` takes no such thing
            found.update(numbers(_annotation(pod, SKIP_INBOUND, TOLD_SKIPPED)))
    return found


def _protocol(
    port: Mapping[str, Any], target: int, pods: Sequence[Manifest], *, first: bool
) -> Protocol | None:
    """What a port speaks; None if nothing says it. An annotation that names no port is about the `first`."""
    for pod in pods:
        with contextlib.suppress(ValueError):  # nor such a thing
            told = protocols(_annotation(pod, PROTOCOL, TOLD_PROTOCOL))
            if protocol := told.get(target) or (told.get(None) if first else None):
                return cast(Protocol, protocol)
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
    """How the kubelet asks a container. `path`: of HTTP. `hook`: not how it is, but to do something."""

    kind: str  # httpGet, tcpSocket, grpc
    port: int
    path: str
    tls: bool
    hook: bool


def _probes(pods: Iterable[Manifest]) -> Iterator[_Probe]:
    """What the kubelet asks these pods' containers by the network: probes, and hooks of their life cycle."""
    for container in (one for pod in pods for one in _containers(pod)):
        numbers = {one.get("name"): one.get("containerPort") for one in container.get("ports") or ()}
        hooks = container.get("lifecycle") or {}
        asked = [(container.get(kind), False) for kind in _PROBES] + [
            (hooks.get(kind), True) for kind in _HOOKS
        ]
        for probe, hook in asked:
            for kind in ("httpGet", "tcpSocket", "grpc"):
                if (how := (probe or {}).get(kind)) is not None:
                    port = numbers.get(how.get("port"), how.get("port"))
                    if isinstance(port, int):
                        tls = how.get("scheme", "HTTP") != "HTTP"
                        path = "/" + str(how.get("path") or "").removeprefix("/")
                        yield _Probe(kind, port, path, tls, hook)


def _port(way: _Way, pods: Sequence[Manifest], *, first: bool) -> FurtherPort:
    """A port of these pods."""
    probes = [one for one in _probes(pods) if one.port == way.target]
    protocol = _protocol(way.said, way.target, pods, first=first)
    asked = {one.path for one in probes if one.kind == "httpGet" and not one.tls}
    return FurtherPort(
        port=way.target,
        called=way.called,
        protocol=protocol or "http",
        detect=protocol is None,
        grpc_probe=any(one.kind == "grpc" for one in probes),
        open_paths={path: ["GET"] for path in sorted(asked | _scraped(way, pods))},
    )


def _scraped(way: _Way, pods: Iterable[Manifest]) -> set[str]:
    """Where Prometheus, which has no sidecar, reads a port, by its usual annotations or the port's name."""
    found = set()
    if "metrics" in re.split(r"[^a-z0-9]", str(way.said.get("name") or "")):
        found.add("/metrics")
    for pod in pods:
        wanted = _annotation(pod, "prometheus.io/scrape") == "true"
        if wanted and _annotation(pod, "prometheus.io/port") == str(way.target):
            found.add(_annotation(pod, "prometheus.io/path") or "/metrics")
    return {path for path in found if path.startswith("/")}


def _service(
    first: FurtherPort | None,
    further: Sequence[FurtherPort],
    pods: Sequence[Manifest],
    besides: Collection[int],
) -> Service:
    """`besides`: other ports that Services of the namespace lead to."""
    probes = list(_probes(pods))
    named = {
        one["containerPort"]
        for pod in pods
        for container in _containers(pod)
        for one in container.get("ports") or ()
        if one.get("protocol", "TCP") == "TCP" and one.get("containerPort")
    }
    first = first or FurtherPort(port=_NOBODYS_PORT, called=_NOBODYS_PORT)
    aside = (named | {one.port for one in probes} | set(besides)) - {
        first.port,
        *(one.port for one in further),
    }
    probed = sorted(
        one.path for one in probes if one.kind == "httpGet" and one.port == first.port and not one.hook
    )
    return Service(
        port=first.port,
        protocol=first.protocol,
        healthz=probed[0] if probed else "/healthz",
        metrics=None,
        open_paths=first.open_paths,
        versions={version_of(pod): Workload(image=INJECTED) for pod in pods},
        found=Found(
            detect=first.detect,
            grpc_probe=first.grpc_probe,
            ports=tuple(further),
            aside=tuple(sorted(aside)),
        ),
    )


def _containers(pod: Manifest) -> list[Manifest]:
    """The containers of a pod that are its owner's and stay."""
    spec = pod.get("spec", {})
    sidecars = [one for one in spec.get("initContainers") or () if one.get("restartPolicy") == "Always"]
    return [one for one in (*(spec.get("containers") or ()), *sidecars) if not one["name"].startswith(_OURS)]
