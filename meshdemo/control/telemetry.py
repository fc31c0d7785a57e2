"""OTLP in, samples out: what the sidecars report, kept for ten minutes.

Each sidecar pushes its stats about twice a second, in a large mesh more seldom (bootstrap.report_interval_s).
An export is decoded (otlp.py) and becomes a `Sample` at once, and the message is dropped.

Time: a sample is placed by the sidecar's own stamps, moved onto the control plane's clock by the smallest
difference between receipt and stamp seen for that sidecar. Windows of several sidecars then line up although
their clocks differ, and exports that arrive late in a bunch (a control plane that stood still) fall into the
seconds they are about. A difference that jumps by seconds means that the sidecar's clock was set: then
receipt counts.

Counters and histograms are deltas, and Envoy does not send an export twice; one whose stamp is not newer
than the last is a repetition on the way and is dropped.

Memory: the last seconds are kept as objects, for windows that are asked for often; older ones are packed to
a few hundred bytes each, and the oldest go when there are too many.
"""

from __future__ import annotations

import asyncio
import logging
import marshal
import threading
import time
import zlib
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2

from meshdemo.control.model import HOME, Instance
from meshdemo.control.otlp import Export, Malformed, decode
from meshdemo.control.signals import Cell, Histogram, Sample

log = logging.getLogger(__name__)

KEPT_S = 600.0
SILENT_AFTER_S = 3.0
_RECENT_S = 22.0  # as objects: `stat`'s 10 s, of sidecars that report every 5 s
_RECENT_MAX = 40_000
_PACKED_MAX_BYTES = 48 << 20
_SET_CLOCK_S = 3.0  # an export that seems so late was stamped by a clock that has been set
_LONGEST_S = 120.0  # no sidecar reports less often
_STALL_S = 2.0  # a loop that does not beat for so long stood still
_BACKLOG_MAX = 128  # exports for which requests that wait are remembered: a minute of them
_USUAL_S = (2.0, 8.0)  # so long ago was what is usual: before what goes on now, and not long before
_GATHER_S = 0.02  # who waits for samples gets those of so long at once


@dataclass(slots=True)
class _Reporter:
    """What is remembered of one sidecar."""

    offset: float  # control plane's clock minus the sidecar's, plus the shortest way seen
    stamp: float
    received: float
    sample: Sample
    backlog: tuple[tuple[float, int], ...]  # (stamp, at least so many in flight ever since), newest first
    flights: tuple[tuple[float, int], ...]  # (stamp, so many in flight then), newest first


def _backlog(known: _Reporter | None, export: Export) -> tuple[tuple[float, int], ...]:
    """Since when how many of the requests in flight have been so.

    Which requests were answered is not told, only how many: each may have been one of the oldest. So a
    service that takes its time is told from one that hangs, whatever the interval of the exports.
    """
    if known is None:
        since, n = export.start, export.in_flight - export.arrived
        return ((since, n),) if n > 0 and 0 < since < export.stamp else ()
    before = known.sample.in_flight
    answered = max(0, before + export.arrived - export.in_flight)
    then = (known.stamp, before), *known.backlog
    return tuple((since, n - answered) for since, n in then[:_BACKLOG_MAX] if n > answered)


def _flights(known: _Reporter | None, export: Export) -> tuple[tuple[float, int], ...]:
    """How many were in flight in the last seconds, this export included."""
    before = () if known is None else known.flights
    recent = ((stamp, n) for stamp, n in before if stamp >= export.stamp - _USUAL_S[1])
    return (export.stamp, export.in_flight), *recent


def _usual(flights: Sequence[tuple[float, int]]) -> int:
    """How many were in flight at all times a few seconds before the newest of these."""
    latest_s = flights[0][0] - _USUAL_S[0]
    return min((n for stamp, n in flights if stamp <= latest_s), default=0)


@dataclass(frozen=True, slots=True)
class _Packed:
    """Samples of about one second, compressed."""

    first: int  # sequence number of the first
    last: int
    received: float  # of the last
    content: bytes


