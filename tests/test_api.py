"""The control plane's HTTP API over real HTTP, with real sidecars behind it."""

from __future__ import annotations

import http.client
import json
import os
import resource
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import suppress
from functools import partial
from typing import Any

import grpc
import pytest
from api_harness import ServedMesh, Server, served_mesh
from prometheus_client.parser import text_string_to_metric_families
from xds_harness import DEADLINE_S, Load, pair, until

from meshdemo.control.client import ControlClient, SignalRow
from meshdemo.control.identity import CONTROL_PLANE_NAME
from meshdemo.errors import BadInput, Failed, MeshdemoError, Missing


@pytest.fixture(scope="module")
def mesh() -> Iterator[ServedMesh]:
    with served_mesh() as served:
        served.add("service-a")
        served.add("service-b")
        served.add("service-b")
        served.start()
        yield served


@pytest.fixture
def client(mesh: ServedMesh) -> Iterator[ControlClient]:
    client = mesh.server.client()
    yield client
    client.clear_faults()


def requests(mesh: ServedMesh, n: int, path: str = "/work") -> list[int]:
    caller = mesh.members["service-a-1"].client()
    return [caller.get(f"http://service-b:5000{path}").status for _ in range(n)]


def raw(
    server: Server, method: str, path: str, body: bytes | None = None, port: int | None = None, **headers: str
) -> tuple[int, Any, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port or server.http_port, timeout=10)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    answered = {name.lower(): value for name, value in answer.getheaders()}
    try:
        return answer.status, json.loads(content), answered
    except ValueError:
        return answer.status, content.decode(), answered


def bearer(server: Server) -> str:
    return "Bearer " + (server.state / "control" / "api-token").read_text()


# -- who may ask ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/status", "/v1/intent", "/v1/samples", "/v1/tap", "/v1/none"])
@pytest.mark.parametrize("authorization", ["", "Bearer ", "Bearer wrong", "Basic eDp5", "Bearer é"])
def test_nothing_without_the_token(mesh: ServedMesh, path: str, authorization: str) -> None:
    headers = {"Authorization": authorization} if authorization else {}
    status, body, answered = raw(mesh.server, "GET", path, **headers)
    assert (status, answered["www-authenticate"]) == (401, "Bearer")
    assert body["error"]


def test_health_needs_no_token(mesh: ServedMesh) -> None:
    assert raw(mesh.server, "GET", "/healthz")[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "169.254.1.1", "localhost.evil.example", ""]
)
def test_a_name_that_is_not_ours_is_refused(mesh: ServedMesh, host: str) -> None:
    status, _, _ = raw(mesh.server, "GET", "/healthz", Host=host, Authorization=bearer(mesh.server))
    assert status in (400, 403)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1", "127.9.9.9:80", "[::1]:80"])
def test_loopback_by_any_name_is_ours(mesh: ServedMesh, host: str) -> None:
    assert raw(mesh.server, "GET", "/healthz", Host=host)[0] == 200


def test_the_open_address_shows_health_and_metrics_alone(mesh: ServedMesh) -> None:
    port = mesh.server.open_port
    assert raw(mesh.server, "GET", "/healthz", port=port, Host="10.1.2.3:9")[0] == 200
    assert raw(mesh.server, "GET", "/metrics", port=port, Host="10.1.2.3:9")[0] == 200
    for path in ("/v1/status", "/", "/v1/faults"):
        assert raw(mesh.server, "GET", path, port=port, Authorization=bearer(mesh.server))[0] == 404


def test_the_token_is_the_owners_alone_and_in_no_log(mesh: ServedMesh) -> None:
    path = mesh.server.state / "control" / "api-token"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text() not in mesh.server.log()
    for member in mesh.members.values():
        assert member.token not in mesh.server.log()


