"""Simulated sidecars: `python -m meshdemo.bench.sidecars FILE`, a process of its own.

Each has what a real one has towards the control plane: a TLS connection of its own, with a token, an
incremental ADS stream that asks and ACKs as Envoy does, and an OTLP export every few seconds. It does nothing
with its configuration, and reads once what all of them get, so a thousand of them fit on a small machine.
FILE says where and who (`Crowd`). On stdout, a line with the time (monotonic clock, s) whenever all of them
are configured that were not before.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import grpc
from envoy.service.discovery.v3.discovery_pb2 import DeltaDiscoveryRequest, DeltaDiscoveryResponse
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2
from opentelemetry.proto.metrics.v1 import metrics_pb2

from meshdemo.control import xds
from meshdemo.control.garbage import expect_streams
from meshdemo.control.identity import CONTROL_PLANE_NAME, spiffe_id
from meshdemo.control.signals import ENVOY_BOUNDS_US
from meshdemo.control.wire import INCREMENTAL, SERVICE

_ADS = f"/{SERVICE}/{INCREMENTAL.method}"
_OTLP = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"

# As in templates/envoy/bootstrap.yaml.j2: Envoy tries again after a random time of up to this (s), and gives
# a connection so long to be made, its TLS handshake with it.
_BACKOFF_S, _MOST_BACKOFF_S = 0.1, 1.0
_CONNECT_S = 5.0

# What a sidecar asks for when it has got what stands before it.
_NEXT = {
    xds.RUNTIME: (xds.CLUSTERS,),
    xds.CLUSTERS: (xds.SECRETS, xds.ENDPOINTS),
    xds.ENDPOINTS: (xds.LISTENERS,),
    xds.LISTENERS: (xds.ROUTES,),
}
# What it asks for at once when it is back, in Envoy's order.
_ALL = (xds.RUNTIME, xds.CLUSTERS, xds.ENDPOINTS, xds.SECRETS, xds.LISTENERS, xds.ROUTES)


@dataclass(frozen=True, slots=True)
class _Response:
    """A response, as far as a sidecar of this kind looks at it."""

    kind: str
    nonce: str
    versions: dict[str, str]  # name -> version
    gone: tuple[str, ...]


@lru_cache(maxsize=128)
def _read(data: bytes) -> _Response:
    message = DeltaDiscoveryResponse.FromString(data)
    versions = {one.name: one.version for one in message.resources}
    return _Response(message.type_url, message.nonce, versions, tuple(message.removed_resources))


@lru_cache(maxsize=128)
def _ack(kind: str, nonce: str) -> bytes:
    return _encoded(DeltaDiscoveryRequest(type_url=kind, response_nonce=nonce))


def _encoded(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data


@dataclass(frozen=True, slots=True)
class Crowd:
    """Where the control plane is, and who the sidecars are."""

    port: int
    trust: str  # file with the authority's certificates
    mesh: str
    sidecars: Sequence[tuple[str, str, str]]  # instance id, service, token
    endpoints: Sequence[str]  # names of all clusters of the mesh
    export_every_s: float

    def write(self, path: Path) -> None:
        """Store it."""
        path.write_text(json.dumps(asdict(self)))


class _Sidecars:
    """All of them, and how many are configured."""

    def __init__(self, crowd: Crowd) -> None:
        self.crowd = crowd
        self.credentials = grpc.ssl_channel_credentials(Path(crowd.trust).read_bytes())
        self._configured = 0

    def configured(self, change: int) -> None:
        """One more is configured, or one less."""
        self._configured += change
        if change > 0 and self._configured == len(self.crowd.sidecars):
            print(time.monotonic(), flush=True)

    async def run(self) -> None:
        """For ever."""
        await asyncio.gather(*(_Sidecar(self, *who).run() for who in self.crowd.sidecars))


class _Sidecar:
    """One sidecar."""

    def __init__(self, all_: _Sidecars, instance: str, service: str, token: str) -> None:
        self._all = all_
        self._instance = instance
        self._metadata = (("authorization", f"Bearer {token}"),)
        options = (
            ("grpc.ssl_target_name_override", CONTROL_PLANE_NAME),
            ("grpc.use_local_subchannel_pool", 1),  # a connection of its own
            ("grpc.initial_reconnect_backoff_ms", round(_BACKOFF_S * 1000)),
            # The time for a connection, whatever it is called: with less, whoever comes back in a crowd gives
            # up half-way through its handshake, and begins another.
            ("grpc.min_reconnect_backoff_ms", round(_CONNECT_S * 1000)),
            ("grpc.max_reconnect_backoff_ms", round(_MOST_BACKOFF_S * 1000)),
            ("grpc.http2.bdp_probe", 0),
            ("grpc.max_receive_message_length", -1),
        )
        self._channel = grpc.aio.secure_channel(f"127.0.0.1:{all_.crowd.port}", all_.credentials, options)
        self._names: dict[str, Sequence[str]] = {
            xds.RUNTIME: ("runtime",),
            xds.SECRETS: ("identity", "trust"),
            xds.ENDPOINTS: (*all_.crowd.endpoints, "app"),
            xds.ROUTES: ("outbound", "inbound"),
        }
        self._versions: dict[str, dict[str, str]] = {}  # what it has: type -> name -> version
        self._export = _Export(all_.crowd.mesh, service)

    async def run(self) -> None:
        """Hold a stream and export, for ever."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._hold())
            tasks.create_task(self._report())

    async def _hold(self) -> None:
        failures = 0
        while True:
            try:
                if await self._stream():
                    failures = 0
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):  # the latter where one writes to it
                pass
            failures += 1
            most_s = min(_MOST_BACKOFF_S, _BACKOFF_S * 2**failures)
            await asyncio.sleep(random.uniform(0, most_s))  # noqa: S311 (no secret)

    async def _stream(self) -> bool:
        """One stream until it ends; was it of any use?"""
        # The channel goes on connecting, for less than it costs to be told each time that it failed.
        call = self._channel.stream_stream(_ADS)(metadata=self._metadata, wait_for_ready=True)
        back = bool(self._versions)  # then it asks for everything at once
        warming: set[str] = set()
        unconfirmed: list[bytes] = []  # clusters
        complete = False
        try:
            for kind in _ALL if back else _ALL[:1]:
                await call.write(self._subscription(kind))
            while (data := await call.read()) is not grpc.aio.EOF:
                response = _read(data)
                kind = response.kind
                first = kind not in self._versions
                held = self._versions.setdefault(kind, {})
                held.update(response.versions)
                for name in response.gone:
                    held.pop(name, None)
                # A cluster warms until its endpoints have come, and is confirmed then. They are not asked for
                # again if it is just another version of one that was there.
                if kind == xds.CLUSTERS:
                    warming.update(response.versions)
                    warming.difference_update(response.gone)
                    unconfirmed.append(_ack(kind, response.nonce))
                elif kind == xds.ENDPOINTS:
                    warming.difference_update(response.versions)
                if not warming and unconfirmed:
                    for ack in unconfirmed:
                        await call.write(ack)
                    unconfirmed.clear()
                if kind != xds.CLUSTERS:
                    await call.write(_ack(kind, response.nonce))
                if first:
                    for following in _NEXT.get(kind, ()):
                        await call.write(self._subscription(following))
                if not complete and kind == (xds.SECRETS if back else xds.ROUTES):
                    complete = True
                    self._all.configured(+1)
        finally:
            call.cancel()
            if complete:
                self._all.configured(-1)
        return complete

    def _subscription(self, kind: str) -> bytes:
        """The first request for a type on a stream."""
        request = DeltaDiscoveryRequest(type_url=kind)
        names = self._names.get(kind, ())
        # In each process Envoy has them in an order of its own.
        request.resource_names_subscribe.extend(random.sample(names, len(names)))
        request.initial_resource_versions.update(self._versions.get(kind, {}))
        if kind == xds.SECRETS:
            # Its certificate is another one after each restart; asked for so, it comes on each stream.
            request.initial_resource_versions.pop("identity", None)
        if kind == xds.RUNTIME:
            request.node.id = self._instance
        return _encoded(request)

    async def _report(self) -> None:
        every_s = self._all.crowd.export_every_s
        export = self._channel.unary_unary(_OTLP)
        await asyncio.sleep(random.uniform(0, every_s))  # noqa: S311 (no secret)
        while True:
            due = time.monotonic() + every_s
            with suppress(grpc.aio.AioRpcError):
                await export(self._export.encoded(every_s), metadata=self._metadata, timeout=every_s)
            await asyncio.sleep(max(0.0, due - time.monotonic()))


