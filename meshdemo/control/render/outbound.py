"""What a sidecar calls others with: clusters, their endpoints, routes. All sidecars share it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from envoy.config.cluster.v3.cluster_pb2 import Cluster
from envoy.config.listener.v3.listener_pb2 import Listener
from envoy.config.route.v3.route_components_pb2 import VirtualHost  # with it, FilterConfig
from envoy.config.route.v3.route_pb2 import RouteConfiguration

from meshdemo import names
from meshdemo.control import captured, xds
from meshdemo.control.identity import spiffe_id
from meshdemo.control.model import MeshState, Traffic
from meshdemo.control.render.cache import Cache, Is, Made
from meshdemo.control.render.routes import Served, served
from meshdemo.control.render.split import Versions, by_port


@dataclass(frozen=True, slots=True)
class Shared:
    """What all sidecars have."""

    runtime: xds.Bundle
    clusters: xds.Bundle
    endpoints: xds.Bundle
    routes: xds.Bundle
    listeners: tuple[xds.Bundle, ...]  # where traffic is redirected: those that are the same in all pods


def clusters(
    cache: Cache, mesh: MeshState, versions: Versions, traffic: Mapping[str, Traffic], traces: str | None
) -> xds.Bundle:
    """A cluster for each version of each service, by each of its ports, and what else is called.

    `traces`: the collector of spans, host:port.
    """
    made = [
        _cluster(cache, mesh, name, version, port, traffic[name])
        for name in versions
        for port in served(mesh.app.services[name])
        for version in versions[name]
    ]
    if mesh.addresses:
        made.append(cache.made("passthrough", Cluster))
    if traces is not None:
        host, _, port = traces.rpartition(":")
        made.append(cache.made("traces", Cluster, host=host.strip("[]"), port=int(port)))
    return cache.bundle(xds.CLUSTERS, made)


def _cluster(
    cache: Cache, mesh: MeshState, name: str, version: str, port: Served, traffic: Traffic
) -> Made[Cluster]:
    return cache.once(
        ("cluster", Is(port.of), version, Is(traffic)),
        lambda: cache.made(
            "cluster",
            Cluster,
            name=f"{name}/{version}{port.suffix}",
            protocol=port.spoken,
            identity=spiffe_id(mesh.mesh, mesh.namespace, name),
            traffic=_limits(traffic),
        ),
    )


def endpoints(cache: Cache, mesh: MeshState, versions: Versions) -> xds.Bundle:
    """The instances that each version's callers know of, and those of them that have a further port."""
    found = []
    for name, of in versions.items():
        further = [port for port in served(mesh.app.services[name]) if port.key]
        for version, serving in of.items():
            where = tuple((i.host, i.inbound_port) for i in serving)
            found.append(cache.endpoints(f"{name}/{version}", where))
            for port in further:
                where = tuple((i.host, port.number) for i in serving if port.key in i.further)
                found.append(cache.endpoints(f"{name}/{version}{port.suffix}", where))
    return cache.bundle(xds.ENDPOINTS, found)


def routes(
    cache: Cache,
    mesh: MeshState,
    versions: Versions,
    splits: Mapping[str, Mapping[str, int]],
    traffic: Mapping[str, Traffic],
) -> xds.Bundle:
    """A virtual host for each service, with its declared routes."""
    hosts, further = [], []
    for name, service in mesh.app.services.items():
        first, *others = (
            _host(cache, mesh, name, port, by_port(splits[name], versions[name], port), traffic[name])
            for port in served(service)
        )
        hosts.append(first)
        further += others
    frame = cache.made("routes_outbound", RouteConfiguration)
    table = cache.once(
        ("outbound", frame, *hosts),
        lambda: Made(_with_hosts(frame.message, [host.message for host in hosts])),
    )
    # Where traffic is redirected, the address that was called says which service is meant.
    redirected = [_table_of_one(cache, host) for host in ((*hosts, *further) if mesh.addresses else ())]
    return cache.bundle(xds.ROUTES, [table, *redirected])


def _host(
    cache: Cache, mesh: MeshState, name: str, port: Served, split: Mapping[str, int], traffic: Traffic
) -> Made[VirtualHost]:
    return cache.once(
        ("host", Is(port.of), tuple(split.items()), Is(traffic)),
        lambda: cache.made(
            "virtual_host",
            VirtualHost,
            service=name,
            port=port.suffix,
            protocol=port.spoken,
            domains=_domains(name, mesh.namespace),
            routes=port.routes,
            split=split,
            traffic=routing(traffic),
        ),
    )


def _table_of_one(cache: Cache, host: Made[VirtualHost]) -> Made[RouteConfiguration]:
    return cache.once(("outbound", host), lambda: Made(captured.routes(host.message)))


def by_name(cache: Cache, mesh: MeshState, traced: str | None) -> Made[Listener]:
    """The outbound listener that reaches all services, by the names that requests carry.

    `traced`: what the caller is called in spans, None for no spans.
    """
    grpc = any(service.spoken in ("grpc", "any") for service in mesh.app.services.values())
    return cache.made("listener_outbound", Listener, routes="outbound", grpc=grpc, traced=traced)


def routing(traffic: Traffic) -> Traffic:
    """The part of the traffic rules that stands in routes, besides the split."""
    return Traffic(timeout_ms=traffic.timeout_ms, retries=traffic.retries, mirror=mirrors(traffic))


def mirrors(traffic: Traffic) -> dict[str, float]:
    """The versions that get copies of requests, and of what share."""
    return {version: share for version, share in traffic.mirror.items() if share}


def _limits(traffic: Traffic) -> Traffic:
    """The part of the traffic rules that stands in clusters."""
    return Traffic(
        max_connections=traffic.max_connections,
        max_pending=traffic.max_pending,
        max_requests=traffic.max_requests,
        outlier=traffic.outlier,
        retries=1 if traffic.retries else None,  # its budget; the number stands in the routes
    )


def _domains(service: str, home: str) -> list[str]:
    name, namespace = names.parted(service, home)
    short = [name] if namespace == home else []
    return short + [f"{name}.{namespace}{suffix}" for suffix in ("", ".svc", ".svc.cluster.local")]


def _with_hosts(frame: RouteConfiguration, hosts: Sequence[VirtualHost]) -> RouteConfiguration:
    routes = RouteConfiguration()
    routes.CopyFrom(frame)
    routes.virtual_hosts.extend(hosts)
    return routes
