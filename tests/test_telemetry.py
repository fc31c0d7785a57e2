"""OTLP exports into samples, and the store that keeps them."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterable
from typing import Any

import pytest
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2
from opentelemetry.proto.metrics.v1 import metrics_pb2

from meshdemo.control.identity import service_of
from meshdemo.control.model import Instance
from meshdemo.control.otlp import Export, Malformed, decode
from meshdemo.control.signals import BOUNDS_MS, ENVOY_BOUNDS_US, Cell, Histogram, Sample, bucket
from meshdemo.control.telemetry import Store

A, B = "spiffe://m/ns/default/sa/service-a", "spiffe://m/ns/default/sa/service-b"


# -- encoded as Envoy does ------------------------------------------------------------------------------


def tagged(point: Any, tags: dict[str, str]) -> Any:
    for name, value in tags.items():
        attribute = point.attributes.add()
        attribute.key, attribute.value.string_value = name, value
    return point


class Message:
    """One export, as Envoy's OTLP sink makes it."""

    def __init__(self, start: float = 100.0, stamp: float = 101.0) -> None:
        self.request = metrics_service_pb2.ExportMetricsServiceRequest()
        resource = self.request.resource_metrics.add()
        # The field's name depends on whose copy of the messages is installed; its number is 2.
        scopes = metrics_pb2.ResourceMetrics.DESCRIPTOR.fields_by_number[2].name
        self.metrics = getattr(resource, scopes).add().metrics
        self.times = {"start_time_unix_nano": int(start * 1e9), "time_unix_nano": int(stamp * 1e9)}

    def gauge(self, name: str, value: int) -> Message:
        metric = self.metrics.add(name=name)
        metric.gauge.data_points.add(time_unix_nano=self.times["time_unix_nano"], as_int=value)
        return self

    def count(self, name: str, n: int, **tags: str) -> Message:
        metric = self.metrics.add(name=name)
        tagged(metric.sum.data_points.add(**self.times, as_int=n), tags)
        return self

    def took(self, name: str, latencies_ms: Iterable[float], **tags: str) -> Message:
        metric = self.metrics.add(name=name)
        counts = [0] * (len(BOUNDS_MS) + 1)
        for value in latencies_ms:
            counts[bucket(value)] += 1
        tagged(
            metric.histogram.data_points.add(
                **self.times,
                count=sum(counts),
                bucket_counts=counts,
                explicit_bounds=ENVOY_BOUNDS_US,
            ),
            tags,
        )
        return self

    def encoded(self) -> bytes:
        return self.request.SerializeToString()


def test_each_of_envoys_buckets_is_one_of_ours() -> None:
    each = [bound / 2 for bound in BOUNDS_MS[:1]] + [*BOUNDS_MS]
    message = Message().took("inbound.latency", each, caller=A, route="work", code="200", flags="-")
    (cell,) = decode(message.encoded()).cells
    assert cell.latency.counts == dict.fromkeys(range(len(BOUNDS_MS) + 1), 1)


def inbound(n: int, ms: float = 20.0, **tags: str) -> Message:
    return also_inbound(Message(), n, ms, **tags)


def also_inbound(message: Message, n: int, ms: float = 20.0, **tags: str) -> Message:
    tags = {"caller": A, "tls": "TLSv1.3", "route": "work", "code": "200", "flags": "-", "grpc": "", **tags}
    return message.count("inbound.requests", n, **tags).took("inbound.latency", [ms] * n, **tags)


def cell_of(message: Message) -> Cell:
    cells = decode(message.encoded()).cells
    assert len(cells) == 1
    return cells[0]


# -- decoding -------------------------------------------------------------------------------------------