# -- errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/faults", b"{", 400),
        ("POST", "/v1/faults", b"[]", 400),
        ("POST", "/v1/faults", b"{}", 400),
        ("POST", "/v1/faults", b'{"service": "service-b", "lat_ms": "200"}', 400),
        ("POST", "/v1/faults", b'{"service": "service-b", "lat_ms": -1}', 400),
        ("POST", "/v1/faults", b'{"service": "service-b", "latency": 1}', 400),
        ("PUT", "/v1/access", b'{"caller": "service-a", "service": "service-b", "allowed": 1}', 400),
        ("PUT", "/v1/traffic/service-b", b'{"split": {"v9": 100}}', 400),
        ("POST", "/v1/events", b'{"no": "event"}', 400),
        ("POST", "/v1/events", b'{"event": "x", "time": "now"}', 400),
        ("GET", "/v1/signals?by=colour", None, 400),
        ("GET", "/v1/signals?window_s=-1", None, 400),
        ("GET", "/v1/signals?window_s=nan", None, 400),
        ("GET", "/v1/signals?service=service-x", None, 400),
        ("GET", "/v1/samples?after=x", None, 400),
        ("GET", "/v1/samples?wait_s=1000000", None, 400),
        ("GET", "/v1/tap?status=banana", None, 400),
        ("GET", "/v1/nothing", None, 404),
        ("PATCH", "/v1/faults", None, 405),
        ("POST", "/v1/events", b'{"event": "' + b"x" * 300_000 + b'"}', 413),
    ],
)
def test_errors_are_json_and_say_what_is_wrong(
    mesh: ServedMesh, method: str, path: str, body: bytes | None, status: int
) -> None:
    answered, content, _ = raw(
        mesh.server, method, path, body, Authorization=bearer(mesh.server), Content_Type="application/json"
    )
    assert answered == status, content
    assert content["error"]
    assert "remedy" in content


def test_a_body_must_say_that_it_is_json(mesh: ServedMesh) -> None:
    """A page of another origin can only send other types without asking first."""
    status, content, _ = raw(
        mesh.server, "POST", "/v1/events", b'{"event": "x"}',
        Authorization=bearer(mesh.server), Content_Type="text/plain",
    )  # fmt: skip
    assert status == 400
    assert "application/json" in content["error"]


def test_the_client_says_what_the_server_said(client: ControlClient, mesh: ServedMesh) -> None:
    with pytest.raises(BadInput, match=r"unknown service 'service-x'.*service-b"):
        client.add_fault(at="mesh", service="service-x", lat_ms=5)
    with pytest.raises(BadInput, match="no fault 'f-x'"):
        client.clear_fault("f-x")
    with pytest.raises(Failed, match="token"):
        ControlClient(client.base_url, "wrong").status()
    with pytest.raises(Missing, match="does not answer"):
        ControlClient("http://127.0.0.1:1", "x", retry_s=0).status()


# -- the mesh -------------------------------------------------------------------------------------------


def test_status_names_every_instance(client: ControlClient) -> None:
    def settled() -> bool:
        return all(row["acked"] and row["last_report_s"] is not None for row in client.status()["instances"])

    until(settled, "all sidecars to be configured and to report")
    status = client.status()
    assert status["mesh"] == "m"
    assert [row["id"] for row in status["instances"]] == ["service-a-1", "service-b-1", "service-b-2"]
    assert all(row["connected"] and not row["silent"] and not row["ejected"] for row in status["instances"])
    assert status["nacks"] == []
    assert status["trouble"] == ""