class Store:
    """Samples of the last `KEPT_S` seconds, numbered in the order in which they came.

    One thread adds (the control plane's loop), any thread reads. Sequence numbers start at the clock in µs,
    so that they grow over restarts of the control plane too.
    """

    def __init__(self, clock: Callable[[], float] = time.time, kept_s: float = KEPT_S) -> None:
        self._clock = clock
        self._kept_s = kept_s
        self._condition = threading.Condition()
        self._seq = int(clock() * 1e6)
        self._recent: deque[tuple[int, float, Sample]] = deque()
        self._packed: deque[_Packed] = deque()
        self._packed_bytes = 0
        self._reporters: dict[str, _Reporter] = {}
        self._known_since: dict[str, float] = {}
        self._listening_since = self._last_beat = clock()

    # -- writing

    def add(self, instance: Instance, export: Export, *, real: float = 1.0) -> Sample | None:
        """Take an export in; None if it repeats what is known.

        Args:
            real: the share of what reaches the instance that is no copy of a request. What is in flight is
                only known in sum, so of the overdue ones so many count.
        """
        now = self._clock()
        known = self._reporters.get(instance.id)
        if known is not None and known.stamp - _SET_CLOCK_S < export.stamp <= known.stamp:
            return None
        offset = now - export.stamp
        if known is not None and offset - known.offset < _SET_CLOCK_S:
            offset = min(offset, known.offset + 1e-4)  # lets go of a drifting clock by 0.1 ms an export
        start = export.start
        if not 0 < export.stamp - start <= _LONGEST_S:
            # Nothing but gauges, which say no start: it covers the time since the export before.
            start = known.stamp if known is not None and known.stamp < export.stamp else export.stamp - 1.0
        backlog = _backlog(known, export)
        waiting = [(export.stamp - since, int(n * real)) for since, n in backlog]
        flights = _flights(known, export)
        sample = Sample(
            instance=instance.id,
            service=instance.service,
            version=instance.version,
            revision=instance.revision,
            start=start + offset,
            end=export.stamp + offset,
            in_flight=export.in_flight,
            arrived=export.arrived,
            waiting=tuple((waited_s, n) for waited_s, n in waiting if n),
            usual=int(_usual(flights) * real),
            cells=export.cells,
        )
        self._reporters[instance.id] = _Reporter(offset, export.stamp, now, sample, backlog, flights)
        with self._condition:
            self._seq += 1
            self._recent.append((self._seq, now, sample))
            self._age(now)
            self._condition.notify_all()
        return sample

    def hear(self, instance: str) -> None:
        """This instance's sidecar has sent an export, which will be added soon."""
        if known := self._reporters.get(instance):
            known.received = self._clock()

    def track(self, instances: Collection[str]) -> None:
        """These are the instances that should report; others are forgotten (their samples are kept)."""
        now = self._clock()
        there = set(instances)
        self._known_since = {name: self._known_since.get(name, now) for name in there}
        self._reporters = {name: known for name, known in self._reporters.items() if name in there}

    def beat(self) -> None:
        """Say, from the loop that adds and at least every second, that it listens.

        A control plane that stood still (a suspended machine, a stopped process), or whose clock was set,
        must not take it that all sidecars fell silent meanwhile.
        """
        now = self._clock()
        if not 0 <= now - self._last_beat < _STALL_S:
            self._listening_since = now
            if now < self._last_beat:
                self._forget(now)
        self._last_beat = now

    def _forget(self, now: float) -> None:
        """The clock was set back: what bears times to come would stand for now until they have come."""
        with self._condition:
            self._recent.clear()
            self._packed.clear()
            self._packed_bytes = 0
        self._reporters = {}
        self._known_since = dict.fromkeys(self._known_since, now)

    def _age(self, now: float) -> None:
        while self._recent and (self._recent[0][1] < now - _RECENT_S - 1 or len(self._recent) > _RECENT_MAX):
            until = self._recent[0][1] + 1
            rows = []
            while self._recent and self._recent[0][1] <= until:
                rows.append(self._recent.popleft())
            content = zlib.compress(marshal.dumps([(received, _pack(s)) for _, received, s in rows]), 1)
            self._packed.append(_Packed(rows[0][0], rows[-1][0], rows[-1][1], content))
            self._packed_bytes += len(content)
        while self._packed and (
            self._packed[0].received < now - self._kept_s or self._packed_bytes > _PACKED_MAX_BYTES
        ):
            self._packed_bytes -= len(self._packed.popleft().content)

    # -- reading

    def window(self, seconds: float) -> list[Sample]:
        """Samples received in the last `seconds`, oldest first; some more, so that a window of so many
        seconds, counted back from the newest sample, finds all of its own."""
        intervals = (known.sample.end - known.sample.start for known in list(self._reporters.values()))
        start = self._clock() - seconds - 2 * min(max(intervals, default=0.0), 60.0)
        with self._condition:
            recent = list(self._recent)
            packed = list(self._packed)
        if not recent or recent[0][1] >= start:
            old = [
                s for chunk in packed if chunk.received >= start for _, r, s in _unpack(chunk) if r >= start
            ]
        else:
            old = []
        return old + [sample for _, received, sample in recent if received >= start]

    def after(self, seq: int, wait_s: float = 0.0) -> tuple[int, list[Sample]]:
        """The current sequence number, and the samples after `seq`; waits for one if there is none.

        A negative `seq` stands for the current one.
        """
        if seq < 0:
            return self._seq, []
        if seq > self._seq:  # of another life of the control plane, whose clock was ahead
            seq = 0
        with self._condition:
            waited = self._seq <= seq and self._condition.wait_for(lambda: self._seq > seq, wait_s)
        if waited:
            time.sleep(_GATHER_S)
        with self._condition:
            current = self._seq
            recent = list(self._recent)
            packed = list(self._packed) if not recent or recent[0][0] > seq + 1 else []
        old = [s for chunk in packed if chunk.last > seq for n, _, s in _unpack(chunk) if n > seq]
        return current, old + [sample for n, _, sample in recent if n > seq]

    def last_report_s(self, instance: str) -> float | None:
        """Seconds since this instance's sidecar last reported; None if it has not."""
        known = self._reporters.get(instance)
        return None if known is None else max(0.0, self._clock() - known.received)

    def silent(self, instance: str) -> bool:
        """Has its sidecar reported nothing for longer than it should? Then nothing is known of it.

        What it should is 2.5 of its own intervals, at least `SILENT_AFTER_S`.
        """
        now = self._clock()
        if now - self._last_beat > _STALL_S:
            return False  # the loop stands still; who knows
        known = self._reporters.get(instance)
        if known is None:
            heard, interval = self._known_since.get(instance, now), 0.0
        else:
            heard, interval = known.received, min(known.sample.end - known.sample.start, 60.0)
        return now - max(heard, self._listening_since) > max(SILENT_AFTER_S, 2.5 * interval)


