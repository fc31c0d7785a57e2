"""The mesh and its intent -> what each sidecar should have, through the templates in `templates/envoy`.

Templates render YAML, which becomes protobuf with unknown fields refused. That is slow, and most of it is
the same for everyone, so it is done once for each distinct input and remembered: a change of one service
renders that service's part alone, and a thousand sidecars share the encoded result. What differs from
instance to instance (addresses, ports) is no text at all: it is filled into a copy of the parsed message.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast
from weakref import WeakValueDictionary

import jinja2
import yaml
from envoy.config.cluster.v3.cluster_pb2 import Cluster
from envoy.config.endpoint.v3.endpoint_pb2 import ClusterLoadAssignment
from envoy.config.listener.v3.listener_pb2 import Listener
from envoy.config.route.v3.route_components_pb2 import VirtualHost  # with it, FilterConfig
from envoy.config.route.v3.route_pb2 import RouteConfiguration
from envoy.config.trace.v3 import opentelemetry_pb2 as _tracer
from envoy.extensions.access_loggers.grpc.v3 import als_pb2 as _als
from envoy.extensions.access_loggers.stats.v3 import stats_pb2 as _stats
from envoy.extensions.filters.http.fault.v3 import fault_pb2 as _fault
from envoy.extensions.filters.http.rbac.v3 import rbac_pb2 as _rbac
from envoy.extensions.filters.http.router.v3 import router_pb2 as _router
from envoy.extensions.filters.network.http_connection_manager.v3 import (
    http_connection_manager_pb2 as _hcm,
)
from envoy.extensions.filters.network.rbac.v3 import rbac_pb2 as _network_rbac
from envoy.extensions.filters.network.tcp_proxy.v3 import tcp_proxy_pb2 as _tcp_proxy
from envoy.extensions.retry.host.previous_hosts.v3 import previous_hosts_pb2 as _previous_hosts
from envoy.extensions.transport_sockets.tls.v3 import tls_pb2 as _tls
from envoy.extensions.upstreams.http.v3 import http_protocol_options_pb2 as _http_options
from envoy.service.runtime.v3.rtds_pb2 import Runtime
from google.protobuf import json_format
from google.protobuf.message import Message
from pydantic import BaseModel

from meshdemo import names
from meshdemo.apps.model import GATEWAY, OTHER, App, Route, Service
from meshdemo.control import captured, gateway, xds
from meshdemo.control.identity import spiffe_id, trust_domain
from meshdemo.control.intent import callers
from meshdemo.control.model import Fault, Instance, Intent, MeshState, Traffic
from meshdemo.control.signals import MIRRORED
from meshdemo.resources import TEMPLATES

# A message that a `typed_config` names must be known to protobuf; importing its module makes it known.
_KNOWN = (
    _als, _stats, _fault, _rbac, _router, _hcm, _network_rbac, _tcp_proxy, _previous_hosts, _tls,
    _http_options, _tracer,
)  # fmt: skip

_T = TypeVar("_T")
_M = TypeVar("_M", bound=Message)


# -- faults to routes -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Degradation:
    """What the sidecar does to requests: latency for a share of them, an error for a share of them."""

    lat_ms: float
    share: float
    err_rate: float


@dataclass(frozen=True, slots=True)
class InboundRoute:
    """One entry of an instance's route table; the first that matches a request takes it."""

    name: str
    kind: str  # "path" (exact) or "prefix"
    path: str
    method: str | None = None
    caller: str | None = None  # SPIFFE identity
    fault: Degradation | None = None
    # Only requests whose random number is below this share are taken; Envoy draws one number for a request
    # and compares it with every entry's share. 1: all of them.
    below: float = 1.0


def combine(faults: Iterable[Fault]) -> list[tuple[float, Degradation | None]]:
    """Several faults on the same requests, as parts of these: (share of them up to here, what they meet).

    Faults strike independently. Of the latencies that strike a request the longest counts, so where several
    have shares, requests are told apart: those with the longest latency first, and those with none at last.
    """
    faults = list(faults)
    spared = 1.0
    for fault in faults:
        spared *= 1 - fault.err_rate
    err_rate = round(1 - spared, 6)
    slow = sorted((one for one in faults if one.lat_ms and one.share), key=lambda one: -one.lat_ms)
    # What comes below a latency that all requests get never counts.
    last = next((number for number, one in enumerate(slow) if one.share == 1), len(slow))
    slow = slow[: last + 1]
    if len(slow) <= 1:
        lat_ms, share = (slow[0].lat_ms, slow[0].share) if slow else (0.0, 1.0)
        return [(1.0, Degradation(lat_ms, share, err_rate) if lat_ms or err_rate else None)]
    parts: list[tuple[float, Degradation | None]] = []
    quick = 1.0
    for one in slow:
        quick *= 1 - one.share
        parts.append((round(1 - quick, 6), Degradation(one.lat_ms, 1.0, err_rate)))
    if quick:
        parts.append((1.0, Degradation(0.0, 1.0, err_rate) if err_rate else None))
    return parts