def test_requests_show_as_signals_of_every_scope(mesh: ServedMesh, client: ControlClient) -> None:
    assert set(requests(mesh, 60)) == {200}
    assert set(requests(mesh, 20, "/elsewhere")) == {200}

    def counted() -> SignalRow | None:
        found = {row["service"]: row for row in client.signals(window_s=60)}["service-b"]
        return found if found["requests"] >= 80 and found["effective_success_rate"] else None

    whole = until(counted, "80 requests to be counted")
    assert whole["success_rate"] == 1
    assert whole["effective_success_rate"] == 1
    assert 0 < whole["p50_ms"] <= whole["p95_ms"] <= whole["p99_ms"] < 5_000
    assert whole["rps"] > 0

    instances = client.signals(by="instance", window_s=60, service="service-b")
    assert [row["instance"] for row in instances] == ["service-b-1", "service-b-2"]
    assert sum(row["requests"] for row in instances) >= 80
    assert all(row["requests"] > 0 for row in instances)
    versions = client.signals(by="version", window_s=60, service="service-b")
    assert [row["version"] for row in versions] == ["v1"]
    assert versions[0]["effective_success_rate"] == 1
    routes = {row["route"]: row for row in client.signals(by="route", window_s=60, service="service-b")}
    assert routes["work"]["requests"] >= 60
    assert routes["other"]["requests"] >= 20
    callers = client.signals(by="caller", window_s=60, service="service-b")
    assert [row["caller"] for row in callers] == ["service-a"]

    edge = client.edges(window_s=60)[0]
    assert (edge["caller"], edge["service"], edge["secured"]) == ("service-a", "service-b", True)
    assert edge["identity"].endswith("/service-a")


def test_a_fault_is_in_force_when_the_call_returns_and_shows_as_failures(
    mesh: ServedMesh, client: ControlClient
) -> None:
    before = client.events(-1).seq
    fault, effect = client.add_fault(at="mesh", service="service-b", err_rate=1)
    assert effect.sidecars == 2
    assert 0 < effect.effective_ms < 5_000
    assert [known.id for known in client.faults()] == [fault.id]
    assert set(requests(mesh, 10)) == {500}
    until(
        lambda: client.signals(window_s=30, service="service-b")[0]["failures"] >= 10,
        "failures to be counted",
    )
    gone, _ = client.clear_fault(fault.id)
    assert [cleared.id for cleared in gone] == [fault.id]
    assert set(requests(mesh, 10)) == {200}
    assert client.faults() == []
    events = client.events(before).events
    assert [event["event"] for event in events] == ["fault", "fault_cleared"]
    assert {event["fault"] for event in events} == {fault.id}


def test_a_fault_made_elsewhere_is_recorded_and_ends_by_itself(client: ControlClient) -> None:
    began = time.time() - 1
    fault, effect = client.add_fault(
        at="app", service="service-b", version="v1", lat_ms=200, revision=2, started_at=began, for_s=1.2
    )
    assert (fault.started_at, fault.revision, effect.sidecars) == (began, 2, 0)
    until(lambda: client.faults() == [], "the fault to end")


def test_faults_of_one_kind_of_place_can_be_cleared(mesh: ServedMesh, client: ControlClient) -> None:
    client.add_fault(at="app", service="service-b", lat_ms=1, fault_id="app-1")
    client.add_fault(at="mesh", service="service-b", lat_ms=1, fault_id="mesh-1")
    status, content, _ = raw(mesh.server, "DELETE", "/v1/faults?at=mesh", Authorization=bearer(mesh.server))
    assert (status, [fault["id"] for fault in content["faults"]]) == (200, ["mesh-1"])
    assert [fault.id for fault in client.clear_faults().faults] == ["app-1"]


def test_access_and_ejection(mesh: ServedMesh, client: ControlClient) -> None:
    client.set_access("service-a", "service-b", False)
    assert set(requests(mesh, 5)) == {403}
    row = next(row for row in client.access() if row["service"] == "service-b")
    assert row == {"caller": "service-a", "service": "service-b", "allowed": False, "explicit": True}
    denied = until(
        lambda: next((e for e in client.edges(window_s=60) if e["denied"] >= 5), None),
        "denials to be counted",
    )
    assert denied["secured"]
    client.set_access("service-a", "service-b", True)
    assert set(requests(mesh, 5)) == {200}

    client.eject("service-b-1", reason="test", by="me")
    seen = len(mesh.members["service-b-1"].upstream.requests)
    assert set(requests(mesh, 20)) == {200}
    assert len(mesh.members["service-b-1"].upstream.requests) == seen
    rows = client.signals(by="instance", service="service-b")
    assert [row["ejected"] for row in rows] == [True, False]
    client.readmit("service-b-1")
    with pytest.raises(BadInput, match="not ejected"):
        client.readmit("service-b-1")