def test_requests_of_one_caller_and_route_are_one_cell() -> None:
    message = also_inbound(inbound(90), 10, 400.0, code="503", flags="UF")
    cell = cell_of(message)
    assert (cell.inbound, cell.peer, cell.route, cell.identity) == (True, "service-a", "work", A)
    assert (cell.requests, cell.failures, cell.denied, cell.secured) == (100, 10, 0, 100)
    assert cell.codes == {"200": 90, "503": 10}
    assert cell.latency == Histogram.of([20.0] * 90 + [400.0] * 10)
    assert cell.failed_latency == Histogram.of([400.0] * 10)


@pytest.mark.parametrize(
    ("tags", "failed"),
    [
        ({"code": "200"}, False),
        ({"code": "404"}, False),
        ({"code": "500"}, True),
        ({"code": "504", "flags": "UT"}, True),
        ({"code": "0", "flags": "DC"}, True),  # the caller gave up, or a reset
        ({"code": "200", "flags": "UC"}, True),  # cut off in the middle of the answer
        ({"code": "200", "flags": "DC"}, False),  # the caller had enough of a stream
        ({"code": "200", "flags": "DI"}, False),
        ({"code": "200", "grpc": "0"}, False),
        ({"code": "200", "grpc": "14"}, True),
    ],
)
def test_what_is_a_failure(tags: dict[str, str], failed: bool) -> None:
    assert cell_of(inbound(5, **tags)).failures == (5 if failed else 0)


@pytest.mark.parametrize(
    "tags",
    [
        {"code": "403", "flags": "UAEX"},
        {"code": "403", "access": "denied"},
        {"code": "200", "grpc": "7", "flags": "UAEX"},
    ],
)
def test_what_access_rules_refuse_is_no_request_of_the_service(tags: dict[str, str]) -> None:
    cell = cell_of(also_inbound(inbound(5), 3, **tags))
    assert (cell.requests, cell.failures, cell.denied, cell.latency.total) == (5, 0, 3, 5)
    assert cell.secured == 8


def test_the_apps_own_403_is_an_answer() -> None:
    cell = cell_of(inbound(5, code="403"))
    assert (cell.requests, cell.failures, cell.denied) == (5, 0, 0)


def test_outbound_cells_name_the_called_service_and_version() -> None:
    tags = {"cluster": "service-b/v1", "route": "work", "grpc": "", "peer": B}
    message = Message().count("outbound.requests", 7, **tags, code="200", flags="-")
    message.count("outbound.requests", 2, **{**tags, "peer": ""}, code="503", flags="UO")
    cell = cell_of(message)
    assert (cell.inbound, cell.peer, cell.version, cell.route) == (False, "service-b", "v1", "work")
    assert (cell.requests, cell.failures, cell.refused, cell.secured) == (9, 2, 2, 7)
    assert cell.identity == B


def test_requests_in_flight_and_arrived() -> None:
    message = inbound(5).gauge("http.inbound.downstream_rq_active", 8).gauge("server.live", 1)
    message.count("http.inbound.downstream_rq_total", 11).count(
        "cluster.b/v1.upstream_rq_pending_overflow", 1
    )
    export = decode(message.encoded())
    assert (export.in_flight, export.arrived) == (8, 11)
    assert (export.start, export.stamp) == (100.0, 101.0)


def test_a_caller_without_a_certificate_is_nobody() -> None:
    cell = cell_of(inbound(5, caller="-", tls="-"))
    assert (cell.peer, cell.identity, cell.secured) == ("", "", 0)
    assert service_of("https://elsewhere/service-a", "n") == ""


def test_other_bounds_go_where_their_middles_fall() -> None:
    message = Message()
    metric = message.metrics.add(name="inbound.latency")
    point = metric.histogram.data_points.add(
        **message.times, count=6, bucket_counts=[1, 2, 3], explicit_bounds=[10_000, 40_000]
    )
    tagged(point, {"caller": A, "route": "work", "code": "200", "flags": "-"})
    assert cell_of(message).latency.counts == {bucket(5): 1, bucket(20): 2, bucket(40): 3}


@pytest.mark.parametrize("raw", [b"\xff\xff\xff", b"", b"\x0a\x03abc"])
def test_what_is_no_export(raw: bytes) -> None:
    with pytest.raises(Malformed):
        decode(raw)