# Packed, a sample is a tuple of what marshal knows; its format may change with the Python version, which is
# no matter for what never leaves the process.


def _pack(sample: Sample) -> tuple[Any, ...]:
    return (
        sample.instance, sample.service, sample.version, sample.revision, sample.start, sample.end,
        sample.in_flight, sample.arrived, tuple(sample.waiting), sample.usual,
        tuple(
            (
                cell.inbound, cell.peer, cell.route, cell.requests, cell.failures, cell.denied, cell.refused,
                cell.secured, cell.identity, cell.codes, cell.version, cell.ejected,
                cell.mirrored, cell.mirrored_failures, cell.connections, cell.received, cell.sent,
                cell.latency.counts, cell.failed_latency.counts,
            )
            for cell in sample.cells
        ),
    )  # fmt: skip


def _unpack(chunk: _Packed) -> Iterator[tuple[int, float, Sample]]:
    """(sequence number, received, sample) of a chunk."""
    rows = marshal.loads(zlib.decompress(chunk.content))  # noqa: S302 - written by this very process
    for number, (received, row) in enumerate(rows, chunk.first):
        cells = tuple(Cell(*cell[:17], *map(Histogram, cell[17:])) for cell in row[10])
        yield number, received, Sample(*[*row[:10], cells])


# -- the gRPC service -------------------------------------------------------------------------------------

_RESPONSE: bytes = metrics_service_pb2.ExportMetricsServiceResponse().SerializeToString()
Authenticate = Callable[[Collection[tuple[str, str | bytes]]], Awaitable[Instance | None]]


def handler(
    store: Store,
    authenticate: Authenticate,
    on_sample: Callable[[Sample], None],
    real: Callable[[Instance], float] = lambda _: 1.0,
    *,
    calm: asyncio.Event,
    home: str = HOME,
) -> grpc.GenericRpcHandler:
    """The OTLP metrics service on raw bytes: no message is built for an answer that is always the same.

    Args:
        authenticate: whose token a call carries; what it says of the instance counts, not the export.
        on_sample: told of each sample that was taken in.
        real: the share of what reaches an instance that is no copy of a request.
        calm: set when there is nothing more urgent to do. A report bears its own time and loses none.
        home: the mesh's namespace.
    """

    async def export(raw: bytes, context: grpc.aio.ServicerContext) -> bytes:
        instance = await authenticate(context.invocation_metadata())
        if instance is None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no valid token")
            return b""  # not reached: abort raises
        if not calm.is_set():
            store.hear(instance.id)
            await calm.wait()
        try:
            decoded = decode(raw, home)
        except Malformed as error:
            log.warning("telemetry of %s is not understood: %s", instance.id, error)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
            return b""
        sample = store.add(instance, decoded, real=real(instance))
        if sample is not None:
            on_sample(sample)
        return _RESPONSE

    return grpc.method_handlers_generic_handler(
        "opentelemetry.proto.collector.metrics.v1.MetricsService",
        {"Export": grpc.unary_unary_rpc_method_handler(export)},
    )