def test_traffic_rules(client: ControlClient) -> None:
    traffic, _ = client.set_traffic("service-b", {"timeout_ms": 700, "retries": 1})
    assert (traffic.timeout_ms, traffic.retries) == (700, 1)
    assert client.traffic()["service-b"].timeout_ms == 700
    traffic, _ = client.set_traffic("service-b", {"timeout_ms": None, "retries": None})
    assert client.traffic() == {}


def test_samples_come_as_sidecars_report(mesh: ServedMesh, client: ControlClient) -> None:
    seq = client.samples(-1).seq
    names = set()
    deadline = time.monotonic() + DEADLINE_S
    while len(names) < 3 and time.monotonic() < deadline:
        batch = client.samples(seq, wait_s=2)
        assert batch.seq >= seq
        for sample in batch.samples:
            assert sample.end <= batch.now + 0.1
            if 0.25 < sample.end - sample.start < 1:  # they report twice a second, if the machine lets them
                names.add(sample.instance)
        seq = batch.seq
    assert names == {"service-a-1", "service-b-1", "service-b-2"}
    assert len(batch.instances) == 3


def test_tap_shows_single_requests_and_costs_nothing_afterwards(
    mesh: ServedMesh, client: ControlClient
) -> None:
    events: list[Any] = []
    tapping = client.tap(service="service-b", route="/tapped")
    thread = threading.Thread(
        target=lambda: events.extend(event for event, _ in zip(tapping, range(3), strict=False))
    )
    thread.start()

    def flowing() -> bool:
        requests(mesh, 1, "/tapped?x=1")
        requests(mesh, 1, "/work")
        return not thread.is_alive()

    until(flowing, "three requests to be tapped")
    event = events[0]
    assert (event["caller"], event["service"], event["version"]) == ("service-a", "service-b", "v1")
    assert event["instance"] in ("service-b-1", "service-b-2")
    assert (event["method"], event["path"], event["status"]) == ("GET", "/tapped?x=1", 200)
    assert (event["route"], event["secured"], event["flags"]) == ("other", True, "")
    assert abs(event["time"] - time.time()) < 30
    assert 0 < event["latency_ms"] < 5_000
    assert {event["path"] for event in events} == {"/tapped?x=1"}
    tapping.close()


def test_tap_by_status(mesh: ServedMesh, client: ControlClient) -> None:
    client.add_fault(at="mesh", service="service-b", err_rate=1, route="/bad")
    tapping = client.tap(status="5xx", instance="service-b-1", max_per_s=100)
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(next(tapping)))
    thread.start()
    until(
        lambda: bool(requests(mesh, 2, "/bad") + requests(mesh, 2)) and not thread.is_alive(), "a tapped 500"
    )
    assert (found[0]["status"], found[0]["instance"], found[0]["flags"]) == (500, "service-b-1", "FI")
    tapping.close()


def test_a_tap_whose_caller_vanished_is_closed(mesh: ServedMesh, client: ControlClient) -> None:
    """8 may be open at once: were they kept, the last of these would be refused."""

    def tap_and_vanish() -> bool:
        with socket.create_connection(("127.0.0.1", mesh.server.http_port)) as connection:
            ask = f"GET /v1/tap HTTP/1.1\r\nHost: localhost\r\nAuthorization: {bearer(mesh.server)}\r\n\r\n"
            connection.sendall(ask.encode())
            return b" 200 " in connection.recv(100)

    for _ in range(20):
        until(tap_and_vanish, "a place for one more")
    assert client.healthy()


