"""What an instance is called through: who may, which faults strike, what needs no certificate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from envoy.config.cluster.v3.cluster_pb2 import Cluster
from envoy.config.listener.v3.listener_pb2 import Listener
from envoy.config.route.v3.route_pb2 import RouteConfiguration

from meshdemo.apps.model import Service
from meshdemo.control import xds
from meshdemo.control.identity import spiffe_id, trust_domain
from meshdemo.control.model import Fault, Instance, MeshState
from meshdemo.control.render.cache import Cache, Is, Made
from meshdemo.control.render.outbound import by_name
from meshdemo.control.render.routes import inbound_routes
from meshdemo.control.signals import MIRRORED

# https://github.com/grpc/grpc/blob/master/doc/health-checking.md
_GRPC_HEALTH = "/grpc.health.v1.Health/Check"


@dataclass(frozen=True, slots=True)
class Listeners:
    """The listeners of an instance's sidecar, not yet at its addresses."""

    inbound: Made[Listener]
    outbound: Made[Listener]
    plain: Made[Listener]

    def at(self, instance: Instance) -> xds.Bundle:
        """At the addresses of an instance whose traffic is not redirected."""
        return placed(
            (self.inbound.message, instance.host, instance.inbound_port),
            (self.outbound.message, "127.0.0.1", instance.outbound_port),
            (self.plain.message, instance.host, instance.metrics_port),
        )


@dataclass(frozen=True, slots=True, eq=False)
class ServiceParts:
    """What the instances of a service have in common; `routes`: theirs, by the faults that apply, and whether
    requests are mirrored to them."""

    service: Service
    rules: Mapping[str, Any]
    faults: tuple[Fault, ...]
    identity: Callable[[str], str]
    app: xds.Bundle
    bytes: Made[Listener] | None  # the inbound listener of what is not HTTP, where it may be either
    listeners: Listeners
    routes: dict[tuple[tuple[Fault, ...], bool], xds.Bundle]


def service_parts(
    cache: Cache,
    mesh: MeshState,
    service: Service,
    *,
    allowed: tuple[str, ...],
    faults: tuple[Fault, ...],
    traced: str | None,
    load_token: str | None,
) -> ServiceParts:
    """What the instances of a service share.

    Args:
        allowed: the services that may call.
        faults: those in the sidecars of this service.
        traced: what it is called in spans, None for no spans.
        load_token: who shows it may set the load of instances that make load; None: nobody.
    """

    def identity(name: str) -> str:
        return spiffe_id(mesh.mesh, mesh.namespace, name)

    def make() -> ServiceParts:
        rules = access_rules([identity(caller) for caller in allowed])
        aside = service.found.aside if service.found else ()

        def called(protocol: str) -> Made[Listener]:
            return cache.made(
                "listener_inbound",
                Listener,
                protocol=protocol,
                trust_domain=trust_domain(mesh.mesh),
                access=rules if protocol == "tcp" else None,
                traced=traced,
            )

        return ServiceParts(
            service=service,
            rules=rules,
            faults=faults,
            identity=identity,
            app=cache.bundle(
                xds.CLUSTERS,
                [
                    cache.made("app", Cluster, name="app", protocol=service.spoken),
                    *(cache.made("app", Cluster, name=f"aside:{port}", protocol="tcp") for port in aside),
                ],
            ),
            bytes=called("tcp") if service.spoken == "any" else None,
            listeners=Listeners(
                inbound=called(service.spoken),
                outbound=by_name(cache, mesh, traced),
                plain=cache.made(
                    "listener_plain",
                    Listener,
                    open_paths=open_paths(service),
                    load_token=load_token if service.load else None,
                ),
            ),
            routes={},
        )

    return cache.once(("service", Is(service), allowed, faults, traced), make)


def routes(cache: Cache, of: ServiceParts, instance: Instance, *, mirrored: bool) -> xds.Bundle:
    """The route table of an instance. `mirrored`: whether it gets copies of requests."""
    faults = of.faults and tuple(
        fault
        for fault in of.faults
        if fault.version in (None, instance.version) and fault.instance in (None, instance.id)
    )
    bundle = of.routes.get((faults, mirrored))
    if bundle is None:
        table = cache.made(
            "routes_inbound",
            RouteConfiguration,
            protocol=of.service.spoken,
            access=of.rules,
            routes=inbound_routes(of.service, faults, of.identity),
            mirrored=MIRRORED if mirrored else None,
        )
        bundle = of.routes[faults, mirrored] = cache.bundle(xds.ROUTES, [table])
    return bundle


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


def placed(*listeners: tuple[Listener, str, int]) -> xds.Bundle:
    """Listeners, each at its address and port."""
    encoded = {}
    for message, host, port in listeners:
        listener = Listener()
        listener.CopyFrom(message)
        listener.address.socket_address.address = host
        listener.address.socket_address.port_value = port
        encoded[listener.name] = xds.encode(xds.LISTENERS, listener)
    return xds.Bundle(encoded)
