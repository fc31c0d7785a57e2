"""service-a as a process: an open-loop load that hides nothing and can be changed while it runs."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from workload_process import Workload, refused, sample_of, wait_for, workload

from meshdemo.workloads import service_a
from meshdemo.workloads.settings import BadSetting, Environment, Identity

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Server:
    """A server that answers the n-th request on a connection as `script` says: bytes, or None to hang up."""

    def __init__(self, script: Callable[[int], bytes | None]) -> None:
        self.requests: list[bytes] = []
        self.connections = 0
        self._script = script
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        number, data = 0, b""
        with connection:
            while True:
                try:
                    more = connection.recv(65536)
                except OSError:
                    return
                if not more:
                    return
                data += more
                while b"\r\n\r\n" in data:
                    request, _, data = data.partition(b"\r\n\r\n")
                    self.requests.append(request)
                    answer = self._script(number)
                    if answer is None:
                        return
                    connection.sendall(answer)
                    number += 1


@contextmanager
def server(script: Callable[[int], bytes | None] = lambda _: OK) -> Iterator[Server]:
    started = Server(script)
    try:
        yield started
    finally:
        started.close()


def put(a: Workload, **change: Any) -> tuple[int, Any]:
    return a.get("/load", "PUT", json.dumps(change).encode())


def requests(a: Workload, code: str) -> float:
    return a.metric(f'service_a_requests_total{{code="{code}"}}')


def test_load_on_service_b() -> None:
    with (
        workload("service_b") as b,
        workload("service_a", TARGET=f"http://127.0.0.1:{b.port}/work", RPS=200) as a,
    ):
        assert a.get("/healthz")[1]["service"] == "service-a"
        wait_for("answers", lambda: requests(a, "200") > 300)
        assert b.metric("service_b_requests_total") > 300
        assert a.metric("service_a_latency_seconds_count") > 300
        wait_for("the rate", lambda: a.get("/load")[1]["achieved_rps"] == pytest.approx(200, rel=0.01))
        load = a.get("/load")[1]
        assert (load["rps"], load["max_in_flight"], load["dropped"]) == (200, 2000, 0)
        assert a.stop() == 0


def test_connections_are_reused() -> None:
    with server() as s, workload("service_a", TARGET=f"http://127.0.0.1:{s.port}/", RPS=30) as a:
        # One each is the failure. A few more than one is a machine that stalled, after which much is due at once.
        wait_for("requests", lambda: len(s.requests) >= 90 and len(s.requests) > 2 * s.connections)
        assert requests(a, "reset") == 0


def test_through_the_proxy_that_the_environment_names() -> None:
    with (
        server() as s,
        workload("service_a", RPS=50, HTTP_PROXY=f"http://127.0.0.1:{s.port}", NO_PROXY="127.0.0.1") as a,
    ):
        wait_for("answers", lambda: requests(a, "200") > 3)
        head = s.requests[0].decode().split("\r\n")
        assert head[0] == "GET http://service-b:5000/work HTTP/1.1"
        assert "Host: service-b:5000" in head


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (b"HTTP/1.1 503 Unavailable\r\nContent-Length: 0\r\n\r\n", "503"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", "200"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, "200"),
        (b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n", "204"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\ncut off", "timeout"),
        (b"this is not HTTP\r\n\r\n", "invalid"),
        (b"", "timeout"),
        (None, "reset"),
    ],
)
def test_every_kind_of_end_has_its_code(answer: bytes | None, code: str) -> None:
    timeout_s = 0.5 if code == "timeout" else 60
    with (
        server(lambda _: answer) as s,
        workload("service_a", TARGET=f"http://127.0.0.1:{s.port}/", RPS=40, TIMEOUT_S=timeout_s) as a,
    ):
        wait_for(code, lambda: requests(a, code) >= 5)
        assert a.metric("service_a_latency_seconds_count") >= 5
        assert (a.metric("service_a_errors_total") >= 5) == (code not in ("200", "204"))


def test_a_server_that_cannot_be_reached_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with workload("service_a", TARGET=f"http://127.0.0.1:{port}/", RPS=50) as a:
        wait_for("errors", lambda: requests(a, "connect") >= 5)
        assert a.metric("service_a_errors_total") >= 5


def test_a_name_that_is_not_known_is_an_error() -> None:
    with workload("service_a", TARGET="http://no-such-host.invalid/", RPS=50) as a:
        wait_for("errors", lambda: requests(a, "connect") >= 5)


def over_half_a_second(a: Workload) -> float:
    """Requests that took longer, as of one moment."""
    page = a.get("/metrics")[1]
    return sample_of(page, "service_a_latency_seconds_count") - sample_of(
        page, 'service_a_latency_seconds_bucket{le="0.5"}'
    )


def test_a_stalled_server_cannot_hide() -> None:
    with (
        workload("service_b") as b,
        workload("service_a", TARGET=f"http://127.0.0.1:{b.port}/work", RPS=200) as a,
    ):
        wait_for("load", lambda: requests(a, "200") > 100)
        b.process.send_signal(signal.SIGSTOP)
        stalled = time.monotonic()
        time.sleep(1.0)  # this is the stall
        b.process.send_signal(signal.SIGCONT)
        stalled = time.monotonic() - stalled
        wait_for("what was due to be answered", lambda: a.get("/load")[1]["in_flight"] < 20)
        late = over_half_a_second(a)
        # Requests due in all but the last half second of the stall took longer than half a second. A client
        # that waits for its answers would count one per connection.
        assert late >= 0.9 * 200 * (stalled - 0.5)
        assert a.get("/load")[1]["dropped"] == 0


def test_a_generator_that_was_held_up_catches_up() -> None:
    with (
        workload("service_b") as b,
        workload("service_a", TARGET=f"http://127.0.0.1:{b.port}/work", RPS=100) as a,
    ):
        wait_for("load", lambda: requests(a, "200") > 50)
        a.process.send_signal(signal.SIGSTOP)
        time.sleep(1.0)  # this is what holds it up
        a.process.send_signal(signal.SIGCONT)
        wait_for("the rate", lambda: a.get("/load")[1]["achieved_rps"] == pytest.approx(100, rel=0.01))
        wait_for(
            "latencies from when requests were due",
            lambda: over_half_a_second(a) >= 45,
        )


def test_what_is_over_the_limit_is_dropped_and_seen() -> None:
    with (
        workload("service_b", LAT_MS=500) as b,
        workload("service_a", TARGET=f"http://127.0.0.1:{b.port}/work", RPS=100, MAX_IN_FLIGHT=2) as a,
    ):
        wait_for("answers", lambda: requests(a, "200") >= 4)
        dropped = requests(a, "dropped")
        assert dropped >= 50
        assert a.get("/load")[1]["in_flight"] <= 2
        assert a.get("/load")[1]["dropped"] >= dropped
        assert a.metric("service_a_errors_total") >= dropped
        assert put(a, max_in_flight=500)[1]["max_in_flight"] == 500
        wait_for("more in flight", lambda: a.get("/load")[1]["in_flight"] > 2)


def test_the_rate_changes_while_it_runs() -> None:
    with server() as s, workload("service_a", TARGET=f"http://127.0.0.1:{s.port}/", RPS=0.01) as a:
        assert a.get("/load")[1]["rps"] == 0.01
        status, load = put(a, rps=50)
        assert (status, load["rps"], load["max_in_flight"]) == (200, 50, 2000)
        wait_for("requests", lambda: len(s.requests) > 50)
        assert a.metric("service_a_target_rps") == 50
        assert put(a, rps=0)[1]["rps"] == 0
        wait_for("answers to what was sent", lambda: a.get("/load")[1]["in_flight"] == 0)
        sent = len(s.requests)
        time.sleep(0.3)  # long enough for 15 requests at the old rate
        assert len(s.requests) == sent
        assert put(a, rps=50)[0] == 200
        wait_for("requests again", lambda: len(s.requests) > sent + 10)


@pytest.mark.parametrize(
    ("body", "names"),
    [
        (b'{"rps": -1}', "rps: -1 "),
        (b'{"rps": 1e9}', "rps: 1000000000.0 "),
        (b'{"rps": NaN}', "rps: nan "),
        (b'{"rps": "fast"}', "rps: 'fast' "),
        (b'{"rps": true}', "rps: True "),
        (b'{"rps": null}', "rps: None "),
        (b'{"rps": 1' + b"0" * 400 + b"}", "rps: 1"),
        (b'{"max_in_flight": 0}', "max_in_flight: 0 "),
        (b'{"max_in_flight": 1.5}', "max_in_flight: 1.5 "),
        (b'{"rps": 5, "speed": 1}', "'speed' is no setting"),
        (b"{}", "allowed: a JSON object"),
        (b"[1]", "allowed: a JSON object"),
        (b"", "allowed: a JSON object"),
        (b"{", "allowed: a JSON object"),
    ],
)
def test_a_change_that_makes_no_sense_changes_nothing(paused: Workload, body: bytes, names: str) -> None:
    status, answer = paused.get("/load", "PUT", body)
    assert status == 400
    assert names in answer["error"]
    assert "allowed: " in answer["error"]
    load = paused.get("/load")[1]
    assert (load["rps"], load["max_in_flight"]) == (0, 2000)


@pytest.fixture(scope="module")
def paused() -> Iterator[Workload]:
    """A service-a that sends nothing."""
    with workload("service_a", RPS=0) as a:
        yield a


def test_a_change_may_come_in_chunks(paused: Workload) -> None:
    with paused.connect() as connection:
        connection.sendall(
            b'PUT /load HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\na\r\n{"rps": 0}\r\n0\r\n\r\n'
        )
        assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("name", "value"),
    [("RPS", "-1"), ("RPS", "many"), ("RPS", "inf"), ("MAX_IN_FLIGHT", "0"), ("MAX_IN_FLIGHT", "1.5"),
     ("TIMEOUT_S", "0"), ("ARRIVALS", "bursts"), ("TARGET", "https://service-b/"), ("TARGET", ""),
     ("HTTP_PROXY", "socks5://127.0.0.1:1")],
)  # fmt: skip
def test_a_value_that_makes_no_sense(name: str, value: str) -> None:
    env = Environment({name: value})
    with pytest.raises(BadSetting, match=f"^{name}={value!r} makes no sense; allowed: "):
        service_a.build(env, Identity.of(env, "service-a"))


def test_a_value_that_makes_no_sense_ends_it_at_start() -> None:
    status, message = refused("service_a", RPS="fast")
    assert status == 2
    assert message == (
        "service-a: RPS='fast' makes no sense; allowed: requests per second from 0 to 100000\n"
    )


def test_a_stop_waits_for_the_answers() -> None:
    with (
        workload("service_b", LAT_MS=700) as b,
        workload("service_a", TARGET=f"http://127.0.0.1:{b.port}/work", RPS=50) as a,
    ):
        wait_for("requests in flight", lambda: a.get("/load")[1]["in_flight"] >= 10)
        a.process.send_signal(signal.SIGTERM)
        assert a.process.wait(60) == 0
        # Every request that reached service-b was answered before service-a was gone.
        assert b.metric("service_b_requests_total") >= 10
        wait_for("idle connections to be gone", lambda: b.metric("process_open_fds") < 20)