def test_an_export_may_not_cost_what_it_likes() -> None:
    message = Message()
    for number in range(2_001):
        message.count("inbound.requests", 1, route=f"r{number}", code="200")
    with pytest.raises(Malformed):
        decode(message.encoded())


def test_random_bytes_never_do_more_than_be_refused() -> None:
    source = random.Random(7)
    good = inbound(5).encoded()
    for _ in range(300):
        broken = bytearray(good)
        for _ in range(source.randint(1, 8)):
            broken[source.randrange(len(broken))] = source.randrange(256)
        try:
            decode(bytes(broken))
        except Malformed:
            continue


# -- the store ------------------------------------------------------------------------------------------


class Clock:
    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def instance(name: str = "b-1") -> Instance:
    return Instance(
        id=name, service="service-b", version="v1", revision=3,
        inbound_port=1, outbound_port=2, metrics_port=3, app_port=4,
    )  # fmt: skip


def export(stamp: float, requests: int = 10, **more: Any) -> Export:
    cell = Cell(inbound=True, peer="service-a", route="work", requests=requests, codes={"200": requests},
                latency=Histogram.of([20.0] * requests))  # fmt: skip
    known: dict[str, Any] = {
        "start": stamp - 1, "stamp": stamp, "in_flight": 0, "arrived": 0, "cells": (cell,),
    }  # fmt: skip
    return Export(**{**known, **more})


def next_sample(store: Store, clock: Clock, in_flight: int, arrived: int, after_s: float = 1.0) -> Sample:
    """The sample of an export that comes so long after the last one."""
    clock.now += after_s
    one = export(clock.now, start=clock.now - after_s, in_flight=in_flight, arrived=arrived)
    sample = store.add(instance(), one)
    assert sample is not None
    return sample


def test_identity_and_revision_come_from_the_instance() -> None:
    clock = Clock()
    sample = Store(clock).add(instance(), export(clock.now))
    assert sample is not None
    assert (sample.instance, sample.service, sample.version, sample.revision) == ("b-1", "service-b", "v1", 3)


def test_a_repeated_export_counts_once() -> None:
    clock = Clock()
    store = Store(clock)
    assert store.add(instance(), export(clock.now)) is not None
    assert store.add(instance(), export(clock.now)) is None
    assert store.add(instance("b-2"), export(clock.now)) is not None
    assert len(store.window(10)) == 2


@pytest.mark.parametrize("skew", [0.0, 0.4, -7200.0, 86_400.0])
def test_windows_line_up_although_clocks_differ(skew: float) -> None:
    clock = Clock()
    store = Store(clock)
    for _ in range(5):
        clock.now += 1
        sample = store.add(instance(), export(clock.now + skew - 0.01))
        assert sample is not None
        assert sample.end == pytest.approx(clock.now, abs=0.02)
        assert sample.end - sample.start == pytest.approx(1)


def test_exports_that_come_late_in_a_bunch_fall_into_the_seconds_they_are_about() -> None:
    clock = Clock()
    store = Store(clock)
    start = clock.now
    for _ in range(5):
        clock.now += 1
        store.add(instance(), export(clock.now - 0.01))
    clock.now += 2.5  # the control plane stood still
    for stamp in (6, 7):
        store.add(instance(), export(start + stamp - 0.01))
    ends = [sample.end - start for sample in store.window(60)]
    assert ends == pytest.approx([1, 2, 3, 4, 5, 6, 7], abs=0.02)


@pytest.mark.parametrize("jump", [-300.0, 300.0])
def test_a_sidecars_clock_that_is_set_does_not_move_its_samples(jump: float) -> None:
    clock = Clock()
    store = Store(clock)
    for step in range(10):
        clock.now += 1
        sample = store.add(instance(), export(clock.now + (jump if step >= 5 else 0.0)))
        assert sample is not None
        assert sample.end == pytest.approx(clock.now, abs=0.01)


