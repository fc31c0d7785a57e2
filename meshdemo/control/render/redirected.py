"""The listeners of pods whose traffic is redirected into the sidecar (Kubernetes); captured.py makes them."""

from __future__ import annotations

from collections.abc import Mapping

from envoy.config.listener.v3.listener_pb2 import Listener

from meshdemo import names
from meshdemo.control import captured, xds
from meshdemo.control.model import MeshState
from meshdemo.control.render.cache import Cache, Made
from meshdemo.control.render.inbound import ServiceParts, open_paths
from meshdemo.control.render.outbound import by_name


def shared(
    cache: Cache, mesh: MeshState, splits: Mapping[str, Mapping[str, int]], traces: str | None
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
        table, grpc = f"outbound/{name}", service.spoken in ("grpc", "any")
        tcp = cache.made("captured_tcp", Listener, service=name, split=splits[name])
        http = cache.made("listener_outbound", Listener, routes=table, grpc=grpc, traced=traced)
        for called, address, port in mesh.places(name):
            if service.spoken == "any":
                looked_into.append(_detecting(cache, called, address, port, http, tcp))
            else:
                chains.append((called, address, port, tcp if service.spoken == "tcp" else http))
    outbound = cache.once(
        ("captured outbound", frame, *chains),
        lambda: Made(captured.outbound(frame.message, [(*where, chain.message) for *where, chain in chains])),
    )
    named = by_name(cache, mesh, traced)
    proxy = cache.once(("captured proxy", named), lambda: Made(captured.proxy(named.message)))
    # One bundle each: what changes with the services must not have the others sent again.
    return tuple(cache.bundle(xds.LISTENERS, [one]) for one in (outbound, proxy, ready(cache), *looked_into))


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
    """Those that are its service's own, in a pod whose app serves `port`."""
    service, mutual_tls, plain = of.service, of.listeners.inbound, of.listeners.plain
    ports = service.found.aside if service.found else ()
    frame = cache.made("captured_inbound", Listener, port=names.INBOUND_PORT, aside=ports)
    # By HTTP, or by bytes where that is what it is: callers say which by ALPN.
    in_plain = plain if service.spoken != "tcp" and (service.spoken != "any" or open_paths(service)) else None
    aside = {number: cache.made("captured_aside", Listener, port=number) for number in ports}
    inbound = cache.once(
        ("captured inbound", frame, mutual_tls, of.bytes, in_plain, port, *aside.items()),
        lambda: Made(
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
    return cache.bundle(xds.LISTENERS, [inbound, anywhere(cache, plain, names.PLAIN_PORT)])


def anywhere(cache: Cache, listener: Made[Listener], port: int) -> Made[Listener]:
    """A listener, on this port of all the pod's addresses."""
    return cache.once(
        ("captured anywhere", listener, port), lambda: Made(captured.anywhere(listener.message, port))
    )


def ready(cache: Cache) -> Made[Listener]:
    """Where the kubelet asks whether the sidecar is ready."""
    return cache.made("listener_ready", Listener, port=names.READY_PORT)
