"""What steering does is seen in the figures too: the control plane's process, real sidecars, its API."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from api_harness import ServedMesh, served_mesh
from local_harness import read_url
from prometheus_client.parser import text_string_to_metric_families
from xds_harness import Answer, until

from meshdemo.control.client import ControlClient
from meshdemo.control.model import Traffic

WORK = "http://service-b:5000/work"


@pytest.fixture(scope="module")
def served() -> Iterator[ServedMesh]:
    with served_mesh() as mesh:
        mesh.add("service-a")
        mesh.add("service-b")
        mesh.add("service-b")
        mesh.add("service-b", "v2")
        mesh.start()
        yield mesh


@pytest.fixture
def mesh(served: ServedMesh) -> Iterator[ServedMesh]:
    yield served
    client = served.server.client()
    client.clear_faults()
    client.set_traffic("service-b", dict.fromkeys(Traffic.model_fields.keys() - {"since"}))
    for member in served.members.values():
        member.upstream.status = 200


@pytest.fixture
def client(mesh: ServedMesh) -> ControlClient:
    return mesh.server.client()


def send(mesh: ServedMesh, n: int, url: str = WORK) -> list[Answer]:
    caller = mesh.members["service-a-1"].client()
    return [caller.get(url) for _ in range(n)]


def metrics(mesh: ServedMesh, name: str) -> dict[tuple[str, ...], float]:
    """The samples of a metric, by the values of its labels."""
    page = read_url(f"http://127.0.0.1:{mesh.server.http_port}/metrics")
    return {
        tuple(sample.labels.values()): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == name
    }


def by_version(client: ControlClient, window_s: float = 30) -> dict[str, Any]:
    rows = client.signals(by="version", window_s=window_s, service="service-b")
    return {row["version"]: row for row in rows}


# -- mirrored requests --------------------------------------------------------------------------------------


def test_copies_of_requests_count_for_nobody(mesh: ServedMesh, client: ControlClient) -> None:
    mesh.members["service-b-3"].upstream.status = 500
    client.set_traffic("service-b", {"mirror": {"v2": 1.0}})
    began = metrics(mesh, "meshdemo_requests_total")
    assert Counter(answer.status for answer in send(mesh, 60)) == {200: 60}
    v2 = until(
        lambda: (row := by_version(client)["v2"])["mirrored"] >= 60 and row, "the copies to be counted"
    )
    assert (v2["mirrored_failures"], v2["requests"], v2["failures"]) == (v2["mirrored"], 0, 0)
    assert v2["success_rate"] is None
    until(lambda: by_version(client)["v1"]["requests"] >= 60, "the requests to be counted")
    whole = client.signals(window_s=30, service="service-b")[0]
    assert (whole["requests"], whole["success_rate"]) == (by_version(client)["v1"]["requests"], 1)
    (caller,) = client.signals(by="caller", window_s=30, service="service-b")
    assert caller["failures"] == 0
    (route,) = client.signals(by="route", window_s=30, service="service-b")
    assert (route["route"], route["failures"], route["mirrored"]) == ("work", 0, v2["mirrored"])
    (edge,) = client.edges(window_s=30)
    assert (edge["requests"], edge["success_rate"], edge["secured"]) == (whole["requests"], 1, True)
    counted = metrics(mesh, "meshdemo_requests_total")
    assert sum(counted.values()) - sum(began.values()) == 60
    assert metrics(mesh, "meshdemo_mirrored_requests_total")["service-b", "v2"] >= 60


def test_a_fault_of_a_version_that_is_only_mirrored_to_meets_the_copies(
    mesh: ServedMesh, client: ControlClient
) -> None:
    client.set_traffic("service-b", {"mirror": {"v2": 1.0}})
    client.add_fault(at="mesh", service="service-b", version="v2", err_rate=1)
    before = by_version(client)["v2"]["mirrored_failures"]
    assert {answer.status for answer in send(mesh, 20)} == {200}
    until(lambda: by_version(client)["v2"]["mirrored_failures"] >= before + 20, "the copies to fail")


def test_copies_that_hang_are_no_overdue_requests(mesh: ServedMesh, client: ControlClient) -> None:
    client.set_traffic("service-b", {"mirror": {"v2": 1.0}})
    client.add_fault(at="mesh", service="service-b", version="v2", lat_ms=6000)
    send(mesh, 20)
    seq, deadline, seen = client.samples(-1).seq, time.monotonic() + 20, 0
    while seen < 3:
        assert time.monotonic() < deadline
        batch = client.samples(seq, wait_s=2)
        seq = batch.seq
        for sample in batch.samples:
            if sample.version == "v2" and sample.in_flight >= 20:
                seen += 1
                assert sample.overdue == 0
