"""Listeners of pods whose traffic is redirected into the sidecar (Kubernetes), put together from the others.

An app in such a pod knows nothing of a proxy: it connects to a service's address, and the kernel leads the
connection to the sidecar, which sees where it was going. So there is one listener in each direction for
everything, with a filter chain for each place that a connection may have been going to. The chains
themselves are those of the ordinary listeners. Pure: messages in, messages out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from envoy.config.listener.v3.listener_components_pb2 import FilterChain
from envoy.config.listener.v3.listener_pb2 import Listener
from envoy.config.route.v3.route_components_pb2 import VirtualHost
from envoy.config.route.v3.route_pb2 import RouteConfiguration
from envoy.extensions.filters.listener.http_inspector.v3 import http_inspector_pb2 as _http_inspector
from envoy.extensions.filters.listener.original_dst.v3 import original_dst_pb2 as _original_dst
from envoy.extensions.filters.listener.tls_inspector.v3 import tls_inspector_pb2 as _tls_inspector
from envoy.extensions.filters.network.direct_response.v3 import config_pb2 as _direct_response

from meshdemo.names import PROXY_PORT

# What the templates name in a `typed_config`; importing it makes it known to protobuf.
_KNOWN = (_original_dst, _tls_inspector, _http_inspector, _direct_response)


@dataclass(frozen=True, slots=True)
class Door:
    """How a port of a pod is called.

    mutual_tls: what the mesh sends; if there is an `other`, that which says by ALPN that it is HTTP.
    plain: the open paths in plain text.
    """

    mutual_tls: Listener
    other: Listener | None
    plain: Listener | None


def inbound(frame: Listener, *, doors: Mapping[int, Door], aside: Mapping[int, Listener]) -> Listener:
    """All that comes into a pod.

    Args:
        doors: the ports that are in the mesh.
        aside: ports that are not, and what carries their bytes.
    """
    listener = _copy(frame)
    for port, door in doors.items():
        for source, transport, kind in (
            (door.mutual_tls, "tls", "http" if door.other is not None else ""),
            (door.other, "tls", ""),
            (door.plain, "raw_buffer", ""),
        ):
            if source is not None:
                chain = _add(listener, source)
                chain.name = f"{port}/{transport}/{kind}".rstrip("/")
                chain.filter_chain_match.destination_port.value = port
                chain.filter_chain_match.transport_protocol = transport
                if kind:
                    chain.filter_chain_match.application_protocols.extend(("h2", "http/1.1"))
    for number, source in aside.items():
        chain = _add(listener, source)
        chain.name = f"{number}/aside"
        chain.filter_chain_match.destination_port.value = number
    return listener


def detecting(frame: Listener, *, http: Listener, tcp: Listener) -> Listener:
    """What is sent to a service that may speak anything: as HTTP if it is that, else as bytes."""
    listener = _copy(frame)
    chain = _add(listener, http)
    chain.name = "http"
    chain.filter_chain_match.application_protocols.extend(("http/1.0", "http/1.1", "h2c"))
    _add(listener, tcp).name = "tcp"
    return listener


def outbound(frame: Listener, services: Iterable[tuple[str, str, int, Listener]]) -> Listener:
    """All that a pod sends. `services`: name, address, port, and the listener that carries the chain."""
    listener = _copy(frame)
    for name, address, port, source in services:
        chain = _add(listener, source)
        chain.name = name
        chain.filter_chain_match.destination_port.value = port
        prefix = chain.filter_chain_match.prefix_ranges.add()
        prefix.address_prefix = address
        prefix.prefix_len.value = 128 if ":" in address else 32
    return listener


def routes(host: VirtualHost) -> RouteConfiguration:
    """The route table of one service's chain: whatever host a request names, it was sent to that service."""
    table = RouteConfiguration(name=f"outbound/{host.name}", virtual_hosts=[host])
    table.virtual_hosts[0].domains[:] = ["*"]
    return table


def proxy(source: Listener) -> Listener:
    """The ordinary outbound listener, on the pod's loopback: for trying a request as the app's neighbour."""
    listener = _copy(source)
    listener.name = "proxy"
    listener.address.socket_address.address = "127.0.0.1"
    listener.address.socket_address.port_value = PROXY_PORT
    return listener


def anywhere(source: Listener, port: int) -> Listener:
    """A listener, on this port of all the pod's addresses."""
    listener = _copy(source)
    listener.address.socket_address.address = "0.0.0.0"  # noqa: S104 - whoever may ask a pod, asks its address
    listener.address.socket_address.port_value = port
    return listener


def _copy(source: Listener) -> Listener:
    listener = Listener()
    listener.CopyFrom(source)
    return listener


def _add(listener: Listener, source: Listener) -> FilterChain:
    chain = listener.filter_chains.add()
    chain.CopyFrom(source.filter_chains[0])
    return chain
