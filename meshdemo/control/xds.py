"""What travels over xDS: encoded resources, in bundles that many sidecars share.

A resource is encoded once, as it will stand in a response; a bundle is a set of such resources that belong
together (all clusters, the endpoints of all services, the listeners of one instance). What a sidecar should
have is a snapshot: for each type the bundles that make it up. A thousand sidecars refer to the same bundle
objects, so that comparing, storing and sending what they share costs once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import lru_cache
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

WHOLE: Final = frozenset((CLUSTERS, LISTENERS))
"""Types that a sidecar takes all of, and does not know by name before. Of others it asks for some by name."""

SHORT: Final[Mapping[str, str]] = {
    RUNTIME: "runtime", SECRETS: "secrets", CLUSTERS: "clusters", ENDPOINTS: "endpoints",
    LISTENERS: "listeners", ROUTES: "routes",
}  # fmt: skip
"""Names of the types for people."""


class Bundle:
    """Encoded resources of one type that belong together. Compared by identity: renderers share them."""

    __slots__ = ("__weakref__", "_versions", "names", "resources", "unknown", "version")

    def __init__(self, resources: Mapping[str, bytes]) -> None:
        """Resources by name, each as `encode` makes it."""
        self.resources = resources
        self.names = frozenset(resources)
        # Names that stand there alone. Asked for each stream, and of what is rendered there are none.
        self.unknown = frozenset(name for name, data in resources.items() if not data)
        self._versions: Mapping[str, str] | None = None
        # A hash of the content: the same after a restart of the control plane.
        self.version = _hash(*resources.values())

    @property
    def versions(self) -> Mapping[str, str]:
        """The version of each resource: a hash of its content, too."""
        if self._versions is None:
            self._versions = {name: _hash(data) for name, data in self.resources.items()}
        return self._versions

    def part(self, names: frozenset[str]) -> bytes:
        """The resources of these names that are in the bundle, ready to stand in a response."""
        return b"".join(data for name, data in self.resources.items() if name in names)


Bundles = tuple[Bundle, ...]
"""All of one type that a sidecar should have, or has."""

Snapshot = Mapping[str, Bundles]
"""What one sidecar should have: type URL -> bundles."""


def encode(type_url: str, resource: Message) -> bytes:
    """A resource as it stands in a DiscoveryResponse: field 2 (`resources`), an `Any` of it."""
    value = resource.SerializeToString(deterministic=True)
    return field(2, field(1, type_url.encode()) + field(2, value))


def response(type_url: str, version: str, nonce: str, resources: Iterable[bytes]) -> bytes:
    """An encoded DiscoveryResponse: version_info (1), resources (2), type_url (4) and nonce (5).

    Those fields of a DeltaDiscoveryResponse have the same numbers.
    """
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


def _hash(*parts: bytes) -> str:
    hashed = hashlib.blake2b(digest_size=8)
    for part in parts:
        hashed.update(part)
    return hashed.hexdigest()


# -- arithmetic on bundles, remembered, for a thousand streams ask the same ----------------------------------


def version(bundles: Bundles) -> str:
    """The version of all of them."""
    return ".".join(bundle.version for bundle in bundles)


def names(bundles: Bundles) -> frozenset[str]:
    """The names of all resources in them."""
    return bundles[0].names if len(bundles) == 1 else _names_of_all(bundles)


def among(bundles: Bundles, some: frozenset[str]) -> frozenset[str]:
    """Those of `some` that are names in them: without `names`, whose set is another one for each instance."""
    if not some:
        return some
    return frozenset[str]().union(*(some & bundle.names for bundle in bundles))


@lru_cache(maxsize=64)
def _names_of_all(bundles: Bundles) -> frozenset[str]:
    return frozenset[str]().union(*(bundle.names for bundle in bundles))


@lru_cache(maxsize=32)
def lapsed(old: Bundles, new: Bundles) -> frozenset[str]:
    """Names in `old` that are not in `new`."""
    return names(old) - names(new)


def changed(old: Bundles, new: Bundles) -> frozenset[str]:
    """Names in `new` that are not the same in `old`."""
    if not old:
        return names(new)
    if len(old) != len(new):
        return _changed_over_all(old, new)
    found = [
        _changed_in(before, after) for before, after in zip(old, new, strict=True) if before is not after
    ]
    return found[0] if len(found) == 1 else frozenset[str]().union(*found)


@lru_cache(maxsize=32)  # few: an entry keeps bundles alive
def _changed_in(old: Bundle, new: Bundle) -> frozenset[str]:
    return frozenset(name for name, data in new.resources.items() if old.resources.get(name) != data)


@lru_cache(maxsize=16)
def _changed_over_all(old: Bundles, new: Bundles) -> frozenset[str]:
    before, after = _resources(old), _resources(new)
    return frozenset(name for name, data in after.items() if before.get(name) != data)


def only_removes(old: Bundles, new: Bundles) -> bool:
    """Is all of `new` in `old`, and not the other way round?"""
    return old != new and not changed(old, new)


@lru_cache(maxsize=4)
def with_gone(old: Bundles, new: Bundles, unknown: frozenset[str]) -> Bundles:
    """`new`, and what of `old` is no longer in it; of what is `unknown`, the name alone."""
    gone = lapsed(old, new)
    if not gone:
        return new
    kept = {name: data for name, data in _resources(old).items() if name in gone}
    return (*new, Bundle(kept | dict.fromkeys(gone & unknown, b"")))


@lru_cache(maxsize=16)
def held(wanted: Bundles, versions: frozenset[tuple[str, str]]) -> Bundles:
    """What somebody has who has these (name, version); of what differs from `wanted`, the name alone."""
    resources, newest = _resources(wanted), _versions(wanted)
    return (Bundle({n: resources[n] if newest.get(n) == v else b"" for n, v in sorted(versions)}),)


def less(bundles: Bundles, doubted: frozenset[str]) -> Bundles:
    """These, but of what is `doubted` the name alone."""
    return (Bundle(_resources(bundles) | dict.fromkeys(doubted, b"")),)


def unknown(bundles: Bundles) -> frozenset[str]:
    """Names in them that stand there alone."""
    return frozenset[str]().union(*(bundle.unknown for bundle in bundles))


def _resources(bundles: Bundles) -> dict[str, bytes]:
    return {name: data for bundle in bundles for name, data in bundle.resources.items()}


def _versions(bundles: Bundles) -> dict[str, str]:
    return {name: version for bundle in bundles for name, version in bundle.versions.items()}
