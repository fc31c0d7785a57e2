"""The control plane against real Envoys: what is asked for is seen in the behaviour of requests."""

from __future__ import annotations

import itertools
import math
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from envoy.service.accesslog.v3.als_pb2 import StreamAccessLogsMessage
from envoy.service.discovery.v3.discovery_pb2 import (
    DeltaDiscoveryRequest,
    DeltaDiscoveryResponse,
    DiscoveryRequest,
    DiscoveryResponse,
)
from xds_harness import Load, Member, Mesh, Proxied, free_port, mesh_of, pair, until

from meshdemo.bench.outlier import ejections
from meshdemo.control import wire, xds
from meshdemo.control.intent import (
    add_fault,
    clear_fault,
    clear_faults,
    eject,
    new_fault,
    readmit,
    set_access,
    set_traffic,
)
from meshdemo.control.plane import Settings
from meshdemo.errors import BadInput, Failed
from meshdemo.resources import TEMPLATES

WORK = "http://service-b:5000/work"


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    """service-a, two of service-b v1, one of v2; all up."""
    with mesh_of(pair()) as mesh:
        mesh.add("service-a")
        mesh.add("service-b")
        mesh.add("service-b")
        mesh.add("service-b", "v2")
        mesh.start()
        yield mesh


def fault(mesh: Mesh, **request: Any) -> Any:
    """Put a fault in force; its effect."""
    request = {"service": "service-b", **request}
    return mesh.change(lambda intent, state: add_fault(intent, new_fault(request, state, time.time())))


def traffic(mesh: Mesh, **changes: Any) -> Any:
    return mesh.change(lambda intent, state: set_traffic(intent, state, "service-b", changes, time.time()))


def who(client: Proxied, count: int, url: str = WORK) -> Counter[str]:
    """Who answers so many requests."""
    answers = [client.get(url) for _ in range(count)]
    assert {answer.status for answer in answers} == {200}, Counter(a.status for a in answers)
    return Counter(answer.body for answer in answers)


# -- configuration, faults --------------------------------------------------------------------------------


def test_calls_go_through_the_mesh_and_only_initial_versions_get_them(mesh: Mesh) -> None:
    client = mesh.members["service-a-1"].client()
    assert set(who(client, 40)) == {"service-b-1", "service-b-2"}
    seen = mesh.members["service-b-1"].upstream.headers[-1]
    assert seen["host"] == "service-b:5000"
    assert seen["x-forwarded-client-cert"].endswith(";URI=spiffe://m/ns/default/sa/service-a")
    assert who(client, 4, "http://service-b/work")
    assert who(client, 4, "http://service-b.default.svc.cluster.local:5000/work")
    assert client.get("http://nowhere:5000/").status == 404
    until(
        lambda: all(sidecar.connected and sidecar.acked for sidecar in mesh.sidecars()), "all to be confirmed"
    )


def test_a_fault_is_in_force_when_the_change_returns(mesh: Mesh) -> None:
    client = mesh.members["service-a-1"].client()
    effect = fault(mesh, id="x", lat_ms=150, err_rate=1.0)
    answer = client.get(WORK)
    assert answer.status == 500
    assert answer.seconds >= 0.15
    assert effect.sidecars == 3  # of service-b, and nobody else's
    assert 0 < effect.effective_ms < 20_000
    effect = mesh.change(lambda intent, _: clear_fault(intent, "x"))
    assert effect.sidecars == 3
    assert client.get(WORK).status == 200