def declared_routes(service: Service) -> list[Route]:
    """The service's routes, exact paths first and longer prefixes before shorter, and the rest."""
    ordered = sorted(
        service.routes,
        key=lambda route: (route.path is None, -len(route.prefix or ""), route.method is None),
    )
    return [*ordered, Route(name=OTHER, prefix="/")]


def inbound_routes(
    service: Service, faults: Sequence[Fault], identity: Callable[[str], str]
) -> list[InboundRoute]:
    """The route table of an instance that these faults apply to.

    A fault on a path prefix or a caller splits the routes that it meets; each part keeps its route's name, so
    that signals by route stay whole.
    """
    table: list[InboundRoute] = []
    for route in declared_routes(service):
        for kind, path in _parts(route, faults):
            meeting = [fault for fault in faults if path.startswith(fault.route or "/")]
            anyone = [fault for fault in meeting if fault.caller is None]
            for caller in dict.fromkeys(fault.caller for fault in meeting if fault.caller):
                its = [*anyone, *(fault for fault in meeting if fault.caller == caller)]
                table += [
                    InboundRoute(route.name, kind, path, route.method, identity(caller), fault, below)
                    for below, fault in combine(its)
                ]
            table += [
                InboundRoute(route.name, kind, path, route.method, None, fault, below)
                for below, fault in combine(anyone)
            ]
    return table


def _parts(route: Route, faults: Sequence[Fault]) -> list[tuple[str, str]]:
    """A route as (kind, path), and before it the parts that faults on a longer prefix cut out of it."""
    if route.path is not None:
        return [("path", route.path)]
    prefix = route.prefix or "/"
    longer = {
        fault.route
        for fault in faults
        if fault.route and fault.route != prefix and fault.route.startswith(prefix)
    }
    return [("prefix", path) for path in (*sorted(longer, key=lambda path: (-len(path), path)), prefix)]


# -- split ------------------------------------------------------------------------------------------------


def effective_split(service: Service, traffic: Traffic, ready: Mapping[str, int]) -> dict[str, int]:
    """Version -> weight, as callers should split.

    Without a split in the intent, the versions that `up` starts by itself get everything, each by the number
    of its ready instances: a version that is added later gets nothing until somebody says so. The share of a
    version with nobody ready goes to the others, rather than be lost.
    """
    if traffic.split:
        asked = {version: weight for version, weight in traffic.split.items() if weight}
        return {version: weight for version, weight in asked.items() if ready.get(version)} or asked
    initial = [version for version, workload in service.versions.items() if workload.initial]
    for candidates in (initial, list(ready)):
        weights = {version: ready[version] for version in candidates if ready.get(version)}
        if weights:
            return {next(iter(weights)): 100} if len(weights) == 1 else weights
    return {(initial or list(service.versions))[0]: 100}


def real_share(mesh: MeshState, intent: Intent, instance: Instance) -> float:
    """Of what callers send to an instance, the share (0..1) that is not the copy of a request."""
    traffic = intent.traffic.get(instance.service)
    if traffic is None or not traffic.mirror.get(instance.version):
        return 1.0
    ready: dict[str, int] = {}
    for other in mesh.instances:
        if other.service == instance.service and other.ready:
            ready[other.version] = ready.get(other.version, 0) + 1
    split = effective_split(mesh.app.services[instance.service], traffic, ready)
    real = split.get(instance.version, 0) / sum(split.values())
    return real / (real + traffic.mirror[instance.version])


# -- rendering --------------------------------------------------------------------------------------------


