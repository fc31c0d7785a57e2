"""What steering does is seen in the figures too: the control plane's process, real sidecars, its API."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from api_harness import ServedMesh, served_mesh
from local_harness import read_url
from prometheus_client.parser import text_string_to_metric_families
from xds_harness import Answer, Load, Proxied, until

from meshdemo.control.client import ControlClient
from meshdemo.control.model import Traffic
from meshdemo.errors import BadInput, Failed, MeshdemoError

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
    client.set_traffic("service-b", dict.fromkeys(Traffic.model_fields.keys() - {"since", "field_since"}))
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


def all_reported(client: ControlClient) -> None:
    """Wait until each sidecar has reported on a time that begins after now, and so on all that was before."""
    now, waiting = time.time(), {row["id"] for row in client.status()["instances"]}
    seq = client.samples(-1).seq

    def reported() -> bool:
        nonlocal seq
        batch = client.samples(seq)
        seq = batch.seq
        waiting.difference_update(sample.instance for sample in batch.samples if sample.start >= now)
        return not waiting

    until(reported, "each sidecar to report")


def by_version(client: ControlClient, window_s: float = 30) -> dict[str, Any]:
    rows = client.signals(by="version", window_s=window_s, service="service-b")
    return {row["version"]: row for row in rows}


# -- a split that somebody holds ----------------------------------------------------------------------------


def lease(owner: str, lasts_s: float = 1.0, **more: bool) -> dict[str, Any]:
    return {"owner": owner, "by": "a test", "lasts_s": lasts_s, "fallback": {"v1": 100, "v2": 0}, **more}


def split_of(client: ControlClient) -> dict[str, int]:
    return dict(client.traffic()["service-b"].split)


def test_a_split_whose_holder_falls_silent_goes_back_by_itself(
    mesh: ServedMesh, client: ControlClient
) -> None:
    client.set_traffic("service-b", {"timeout_ms": 5000})
    seq = client.events(-1).seq
    client.lease_split("service-b", {"v1": 70, "v2": 30}, lease("x", 4.0, begins=True))
    ends = time.monotonic() + 6
    while time.monotonic() < ends:  # for longer than it lasts, but renewed
        held = client.renew_lease("service-b", "x")
        assert held == {"held": True, "ran_out": False, "split": {"v1": 70, "v2": 30}}
        time.sleep(0.1)
    until(lambda: split_of(client) == {"v1": 100, "v2": 0}, "the split to go back")
    assert client.traffic()["service-b"].timeout_ms == 5000
    lost = client.renew_lease("service-b", "x")
    assert lost == {"held": False, "ran_out": True, "split": {"v1": 100, "v2": 0}}
    event = until(
        lambda: [e for e in client.events(seq).events if e["event"] == "canary"], "the journal to tell"
    )[0]
    assert (event["service"], event["by"]) == ("service-b", "control-plane")
    assert client.intent().leases == {}
    # ... also if the control plane was killed meanwhile.
    client.lease_split("service-b", {"v1": 60, "v2": 40}, lease("y", begins=True))
    mesh.server.stop(signal.SIGKILL)
    mesh.server.start()
    until(lambda: split_of(client) == {"v1": 100, "v2": 0}, "the split to go back after a restart")
    until(lambda: all(row["acked"] for row in client.status()["instances"]), "the sidecars to be back")


def test_a_split_is_held_by_one_and_whoever_else_sets_it_takes_it(client: ControlClient) -> None:
    client.lease_split("service-b", {"v1": 70, "v2": 30}, lease("x", 60, begins=True))
    with pytest.raises(BadInput, match="in the hands of a test"):
        client.lease_split("service-b", {"v1": 60, "v2": 40}, lease("y", 60, begins=True))
    client.set_traffic("service-b", {"retries": 1})  # is about something else
    assert client.renew_lease("service-b", "x")["held"]
    client.set_traffic("service-b", {"split": {"v1": 50, "v2": 50}})
    lost = client.renew_lease("service-b", "x")
    assert lost == {"held": False, "ran_out": False, "split": {"v1": 50, "v2": 50}}
    with pytest.raises(Failed, match="not held"):
        client.lease_split("service-b", {"v1": 0, "v2": 100}, lease("x", ends=True))
    assert client.intent().leases == {}  # none to run out, and to take back what was set
    assert split_of(client) == {"v1": 50, "v2": 50}
    client.lease_split("service-b", {"v1": 40, "v2": 60}, lease("z", 60, begins=True))
    client.lease_split("service-b", {"v1": 0, "v2": 100}, lease("z", 60, ends=True))
    assert client.intent().leases == {}
    assert split_of(client) == {"v1": 0, "v2": 100}


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
    before = by_version(client, 600)["v2"]["mirrored_failures"]
    assert {answer.status for answer in send(mesh, 20)} == {200}
    until(lambda: by_version(client, 600)["v2"]["mirrored_failures"] >= before + 20, "the copies to fail")


def test_copies_that_hang_are_no_overdue_requests(mesh: ServedMesh, client: ControlClient) -> None:
    client.set_traffic("service-b", {"mirror": {"v2": 1.0}})
    client.add_fault(at="mesh", service="service-b", version="v2", lat_ms=14_000)  # Envoy gives a copy 15 s
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


# -- who is who ---------------------------------------------------------------------------------------------


def test_edges_bear_both_identities_and_plain_text_shows_as_such(
    mesh: ServedMesh, client: ControlClient
) -> None:
    assert {answer.status for answer in send(mesh, 5)} == {200}

    def seen() -> Any:
        edges = {row["caller"]: row for row in client.edges(window_s=10)}
        known = edges.get("service-a")
        return edges if known and known["service_identity"] else None

    known = until(seen, "an edge with both identities")["service-a"]
    assert known["identity"].endswith("/sa/service-a")
    assert known["service_identity"].endswith("/sa/service-b")
    assert known["secured"]
    plain = Proxied(mesh.members["service-b-1"].instance.metrics_port)
    assert [plain.get(path).status for path in ("/healthz", "/work", "/work")] == [200, 403, 403]
    plain.close()
    unknown = until(
        lambda: (
            (row := {row["caller"]: row for row in client.edges(10)}.get("")) and row["denied"] >= 2 and row
        ),
        "the plain-text caller",
    )
    assert (unknown["secured"], unknown["denied"], unknown["requests"]) == (False, 2, 0)
    whole = until(
        lambda: (
            send(mesh, 1)
            and (row := client.signals(window_s=10, service="service-b")[0])["denied"]
            and row["requests"]
            and row
        ),
        "the requests beside it",
    )
    assert whole["success_rate"] == 1


# -- retries ------------------------------------------------------------------------------------------------


def arrived(mesh: ServedMesh) -> float:
    """Requests that instances of service-b have answered, tries again included."""
    rows = metrics(mesh, "meshdemo_requests_total")
    return sum(n for labels, n in rows.items() if "service-b" in labels)


def test_retries_help_callers_and_their_budget_bounds_what_they_add(
    mesh: ServedMesh, client: ControlClient
) -> None:
    client.set_traffic("service-b", {"retries": 5, "outlier": False})
    client.add_fault(at="mesh", service="service-b", err_rate=0.8)
    before, sent = arrived(mesh), 0
    with Load(mesh.members["service-a-1"], WORK, threads=60, pause_s=0.2) as load:
        load.more(600)
        row = until(
            lambda: (
                (row := client.signals(window_s=5, service="service-b")[0])["effective_success_rate"] and row
            ),
            "signals",
        )
    sent = len(load.answers)
    assert row["effective_success_rate"] > row["success_rate"] + 0.05
    all_reported(client)
    times = (arrived(mesh) - before) / sent
    assert 1.2 < times < 2.7, times  # without a budget: 3.7


def test_an_instance_that_is_gone_is_tried_around_within_the_budget(
    mesh: ServedMesh, client: ControlClient
) -> None:
    client.set_traffic("service-b", {"retries": 5})
    # Fewer in flight than the budget's floor (cluster.yaml.j2), however long a starved machine lets them wait.
    with Load(mesh.members["service-a-1"], WORK, threads=10, pause_s=0.05) as load:
        for _ in range(3):
            mesh.members["service-b-1"].upstream.status = 503
            load.more(150)
            mesh.members["service-b-1"].upstream.status = 200
            load.more(100)
    assert load.failed == []


# -- tap ----------------------------------------------------------------------------------------------------


@contextmanager
def tapped(client: ControlClient, **wanted: Any) -> Iterator[list[Any]]:
    """The events of a tap, as they come."""
    events: list[Any] = []
    tapping = client.tap(**wanted)
    threading.Thread(target=_drain, args=(tapping, events), daemon=True).start()
    yield events


def _drain(tapping: Iterator[Any], events: list[Any]) -> None:
    with suppress(MeshdemoError, ValueError):
        for event in tapping:
            events.append(event)


def test_tap_shows_what_the_callers_sidecar_answered(mesh: ServedMesh, client: ControlClient) -> None:
    client.add_fault(at="mesh", service="service-b", lat_ms=1500)
    client.set_traffic("service-b", {"timeout_ms": 100, "retries": 0})
    with tapped(client, service="service-b", failed=True) as events:
        until(
            lambda: send(mesh, 1) and [e for e in events if e["flags"] == "UT"], "a timeout of the caller's"
        )
        event = next(e for e in events if e["flags"] == "UT")
        assert (event["status"], event["at"], event["caller"]) == (504, "caller", "service-a")
        assert (event["service"], event["version"], event["route"]) == ("service-b", "v1", "work")
        client.set_traffic("service-b", {"timeout_ms": 5000, "max_connections": 1, "max_pending": 1})
        with Load(mesh.members["service-a-1"], WORK, threads=8, pause_s=0):
            until(lambda: [e for e in events if e["flags"] == "UO"], "what the breaker refused")
    assert all(event["service"] == "service-b" for event in events)


# -- what Envoy does by itself ------------------------------------------------------------------------------


def test_refusals_and_ejections_are_seen_apart_from_errors_of_the_app(
    mesh: ServedMesh, client: ControlClient
) -> None:
    bad = mesh.members["service-b-1"].upstream
    bad.status = 500

    def ejected() -> Any:
        send(mesh, 60)
        rows = {row["instance"]: row for row in client.signals("instance", 20, "service-b")}
        return rows if rows["service-b-1"]["outlier_ejected"] else None

    rows = until(ejected, "Envoy to eject the instance")
    assert (rows["service-b-2"]["outlier_ejected"], rows["service-b-1"]["ejected"]) == (0, False)

    def shown() -> bool:
        send(mesh, 60)
        kept_out = {k for k, n in metrics(mesh, "meshdemo_outlier_ejected_instances").items() if n}
        return kept_out == {("service-a", "service-b", "v1")} and bool(
            by_version(client)["v1"]["outlier_ejected"]
        )

    until(shown, "it to be in the metrics and by version")
    bad.status = 200
    all_reported(client)
    client.add_fault(at="mesh", service="service-b", lat_ms=300)
    client.set_traffic("service-b", {"max_connections": 1, "max_pending": 1})
    failures = sum(metrics(mesh, "meshdemo_request_failures_total").values())
    with Load(mesh.members["service-a-1"], WORK, threads=8, pause_s=0.02) as load:
        row = until(
            lambda: (row := client.signals(window_s=3, service="service-b")[0])["refused"] and row,
            "what the breaker refused",
        )
    assert {answer.status for answer in load.answers} <= {200, 503}
    assert row["effective_success_rate"] < 1
    until(lambda: sum(metrics(mesh, "meshdemo_client_request_refused_total").values()) > 20, "refusals")
    assert sum(metrics(mesh, "meshdemo_request_failures_total").values()) == failures  # of the app: none


# -- rotation -----------------------------------------------------------------------------------------------


def test_certificates_and_root_are_rotated_by_hand_under_load(
    mesh: ServedMesh, client: ControlClient
) -> None:
    before = client.identities()
    assert before["trusted_roots"] == 1
    assert {row["identity"].rsplit("/", 1)[1] for row in before["instances"]} == {"service-a", "service-b"}
    with Load(mesh.members["service-a-1"], WORK) as load:
        assert client.rotate_identities().sidecars == 4
        load.more(30)
        assert client.rotate_identities(root=True).sidecars == 4
        load.more(30)
    assert load.failed == []
    after = client.identities()
    assert (after["trusted_roots"], after["replacing_root"]) == (1, False)
    old = {row["instance"]: row["expires_at"] for row in before["instances"]}
    assert all(row["expires_at"] > old[row["instance"]] for row in after["instances"])