def test_a_fault_meets_only_whom_it_is_for(mesh: Mesh) -> None:
    client = mesh.members["service-a-1"].client()
    fault(mesh, instance="service-b-1", err_rate=1.0)
    statuses = Counter(client.get(WORK).status for _ in range(40))
    assert set(statuses) == {200, 500}
    mesh.change(lambda intent, _: clear_faults(intent))

    fault(mesh, route="/api/slow", err_rate=1.0)
    assert client.get("http://service-b:5000/api/slower").status == 500
    assert client.get("http://service-b:5000/api/fast").status == 200
    assert client.get(WORK).status == 200
    mesh.change(lambda intent, _: clear_faults(intent))

    fault(mesh, caller="service-c", err_rate=1.0)
    assert client.get(WORK).status == 200
    fault(mesh, caller="service-a", route="/work", err_rate=1.0)
    assert client.get(WORK).status == 500
    mesh.change(lambda intent, _: clear_faults(intent))

    fault(mesh, version="v2", err_rate=1.0)
    assert who(client, 10)


def test_a_fault_ends_by_itself(mesh: Mesh) -> None:
    names = (f"short-{n}" for n in itertools.count())
    with Load(mesh.members["service-a-1"], WORK, threads=1) as load:

        def felt() -> bool:
            name = next(names)
            fault(mesh, id=name, err_rate=1.0, for_s=1)
            until(lambda: not mesh.plane.intent.faults, "the fault to end")
            # It is in the journal once every sidecar has acknowledged its end.
            until(
                lambda: [event["fault"] for event in mesh.journal("fault_expired")][-1:] == [name],
                "the journal",
            )
            return bool(load.failed)

        until(felt, "a request to meet a fault")  # where the machine stalls, its time may be over before that
        load.more(20)
    assert load.errors == []
    assert {answer.status for answer in load.answers} == {200, 500}
    assert {answer.status for answer in load.answers[-10:]} == {200}


def test_bad_input_changes_nothing(mesh: Mesh) -> None:
    before = mesh.plane.intent
    with pytest.raises(BadInput, match="unknown service 'service-x'"):
        fault(mesh, service="service-x", err_rate=1.0)
    assert mesh.plane.intent is before


def test_a_rejection_names_the_sidecar_and_the_intent_before_comes_back(tmp_path: Path) -> None:
    templates = tmp_path / "envoy"
    shutil.copytree(TEMPLATES / "envoy", templates)
    macros = templates / "macros.yaml.j2"
    # Seven retries are something that Envoy will not take, in these templates.
    took = "base_interval: 0.025s"
    assert took in macros.read_text()
    macros.write_text(
        macros.read_text().replace(
            f'"{{{took}, max_interval: 1s}}" if',
            f'"{{base_interval: 0s, max_interval: 1s}}" if traffic.retries == 7 else "{{{took}, max_interval: 1s}}" if',
        )
    )
    with mesh_of(pair(), Settings(templates=templates)) as mesh:
        mesh.add("service-a")
        mesh.add("service-b")
        mesh.start()
        before = mesh.plane.intent
        with pytest.raises(
            Failed,
            match=r"^the sidecar of service-[ab]-1 rejected its routes .and 1 more.: Proto con.*BaseInterval",
        ):
            traffic(mesh, retries=7)
        assert mesh.plane.intent == before
        assert mesh.journal("rejected")
        until(lambda: all(s.acked for s in mesh.sidecars()), "sidecars to be back at what was good")
        client = mesh.members["service-a-1"].client()
        assert client.get(WORK).status == 200
        traffic(mesh, retries=3)
        fault(mesh, err_rate=1.0)
        assert client.get(WORK).status == 500


def test_a_hung_sidecar_is_named_and_delays_one_change_only() -> None:
    with mesh_of(pair(), Settings(ack_timeout_s=4)) as mesh:
        mesh.add("service-a")
        hung = mesh.add("service-b")
        mesh.add("service-b")
        mesh.start()
        assert hung.process
        hung.process.send_signal(19)  # SIGSTOP
        try:
            effect = fault(mesh, err_rate=1.0)
            assert (effect.sidecars, effect.unconfirmed) == (1, ("service-b-1",))
            began = time.monotonic()
            effect = mesh.change(lambda intent, _: clear_faults(intent))
            assert (effect.sidecars, effect.unconfirmed) == (1, ("service-b-1",))
            assert time.monotonic() - began < 3
        finally:
            hung.process.send_signal(18)  # SIGCONT
        until(lambda: all(s.acked for s in mesh.sidecars()), "the hung sidecar to catch up")
        assert fault(mesh, err_rate=1.0).sidecars == 2