class Renderer:
    """Renders snapshots; remembers what it rendered for as long as it is in use."""

    def __init__(self, templates: Path = TEMPLATES / "envoy", load_token: str | None = None) -> None:
        """`load_token`: who shows it may set the load of instances that make load; None: nobody."""
        self._load_token = load_token
        self._environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(templates),
            undefined=jinja2.StrictUndefined,
            autoescape=False,  # noqa: S701 (YAML; values go through tojson)
        )
        self._app: App | None = None
        self._used: dict[Hashable, Any] = {}
        self._before: dict[Hashable, Any] = {}
        self._bundles: WeakValueDictionary[tuple[str, str], xds.Bundle] = WeakValueDictionary()

    def snapshots(self, mesh: MeshState, intent: Intent, *, tap: bool = False) -> dict[str, xds.Snapshot]:
        """What each instance's sidecar should have, by instance id; secrets are not in it.

        Raises:
            jinja2.TemplateError, yaml.YAMLError, json_format.ParseError: a template is broken.
        """
        # The runtime reports the same app again and again: as one object it is a cheap key.
        if self._app is None or mesh.app != self._app:
            self._app = mesh.app
        # Two generations: what this round uses is kept for the next, the rest is forgotten.
        self._before, self._used = self._used, {}
        try:
            return self._snapshots(mesh.model_copy(update={"app": self._app}), intent, tap)
        except BaseException:
            self._used = {**self._before, **self._used}
            raise

    def _snapshots(self, mesh: MeshState, intent: Intent, tap: bool) -> dict[str, xds.Snapshot]:
        traffic = {name: intent.traffic.get(name, _DEFAULT) for name in mesh.app.services}
        splits, versions = _serving(mesh, traffic, {ejection.instance for ejection in intent.ejections})
        shared = _Shared(
            runtime=self._bundle(xds.RUNTIME, [self._made("runtime", Runtime, tap=tap)]),
            clusters=self._clusters(mesh, versions, traffic, intent.traces),
            endpoints=self._endpoints(versions),
            outbound=self._outbound(mesh, splits, traffic),
            listeners=self._captured_listeners(mesh, splits, intent.traces) if mesh.addresses else (),
        )
        allowed = callers(intent, mesh)
        services = {
            name: self._service(
                mesh,
                service,
                tuple(allowed.get(name, ())),
                tuple(fault for fault in intent.faults if fault.at == "mesh" and fault.service == name),
                None if intent.traces is None else name,
            )
            for name, service in mesh.app.services.items()
        }
        found = {
            instance.id: self._snapshot(
                shared, services[instance.service], instance, _mirrors(traffic[instance.service])
            )
            for instance in mesh.instances
        }
        if mesh.gateways:
            table = self._gateway_routes(mesh, splits, traffic)
            found |= {one.id: self._gateway(mesh, one, shared, table, intent.traces) for one in mesh.gateways}
        return found

    def _snapshot(
        self, shared: _Shared, of: _ServiceParts, instance: Instance, mirrors: Collection[str]
    ) -> xds.Snapshot:
        inbound = self._inbound(of, instance, mirrored=instance.version in mirrors)
        where = (instance.host, instance.inbound_port, instance.outbound_port, instance.metrics_port)
        app = (instance.app_host, instance.app_port)
        return self._once(
            ("snapshot", instance.id, where, app, shared, of, inbound),
            lambda: self._assembled(shared, of, instance, inbound),
        )

    def _assembled(
        self, shared: _Shared, of: _ServiceParts, instance: Instance, inbound: xds.Bundle
    ) -> xds.Snapshot:
        app = self._endpoints_of("app", ((instance.app_host, instance.app_port),))
        if shared.listeners:
            own = self._captured_inbound(of, instance.app_port)
            aside = of.service.found.aside if of.service.found else ()
            endpoints = [
                app,
                *(self._endpoints_of(f"aside:{port}", ((instance.app_host, port),)) for port in aside),
            ]
        else:
            own = self._interned(xds.LISTENERS, _listeners(of.listeners, instance))
            endpoints = [app]
        return {
            xds.RUNTIME: (shared.runtime,),
            xds.CLUSTERS: (shared.clusters, of.app),
            xds.ENDPOINTS: (shared.endpoints, self._bundle(xds.ENDPOINTS, endpoints)),
            xds.LISTENERS: (*shared.listeners, own),
            xds.ROUTES: (shared.outbound, inbound),
        }

    # -- what all sidecars share --------------------------------------------------------------------------

    def _clusters(
        self, mesh: MeshState, versions: _Versions, traffic: Mapping[str, Traffic], traces: str | None
    ) -> xds.Bundle:
        return self._bundle(
            xds.CLUSTERS,
            [
                self._cluster(mesh, name, version, traffic[name])
                for name, of in versions.items()
                for version in of
            ]
            + ([self._made("passthrough", Cluster)] if mesh.addresses else [])
            + ([self._collector(traces)] if traces is not None else []),
        )

    def _collector(self, traces: str) -> _Made[Cluster]:
        host, _, port = traces.rpartition(":")
        return self._made("traces", Cluster, host=host.strip("[]"), port=int(port))

    def _cluster(self, mesh: MeshState, name: str, version: str, traffic: Traffic) -> _Made[Cluster]:
        service = mesh.app.services[name]
        return self._once(
            ("cluster", _Is(service), version, _Is(traffic)),
            lambda: self._made(
                "cluster",
                Cluster,
                service=name,
                version=version,
                protocol=service.spoken,
                identity=spiffe_id(mesh.mesh, mesh.namespace, name),
                traffic=_limits(traffic),
            ),
        )

    def _endpoints(self, versions: _Versions) -> xds.Bundle:
        return self._bundle(
            xds.ENDPOINTS,
            [
                self._endpoints_of(f"{name}/{version}", tuple((i.host, i.inbound_port) for i in serving))
                for name, of in versions.items()
                for version, serving in of.items()
            ],
        )

    def _outbound(
        self, mesh: MeshState, splits: Mapping[str, Mapping[str, int]], traffic: Mapping[str, Traffic]
    ) -> xds.Bundle:
        hosts = [self._host(mesh, name, splits[name], traffic[name]) for name in mesh.app.services]
        frame = self._made("routes_outbound", RouteConfiguration)
        routes = self._once(
            ("outbound", frame, *hosts),
            lambda: _Made(_with_hosts(frame.message, [host.message for host in hosts])),
        )
        # Where traffic is redirected, the address that was called says which service is meant.
        redirected = [self._table_of_one(host) for host in (hosts if mesh.addresses else ())]
        return self._bundle(xds.ROUTES, [routes, *redirected])

    def _host(
        self, mesh: MeshState, name: str, split: Mapping[str, int], traffic: Traffic
    ) -> _Made[VirtualHost]:
        service = mesh.app.services[name]
        return self._once(
            ("host", _Is(service), tuple(split.items()), _Is(traffic)),
            lambda: self._made(
                "virtual_host",
                VirtualHost,
                service=name,
                protocol=service.spoken,
                domains=_domains(name, mesh.namespace),
                routes=declared_routes(service),
                split=split,
                traffic=_routing(traffic),
            ),
        )

    def _table_of_one(self, host: _Made[VirtualHost]) -> _Made[RouteConfiguration]:
        return self._once(("outbound", host), lambda: _Made(captured.routes(host.message)))

    def _captured_listeners(
        self, mesh: MeshState, splits: Mapping[str, Mapping[str, int]], traces: str | None
    ) -> tuple[xds.Bundle, ...]:
        """The listeners of pods whose traffic is redirected that are the same in each of them.

        Being the same, they cannot say in a span whose it is; the span of the called service does.
        """
        traced = None if traces is None else "sidecar"
        frame = self._made("captured_outbound", Listener, port=names.OUTBOUND_PORT)
        chains, looked_into = [], []
        for name, service in mesh.app.services.items():
            if address := mesh.addresses.get(name):
                port, table = mesh.ports.get(name, service.port), f"outbound/{name}"
                tcp = self._made("captured_tcp", Listener, service=name, split=splits[name])
                if service.spoken == "any":
                    http = self._made("listener_outbound", Listener, routes=table, grpc=True, traced=traced)
                    looked_into.append(self._detecting(name, address, port, http, tcp))
                elif service.spoken == "tcp":
                    chains.append((name, address, port, tcp))
                else:
                    grpc = service.spoken == "grpc"
                    http = self._made("listener_outbound", Listener, routes=table, grpc=grpc, traced=traced)
                    chains.append((name, address, port, http))
        outbound = self._once(
            ("captured outbound", frame, *chains),
            lambda: _Made(
                captured.outbound(frame.message, [(*where, chain.message) for *where, chain in chains])
            ),
        )
        ready = self._made("listener_ready", Listener, port=names.READY_PORT)
        by_name = self._by_name(mesh, traced)
        proxy = self._once(("captured proxy", by_name), lambda: _Made(captured.proxy(by_name.message)))
        # One bundle each: what changes with the services must not have the others sent again.
        return tuple(self._bundle(xds.LISTENERS, [one]) for one in (outbound, proxy, ready, *looked_into))

    def _detecting(
        self, name: str, address: str, port: int, http: _Made[Listener], tcp: _Made[Listener]
    ) -> _Made[Listener]:
        """The listener of a service of which nothing says what it speaks."""
        frame = self._made("captured_detect", Listener, service=name, address=address, port=port)
        return self._once(
            ("captured detect", frame, http, tcp),
            lambda: _Made(captured.detecting(frame.message, http=http.message, tcp=tcp.message)),
        )

    def _by_name(self, mesh: MeshState, traced: str | None) -> _Made[Listener]:
        """The outbound listener that reaches all services, by the names that requests carry."""
        grpc = any(service.spoken in ("grpc", "any") for service in mesh.app.services.values())
        return self._made("listener_outbound", Listener, routes="outbound", grpc=grpc, traced=traced)

    def _captured_inbound(self, of: _ServiceParts, port: int) -> xds.Bundle:
        """The listeners of such a pod that are its service's own."""
        mutual_tls, _, plain = of.listeners
        service = of.service
        ports = service.found.aside if service.found else ()
        frame = self._made("captured_inbound", Listener, port=names.INBOUND_PORT, aside=ports)
        # By HTTP, or by bytes where that is what it is: callers say which by ALPN.
        in_plain = (
            plain if service.spoken != "tcp" and (service.spoken != "any" or open_paths(service)) else None
        )
        aside = {number: self._made("captured_aside", Listener, port=number) for number in ports}
        inbound = self._once(
            ("captured inbound", frame, mutual_tls, of.bytes, in_plain, port, *aside.items()),
            lambda: _Made(
                captured.inbound(
                    frame.message,
                    mutual_tls=mutual_tls.message,
                    other=of.bytes and of.bytes.message,
                    plain=in_plain and in_plain.message,
                    port=port,
                    aside={number: listener.message for number, listener in aside.items()},
                )
            ),
        )
        metrics = self._once(
            ("captured plain", plain),
            lambda: _Made(captured.anywhere(plain.message, names.PLAIN_PORT)),
        )
        return self._bundle(xds.LISTENERS, [inbound, metrics])

    # -- the gateway --------------------------------------------------------------------------------------

    def _gateway(
        self,
        mesh: MeshState,
        instance: Instance,
        shared: _Shared,
        table: xds.Bundle,
        traces: str | None,
    ) -> xds.Snapshot:
        """What the Envoy at the edge has: as a sidecar that only calls, and is called from outside."""
        front = self._made("listener_gateway", Listener, traced=None if traces is None else GATEWAY)
        plain = self._made("listener_plain", Listener, open_paths={}, load_token=None)
        if mesh.addresses:  # in a pod, which is reached at its own address
            placed = [
                self._once(
                    ("gateway", front, instance.outbound_port),
                    lambda: _Made(captured.anywhere(front.message, instance.outbound_port)),
                ),
                self._once(
                    ("captured plain", plain),
                    lambda: _Made(captured.anywhere(plain.message, names.PLAIN_PORT)),
                ),
                self._made("listener_ready", Listener, port=names.READY_PORT),
            ]
            own = self._bundle(xds.LISTENERS, placed)
        else:
            where = (instance.host, instance.outbound_port, instance.metrics_port)
            own = self._once(
                ("gateway", front, plain, *where),
                lambda: self._interned(
                    xds.LISTENERS,
                    _placed(
                        (front.message, instance.host, instance.outbound_port),
                        (plain.message, instance.host, instance.metrics_port),
                    ),
                ),
            )
        return {
            xds.RUNTIME: (shared.runtime,),
            xds.CLUSTERS: (shared.clusters,),
            xds.ENDPOINTS: (shared.endpoints,),
            xds.LISTENERS: (own,),
            xds.ROUTES: (table,),
        }

    def _gateway_routes(
        self, mesh: MeshState, splits: Mapping[str, Mapping[str, int]], traffic: Mapping[str, Traffic]
    ) -> xds.Bundle:
        declared = {name: declared_routes(service) for name, service in mesh.app.services.items()}
        hosts = [
            {
                "name": host.name,
                "unknown": host.unknown,
                "routes": [self._gateway_route(route, mesh, splits, traffic) for route in host.routes],
            }
            for host in gateway.hosts(mesh, declared)
        ]
        return self._bundle(xds.ROUTES, [self._made("routes_gateway", RouteConfiguration, hosts=hosts)])

    @staticmethod
    def _gateway_route(
        route: gateway.GatewayRoute,
        mesh: MeshState,
        splits: Mapping[str, Mapping[str, int]],
        traffic: Mapping[str, Traffic],
    ) -> dict[str, Any]:
        """A route with what callers of its (first) service go by."""
        first = route.backends[0][0] if route.backends else None
        return {
            "name": route.name,
            "kind": route.kind,
            "path": route.path,
            "method": route.method,
            "headers": route.headers,
            "clusters": _shares(route.backends, splits),
            "service": first,
            "protocol": mesh.app.services[first].spoken if first else "http",
            "traffic": _routing(traffic[first]) if first else _DEFAULT,
        }

    # -- what the instances of one service share ----------------------------------------------------------

    def _service(
        self,
        mesh: MeshState,
        service: Service,
        allowed: tuple[str, ...],
        faults: tuple[Fault, ...],
        traced: str | None,
    ) -> _ServiceParts:
        """`allowed`: the services that may call; `faults`: those in the sidecars of this service; `traced`:
        what it is called in spans, None for no spans."""
        return self._once(
            ("service", _Is(service), allowed, faults, traced),
            lambda: self._service_parts(mesh, service, allowed, faults, traced),
        )

    def _service_parts(
        self,
        mesh: MeshState,
        service: Service,
        allowed: tuple[str, ...],
        faults: tuple[Fault, ...],
        traced: str | None,
    ) -> _ServiceParts:
        def identity(name: str) -> str:
            return spiffe_id(mesh.mesh, mesh.namespace, name)

        rules = access_rules([identity(caller) for caller in allowed])
        domain = trust_domain(mesh.mesh)

        def inbound(protocol: str) -> _Made[Listener]:
            return self._made(
                "listener_inbound",
                Listener,
                protocol=protocol,
                trust_domain=domain,
                access=rules if protocol == "tcp" else None,
                traced=traced,
            )

        aside = service.found.aside if service.found else ()
        return _ServiceParts(
            service=service,
            rules=rules,
            faults=faults,
            identity=identity,
            app=self._bundle(
                xds.CLUSTERS,
                [
                    self._made("app", Cluster, name="app", protocol=service.spoken),
                    *(self._made("app", Cluster, name=f"aside:{port}", protocol="tcp") for port in aside),
                ],
            ),
            bytes=inbound("tcp") if service.spoken == "any" else None,
            listeners=(
                inbound(service.spoken),
                self._by_name(mesh, traced),
                self._made(
                    "listener_plain",
                    Listener,
                    open_paths=open_paths(service),
                    load_token=self._load_token if service.load else None,
                ),
            ),
            inbound={},
        )

    def _inbound(self, of: _ServiceParts, instance: Instance, *, mirrored: bool) -> xds.Bundle:
        faults = of.faults and tuple(
            fault
            for fault in of.faults
            if fault.version in (None, instance.version) and fault.instance in (None, instance.id)
        )
        bundle = of.inbound.get((faults, mirrored))
        if bundle is None:
            routes = self._made(
                "routes_inbound",
                RouteConfiguration,
                protocol=of.service.spoken,
                access=of.rules,
                routes=inbound_routes(of.service, faults, of.identity),
                mirrored=MIRRORED if mirrored else None,
            )
            bundle = of.inbound[faults, mirrored] = self._bundle(xds.ROUTES, [routes])
        return bundle

    # -- making and remembering ---------------------------------------------------------------------------

    def _once(self, key: Hashable, make: Callable[[], _T]) -> _T:
        """The value for this key, made if it is not remembered."""
        found = self._used.get(key)
        if found is None:
            found = self._before.get(key)
            if found is None:
                found = make()
            self._used[key] = found
        return cast(_T, found)

    def _made(self, template: str, kind: type[_M], **values: Any) -> _Made[_M]:
        """A template rendered and parsed, once for these values."""
        return self._once(
            (template, _frozen(values)),
            lambda: _Made(
                parse(self._environment.get_template(f"{template}.yaml.j2").render(values), kind())
            ),
        )

    def _endpoints_of(
        self, name: str, addresses: tuple[tuple[str, int], ...]
    ) -> _Made[ClusterLoadAssignment]:
        return self._once(("endpoints", name, addresses), lambda: _Made(_assignment(name, addresses)))

    def _bundle(self, type_url: str, made: Sequence[_Made[Any]]) -> xds.Bundle:
        """These messages as one bundle: the same object for as long as they are the same."""
        return self._once(
            ("bundle", *made),
            lambda: self._interned(
                type_url, xds.Bundle({one.name: xds.encode(type_url, one.message) for one in made})
            ),
        )

    def _interned(self, type_url: str, bundle: xds.Bundle) -> xds.Bundle:
        """The bundle of this content that is in use already, if there is one: what is equal is identical."""
        return self._bundles.setdefault((type_url, bundle.version), bundle)


