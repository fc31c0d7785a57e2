"""The numbers are true: what the mesh says of requests is what they were. Real Envoys."""

from __future__ import annotations

import math
import threading
from collections import Counter
from typing import Any

import pytest
from api_harness import served_mesh
from local_harness import Cli, wait_for
from xds_harness import Load, mesh_of, pair, until

from meshdemo.control.intent import set_traffic
from meshdemo.control.model import Intent, MeshState
from meshdemo.control.signals import bucket
from meshdemo.runtime.local.runtime import LocalRuntime

WORK, WARM, END = (f"http://service-b:5000/{path}" for path in ("work", "warm", "end"))


def test_quantiles_are_within_a_tenth_of_those_of_the_single_requests() -> None:
    """Of each request, a tap says how long it took to the microsecond; signals know it from buckets."""
    mix = ((8, 366), (40, 26), (400, 8))  # (ms, requests): each quantile is in the middle of one kind
    with served_mesh() as mesh:
        mesh.add("service-a")
        mesh.add("service-b")
        mesh.start()
        control = mesh.server.client()
        caller = mesh.members["service-a-1"].client()
        tapped: list[Any] = []
        tapping = control.tap(service="service-b", max_per_s=1000)

        def listen() -> None:
            for event in tapping:
                tapped.append(event)
                if event["path"] == "/end":
                    return

        listening = threading.Thread(target=listen, daemon=True)
        listening.start()
        until(lambda: caller.get(WARM).status == 200 and tapped, "a tapped request")
        for lat_ms, count in mix:
            control.clear_faults()
            control.add_fault(at="mesh", service="service-b", lat_ms=lat_ms)
            assert Counter(caller.get(WORK).status for _ in range(count)) == {200: count}
        total = sum(count for _, count in mix)

        def took_ms() -> list[float]:
            return sorted(one["latency_ms"] for one in list(tapped) if one["path"] == "/work")

        def row() -> dict[str, Any]:
            rows = control.signals(by="route", service="service-b", window_s=300)
            return dict(next(one for one in rows if one.get("route") == "work"))

        def counted() -> Counter[int]:
            """Requests by bucket, as service-b's sidecar has counted them."""
            samples = control.samples(0).samples
            cells = [
                cell for sample in samples for cell in sample.cells if cell.inbound and cell.route == "work"
            ]
            return sum((Counter(dict(cell.latency.counts)) for cell in cells), Counter[int]())

        until(lambda: len(took_ms()) == total, "all requests to be tapped")
        until(lambda: row()["requests"] == counted().total() == total, "all requests to be counted")
        found, exact, by_bucket = row(), took_ms(), Counter(map(bucket, took_ms()))
        for key, q in (("p50_ms", 0.5), ("p95_ms", 0.95), ("p99_ms", 0.99)):
            assert found[key] == pytest.approx(exact[math.ceil(q * total) - 1], rel=0.1), (key, exact)
        # One tells them rounded to a microsecond and the other cut to one; few are that near to a bound.
        elsewhere = (counted() - by_bucket).total()
        assert elsewhere <= total // 100, (counted(), by_bucket)
        until(lambda: caller.get(END).status == 200 and not listening.is_alive(), "the tap to end")
        tapping.close()


def test_of_ten_thousand_requests_after_a_change_each_version_gets_its_share() -> None:
    """Within 3 standard deviations, at once. Chance alone breaks that once in 400 times, so it is asked twice."""
    count, share = 10_000, 0.1
    with mesh_of(pair()) as mesh:
        mesh.add("service-a")
        mesh.add("service-b")
        new = mesh.add("service-b", "v2").instance.id
        mesh.start()

        def split(weight: int) -> None:
            def change(intent: Intent, state: MeshState) -> Intent:
                return set_traffic(
                    intent, state, "service-b", {"split": {"v1": 100 - weight, "v2": weight}}, 0.0
                )

            assert mesh.change(change).sidecars == 2 + 1

        def deviations() -> float:
            answers = [caller.get(WORK) for _ in range(count)]
            assert {answer.status for answer in answers} == {200}
            got = sum(answer.body == new for answer in answers)
            return abs(got - count * share) / math.sqrt(count * share * (1 - share))

        caller = mesh.members["service-a-1"].client()
        with Load(mesh.members["service-a-1"], WORK, threads=1) as load:
            split(50)
            split(round(share * 100))
            load.more(10)
        assert load.failed == []
        assert deviations() <= 3 or deviations() <= 3


def test_ten_rotations_at_500_requests_a_second_fail_no_request(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Each time the requests take longer, so that more are in flight: connections with the new certificates."""
    with Cli(tmp_path_factory.mktemp("home")).up("--rps", "500") as mesh:
        runtime = LocalRuntime(mesh.name)
        runtime.paths = mesh.paths
        control = runtime.control()
        expiry = {row["instance"]: row["expires_at"] for row in control.identities()["instances"]}

        def rotate(attempt: int) -> None:
            for number in range(10):
                control.clear_faults()
                control.add_fault(at="mesh", service="service-b", lat_ms=20 * (number + 1))
                assert not control.rotate_identities().unconfirmed
                enough = mesh.counts()["200"] + 250
                wait_for("half a second of requests", lambda enough=enough: mesh.counts()["200"] >= enough)
            control.clear_faults()

        mesh.loses_no_request(rotate)
        after = {row["instance"]: row["expires_at"] for row in control.identities()["instances"]}
        assert all(after[instance] > expiry[instance] for instance in after)
