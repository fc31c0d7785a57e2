"""What an instance is called through: who may, which faults strike, what needs no certificate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from envoy.config.cluster.v3.cluster_pb2 import Cluster
from envoy.config.listener.v3.listener_pb2 import Listener
from envoy.config.route.v3.route_pb2 import RouteConfiguration

from meshdemo.apps.model import FurtherPort, Service
from meshdemo.control import xds
from meshdemo.control.identity import spiffe_id, trust_domain
from meshdemo.control.model import Fault, Instance, MeshState
from meshdemo.control.render.cache import Cache, Is, Made
from meshdemo.control.render.outbound import by_name
from meshdemo.control.render.routes import Served, inbound_routes, served
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


@dataclass(frozen=True, slots=True)
class Door:
    """How a port of an instance is called."""

    port: Served
    mutual_tls: Made[Listener]
    bytes: Made[Listener] | None  # of what is not HTTP, where it may be either
    plain: Made[Listener] | None  # in plain text, where there is anything to say


@dataclass(frozen=True, slots=True, eq=False)
class ServiceParts:
    """What the instances of a service have in common; `routes`: theirs, by the faults that apply, and whether
    requests are mirrored to them."""

    service: Service
    rules: Mapping[str, Any]
    faults: tuple[Fault, ...]
    identity: Callable[[str], str]
    app: xds.Bundle
    doors: tuple[Door, ...]
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
        callers = [identity(caller) for caller in allowed]
        rules = access_rules(callers)
        aside = service.found.aside if service.found else ()

        def called(port: Served, protocol: str) -> Made[Listener]:
            return cache.made(
                "listener_inbound",
                Listener,
                port=port.within,
                protocol=protocol,
                trust_domain=trust_domain(mesh.mesh),
                callers=callers if protocol == "tcp" else None,
                access=rules if protocol == "tcp" else None,
                traced=traced,
            )

        def plain(port: Served) -> Made[Listener]:
            return cache.made(
                "listener_plain",
                Listener,
                port=port.within,
                open_paths=open_paths(port.of),
                load_token=load_token if service.load else None,
            )

        def door(port: Served) -> Door:
            # What is no HTTP, or may be something else, hears it in plain text if it is known to be asked so.
            speaks = port.spoken in ("http", "grpc") or (service.found is not None and open_paths(port.of))
            return Door(
                port=port,
                mutual_tls=called(port, port.spoken),
                bytes=called(port, "tcp") if port.spoken == "any" else None,
                plain=plain(port) if speaks else None,
            )

        ports = [port for port in served(service) if not port.part]
        return ServiceParts(
            service=service,
            rules=rules,
            faults=faults,
            identity=identity,
            app=cache.bundle(
                xds.CLUSTERS,
                [
                    *(
                        # The kubelet may ask in another protocol than callers do.
                        cache.made(
                            "app",
                            Cluster,
                            name=f"app{port.within}",
                            protocol="any" if service.found is not None else port.spoken,
                        )
                        for port in ports
                    ),
                    *(cache.made("app", Cluster, name=f"aside:{port}", protocol="tcp") for port in aside),
                ],
            ),
            doors=tuple(door(port) for port in ports),
            listeners=Listeners(
                inbound=called(ports[0], service.spoken),
                outbound=by_name(cache, mesh, traced),
                plain=plain(ports[0]),
            ),
            routes={},
        )

    return cache.once(("service", Is(service), allowed, faults, traced), make)


def routes(cache: Cache, of: ServiceParts, instance: Instance, *, mirrored: bool) -> xds.Bundle:
    """The route tables of an instance, one for each port. `mirrored`: whether it gets copies of requests."""
    faults = of.faults and tuple(
        fault
        for fault in of.faults
        if fault.version in (None, instance.version) and fault.instance in (None, instance.id)
    )
    bundle = of.routes.get((faults, mirrored))
    if bundle is None:
        tables = [
            cache.made(
                "routes_inbound",
                RouteConfiguration,
                port=door.port.within,
                protocol=door.port.spoken,
                access=of.rules,
                routes=inbound_routes(door.port.routes, faults, of.identity),
                mirrored=MIRRORED if mirrored else None,
            )
            for door in of.doors
        ]
        bundle = of.routes[faults, mirrored] = cache.bundle(xds.ROUTES, tables)
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


def open_paths(of: Service | FurtherPort) -> dict[str, list[str]]:
    """Exact path -> methods that need no certificate: probes, metrics, and what the app file declares."""
    declared = isinstance(of, Service) and of.found is None
    # Of what is not declared only that counts which is known to be asked so.
    told = (of.healthz, of.metrics) if isinstance(of, Service) and declared else ()
    paths = {path: ["GET"] for path in told if path}
    if isinstance(of, Service) and of.load:
        paths["/load"] = ["GET"]
    for path, methods in of.open_paths.items():
        paths[path] = list(dict.fromkeys([*paths.get(path, []), *methods]))
    probed = of if isinstance(of, FurtherPort) else of.found
    if probed is not None and probed.grpc_probe:
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