def test_an_export_of_gauges_alone_covers_the_time_since_the_one_before() -> None:
    clock = Clock()
    store = Store(clock)
    first = store.add(instance(), export(clock.now, start=0.0, cells=()))
    clock.now += 1.25
    second = store.add(instance(), export(clock.now, start=0.0, cells=()))
    assert first is not None
    assert second is not None
    assert first.end - first.start == pytest.approx(1)
    assert second.start == pytest.approx(first.end)


def test_overdue_are_those_in_flight_for_longer_than_one_export() -> None:
    clock = Clock()
    store = Store(clock)

    def overdue(in_flight: int, arrived: int) -> int:
        return next_sample(store, clock, in_flight, arrived).overdue

    assert overdue(in_flight=10, arrived=100) == 0
    assert overdue(in_flight=10, arrived=100) == 0
    assert overdue(in_flight=60, arrived=50) == 10  # hung: nothing is answered, all wait
    assert overdue(in_flight=90, arrived=30) == 60
    assert overdue(in_flight=5, arrived=0) == 5
    # Counter and gauge are not read in the same instant: no more can be old than were there before.
    assert overdue(in_flight=0, arrived=50) == 0
    assert overdue(in_flight=3, arrived=1) == 0


def test_how_long_requests_wait_is_known_to_the_export() -> None:
    clock = Clock()
    store = Store(clock)

    def waiting(in_flight: int, arrived: int) -> list[tuple[float, int]]:
        sample = next_sample(store, clock, in_flight, arrived)
        return [(round(waited_s, 3), n) for waited_s, n in sample.waiting]

    assert waiting(in_flight=20, arrived=100) == []
    assert waiting(in_flight=70, arrived=50) == [(1, 20)]
    assert waiting(in_flight=120, arrived=50) == [(1, 70), (2, 20)]
    # 30 were answered. Which ones is not known: perhaps the oldest.
    assert waiting(in_flight=140, arrived=50) == [(1, 90), (2, 40)]
    # Slow, but not hung: 50 come in a second, 50 are answered, and each takes two.
    for _ in range(9):
        waiting(in_flight=100, arrived=50)
    assert waiting(in_flight=100, arrived=50) == [(1, 50)]


def test_what_takes_long_as_usual_is_told_from_what_hangs() -> None:
    clock = Clock()
    store = Store(clock)

    def add(in_flight: int, arrived: int) -> Sample:
        return next_sample(store, clock, in_flight, arrived, after_s=0.5)

    # Of 50 that come, one takes ten seconds: soon 20 are in flight at any moment.
    for number in range(40):
        assert add(in_flight=min(number, 20), arrived=50).waiting_for(0.3) == 0
    # Now and then hardly any come.
    for number in range(24):
        sample = add(in_flight=20, arrived=5 if number % 8 == 7 else 50)
        assert sample.waiting_for(0.3) == 0
    assert sample.usual == 20
    assert sample.overdue == 15  # in flight for the whole of this export, as far as is known
    # Nothing is answered any more.
    assert add(in_flight=70, arrived=50).waiting_for(0.3) == 0  # it may all have come just now
    assert add(in_flight=120, arrived=50).waiting_for(0.3) == 50
    assert add(in_flight=170, arrived=50).waiting_for(0.3) == 100
    # It is over: what was in flight meanwhile is not what is usual.
    for _ in range(5):
        sample = add(in_flight=0, arrived=50)
    assert sample.usual == 0


def listen(store: Store, clock: Clock, seconds: float) -> None:
    """Let time pass while the loop runs."""
    for _ in range(round(seconds * 10)):
        clock.now += 0.1
        store.beat()