class _Export:
    """What a sidecar with some traffic in both directions reports."""

    def __init__(self, mesh: str, service: str) -> None:
        self._request = metrics_service_pb2.ExportMetricsServiceRequest()
        # The field's name depends on whose copy of the messages is installed; its number is 2.
        scopes = metrics_pb2.ResourceMetrics.DESCRIPTOR.fields_by_number[2].name
        metrics = getattr(self._request.resource_metrics.add(), scopes).add().metrics
        identity = spiffe_id(mesh, "default", service)
        self._points = []
        for direction, own in (
            ("inbound", {"caller": identity, "tls": "TLSv1.3", "access": "allowed"}),
            ("outbound", {"cluster": f"{service}/v1", "peer": identity}),
        ):
            tags = {**own, "route": "other", "code": "200", "flags": "-", "grpc": ""}
            counter = metrics.add(name=f"{direction}.requests").sum.data_points.add(as_int=500)
            counts = [0] * (len(ENVOY_BOUNDS_US) + 1)
            counts[5:25] = [25] * 20
            histogram = metrics.add(name=f"{direction}.latency").histogram.data_points.add(
                count=500, bucket_counts=counts, explicit_bounds=ENVOY_BOUNDS_US
            )
            for point in (counter, histogram):
                for name, value in tags.items():
                    point.attributes.add(key=name).value.string_value = value
                self._points.append(point)
        for name in ("server.live", "http.inbound.downstream_rq_active"):
            self._points.append(metrics.add(name=name).gauge.data_points.add(as_int=1))

    def encoded(self, every_s: float) -> bytes:
        """One export, of the last so many seconds."""
        now = time.time_ns()
        for point in self._points:
            point.start_time_unix_nano, point.time_unix_nano = now - round(every_s * 1e9), now
        return _encoded(self._request)


def main() -> None:
    """The process."""
    crowd = Crowd(**json.loads(Path(sys.argv[1]).read_text()))
    expect_streams(len(crowd.sidecars))
    asyncio.run(_Sidecars(crowd).run())


if __name__ == "__main__":
    main()