class _Is:
    """A value as a key, by identity: cheap, and it keeps the value alive."""

    __slots__ = ("it",)

    def __init__(self, it: object) -> None:
        self.it = it

    def __hash__(self) -> int:
        return id(self.it)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Is) and other.it is self.it


class _Made(Generic[_M]):
    """A parsed message. Compared by identity, which is cheap: equal input gives the same object."""

    __slots__ = ("message",)

    def __init__(self, message: _M) -> None:
        self.message = message

    @property
    def name(self) -> str:
        """The name that xDS knows it by."""
        assigned = isinstance(self.message, ClusterLoadAssignment)
        return str(self.message.cluster_name if assigned else self.message.name)


_DEFAULT = Traffic()
_GRPC_HEALTH = (
    "/grpc.health.v1.Health/Check"  # https://github.com/grpc/grpc/blob/master/doc/health-checking.md
)

_Versions = Mapping[str, Mapping[str, Sequence[Instance]]]
"""Service -> version -> the instances that its callers know of."""


@dataclass(frozen=True, slots=True)
class _Shared:
    """What all sidecars have."""

    runtime: xds.Bundle
    clusters: xds.Bundle
    endpoints: xds.Bundle
    outbound: xds.Bundle
    listeners: tuple[xds.Bundle, ...]  # where traffic is redirected: those that are the same in all pods