def test_a_hung_sidecar_keeps_no_report_from_the_others() -> None:
    with mesh_of(pair(), Settings(ack_timeout_s=120)) as mesh:
        caller, hung = mesh.add("service-a"), mesh.add("service-a")
        mesh.add("service-b")
        mesh.add("service-b")
        mesh.start()
        assert hung.process
        hung.process.send_signal(19)  # SIGSTOP
        reports = [
            threading.Thread(target=mesh.update, args=("service-b-1",), kwargs={"ready": ready})
            for ready in (False, True)
        ]
        try:
            for report, answering in zip(reports, (1, 2), strict=True):
                report.start()
                until(lambda n=answering: len(who(caller.client(), 10)) == n, f"{answering} to answer")  # type: ignore[misc]
            assert all(report.is_alive() for report in reports)  # both still wait for the one that hangs
        finally:
            hung.process.send_signal(18)  # SIGCONT
            for report in reports:
                report.join(60)
        assert not any(report.is_alive() for report in reports)


# -- traffic ----------------------------------------------------------------------------------------------


def test_a_split_is_kept_to_and_changing_it_fails_no_request(mesh: Mesh) -> None:
    a = mesh.members["service-a-1"]
    with Load(a, WORK) as load:
        for weight in (10, 90, 50):
            effect = traffic(mesh, split={"v1": 100 - weight, "v2": weight})
            assert effect.sidecars == 4
            load.more(50)
    assert load.failed == []
    client, count, share = a.client(), 2000, 0.3
    traffic(mesh, split={"v1": 70, "v2": 30})
    may_differ = 4 * math.sqrt(count * share * (1 - share))  # by chance it does so once in 16,000 times
    assert any(abs(who(client, count)["service-b-3"] - count * share) <= may_differ for _ in range(2))
    traffic(mesh, split={"v1": 0, "v2": 100})
    assert set(who(client, 20)) == {"service-b-3"}


def test_timeout_and_retries(mesh: Mesh) -> None:
    client = mesh.members["service-a-1"].client()
    fault(mesh, id="slow", lat_ms=20_000)
    traffic(mesh, timeout_ms=100)
    answer = client.get(WORK)
    assert answer.status == 504
    assert answer.seconds < 10
    traffic(mesh, timeout_ms=None)
    mesh.change(lambda intent, _: clear_fault(intent, "slow"))

    fault(mesh, err_rate=0.5)
    assert Counter(client.get(WORK).status for _ in range(40))[500] > 4  # errors of the app are not retried
    traffic(mesh, retries=10)
    assert Counter(client.get(WORK).status for _ in range(40))[500] <= 2


def test_a_breaker_refuses_what_is_too_much(mesh: Mesh) -> None:
    a = mesh.members["service-a-1"]
    fault(mesh, lat_ms=300)
    traffic(mesh, max_connections=1, max_pending=1)
    with Load(a, WORK, threads=12, pause_s=0) as load:
        until(lambda: any(answer.status == 503 for answer in load.answers), "the breaker to refuse")
        until(lambda: any(answer.status == 200 for answer in load.answers), "a request to pass")
    refused = [answer for answer in load.answers if answer.status == 503]
    assert min(answer.seconds for answer in refused) < 0.25  # at once, not after the latency
    assert "upstream_rq_pending_overflow" in stats(a)
    traffic(mesh, max_connections=None, max_pending=None)
    with Load(a, WORK, threads=12, pause_s=0) as load:
        load.more(30)
    assert load.failed == []


def test_mirrored_requests_reach_the_other_version_and_bother_nobody(mesh: Mesh) -> None:
    client = mesh.members["service-a-1"].client()
    v2 = mesh.members["service-b-3"].upstream
    v2.status = 500
    traffic(mesh, mirror={"v2": 1.0})
    assert set(who(client, 20)) == {"service-b-1", "service-b-2"}
    until(lambda: len(v2.requests) == 20, "the mirrored requests")