def test_silence() -> None:
    clock = Clock()
    store = Store(clock)
    store.track(["b-1", "b-2"])
    assert not store.silent("b-1")
    assert store.last_report_s("b-1") is None
    for _ in range(4):
        listen(store, clock, 1)
        store.add(instance(), export(clock.now))
    assert not store.silent("b-1")
    assert store.silent("b-2")  # never heard of
    listen(store, clock, 2.9)
    assert not store.silent("b-1")
    assert store.last_report_s("b-1") == pytest.approx(2.9)
    listen(store, clock, 0.2)
    assert store.silent("b-1")
    store.add(instance(), export(clock.now))
    assert not store.silent("b-1")
    store.track(["b-2"])
    assert store.last_report_s("b-1") is None


def test_a_sidecar_that_reports_every_5_s_is_not_silent_between() -> None:
    clock = Clock()
    store = Store(clock)
    store.add(instance(), export(clock.now, start=clock.now - 5))
    listen(store, clock, 9)
    assert not store.silent("b-1")
    listen(store, clock, 4)
    assert store.silent("b-1")


@pytest.mark.parametrize("jump", [3600.0, -3600.0])
def test_a_control_plane_that_stood_still_does_not_blame_the_sidecars(jump: float) -> None:
    clock = Clock()
    store = Store(clock)
    store.track(["b-1"])
    for _ in range(3):
        listen(store, clock, 1)
        store.add(instance(), export(clock.now))
    clock.now += jump  # suspended, or its clock was set
    assert not store.silent("b-1")
    store.beat()
    assert not store.silent("b-1")
    listen(store, clock, 2)
    assert not store.silent("b-1")
    listen(store, clock, 1.5)
    assert store.silent("b-1")
    store.add(instance(), export(clock.now))
    assert all(sample.end <= clock.now for sample in store.window(3700))


def test_ten_minutes_are_kept_and_packed_samples_come_back_as_they_were() -> None:
    clock = Clock()
    store = Store(clock)
    first = store.after(-1)[0]
    added: list[Sample] = []
    for number in range(700):
        clock.now += 1
        sample = store.add(instance(), export(clock.now, requests=1 + number % 7, in_flight=number // 9))
        assert sample is not None
        added.append(sample)
    assert added[-1].usual
    kept = store.window(10_000)
    assert 600 <= len(kept) <= 604
    assert kept == added[-len(kept) :]
    assert store.window(60)[-60:] == added[-60:]
    assert len(store.window(60)) <= 64
    seq, after = store.after(first)
    assert after == kept
    assert store.after(seq - 100)[1] == added[-100:]
    assert store.after(seq - 3)[1] == added[-3:]
    assert store.after(seq)[1] == []


def test_memory_is_bounded_whatever_comes() -> None:
    """1,000 sidecars every 5 s for 10 minutes, at some routes each: well below 48 MiB."""
    clock = Clock()
    store = Store(clock)
    spread = Histogram.of([1.5**power for power in range(20)])
    cells = tuple(
        Cell(inbound=True, peer=f"s-{n}", route="work", requests=20, codes={"200": 20}, latency=spread)
        for n in range(3)
    )
    one = instance()
    names = [one.model_copy(update={"id": f"b-{n}"}) for n in range(200)]
    for _ in range(120):
        clock.now += 1
        for name in names:
            store.add(name, export(clock.now, start=clock.now - 5, cells=cells))
    assert store._packed_bytes < 4 << 20
    assert len(store._recent) < 200 * 25


def test_waiting_for_a_sample() -> None:
    store = Store()
    seq, _ = store.after(-1)
    assert store.after(seq, wait_s=0.01) == (seq, [])
    thread = threading.Timer(0.05, lambda: store.add(instance(), export(time.time())))
    thread.start()
    later, found = store.after(seq, wait_s=10)
    thread.join()
    assert later == seq + 1
    assert [sample.instance for sample in found] == ["b-1"]


def test_sequence_numbers_grow_over_restarts() -> None:
    before = Store()
    before.add(instance(), export(time.time()))
    seq, _ = before.after(-1)
    after = Store()
    after.add(instance(), export(time.time()))
    assert len(after.after(seq)[1]) == 1
    assert len(after.after(seq + 10**12)[1]) == 1  # a number that was never given
