"""One OTLP export of a sidecar, decoded: its counters and histograms of requests, as cells.

Each sidecar pushes its stats about twice a second, those of the stats access logger (see templates/envoy).
Counters and histograms are deltas.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from dataclasses import dataclass, field

from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2
from opentelemetry.proto.metrics.v1 import metrics_pb2

from meshdemo.control.identity import service_of
from meshdemo.control.model import HOME
from meshdemo.control.signals import BOUNDS_MS, MIRRORED, Cell, Histogram, bucket

# Names that templates/envoy gives the stats; see `report` there.
_REQUESTS = {"inbound.requests": True, "outbound.requests": False}  # name -> inbound
_LATENCY = {"inbound.latency": True, "outbound.latency": False}
_EJECTED = "cluster.outlier_detection.ejections_active"
# Of a service that is not HTTP: connections, by caller, and the bytes of all of them together.
_CONNECTIONS = "inbound.connections"
_BYTES = {
    "tcp.inbound.downstream_cx_rx_bytes_total": "received",
    "tcp.inbound.downstream_cx_tx_bytes_total": "sent",
}
# Of connections, when they come, or at their first byte.
_TCP_DENIED = frozenset(("listener.inbound.ssl.fail_verify_san", "inbound.rbac.denied"))
_IN_FLIGHT, _ARRIVED = "http.inbound.downstream_rq_active", "http.inbound.downstream_rq_total"

# Envoy's flags of a response that began well and was cut off: reset by the upstream or locally, the
# connection lost, out of time, not the protocol. A caller that walked away (DC) is not among them.
BROKEN_OFF = frozenset(("UR", "UC", "LR", "UT", "DT", "SI", "UPE"))

_MAX_CELLS = 2_000  # of one export: what a sidecar may cost, whoever wrote its configuration
_NOTHING = Histogram()

# xds-protos calls the field by its old name, opentelemetry-proto by its new one; one of both is installed.
_SCOPES = (
    "scope_metrics"
    if "scope_metrics" in metrics_pb2.ResourceMetrics.DESCRIPTOR.fields_by_name
    else "instrumentation_library_metrics"
)


class Malformed(Exception):
    """An export that is not what a sidecar of this mesh sends."""


@dataclass(frozen=True, slots=True)
class Export:
    """One export, decoded; `start` and `stamp` are seconds since the epoch on the sidecar's clock."""

    start: float
    stamp: float
    in_flight: int
    arrived: int
    cells: tuple[Cell, ...]


_Key = tuple[bool, str, str, str]  # inbound, peer, version, route
_Attributes = tuple[tuple[str, str], ...]
_WHOLE: _Key = (True, "", "", "")  # what is not told apart by caller


@dataclass(frozen=True, slots=True)
class _Kind:
    """What the tags of a data point say of its requests."""

    key: _Key
    identity: str
    code: str
    denied: bool
    failed: bool
    refused: bool
    mirrored: bool


@dataclass(slots=True)
class _Sum:
    """A cell while it is being added up."""

    identity: str = ""
    requests: int = 0
    failures: int = 0
    denied: int = 0
    refused: int = 0
    secured: int = 0
    ejected: int = 0
    mirrored: int = 0
    mirrored_failures: int = 0
    connections: int = 0
    received: int = 0
    sent: int = 0
    codes: dict[str, int] = field(default_factory=dict)
    latency: dict[int, int] = field(default_factory=dict)
    failed_latency: dict[int, int] = field(default_factory=dict)

    def connect(self, kind: _Kind, n: int) -> None:
        """Take in n connections."""
        self.connections += n
        if kind.identity:
            self.identity = kind.identity
            self.secured += n

    def count(self, kind: _Kind, n: int) -> None:
        """Take in n requests."""
        if kind.mirrored:
            self.mirrored += n
            self.mirrored_failures += n * kind.failed
            return
        if kind.identity:
            self.identity = kind.identity
            self.secured += n
        if kind.denied:
            self.denied += n
            return
        self.requests += n
        self.codes[kind.code] = self.codes.get(kind.code, 0) + n
        self.failures += n * kind.failed
        self.refused += n * kind.refused

    def spread(self, kind: _Kind, point: metrics_pb2.HistogramDataPoint) -> None:
        """Take in how long requests took."""
        if kind.denied or kind.mirrored:
            return
        indices = _indices(point)
        for position, n in enumerate(list(point.bucket_counts)):
            if n:
                index = indices[position]
                self.latency[index] = self.latency.get(index, 0) + n
                if kind.failed:
                    self.failed_latency[index] = self.failed_latency.get(index, 0) + n

    def cell(self, key: _Key) -> Cell:
        """The sum as a value."""
        inbound, peer, version, route = key
        return Cell(
            inbound=inbound,
            peer=peer,
            route=route,
            requests=self.requests,
            failures=self.failures,
            denied=self.denied,
            refused=self.refused,
            secured=self.secured,
            identity=self.identity,
            codes=self.codes,
            latency=Histogram(self.latency) if self.latency else _NOTHING,
            failed_latency=Histogram(self.failed_latency) if self.failed_latency else _NOTHING,
            version=version,
            ejected=self.ejected,
            mirrored=self.mirrored,
            mirrored_failures=self.mirrored_failures,
            connections=self.connections,
            received=self.received,
            sent=self.sent,
        )