def test_an_instance_that_only_fails_is_left_alone_and_one_that_fails_in_part_is_not(mesh: Mesh) -> None:
    client = mesh.members["service-a-1"].client()
    bad = mesh.members["service-b-1"].upstream
    bad.status = 500
    until(
        lambda: set(Counter(client.get(WORK).body for _ in range(10))) == {"service-b-2"},
        "the failing instance to be left alone",
    )
    bad.status = 200
    until(lambda: "service-b-1" in who(client, 10), "it to be back")
    traffic(mesh, outlier=False)
    bad.status = 500
    assert Counter(client.get(WORK).status for _ in range(120))[500] > 20
    bad.status = 200
    traffic(mesh, outlier=None)
    before = ejections(mesh.members["service-a-1"].admin)
    fault(mesh, err_rate=0.3)
    for _ in range(400):
        client.get(WORK)
    assert ejections(mesh.members["service-a-1"].admin) == before


def test_ejected_and_unready_instances_get_nothing_and_no_request_is_lost(mesh: Mesh) -> None:
    a = mesh.members["service-a-1"]
    with Load(a, WORK) as load:
        for _ in range(3):
            mesh.change(
                lambda intent, state: eject(
                    intent, state, "service-b-1", reason="r", by="test", now=time.time()
                )
            )
            load.more(10)
            assert set(who(a.client(), 10)) == {"service-b-2"}
            mesh.change(lambda intent, _: readmit(intent, "service-b-1"))
            mesh.update("service-b-2", ready=False)
            load.more(10)
            assert set(who(a.client(), 10)) == {"service-b-1"}
            mesh.update("service-b-2", ready=True)
    assert load.failed == []


def test_an_app_that_moves_and_an_instance_that_is_replaced_lose_no_request(mesh: Mesh) -> None:
    a, b = mesh.members["service-a-1"], mesh.members["service-b-1"]
    other = mesh.members["service-b-3"].upstream
    with Load(a, WORK) as load:
        mesh.update("service-b-1", app_port=other.port)
        until(lambda: "service-b-3" in who(a.client(), 20), "the new app to answer")
        mesh.update("service-b-1", app_port=b.upstream.port)
        until(lambda: "service-b-3" not in who(a.client(), 20), "the old app to answer")
        new = mesh.add("service-b", ready=False)
        mesh.refresh()
        mesh.start_sidecar(new)
        mesh.await_ready(new)
        mesh.update(new.instance.id, ready=True)
        until(lambda: new.instance.id in who(a.client(), 20), "the new instance to take traffic")
        gone = mesh.members["service-b-2"]
        mesh.update("service-b-2", ready=False)
        load.more(50)
        assert gone.process
        gone.process.terminate()
        mesh.members.pop("service-b-2")
        mesh.refresh()
        load.more(50)
        gone.process.wait()
        gone.upstream.close()
    assert load.failed == []


def test_a_dead_app_costs_its_callers_next_to_nothing(mesh: Mesh) -> None:
    a, b = mesh.members["service-a-1"], mesh.members["service-b-1"]
    with Load(a, WORK) as load:
        port = b.upstream.port
        mesh.update("service-b-1", app_port=free_port())  # nobody listens there: as if it were dead
        load.more(300)
        mesh.update("service-b-1", app_port=port)
    assert len(load.failed) <= len(load.answers) // 100


# -- the control plane away -------------------------------------------------------------------------------


