"""What the Envoy at the edge, the gateway, has: as a sidecar that only calls, and is called from outside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from envoy.config.listener.v3.listener_pb2 import Listener
from envoy.config.route.v3.route_pb2 import RouteConfiguration

from meshdemo import names
from meshdemo.apps.model import GATEWAY, App
from meshdemo.control import gateway, xds
from meshdemo.control.model import Instance, MeshState, Traffic
from meshdemo.control.render import redirected
from meshdemo.control.render.cache import Cache
from meshdemo.control.render.inbound import placed
from meshdemo.control.render.outbound import Shared, routing
from meshdemo.control.render.routes import Served, served
from meshdemo.control.render.split import Versions, by_port, shares


def snapshot(
    cache: Cache,
    mesh: MeshState,
    instance: Instance,
    shared: Shared,
    table: xds.Bundle,
    traces: str | None,
) -> xds.Snapshot:
    """All that it has. `table`: its `routes`."""
    front = cache.made("listener_gateway", Listener, traced=None if traces is None else GATEWAY)
    plain = cache.made("listener_plain", Listener, port="", open_paths={}, load_token=None)
    if mesh.addresses:  # in a pod, which is reached at its own address
        listeners = cache.bundle(
            xds.LISTENERS,
            [
                redirected.anywhere(cache, front, instance.outbound_port),
                redirected.anywhere(cache, plain, names.PLAIN_PORT),
                redirected.ready(cache),
            ],
        )
    else:
        listeners = cache.once(
            ("gateway", front, plain, instance.host, instance.outbound_port, instance.metrics_port),
            lambda: cache.interned(
                xds.LISTENERS,
                placed(
                    (front.message, instance.host, instance.outbound_port),
                    (plain.message, instance.host, instance.metrics_port),
                ),
            ),
        )
    return {
        xds.RUNTIME: (shared.runtime,),
        xds.CLUSTERS: (shared.clusters,),
        xds.ENDPOINTS: (shared.endpoints,),
        xds.LISTENERS: (listeners,),
        xds.ROUTES: (table,),
    }


def routes(
    cache: Cache,
    mesh: MeshState,
    versions: Versions,
    splits: Mapping[str, Mapping[str, int]],
    traffic: Mapping[str, Traffic],
) -> xds.Bundle:
    """What it does with requests from outside."""
    ports = backends(mesh.app)
    declared = {backend: port.routes for backend, port in ports.items()}
    hosts = [
        {
            "name": host.name,
            "unknown": host.unknown,
            "routes": [_route(route, ports, versions, splits, traffic) for route in host.routes],
        }
        for host in gateway.hosts(mesh, declared)
    ]
    return cache.bundle(xds.ROUTES, [cache.made("routes_gateway", RouteConfiguration, hosts=hosts)])


def backends(app: App) -> dict[str, Served]:
    """All that requests can be led to, as an Entry names it."""
    return {
        f"{name}:{port.key}" if port.key else name: port
        for name, service in app.services.items()
        for port in served(service)
        if port.spoken != "tcp" and not port.part
    }


def _route(
    route: gateway.GatewayRoute,
    ports: Mapping[str, Served],
    versions: Versions,
    splits: Mapping[str, Mapping[str, int]],
    traffic: Mapping[str, Traffic],
) -> dict[str, Any]:
    """A route with what callers of its (first) service go by."""
    first = route.backends[0][0] if route.backends else None
    service = gateway.service_of(first) if first else None
    weights = []
    for backend, weight in route.backends:
        of, port = gateway.service_of(backend), ports[backend]
        weights.append((of, port.suffix, by_port(splits[of], versions[of], port), weight))
    return {
        "name": route.name,
        "kind": route.kind,
        "path": route.path,
        "method": route.method,
        "headers": route.headers,
        "clusters": shares(weights),
        "service": service,
        "port": ports[first].suffix if first else "",
        "protocol": ports[first].spoken if first else "http",
        "traffic": routing(traffic[service]) if service else Traffic(),
    }