def test_events_are_numbered_and_waited_for(client: ControlClient) -> None:
    seq = client.post_event({"event": "acted", "remedy": "eject", "service": "service-b", "time": 5.0})
    batch = client.events(seq - 1)
    assert batch.events[0]["remedy"] == "eject"
    assert batch.events[0]["time"] == 5.0
    threading.Timer(0.1, lambda: client.post_event({"event": "healed"})).start()
    assert [event["event"] for event in client.events(batch.seq, wait_s=10).events] == ["healed"]
    assert client.events(client.events(-1).seq, wait_s=0.05).events == []


def test_metrics_in_prometheus_form(mesh: ServedMesh, client: ControlClient) -> None:
    requests(mesh, 10)
    client.post_event({"event": "acted", "remedy": "restart", "service": "service-b"})

    def read() -> str:
        _, page, _ = raw(mesh.server, "GET", "/metrics")
        return str(page)

    def family(name: str, page: str) -> list[Any]:
        families = {family.name: family for family in text_string_to_metric_families(page)}
        return list(families[name].samples) if name in families else []

    def of_b(page: str, name: str, suffix: str, **labels: str) -> float:
        labels["service"] = "service-b"
        return sum(
            s.value
            for s in family(name, page)
            if s.name == name + suffix and labels.items() <= s.labels.items()
        )

    def counted() -> str:
        page = read()
        requests = of_b(page, "meshdemo_requests", "_total", code="200", caller="service-a")
        return page if min(requests, of_b(page, "meshdemo_request_duration_seconds", "_count")) >= 10 else ""

    page = until(counted, "requests to count")
    assert of_b(page, "meshdemo_request_duration_seconds", "_bucket", le="+Inf") == of_b(
        page, "meshdemo_request_duration_seconds", "_count"
    )
    assert of_b(page, "meshdemo_remedies", "_total", remedy="restart") == 1
    states = {s.labels["state"]: s.value for s in family("meshdemo_sidecars", page)}
    assert (sum(states.values()), states["disconnected"]) == (3, 0)
    assert sum(s.value for s in family("meshdemo_instances", page)) == 3, "each instance has one state"


def test_a_silent_sidecar_is_seen_as_silent(mesh: ServedMesh, client: ControlClient) -> None:
    process = mesh.members["service-b-2"].process
    assert process is not None

    def silent() -> dict[str, bool]:
        return {row["instance"]: row["silent"] for row in client.signals(by="instance", service="service-b")}

    process.send_signal(signal.SIGSTOP)
    try:
        until(lambda: silent()["service-b-2"], "it to be silent")
        (row,) = (row for row in client.status()["instances"] if row["id"] == "service-b-2")
        assert row["last_report_s"] > 1.5
        assert not silent()["service-b-1"]
        assert not client.signals(service="service-b")[0]["silent"]
    finally:
        process.send_signal(signal.SIGCONT)
    until(lambda: not silent()["service-b-2"], "it to be heard again")


def test_telemetry_is_taken_from_sidecars_alone(mesh: ServedMesh) -> None:
    trust = grpc.ssl_channel_credentials((mesh.state / "trust.pem").read_bytes())
    token = mesh.members["service-b-1"].token
    with grpc.secure_channel(
        f"127.0.0.1:{mesh.server.grpc_port}",
        trust,
        options=[("grpc.ssl_target_name_override", CONTROL_PLANE_NAME)],
    ) as channel:
        export = channel.unary_unary("/opentelemetry.proto.collector.metrics.v1.MetricsService/Export")
        log = channel.stream_unary("/envoy.service.accesslog.v3.AccessLogService/StreamAccessLogs")

        def refused(call: Callable[[], object]) -> grpc.StatusCode:
            with pytest.raises(grpc.RpcError) as caught:
                call()
            code: grpc.StatusCode = caught.value.code()
            return code

        for wrong in (None, "", "wrong", token[:-1]):
            metadata = [] if wrong is None else [("authorization", f"Bearer {wrong}")]
            code = grpc.StatusCode.UNAUTHENTICATED
            assert refused(partial(export, b"", timeout=10, metadata=metadata)) is code
            assert refused(partial(log, iter([b""]), timeout=10, metadata=metadata)) is code
        metadata = [("authorization", f"Bearer {token}")]
        malformed = partial(export, b"\xff", timeout=10, metadata=metadata)
        assert refused(malformed) is grpc.StatusCode.INVALID_ARGUMENT