def test_a_control_plane_restart_fails_no_request_and_keeps_the_intent(mesh: Mesh) -> None:
    a = mesh.members["service-a-1"]
    traffic(mesh, split={"v1": 50, "v2": 50})
    with Load(a, WORK) as load:
        mesh.stop_control(abruptly=True)
        load.more(200)
        assert set(who(a.client(), 60)) == {"service-b-1", "service-b-2", "service-b-3"}
        # While nobody is told: one instance goes.
        began = time.monotonic()
        member = mesh.members["service-b-3"]
        member.instance = member.instance.model_copy(update={"ready": False})
        mesh.start_control()
        until(lambda: all(s.acked for s in mesh.sidecars()), "all sidecars to be back")
        assert time.monotonic() - began < 25
        assert mesh.plane.intent.traffic["service-b"].split == {"v1": 50, "v2": 50}
        traffic(mesh, split={})
        assert set(who(a.client(), 30)) == {"service-b-1", "service-b-2"}
        assert fault(mesh, id="f", lat_ms=1).sidecars == 3
        load.more(50)
    assert load.failed == []


def test_a_sidecar_that_starts_without_its_control_plane_waits_and_is_not_ready(mesh: Mesh) -> None:
    from meshdemo.control.bootstrap import is_ready

    mesh.stop_control()
    member = mesh.members["service-b-1"]
    assert member.process
    member.process.kill()
    member.process.wait()
    mesh.start_control()  # to know where it is; gone before the sidecar asks
    mesh.stop_control()
    mesh.control = None
    member.admin.unlink(missing_ok=True)

    class Nowhere:
        plane = type("P", (), {"trust_path": mesh.state / "trust.pem"})()

    mesh.control = Nowhere()  # type: ignore[assignment]
    mesh.start_sidecar(member)
    mesh.control = None
    until(member.admin.exists, "the admin socket")
    time.sleep(0.3)
    assert not is_ready(member.admin)
    mesh.start_control()
    mesh.await_ready(member)


# -- other protocols, other doors -------------------------------------------------------------------------


def test_grpc_calls_faults_and_retries() -> None:
    async def echo(request: bytes, context: Any) -> bytes:
        return b"pong " + request

    async def serve() -> tuple[Any, int]:
        server = grpc.aio.server()
        handler = grpc.unary_unary_rpc_method_handler(echo)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t.Echo", {"Ping": handler}),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port

    app = pair(
        service_a={"port": 5000, "calls": ["voting"], "versions": {"v1": {"command": ["x"]}}},
        voting={"port": 8080, "protocol": "grpc", "routes": [{"name": "ping", "path": "/t.Echo/Ping"}]},
    )
    with mesh_of(app) as mesh:
        a, v = mesh.add("service-a"), mesh.add("voting")
        mesh.start()
        assert mesh.control
        server, port = mesh.control.run(serve())
        mesh.update(v.instance.id, app_port=port)
        options = (("grpc.default_authority", "voting:8080"), ("grpc.enable_http_proxy", 0))
        with grpc.insecure_channel(f"127.0.0.1:{a.instance.outbound_port}", options=options) as channel:
            ping = channel.unary_unary("/t.Echo/Ping")
            assert ping(b"x", timeout=10) == b"pong x"
            fault(mesh, service="voting", id="f", err_rate=1.0)
            with pytest.raises(grpc.RpcError) as caught:
                ping(b"x", timeout=10)
            assert caught.value.code() == grpc.StatusCode.INTERNAL
            assert "grpc.13" in until(lambda: stats(a) if "grpc.13" in stats(a) else "", "the statistics")
            mesh.change(lambda intent, _: clear_faults(intent))
            assert ping(b"y", timeout=10) == b"pong y"
            mesh.change(lambda intent, state: set_access(intent, state, "service-a", "voting", False))
            with pytest.raises(grpc.RpcError) as caught:
                ping(b"x", timeout=10)
            assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
        mesh.control.run(server.stop(None))


