"""Single requests, live: the access logs of the sidecars (Envoy's ALS), while somebody looks.

Sidecars send them only while there is a session: the first one switches them on, the last one off. A session
that cannot keep up loses events, never the traffic: its queue is bounded, and the next event that it gets
says how many were left out.
"""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
from envoy.config.core.v3 import base_pb2
from envoy.data.accesslog.v3 import accesslog_pb2
from envoy.service.accesslog.v3 import als_pb2

from meshdemo.control.client import TAP_PER_S, TAP_STATUS
from meshdemo.control.identity import service_of
from meshdemo.control.model import HOME, Instance
from meshdemo.control.otlp import BROKEN_OFF, of_cluster
from meshdemo.control.signals import MIRRORED
from meshdemo.control.telemetry import Authenticate
from meshdemo.errors import BadInput, Failed
from meshdemo.names import parted, qualified

if TYPE_CHECKING:
    from meshdemo.control.client import TapEvent

_QUEUE = 2_000
_MAX_SESSIONS = 8  # each holds a thread of the API
_MAX_PATH = 1_000
_HOST = re.compile(r"([a-z][-a-z0-9]*)(?:\.([-a-z0-9]+)[-a-z0-9.]*)?(:\d+)?$")  # SERVICE.NAMESPACE.svc
_RESPONSE: bytes = als_pb2.StreamAccessLogsResponse().SerializeToString()

