"""The two encodings of ADS: how a request is read, and how a response is written.

State of the world: a request names all that the sidecar asks for, and a response with clusters or listeners
holds all of them. Incremental ("delta"): a request names what it asks for from now on, or no longer, and a
response holds what changed, and the names of what is gone. What is sent, and when, is the same (`stream`).

https://www.envoyproxy.io/docs/envoy/latest/api-docs/xds_protocol

Sidecars with the same past speak in the same words, so most requests are read once for all of them, and most
responses are written once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from envoy.service.discovery.v3.discovery_pb2 import DeltaDiscoveryRequest, DiscoveryRequest

from meshdemo.control import xds

SERVICE: Final = "envoy.service.discovery.v3.AggregatedDiscoveryService"
"""The gRPC service whose methods speak them."""

EVERYTHING: Final = "*"
"""The name that stands for everything of a type."""

_NONE = frozenset[str]()


@dataclass(frozen=True, slots=True)
class Request:
    """A request, as far as it is read."""

    type_url: str
    names: frozenset[str] = _NONE  # asked for: all, or (incremental) from now on
    nonce: str = ""
    node: str = ""
    error: str | None = None  # Envoy's words, if it rejects what it was sent
    # -- state of the world
    version: str = ""
    # -- incremental
    dropped: frozenset[str] = _NONE  # no longer asked for
    versions: frozenset[tuple[str, str]] = frozenset()  # (name, version) of what it has already


@dataclass(frozen=True, slots=True)
class Response:
    """What a response says."""

    type_url: str
    version: str
    nonce: str
    bundles: xds.Bundles
    names: frozenset[str]  # of those in the bundles, what is sent
    gone: frozenset[str] = _NONE  # names that there is nothing of (any more)


class Wire:
    """An encoding."""

    def __init__(
        self,
        method: str,
        read: Callable[[bytes], Request],
        write: Callable[[Response], bytes],
        *,
        incremental: bool,
        remembered_bytes: int,
    ) -> None:
        """`method` of `SERVICE` speaks it.

        Args:
            remembered_bytes: requests up to this size are kept once they are read.
        """
        self.method = method
        self._remembered_bytes = remembered_bytes
        self.incremental = incremental
        self._read = read
        self._remembered = lru_cache(maxsize=256)(read)
        # Few: a push brings one or two, and each may be large.
        self._written = lru_cache(maxsize=16)(write)

    def read(self, data: bytes) -> Request:
        """A request from the wire. Raises DecodeError."""
        return self._remembered(data) if len(data) <= self._remembered_bytes else self._read(data)

    def write(self, response: Response) -> bytes:
        """A response for the wire."""
        return self._written(response)


def envoys_words(message: str) -> str:
    """Envoy's reason for a rejection, without the whole resource that it prints before some of them."""
    dump, found, reason = message.rpartition("Proto constraint validation failed")
    words = f"{found}{reason}" if dump.lstrip().startswith("goo.gle/debug") else message
    return " ".join(words.split())[:1000] or "no reason given"


def shared(names: frozenset[str]) -> frozenset[str]:
    """Sidecars subscribe to the same names: one set for all of them."""
    return _shared(names) if len(names) <= _SHARED_NAMES else names


_SHARED_NAMES = 5000


@lru_cache(maxsize=64)
def _shared(names: frozenset[str]) -> frozenset[str]:
    return names


def _error(message: Any) -> str | None:
    return envoys_words(message.error_detail.message) if message.HasField("error_detail") else None


def _read_state(data: bytes) -> Request:
    message = DiscoveryRequest.FromString(data)
    return Request(
        message.type_url,
        # Of these types a sidecar gets all, whatever it names.
        _ALL if message.type_url in xds.WHOLE else shared(frozenset(message.resource_names)),
        nonce=message.response_nonce,
        node=message.node.id,
        error=_error(message),
        version=message.version_info,
    )


def _read_delta(data: bytes) -> Request:
    message = DeltaDiscoveryRequest.FromString(data)
    return Request(
        message.type_url,
        shared(frozenset(message.resource_names_subscribe)),
        nonce=message.response_nonce,
        node=message.node.id,
        error=_error(message),
        dropped=shared(frozenset(message.resource_names_unsubscribe)),
        versions=frozenset(message.initial_resource_versions.items()),
    )


_ALL = frozenset((EVERYTHING,))


def _write_state(response: Response) -> bytes:
    parts = [bundle.part(response.names) for bundle in response.bundles]
    return xds.response(response.type_url, response.version, response.nonce, parts)


def _write_delta(response: Response) -> bytes:
    parts = [_delta_part(bundle, response.names) for bundle in response.bundles]
    gone = [xds.field(6, name.encode()) for name in sorted(response.gone)]  # removed_resources
    return xds.response(response.type_url, response.version, response.nonce, [*parts, *gone])


@lru_cache(maxsize=64)  # a response to one sidecar is mostly made of what others get, too
def _delta_part(bundle: xds.Bundle, names: frozenset[str]) -> bytes:
    """As `Bundle.part`, each in a Resource: version (1), resource (2; an Any, as it is there), name (3)."""
    return b"".join(
        xds.field(2, xds.field(1, bundle.versions[name].encode()) + data + xds.field(3, name.encode()))
        for name, data in bundle.resources.items()
        if name in names
    )


# What is longer is not kept: a sidecar may send megabytes.
STATE_OF_THE_WORLD: Final = Wire(
    "StreamAggregatedResources", _read_state, _write_state, incremental=False, remembered_bytes=8192
)
# Longer ones come once from each sidecar, and each has its own order of names.
INCREMENTAL: Final = Wire(
    "DeltaAggregatedResources", _read_delta, _write_delta, incremental=True, remembered_bytes=512
)
WIRES: Final = (STATE_OF_THE_WORLD, INCREMENTAL)