def decode(raw: bytes, home: str = HOME) -> Export:
    """One OTLP metrics export of a sidecar. `home`: the mesh's namespace.

    Raises:
        Malformed: not an export, or more cells than a sidecar may have.
    """
    try:
        message = metrics_service_pb2.ExportMetricsServiceRequest.FromString(raw)
    except Exception as error:  # the implementations of protobuf raise different classes
        raise Malformed(f"not an OTLP metrics export: {error}") from error
    sums: defaultdict[_Key, _Sum] = defaultdict(_Sum)
    start_ns = stamp_ns = in_flight = arrived = 0
    metrics = (
        metric
        for resource in message.resource_metrics
        for scope in getattr(resource, _SCOPES)
        for metric in scope.metrics
    )
    for metric in metrics:
        name = metric.name
        points = getattr(metric, metric.WhichOneof("data") or "gauge").data_points
        for point in points:
            start_ns, stamp_ns = max(start_ns, point.start_time_unix_nano), point.time_unix_nano
            if name in _LATENCY:
                kind = _kind(_LATENCY[name], _attributes(point), home)
                sums[kind.key].spread(kind, point)
            elif name in _REQUESTS:
                kind = _kind(_REQUESTS[name], _attributes(point), home)
                sums[kind.key].count(kind, point.as_int)
            elif name == _CONNECTIONS:
                kind = _kind(True, _attributes(point), home)
                sums[kind.key].connect(kind, point.as_int)
            elif name in _BYTES:
                if point.as_int:
                    whole = sums[_WHOLE]
                    setattr(whole, _BYTES[name], getattr(whole, _BYTES[name]) + point.as_int)
            elif name in _TCP_DENIED:
                if point.as_int:
                    sums[_WHOLE].denied += point.as_int
            elif name == _EJECTED:
                # An attribute of its own: the cluster. What is wrong by one port need not be by another.
                peer, version = of_cluster(dict(_attributes(point)).get("cluster", ""))
                if peer and point.as_int:
                    row = sums[False, peer, version, ""]
                    row.ejected = max(row.ejected, point.as_int)
            elif name == _IN_FLIGHT:
                in_flight += point.as_int
            elif name == _ARRIVED:
                arrived += point.as_int
        if len(sums) > _MAX_CELLS:
            raise Malformed(f"more than {_MAX_CELLS} combinations of peer and route")
    if not stamp_ns:
        raise Malformed("an export without a time")
    cells = tuple(added.cell(key) for key, added in sums.items())
    return Export(start_ns / 1e9, stamp_ns / 1e9, in_flight, arrived, cells)


def of_cluster(name: str) -> tuple[str, str]:
    """The service and the version of a cluster: SERVICE/VERSION, or SERVICE/VERSION/PORT."""
    service, _, rest = name.partition("/")
    return service, rest.partition("/")[0]


def _attributes(point: metrics_pb2.NumberDataPoint | metrics_pb2.HistogramDataPoint) -> _Attributes:
    return tuple([(attribute.key, attribute.value.string_value) for attribute in point.attributes])


@functools.lru_cache(maxsize=8192)
def _kind(inbound: bool, attributes: _Attributes, home: str) -> _Kind:
    """What tags mean; cached, for the same come every second."""
    # Envoy writes '-' (or nothing) for what a request does not have.
    tags = {name: "" if value == "-" else value for name, value in attributes}
    identity = tags.get("caller" if inbound else "peer", "")
    caller = service_of(identity, home)
    peer, version = (caller, "") if inbound else of_cluster(tags.get("cluster", ""))
    flags = frozenset(tags.get("flags", "").split(","))
    code = tags.get("code") or "0"
    route = tags.get("route", "")
    return _Kind(
        key=(inbound, peer, version, route.removeprefix(MIRRORED)),
        identity=identity,
        code=code,
        denied="UAEX" in flags or tags.get("access") == "denied",
        failed=(
            code[0] == "5"
            or code == "0"  # no response: reset, or given up by the caller
            or bool(flags & BROKEN_OFF)
            or tags.get("grpc", "") not in ("", "0")
        ),
        refused="UO" in flags,
        mirrored=route.startswith(MIRRORED),
    )


_MAPPINGS: dict[tuple[int, float, float], tuple[int, ...]] = {}


def _indices(point: metrics_pb2.HistogramDataPoint) -> tuple[int, ...]:
    """Position in an export's buckets (bounds in µs) -> index in BOUNDS_MS.

    One mesh has one set of bounds, that of templates/envoy, so it is told by its length and ends. A bucket
    between other bounds goes where its middle falls.
    """
    bounds = point.explicit_bounds
    if not bounds:
        return (len(BOUNDS_MS),)
    key = (len(bounds), bounds[0], bounds[-1])
    found = _MAPPINGS.get(key)
    if found is None:
        edges = [0.0, *(bound / 1000 for bound in bounds)]
        # abs: what a stranger sends may have bounds that make no sense
        middles = [abs(low * high) ** 0.5 if low else high / 2 for low, high in itertools.pairwise(edges)]
        found = (*(bucket(middle) for middle in middles), bucket(edges[-1] * 1.001))  # what is above the last
        if len(_MAPPINGS) > 16:  # bounds that differ by sidecar: not of our making
            _MAPPINGS.clear()
        _MAPPINGS[key] = found
    return found
