"""service-b as a process: what it answers, counts, refuses, and how it stops."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from workload_process import DEADLINE_S, Workload, read_response, refused, wait_for, workload

from meshdemo.workloads import service_b
from meshdemo.workloads.settings import BadSetting, Environment, Identity

REQUEST = b"GET /work HTTP/1.1\r\nHost: service-b:5000\r\n\r\n"


def test_answers_and_says_who_it_is() -> None:
    with workload("service_b", SERVICE="dependency", VERSION="v2", INSTANCE="dependency-v2-0") as b:
        assert b.get("/work") == (200, {"result": "ok"})
        identity = {"service": "dependency", "version": "v2", "instance": "dependency-v2-0"}
        assert b.get("/healthz") == (200, {"status": "ok", **identity})
        labels = 'workload_info{instance="dependency-v2-0",service="dependency",version="v2"}'
        assert b.metric(labels) == 1


def test_other_requests_get_an_error_in_json() -> None:
    with workload("service_b") as b:
        assert b.get("/work", "HEAD") == (200, "")
        status, body = b.get("/nothing")
        assert (status, list(body)) == (404, ["error"])
        status, body = b.get("/work", "POST", b"x")
        assert (status, list(body)) == (405, ["error"])


def test_counts_every_response_but_those_about_itself() -> None:
    with workload("service_b") as b:
        assert b.metric("service_b_requests_total") == 0
        for _ in range(3):
            b.get("/work")
        b.get("/nothing")
        b.get("/healthz")
        assert b.metric("service_b_requests_total") == 4
        assert b.metric("service_b_latency_seconds_count") == 4
        assert b.metric("service_b_errors_total") == 0


def test_an_injected_error_takes_the_latency_and_is_counted() -> None:
    with workload("service_b", LAT_MS=100, ERR_RATE=1) as b:
        assert b.get("/work") == (500, {"error": "injected"})
        assert b.metric("service_b_requests_total") == 1
        assert b.metric("service_b_errors_total") == 1
        assert b.metric("service_b_latency_seconds_count") == 1
        assert b.metric("service_b_latency_seconds_sum") >= 0.1
        assert b.metric('service_b_latency_seconds_bucket{le="0.075"}') == 0


def test_error_share() -> None:
    with workload("service_b", ERR_RATE=0.3) as b, b.connect() as connection:
        errors = 0
        for _ in range(1000):
            connection.sendall(REQUEST)
            errors += b" 500 " in read_response(connection)[0]
        assert 200 < errors < 400  # seven standard deviations
        assert b.metric("service_b_errors_total") == errors


def test_a_slow_request_keeps_no_other_waiting() -> None:
    with workload("service_b", LAT_MS=1000) as b:
        connections = [b.connect() for _ in range(300)]
        started = time.monotonic()
        for connection in connections:
            connection.sendall(REQUEST)
        assert b.get("/healthz")[0] == 200
        for connection in connections:
            assert read_response(connection)[1] == b'{"result":"ok"}\n'
            connection.close()
        assert time.monotonic() - started < 30  # one after another: 300 s; by 8 threads: 38 s


def test_one_busy_connection_does_not_keep_others_waiting() -> None:
    with workload("service_b") as b, b.connect() as busy:
        total = 20_000
        threading.Thread(target=busy.sendall, args=(REQUEST * total,), daemon=True).start()
        threading.Thread(target=read_all, args=(busy,), daemon=True).start()
        answered = wait_for("an answer", lambda: b.metric("service_b_requests_total"))
        assert answered < total  # and yet the metrics were answered
        wait_for("all answers", lambda: b.metric("service_b_requests_total") == total)


def read_all(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed at the end of the test
        while connection.recv(65536):
            pass


@pytest.mark.parametrize(
    "head",
    [
        b"GET /work HTTP/1.1\r\nHost x\r\n\r\n",
        b"GET /work HTTP/1.1\r\nHost : x\r\n\r\n",
        b"GET /work HTTP/1.1\r\nA: b\r\n folded\r\n\r\n",
        b"POST /work HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nx",
        b"GET /work HTTP/1.1\r\n" + b"A: b\r\n" * 300 + b"\r\n",
        b"GARBAGE\r\n\r\n",
    ],
)
def test_what_is_not_http_is_refused(sound: Workload, head: bytes) -> None:
    with sound.connect() as connection:
        connection.sendall(head)
        assert connection.recv(4096).startswith(b"HTTP/1.1 400 ")
    assert sound.get("/work")[0] == 200


@pytest.fixture(scope="module")
def sound() -> Iterator[Workload]:
    """A service-b without faults."""
    with workload("service_b") as b:
        yield b


@pytest.mark.parametrize(
    ("name", "value"),
    [("LAT_MS", value) for value in ("-1", "abc", "nan", "inf", "1e999", "", "5 ms")]
    + [("ERR_RATE", value) for value in ("-0.1", "1.1", "30%", "nan", "")],
)
def test_a_value_that_makes_no_sense(name: str, value: str) -> None:
    env = Environment({name: value})
    with pytest.raises(BadSetting, match=f"^{name}={value!r} makes no sense; allowed: "):
        service_b.build(env, Identity.of(env, "service-b"))


@pytest.mark.parametrize(("name", "value"), [("LAT_MS", "-1"), ("ERR_RATE", "2"), ("PORT", "65536")])
def test_a_value_that_makes_no_sense_ends_it_at_start(name: str, value: str) -> None:
    status, message = refused("service_b", **{name: value})
    assert status == 2
    assert message.startswith(f"service-b: {name}={value!r} makes no sense; allowed: ")
    assert message.count("\n") == 1


def test_a_taken_port_is_said_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, message = refused("service_b", PORT=port)
    assert status == 1
    assert message.startswith(f"service-b: cannot listen on 127.0.0.1:{port}: ")
    assert message.count("\n") == 1


def test_a_stop_finishes_what_is_in_flight_and_ends_idle_connections() -> None:
    with workload("service_b", LAT_MS=8000) as b, b.connect() as busy, b.connect() as idle:
        idle.sendall(REQUEST.replace(b"/work", b"/healthz"))
        assert b"Connection: close" not in read_response(idle)[0]
        busy.sendall(REQUEST)
        # A later request has been taken up when an earlier one on another connection was.
        assert b.get("/healthz")[0] == 200
        b.process.terminate()
        assert idle.recv(1) == b""
        head, body = read_response(busy)
        assert body == b'{"result":"ok"}\n'
        assert b"Connection: close" in head
        assert busy.recv(1) == b""
        assert b.process.wait(DEADLINE_S) == 0
        with pytest.raises(ConnectionRefusedError):
            b.connect()


def test_a_stop_waits_no_longer_than_the_drain_time() -> None:
    with workload("service_b", LAT_MS=600_000, DRAIN_S=0.2) as b, b.connect() as busy:
        busy.sendall(REQUEST)
        assert b.get("/healthz")[0] == 200
        assert b.stop() == 0


def test_interrupting_it_is_a_stop_too() -> None:
    with workload("service_b") as b:
        b.process.send_signal(2)
        wait_for("exit", lambda: b.process.poll() is not None)
        assert b.process.returncode == 0