# -- processes ------------------------------------------------------------------------------------------


def test_killed_and_started_again_under_load_nothing_is_lost_and_no_request_fails() -> None:
    with served_mesh() as mesh:
        caller = mesh.add("service-a")
        mesh.add("service-b")
        mesh.start()
        client = mesh.server.client(retry_s=DEADLINE_S)
        fault, _ = client.add_fault(at="mesh", service="service-b", lat_ms=1, for_s=600)
        seq = client.post_event({"event": "healed", "note": "before"})
        after = client.samples(-1).seq
        with Load(caller, "http://service-b:5000/work", threads=2) as load:
            mesh.server.stop(signal.SIGKILL)
            with (mesh.state / "events.jsonl").open("a") as journal:
                journal.write('{"event": "torn')
            load.more(50)
            threading.Thread(target=mesh.server.start).start()
            assert [known.id for known in client.faults()] == [fault.id]  # waits for it to be back
            load.more(50)

            def acked() -> bool:
                return all(row["acked"] for row in client.status()["instances"])

            until(acked, "sidecars to be back")
            # Samples of the new process come after the old one's numbers.
            assert until(lambda: client.samples(after, wait_s=1).samples, "samples")
        assert load.failed == []
        events = client.events(seq - 1).events
        assert [event.get("note") for event in events[:1]] == ["before"]
        assert events[1]["event"] == "control_plane_started"
        assert events[1]["seq"] == seq + 1


def test_a_grpc_error_is_a_failure_though_http_says_200() -> None:
    def answer(raw: bytes, context: grpc.ServicerContext) -> bytes:
        if raw == b"bad":
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "no")
        return raw

    handler = grpc.method_handlers_generic_handler("t.T", {"Go": grpc.unary_unary_rpc_method_handler(answer)})
    with served_mesh() as mesh, futures.ThreadPoolExecutor(2) as threads:
        app = grpc.server(threads)
        app.add_generic_rpc_handlers((handler,))
        mesh.app = pair(service_b={"protocol": "grpc"})
        caller, member = mesh.add("service-a"), mesh.add("service-b")
        port = app.add_insecure_port("127.0.0.1:0")
        member.instance = member.instance.model_copy(update={"app_port": port})
        app.start()
        mesh.start()
        client = mesh.server.client()
        tapping = client.tap()
        bad: list[Any] = []
        thread = threading.Thread(
            target=lambda: bad.append(next(event for event in tapping if event["grpc_status"]))
        )
        thread.start()
        with grpc.insecure_channel(
            f"127.0.0.1:{caller.instance.outbound_port}",
            options=[("grpc.default_authority", "service-b:5000")],
        ) as channel:
            go = channel.unary_unary("/t.T/Go")

            def called() -> bool:
                assert go(b"good", timeout=10) == b"good"
                with pytest.raises(grpc.RpcError) as caught:
                    go(b"bad", timeout=10)
                assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
                return not thread.is_alive()

            until(called, "a tapped error")

        def counted() -> Any:
            """The service's signals once both sides' sidecars have reported failures; they report in turn."""
            row = client.signals(service="service-b")[0]
            return row if row["failures"] and row["effective_success_rate"] not in {None, 1} else None

        row = until(counted, "failures to be counted")
        app.stop(0)
        assert 0 < row["failures"] < row["requests"]
        assert row["effective_success_rate"] == pytest.approx(0.5, abs=0.3)
        assert (bad[0]["status"], bad[0]["grpc_status"], bad[0]["path"]) == (200, 9, "/t.T/Go")
        tapping.close()