def test_tcp_services_are_reached_through_connect_and_guarded_too() -> None:
    app = pair(
        service_a={"port": 5000, "calls": ["cache"], "versions": {"v1": {"command": ["x"]}}},
        cache={"port": 6379, "protocol": "tcp"},
    )
    with mesh_of(app) as mesh:
        a, c, cache = mesh.add("service-a"), mesh.add("service-c"), mesh.add("cache")
        mesh.start()

        def through(member: Member) -> str:
            import http.client

            connection = http.client.HTTPConnection("127.0.0.1", member.instance.outbound_port, timeout=10)
            connection.set_tunnel("cache", 6379)
            try:
                connection.request("GET", "/")
                return connection.getresponse().read().decode()
            except (OSError, http.client.HTTPException) as error:
                return type(error).__name__
            finally:
                connection.close()

        assert through(a) == cache.instance.id  # HTTP is what this server speaks; the mesh sees bytes
        assert through(c) != cache.instance.id
        mesh.change(lambda intent, state: set_access(intent, state, "service-c", "cache", True))
        until(lambda: through(c) == cache.instance.id, "service-c to be let in")


def test_the_plain_listener_opens_declared_paths_only() -> None:
    app = pair(
        service_b={
            "load": True,
            "port": 5000,
            "versions": {"v1": {"command": ["x"]}},
        }
    )
    with mesh_of(app) as mesh:
        b = mesh.add("service-b")
        mesh.start()
        client = Proxied(b.instance.metrics_port)
        b.clients.append(client)
        assert client.get("/healthz").body == "service-b-1"
        assert client.get("/metrics").status == 200
        assert client.get("/load").status == 200
        # The load is set by who knows the control plane's token, which the app is not told.
        for authorization in ("", "Bearer x"):
            assert client.get("/load", "PUT", {"authorization": authorization}).status == 403
        shown = {"authorization": f"Bearer {mesh.plane.load_token}"}
        assert client.get("/load", "PUT", shown).status == 200
        assert "authorization" not in b.upstream.headers[-1]
        assert "server_live" in client.get("/stats/prometheus").body
        for path, method in (
            ("/work", "GET"), ("/healthz", "POST"), ("/load", "POST"), ("//work", "GET"),
            ("/healthz/../work", "GET"), ("/healthz%2f..%2fwork", "GET"), ("/stats", "GET"),
            ("/quitquitquit", "POST"), ("/stats/prometheus", "POST"),
        ):  # fmt: skip
            assert client.get(path, method).status in (400, 403), path
        assert {path for _, path in b.upstream.requests} == {"/healthz", "/metrics", "/load"}


def test_tap_sends_single_requests_while_it_is_on() -> None:
    received: list[bytes] = []

    def told() -> int:
        """Requests."""
        return sum(len(StreamAccessLogsMessage.FromString(one).http_logs.log_entry) for one in received)

    async def log(requests: Any, context: Any) -> bytes:
        async for message in requests:
            received.append(message)
        return b""

    handler = grpc.method_handlers_generic_handler(
        "envoy.service.accesslog.v3.AccessLogService",
        {"StreamAccessLogs": grpc.stream_unary_rpc_method_handler(log)},
    )
    with mesh_of(pair()) as mesh:
        a = mesh.add("service-a")
        mesh.add("service-b")
        mesh.extra = (handler,)
        mesh.start()
        client = a.client()
        who(client, 5)
        assert mesh.control
        assert mesh.control.run(mesh.plane.set_tap(True)).sidecars == 2
        who(client, 5)
        until(lambda: told() == 5, "the access log")
        mesh.control.run(mesh.plane.set_tap(False))
        count = len(received)
        who(client, 5)
        time.sleep(0.3)
        assert len(received) == count


# -- who may connect to the control plane -----------------------------------------------------------------


def ask(mesh: Mesh, token: str | None, request: Any) -> Any:
    """One request on an ADS stream of our own, in either encoding, and its response."""
    answered = threading.Event()
    delta = isinstance(request, DeltaDiscoveryRequest)
    method_of = wire.INCREMENTAL if delta else wire.STATE_OF_THE_WORLD
    response = DeltaDiscoveryResponse if delta else DiscoveryResponse

    def requests() -> Iterator[Any]:
        yield request
        answered.wait(20)

    credentials = grpc.ssl_channel_credentials((mesh.state / "trust.pem").read_bytes())
    options = (("grpc.ssl_target_name_override", "control-plane.meshdemo"),)
    with grpc.secure_channel(f"127.0.0.1:{mesh.control_port}", credentials, options) as channel:
        method = channel.stream_stream(
            f"/{wire.SERVICE}/{method_of.method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=response.FromString,
        )
        metadata = (("authorization", f"Bearer {token}"),) if token is not None else None
        try:
            return next(method(requests(), metadata=metadata, timeout=20))
        finally:
            answered.set()