@dataclass(frozen=True, slots=True, eq=False)
class _ServiceParts:
    """What the instances of a service have in common; `inbound`: their routes, by the faults that apply, and
    whether requests are mirrored to them."""

    service: Service
    rules: Mapping[str, Any]
    faults: tuple[Fault, ...]
    identity: Callable[[str], str]
    app: xds.Bundle
    bytes: _Made[Listener] | None  # the inbound listener of what is not HTTP, where it may be either
    listeners: tuple[_Made[Listener], _Made[Listener], _Made[Listener]]
    inbound: dict[tuple[tuple[Fault, ...], bool], xds.Bundle]


# -- pieces -----------------------------------------------------------------------------------------------


def parse(text: str, message: _M) -> _M:
    """YAML as this message; fields that it does not have are refused.

    Raises:
        yaml.YAMLError, json_format.ParseError
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    json_format.ParseDict(yaml.load(text, Loader=loader), message)  # noqa: S506 (both are safe loaders)
    return message


def access_rules(allowed: Sequence[str]) -> dict[str, Any]:
    """RBAC rules (config.rbac.v3.RBAC) that let these SPIFFE identities in and nobody else."""
    if not allowed:
        return {"action": "ALLOW"}
    principals = [{"authenticated": {"principal_name": {"exact": identity}}} for identity in allowed]
    return {
        "action": "ALLOW",
        "policies": {"callers": {"permissions": [{"any": True}], "principals": principals}},
    }


def open_paths(service: Service) -> dict[str, list[str]]:
    """Exact path -> methods that need no certificate: probes, metrics, and what the app file declares."""
    # Of what is not declared the kubelet's probes are all that is known to be asked so.
    told = () if service.found is not None else (service.healthz, service.metrics)
    paths = {path: ["GET"] for path in told if path}
    if service.load:
        paths["/load"] = ["GET"]
    for path, methods in service.open_paths.items():
        paths[path] = list(dict.fromkeys([*paths.get(path, []), *methods]))
    if service.found is not None and service.found.grpc_probe:
        paths[_GRPC_HEALTH] = ["POST"]
    return paths


def _serving(
    mesh: MeshState, traffic: Mapping[str, Traffic], ejected: Collection[str]
) -> tuple[dict[str, dict[str, int]], _Versions]:
    """By service: the split in force, and for each version the instances that its callers know of.

    Those are the ones that are ready and not ejected. Where a version has none, its callers keep what there
    is: they send nothing there once the split has moved on, until then a draining instance still answers, and
    if there is no other version an instance that is not ready is better than none.
    """
    versions: dict[str, dict[str, list[Instance]]] = {
        name: {version: [] for version in service.versions} for name, service in mesh.app.services.items()
    }
    for instance in mesh.instances:
        if instance.host:  # a pod that is being started has no address yet
            versions[instance.service].setdefault(instance.version, []).append(instance)
    splits: dict[str, dict[str, int]] = {}
    known: dict[str, dict[str, list[Instance]]] = {}
    for name, service in mesh.app.services.items():
        takes = {
            version: [i for i in instances if i.ready and i.id not in ejected]
            for version, instances in versions[name].items()
        }
        split = effective_split(service, traffic[name], {version: len(i) for version, i in takes.items()})
        splits[name] = split
        known[name] = {
            version: takes[version] or [i for i in instances if version not in split or i.id not in ejected]
            for version, instances in versions[name].items()
        }
    return splits, known


def _limits(traffic: Traffic) -> Traffic:
    """The part of the traffic rules that stands in clusters."""
    return Traffic(
        max_connections=traffic.max_connections,
        max_pending=traffic.max_pending,
        max_requests=traffic.max_requests,
        outlier=traffic.outlier,
        retries=1 if traffic.retries else None,  # its budget; the number stands in the routes
    )


def _routing(traffic: Traffic) -> Traffic:
    """The part of the traffic rules that stands in routes, besides the split."""
    return Traffic(timeout_ms=traffic.timeout_ms, retries=traffic.retries, mirror=_mirrors(traffic))


def _mirrors(traffic: Traffic) -> dict[str, float]:
    """The versions that get copies of requests, and of what share."""
    return {version: share for version, share in traffic.mirror.items() if share}


def _domains(service: str, home: str) -> list[str]:
    name, namespace = names.parted(service, home)
    short = [name] if namespace == home else []
    return short + [f"{name}.{namespace}{suffix}" for suffix in ("", ".svc", ".svc.cluster.local")]


def _with_hosts(frame: RouteConfiguration, hosts: Sequence[VirtualHost]) -> RouteConfiguration:
    routes = RouteConfiguration()
    routes.CopyFrom(frame)
    routes.virtual_hosts.extend(hosts)
    return routes


def _assignment(name: str, addresses: Iterable[tuple[str, int]]) -> ClusterLoadAssignment:
    assignment = ClusterLoadAssignment(cluster_name=name)
    locality = assignment.endpoints.add()
    for host, port in addresses:
        address = locality.lb_endpoints.add().endpoint.address.socket_address
        address.address, address.port_value = host, port
    return assignment


def _shares(backends: Iterable[tuple[str, int]], splits: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """Cluster -> weight: each backend's share, divided as its own traffic is split."""
    parts = {
        f"{service}/{version}": weight * part / sum(splits[service].values())
        for service, weight in backends
        for version, part in splits[service].items()
        if part
    }
    whole = sum(parts.values())
    return {cluster: max(1, round(1_000_000 * part / whole)) for cluster, part in parts.items()}


def _listeners(
    shared: tuple[_Made[Listener], _Made[Listener], _Made[Listener]], instance: Instance
) -> xds.Bundle:
    inbound, outbound, plain = (one.message for one in shared)
    return _placed(
        (inbound, instance.host, instance.inbound_port),
        (outbound, "127.0.0.1", instance.outbound_port),
        (plain, instance.host, instance.metrics_port),
    )


def _placed(*listeners: tuple[Listener, str, int]) -> xds.Bundle:
    """Listeners, each at its address and port."""
    encoded = {}
    for message, host, port in listeners:
        listener = Listener()
        listener.CopyFrom(message)
        listener.address.socket_address.address = host
        listener.address.socket_address.port_value = port
        encoded[listener.name] = xds.encode(xds.LISTENERS, listener)
    return xds.Bundle(encoded)


def _frozen(value: Any) -> Hashable:
    """A value as something that can be a key."""
    if isinstance(value, Mapping):
        return tuple((key, _frozen(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, BaseModel):
        return tuple((key, _frozen(item)) for key, item in value)
    return cast(Hashable, value)