def test_a_hung_instance_has_overdue_requests() -> None:
    with served_mesh() as mesh, socket.create_server(("127.0.0.1", 0)) as hung:
        caller = mesh.add("service-a")
        member = mesh.add("service-b")
        member.instance = member.instance.model_copy(update={"app_port": hung.getsockname()[1]})
        mesh.start()
        client = mesh.server.client()
        # The kernel accepts; nobody answers.
        for _ in range(5):
            connection = socket.create_connection(("127.0.0.1", caller.instance.outbound_port))
            connection.sendall(b"GET http://service-b:5000/work HTTP/1.1\r\nHost: service-b:5000\r\n\r\n")
            caller.clients.append(connection)  # type: ignore[arg-type]  (only ever closed)
        row = until(
            lambda: found[0] if (found := client.signals(service="service-b"))[0]["overdue"] >= 5 else None,
            "overdue requests",
        )
        assert row["overdue"] == 5


def test_sigterm_ends_it_cleanly_and_quickly() -> None:
    with served_mesh() as mesh:
        mesh.write_instances()
        mesh.server.start()
        tapping = mesh.server.client().tap()

        def tap_to_the_end() -> None:
            with suppress(MeshdemoError):  # what it is told when the control plane goes
                list(tapping)

        thread = threading.Thread(target=tap_to_the_end, daemon=True)
        thread.start()
        began = time.monotonic()
        assert mesh.server.stop(signal.SIGTERM) == 0, mesh.server.log()
        assert time.monotonic() - began < 15
        assert "Traceback" not in mesh.server.log()


def test_it_answers_however_many_sidecars_hold_a_connection() -> None:
    """Each takes a file descriptor, and the API's own may be above what `select` knows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        with served_mesh() as mesh:
            mesh.write_instances()
            mesh.server.start(keeping=held)
            assert mesh.server.client().status()["instances"] == []
    finally:
        for one in held:
            os.close(one)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_stops_it_from_starting_is_said_in_one_line() -> None:
    with served_mesh() as mesh:
        assert mesh.server.spawn().wait(30) == Missing.exit_status
        assert "instances.json is not there" in mesh.server.log()
        mesh.write_instances()
        for name in ("grpc_port", "http_port"):
            with socket.create_server(("127.0.0.1", 0)) as taken:
                free = getattr(mesh.server, name)
                setattr(mesh.server, name, taken.getsockname()[1])
                assert mesh.server.spawn().wait(30) == Failed.exit_status
                assert "cannot listen on 127.0.0.1" in mesh.server.log()
                setattr(mesh.server, name, free)
        (mesh.folder / "instances.json").write_text("{")
        assert mesh.server.spawn().wait(30) == Failed.exit_status
        assert "Traceback" not in mesh.server.log()


def test_instances_that_come_and_go() -> None:
    with served_mesh() as mesh:
        mesh.add("service-b")
        mesh.write_instances()
        mesh.server.start()
        client = mesh.server.client()
        mesh.add("service-b")
        mesh.write_instances()
        client.refresh_instances()
        assert [row["id"] for row in client.status()["instances"]] == ["service-b-1", "service-b-2"]
        (mesh.folder / "instances.json").write_text("not JSON")
        with pytest.raises(Failed, match="cannot be read"):
            client.refresh_instances()
        (mesh.folder / "instances.json").unlink()
        with pytest.raises(Failed, match="is not there"):
            client.refresh_instances()
        assert len(client.status()["instances"]) == 2