def asking(delta: bool, names: list[str], **versions: str) -> Any:
    """A first request for secrets."""
    if delta:
        return DeltaDiscoveryRequest(
            type_url=xds.SECRETS, resource_names_subscribe=names, initial_resource_versions=versions
        )
    return DiscoveryRequest(type_url=xds.SECRETS, resource_names=names)


@pytest.mark.parametrize("delta", [False, True], ids=["state of the world", "incremental"])
def test_streams_need_a_token_and_get_what_it_proves(delta: bool) -> None:
    with mesh_of(pair()) as mesh:
        a, b = mesh.add("service-a"), mesh.add("service-b")
        mesh.start_control()
        secrets = asking(delta, ["identity", "trust"])
        for token in (None, "", "nonsense", "Bearer", a.token[:-1]):
            with pytest.raises(grpc.RpcError) as caught:
                ask(mesh, token, secrets)
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert len(ask(mesh, a.token, secrets).resources) == 2
        (found, *_) = ask(mesh, b.token, secrets).resources
        assert b"BEGIN" in (found.resource if delta else found).value

        claim = asking(delta, ["identity"])
        claim.node.id = b.instance.id
        others = asking(delta, ["spiffe://m/ns/default/sa/service-b"])
        had = [asking(True, [], **{"spiffe://m/ns/default/sa/service-b": "1"})] if delta else []
        for request in (claim, *had, others):
            with pytest.raises(grpc.RpcError) as caught:
                ask(mesh, a.token, request)
            assert caught.value.code() == grpc.StatusCode.PERMISSION_DENIED
        refused = mesh.journal("refused")
        assert [event["instance"] for event in refused] == ["", "service-a-1", "service-a-1"]
        assert "spiffe://m/ns/default/sa/service-b" in refused[-1]["reason"]


def test_a_token_that_was_replaced_or_whose_instance_is_gone_is_worth_nothing(mesh: Mesh) -> None:
    import hashlib

    member = mesh.members["service-b-1"]
    old = member.token
    fresh = "another-token"
    (member.folder / "token.new").write_text(fresh)
    (member.folder / "token.new").replace(member.folder / "token")
    before = mesh.plane._discovery.stream("service-b-1")
    mesh.update("service-b-1", token_sha256=hashlib.sha256(fresh.encode()).hexdigest())

    def is_back() -> bool:
        stream = mesh.plane._discovery.stream("service-b-1")
        return stream not in {None, before} and all(sidecar.acked for sidecar in mesh.sidecars())

    until(is_back, "the sidecar to come back with its new token")
    assert member.process
    member.process.kill()  # or it would take its stream back from the one that asks below
    member.process.wait()
    until(lambda: mesh.plane._discovery.stream("service-b-1") is None, "it to be seen gone")
    request = DiscoveryRequest(type_url=xds.CLUSTERS)
    with pytest.raises(grpc.RpcError) as caught:
        ask(mesh, old, request)
    assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
    assert ask(mesh, fresh, request).resources
    mesh.members.pop("service-b-1").upstream.close()
    mesh.refresh()
    with pytest.raises(grpc.RpcError) as caught:
        ask(mesh, fresh, request)
    assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED


# -- helpers ----------------------------------------------------------------------------------------------


def stats(member: Member) -> str:
    """The statistics of a sidecar that are not zero."""
    from meshdemo.control.bootstrap import _ask

    return _ask(member.admin, "/stats?usedonly", 5)
