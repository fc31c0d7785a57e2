"""The listeners of pods whose traffic is redirected into the sidecar (Kubernetes); captured.py makes them."""

from __future__ import annotations

from collections.abc import Mapping

from envoy.config.listener.v3.listener_pb2 import Listener

from meshdemo import names
from meshdemo.control import captured, xds
from meshdemo.control.model import MeshState
from meshdemo.control.render.cache import Cache, Made
from meshdemo.control.render.inbound import Door, ServiceParts
from meshdemo.control.render.outbound import by_name
from meshdemo.control.render.routes import Served, served
from meshdemo.control.render.split import Versions, by_port


def shared(
    cache: Cache,
    mesh: MeshState,
    versions: Versions,
    splits: Mapping[str, Mapping[str, int]],
    traces: str | None,
) -> tuple[xds.Bundle, ...]:
    """Those that are the same in each such pod.

    Being the same, they cannot say in a span whose it is; the span of the called service does.
    """
    traced = None if traces is None else "sidecar"
    frame = cache.made("captured_outbound", Listener, port=names.OUTBOUND_PORT)
    chains, looked_into = [], []
    for name, service in mesh.app.services.items():
        if name not in mesh.addresses:
            continue
        ports = {port.key: port for port in served(service)}
        for called, address, number, key in mesh.places(name):
            port = ports[key]
            http, tcp = _chains(cache, name, port, by_port(splits[name], versions[name], port), traced)
            if port.spoken == "any":
                looked_into.append(_detecting(cache, called, address, number, http, tcp))
            else:
                chains.append((called, address, number, tcp if port.spoken == "tcp" else http))
    outbound = cache.once(
        ("captured outbound", frame, *chains),
        lambda: Made(captured.outbound(frame.message, [(*where, chain.message) for *where, chain in chains])),
    )
    named = by_name(cache, mesh, traced)
    proxy = cache.once(("captured proxy", named), lambda: Made(captured.proxy(named.message)))
    # One bundle each: what changes with the services must not have the others sent again.
    return tuple(cache.bundle(xds.LISTENERS, [one]) for one in (outbound, proxy, ready(cache), *looked_into))


def _chains(
    cache: Cache, service: str, port: Served, split: Mapping[str, int], traced: str | None
) -> tuple[Made[Listener], Made[Listener]]:
    """What carries requests, and bytes, to a port of a service."""
    table, grpc = f"outbound/{service}{port.suffix}", port.spoken in ("grpc", "any")
    return (
        cache.made("listener_outbound", Listener, routes=table, grpc=grpc, traced=traced),
        cache.made("captured_tcp", Listener, service=service, port=port.suffix, split=split),
    )


def _detecting(
    cache: Cache, name: str, address: str, port: int, http: Made[Listener], tcp: Made[Listener]
) -> Made[Listener]:
    """The listener of a service of which nothing says what it speaks."""
    frame = cache.made("captured_detect", Listener, service=name, address=address, port=port)
    return cache.once(
        ("captured detect", frame, http, tcp),
        lambda: Made(captured.detecting(frame.message, http=http.message, tcp=tcp.message)),
    )


def own(cache: Cache, of: ServiceParts, port: int) -> xds.Bundle:
    """Those that are its service's own, in a pod whose app serves `port` as the first one."""
    past = of.service.found.aside if of.service.found else ()
    frame = cache.made("captured_inbound", Listener, port=names.INBOUND_PORT, aside=past)
    doors = {(door.port.number if door.port.key else port): door for door in of.doors}
    parts = [(number, door.mutual_tls, door.bytes, door.plain) for number, door in doors.items()]
    aside = {number: cache.made("captured_aside", Listener, port=number) for number in past}
    inbound = cache.once(
        ("captured inbound", frame, *parts, *aside.items()),
        lambda: Made(
            captured.inbound(
                frame.message,
                doors={number: _door(door) for number, door in doors.items()},
                aside={number: listener.message for number, listener in aside.items()},
            )
        ),
    )
    return cache.bundle(xds.LISTENERS, [inbound, anywhere(cache, of.listeners.plain, names.PLAIN_PORT)])


def _door(door: Door) -> captured.Door:
    return captured.Door(
        mutual_tls=door.mutual_tls.message,
        other=door.bytes and door.bytes.message,
        plain=door.plain and door.plain.message,
    )


def anywhere(cache: Cache, listener: Made[Listener], port: int) -> Made[Listener]:
    """A listener, on this port of all the pod's addresses."""
    return cache.once(
        ("captured anywhere", listener, port), lambda: Made(captured.anywhere(listener.message, port))
    )


def ready(cache: Cache) -> Made[Listener]:
    """Where the kubelet asks whether the sidecar is ready."""
    return cache.made("listener_ready", Listener, port=names.READY_PORT)