# https://www.envoyproxy.io/docs/envoy/latest/configuration/observability/access_log/usage (RESPONSE_FLAGS)
_FLAGS = {
    "failed_local_healthcheck": "LH", "no_healthy_upstream": "UH", "upstream_request_timeout": "UT",
    "local_reset": "LR", "upstream_remote_reset": "UR", "upstream_connection_failure": "UF",
    "upstream_connection_termination": "UC", "upstream_overflow": "UO", "no_route_found": "NR",
    "delay_injected": "DI", "fault_injected": "FI", "rate_limited": "RL", "unauthorized_details": "UAEX",
    "rate_limit_service_error": "RLSE", "downstream_connection_termination": "DC",
    "upstream_retry_limit_exceeded": "URX", "stream_idle_timeout": "SI",
    "invalid_envoy_request_headers": "IH", "downstream_protocol_error": "DPE",
    "upstream_max_stream_duration_reached": "UMSDR", "response_from_cache_filter": "RFCF",
    "no_filter_config_found": "NFCF", "duration_timeout": "DT", "upstream_protocol_error": "UPE",
    "no_cluster_found": "NC", "overload_manager": "OM", "dns_resolution_failure": "DF",
    "downstream_remote_reset": "DR",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Filter:
    """Which requests a session wants; None: all. `route` is a route's name, or a path prefix (`/...`);
    `status` a code or a class of codes (`5xx`).

    Raises:
        BadInput: a status that is neither.
    """

    service: str | None = None
    caller: str | None = None
    route: str | None = None
    status: str | None = None
    instance: str | None = None
    failed: bool = False

    def __post_init__(self) -> None:
        if self.status is not None and not re.fullmatch(TAP_STATUS, self.status):
            raise BadInput(f"status '{self.status}' is no status", "such as 503, or 5xx; 0 for no response")

    def wants_instance(self, instance: Instance) -> bool:
        """Can requests of this instance match? Asked before an entry is decoded."""
        return self.service in (None, instance.service) and self.instance in (None, instance.id)

    def wants_caller(self, instance: Instance) -> bool:
        """Can what this instance's sidecar answered itself match?"""
        return self.instance is None and self.caller in (None, instance.service)

    def wants(self, event: TapEvent) -> bool:
        """Does this request match?"""
        if self.caller is not None and event["caller"] != self.caller:
            return False
        if self.service is not None and event["service"] != self.service:
            return False
        if self.failed and not failed(event):
            return False
        if self.status is not None and not self._of_status(event):
            return False
        if self.route is not None:
            if self.route.startswith("/"):
                return event["path"].startswith(self.route)
            return event["route"] == self.route
        return True

    def _of_status(self, event: TapEvent) -> bool:
        code = str(event["status"])
        if self.status == "5xx" and event["grpc_status"]:  # an error of gRPC comes as 200
            return True
        return code == self.status or (str(self.status).endswith("xx") and code[0] == str(self.status)[0])


def failed(event: TapEvent) -> bool:
    """Is this a failure, as success rates count it?"""
    return (
        event["status"] >= 500
        or event["status"] == 0
        or bool(event["grpc_status"])
        or bool(BROKEN_OFF.intersection(event["flags"].split(",")))
    )


class Session:
    """One who taps. The loop puts in, one thread takes out."""

    def __init__(self, wanted: Filter, max_per_s: float, clock: Callable[[], float]) -> None:
        self.wanted = wanted
        self._rate = max_per_s
        self._clock = clock
        self._allowance, self._allowed_at = max(1.0, max_per_s), clock()
        self._condition = threading.Condition()
        self._events: deque[TapEvent] = deque()
        self._skipped = 0

    def put(self, event: TapEvent) -> None:
        """Take a matching event in, or count it as left out: too many a second, or nobody fetches them."""
        now = self._clock()
        burst = max(1.0, self._rate)
        self._allowance = min(burst, self._allowance + (now - self._allowed_at) * self._rate)
        self._allowed_at = now
        with self._condition:
            if self._allowance < 1 or len(self._events) >= _QUEUE:
                self._skipped += 1
                return
            self._allowance -= 1
            self._events.append({**event, "skipped": self._skipped})
            self._skipped = 0
            self._condition.notify()

    def take(self, wait_s: float) -> list[TapEvent]:
        """All events that are there; waits up to `wait_s` for one."""
        with self._condition:
            if not self._events:
                self._condition.wait(wait_s)
            events = list(self._events)
            self._events.clear()
        return events


class Tap:
    """The sessions, and the access logs that feed them. Lives on the control plane's loop.

    Args:
        switch: has the sidecars send their access logs, or stop; returns when they do.
        home: the mesh's namespace.
    """

    def __init__(
        self,
        switch: Callable[[bool], Awaitable[object]],
        authenticate: Authenticate,
        clock: Callable[[], float] = time.monotonic,
        *,
        home: str = HOME,
    ) -> None:
        self._home = home
        self._switch = switch
        self._authenticate = authenticate
        self._clock = clock
        self._sessions: tuple[Session, ...] = ()
        self._on = False
        self._switching = asyncio.Lock()

    async def open(self, wanted: Filter, max_per_s: float | None = None) -> Session:
        """Begin a session; returns when the sidecars send. End it with `close`.

        Raises:
            BadInput: a rate that makes no sense. Failed: too many sessions, or a sidecar refused.
        """
        least, most = TAP_PER_S
        rate = most if max_per_s is None else max_per_s
        if not least <= rate <= most:
            raise BadInput(f"{rate:g} events a second", f"allowed: {least:g} to {most:g}")
        if len(self._sessions) >= _MAX_SESSIONS:
            raise Failed(f"{_MAX_SESSIONS} taps are open already", "close one")
        session = Session(wanted, rate, self._clock)
        self._sessions = (*self._sessions, session)
        try:
            await self._settle()
        except BaseException:
            await self.close(session)
            raise
        return session

    async def close(self, session: Session) -> None:
        """End a session."""
        self._sessions = tuple(other for other in self._sessions if other is not session)
        await self._settle()

    async def _settle(self) -> None:
        """Switch the access logs to what the sessions need now, one switch at a time."""
        async with self._switching:
            if bool(self._sessions) != self._on:
                wanted = bool(self._sessions)
                await self._switch(wanted)
                self._on = wanted

    # -- access logs in

    def handler(self) -> grpc.GenericRpcHandler:
        """The ALS service."""
        return grpc.method_handlers_generic_handler(
            "envoy.service.accesslog.v3.AccessLogService",
            {"StreamAccessLogs": grpc.stream_unary_rpc_method_handler(self._receive)},
        )

    async def _receive(self, messages: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> bytes:
        instance = await self._authenticate(context.invocation_metadata())
        if instance is None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no valid token")
            return b""  # not reached: abort raises
        outbound: bool | None = None  # whose log it is stands in the first message alone
        async for raw in messages:
            message = None
            if outbound is None:
                message = als_pb2.StreamAccessLogsMessage.FromString(raw)
                outbound = message.identifier.log_name == "outbound"
            sessions = [
                session
                for session in self._sessions
                if (session.wanted.wants_caller if outbound else session.wanted.wants_instance)(instance)
            ]
            if not sessions:
                continue
            message = message or als_pb2.StreamAccessLogsMessage.FromString(raw)
            for entry in message.http_logs.log_entry:
                event = (answered_by_caller if outbound else event_of)(entry, instance, self._home)
                if not event["service"]:
                    continue
                for session in sessions:
                    if session.wanted.wants(event):
                        session.put(event)
        return _RESPONSE


def event_of(entry: accesslog_pb2.HTTPAccessLogEntry, instance: Instance, home: str) -> TapEvent:
    """An access log entry of an instance's sidecar as a tap event. `home`: the mesh's namespace."""
    common, request, response = entry.common_properties, entry.request, entry.response
    peer = common.tls_properties.peer_certificate_properties.subject_alt_name
    took = common.time_to_last_downstream_tx_byte
    if not (took.seconds or took.nanos):  # nothing was sent: reset, or the caller gave up
        took = common.duration
    grpc_status = response.response_trailers.get("grpc-status") or response.response_headers.get(
        "grpc-status"
    )
    return {
        "time": common.start_time.seconds + common.start_time.nanos / 1e9,
        "caller": next((service_of(name.uri, home) for name in peer if name.uri), ""),
        "service": instance.service,
        "version": instance.version,
        "instance": instance.id,
        "route": common.route_name.removeprefix(MIRRORED),
        "mirrored": common.route_name.startswith(MIRRORED),
        "method": base_pb2.RequestMethod.Name(request.request_method),
        "path": (request.original_path or request.path)[:_MAX_PATH],
        "status": response.response_code.value,
        "grpc_status": int(grpc_status) if grpc_status and grpc_status.isdecimal() else None,
        "flags": ",".join(_FLAGS.get(flag.name, flag.name) for flag, _ in common.response_flags.ListFields()),
        "latency_ms": round(took.seconds * 1e3 + took.nanos / 1e6, 3),
        "secured": bool(peer),
        "at": "service",
    }


def answered_by_caller(entry: accesslog_pb2.HTTPAccessLogEntry, instance: Instance, home: str) -> TapEvent:
    """An access log entry of a caller's sidecar, of a request that it answered itself."""
    service, version = of_cluster(entry.common_properties.upstream_cluster)
    if not service and (host := _HOST.match(entry.request.authority)):
        # Refused before an instance was chosen: Envoy does not say of which cluster.
        service = qualified(host[1], host[2] or parted(instance.service, home)[1], home)
    return {
        **event_of(entry, instance, home),
        "caller": instance.service,
        "service": service,
        "version": version,
        "instance": "",
        "secured": False,
        "at": "caller",
    }
