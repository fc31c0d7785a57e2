"""What travels over xDS: encoded resources, in bundles that many sidecars share.

A resource is encoded once, as it will stand in a response; a bundle is a set of such resources that belong
together (all clusters, the endpoints of all services, the listeners of one instance). What a sidecar should
have is a snapshot: for each type the bundles that make it up. A thousand sidecars refer to the same bundle
objects, so that comparing, storing and sending what they share costs once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Final

from google.protobuf.message import Message

_PREFIX = "type.googleapis.com/"
RUNTIME: Final = _PREFIX + "envoy.service.runtime.v3.Runtime"
CLUSTERS: Final = _PREFIX + "envoy.config.cluster.v3.Cluster"
ENDPOINTS: Final = _PREFIX + "envoy.config.endpoint.v3.ClusterLoadAssignment"
LISTENERS: Final = _PREFIX + "envoy.config.listener.v3.Listener"
ROUTES: Final = _PREFIX + "envoy.config.route.v3.RouteConfiguration"
SECRETS: Final = _PREFIX + "envoy.extensions.transport_sockets.tls.v3.Secret"

ORDER: Final = (RUNTIME, SECRETS, CLUSTERS, ENDPOINTS, LISTENERS, ROUTES)
"""The order of sending: what others refer to comes first (make before break)."""

STATE_OF_THE_WORLD: Final = frozenset((CLUSTERS, LISTENERS))
"""Types of which a response holds everything; what is not in it goes. Of others, it holds what changed."""

SHORT: Final[Mapping[str, str]] = {
    RUNTIME: "runtime", SECRETS: "secrets", CLUSTERS: "clusters", ENDPOINTS: "endpoints",
    LISTENERS: "listeners", ROUTES: "routes",
}  # fmt: skip
"""Names of the types for people."""


class Bundle:
    """Encoded resources of one type that belong together. Compared by identity: renderers share them."""

    __slots__ = ("__weakref__", "_parts", "_whole", "names", "resources", "version")

    def __init__(self, resources: Mapping[str, bytes]) -> None:
        """Resources by name, each as `encode` makes it."""
        self.resources = resources
        self.names = frozenset(resources)
        self._whole = b"".join(resources.values())
        self._parts: dict[frozenset[str], bytes] = {}
        # A hash of the content: the same after a restart of the control plane.
        self.version = hashlib.blake2b(self._whole, digest_size=8).hexdigest()

    def part(self, names: frozenset[str]) -> bytes:
        """The resources of these names that are in the bundle, ready to stand in a response."""
        if names >= self.names:
            return self._whole
        part = self._parts.get(names)
        if part is None:
            part = b"".join(data for name, data in self.resources.items() if name in names)
            if len(self._parts) > 32:  # sidecars ask for the same few sets; do not keep odd ones
                self._parts.clear()
            self._parts[names] = part
        return part


Snapshot = Mapping[str, tuple[Bundle, ...]]
"""What one sidecar should have: type URL -> bundles."""


def encode(type_url: str, resource: Message) -> bytes:
    """A resource as it stands in a DiscoveryResponse: field 2 (`resources`), an `Any` of it."""
    value = resource.SerializeToString(deterministic=True)
    return field(2, field(1, type_url.encode()) + field(2, value))


def response(type_url: str, version: str, nonce: str, resources: list[bytes]) -> bytes:
    """An encoded DiscoveryResponse: version_info (1), resources (2), type_url (4) and nonce (5)."""
    return b"".join(
        (field(1, version.encode()), *resources, field(4, type_url.encode()), field(5, nonce.encode()))
    )


def field(number: int, data: bytes) -> bytes:
    """A length-delimited protobuf field (https://protobuf.dev/programming-guides/encoding/)."""
    return bytes(_varint(number << 3 | 2) + _varint(len(data))) + data


def _varint(value: int) -> bytearray:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return out
