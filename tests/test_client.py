"""The API's client: what it repeats and what it must not, and what it costs to import."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from meshdemo.control.client import ControlClient
from meshdemo.errors import BadInput, Failed, MeshdemoError, Missing
from meshdemo.runtime.local.ports import Port


class Fake(ThreadingHTTPServer):
    """Answers what it is told to; `None` hangs up without a word."""

    daemon_threads = True

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.answers: list[tuple[int, bytes] | None] = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                self.rfile.read(length)
                fake.asked.append((self.command, self.path))
                answer = fake.answers.pop(0) if fake.answers else (200, b"{}")
                if answer is None:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                self.send_response(answer[0])
                self.send_header("Content-Length", str(len(answer[1])))
                self.end_headers()
                self.wfile.write(answer[1])

            do_POST = do_PUT = do_DELETE = do_GET

            def log_message(self, format: str, *args: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def fake() -> Iterator[Fake]:
    server = Fake()
    yield server
    server.shutdown()
    server.server_close()


def body(value: object) -> bytes:
    return json.dumps(value).encode()


def test_a_read_is_repeated_when_the_connection_breaks(fake: Fake) -> None:
    fake.answers = [None, None, (200, body([]))]
    assert ControlClient(fake.url, "t", retry_s=60).signals() == []
    assert len(fake.asked) == 3


def test_a_change_that_may_have_been_taken_is_not_repeated(fake: Fake) -> None:
    fake.answers = [None]
    with pytest.raises(Missing):
        ControlClient(fake.url, "t").eject("b-1", reason="r", by="me")
    assert len(fake.asked) == 1


def test_even_a_change_waits_for_a_server_that_is_not_there_yet() -> None:
    held = Port()
    port = held.number
    late: list[Fake] = []

    class Late(Fake):
        allow_reuse_address = True

        def server_bind(self) -> None:
            self.server_address = ("127.0.0.1", port)
            super().server_bind()

    timer = threading.Timer(0.3, lambda: late.append(Late()))
    timer.start()
    try:
        client = ControlClient(f"http://127.0.0.1:{port}", "t", retry_s=10)
        client.refresh_instances()
        timer.join()
        assert late[0].asked == [("POST", "/v1/instances/refresh")]
    finally:
        timer.join()
        held.release()
        late[0].shutdown()
        late[0].server_close()


def test_nobody_there_is_missing_with_a_remedy() -> None:
    with pytest.raises(Missing, match="meshdemo up") as caught:
        ControlClient("http://127.0.0.1:1", "t", retry_s=0.1).status()
    assert caught.value.exit_status == 3
    assert not ControlClient("http://127.0.0.1:1", "t").healthy()


def test_no_answer_in_time_failed_and_is_not_repeated() -> None:
    with socket.create_server(("127.0.0.1", 0)) as hung:
        client = ControlClient(f"http://127.0.0.1:{hung.getsockname()[1]}", "t", timeout_s=0.2, retry_s=5)
        with pytest.raises(Failed, match="in time"):
            client.status()


@pytest.mark.parametrize(
    ("status", "raised"), [(400, BadInput), (404, BadInput), (401, Failed), (409, Failed), (500, Failed)]
)
def test_errors_carry_the_servers_words(fake: Fake, status: int, raised: type[MeshdemoError]) -> None:
    fake.answers = [(status, body({"error": "no such thing", "remedy": "name another"}))]
    with pytest.raises(raised) as caught:
        ControlClient(fake.url, "t").traffic()
    assert (caught.value.message, caught.value.remedy) == ("no such thing", "name another")


@pytest.mark.parametrize("content", [b"", b"<html>", b"\xff", b"[1]", b'"text"'])
def test_errors_that_are_no_json_are_errors_all_the_same(fake: Fake, content: bytes) -> None:
    fake.answers = [(502, content)]
    with pytest.raises(Failed):
        ControlClient(fake.url, "t").traffic()


@pytest.mark.parametrize("url", ["", "127.0.0.1:5", "https://127.0.0.1:5", "file:///etc/passwd"])
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(BadInput):
        ControlClient(url, "t")


def test_a_stream_skips_heartbeats_and_ends_with_the_server(fake: Fake) -> None:
    fake.answers = [(200, b'\n{"status":200}\n\n{"status":503}\n')]
    assert [event["status"] for event in ControlClient(fake.url, "t").tap(service="b")] == [200, 503]
    assert fake.asked == [("GET", "/v1/tap?service=b")]


def test_a_stream_that_is_refused(fake: Fake) -> None:
    fake.answers = [(400, body({"error": "status 'x'", "remedy": ""}))]
    with pytest.raises(BadInput, match="status 'x'"):
        next(ControlClient(fake.url, "t").tap(status="x"))


def test_importing_it_costs_nothing_that_is_not_needed() -> None:
    """`meshdemo stat` answers within 300 ms: what takes long comes in with the call that needs it."""
    ran = subprocess.run(
        [sys.executable, "-c", "import sys, meshdemo.control.client; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(ran.stdout.split())
    assert "meshdemo.control.client" in loaded
    assert not loaded & {"pydantic", "grpc", "flask", "http.client", "ssl", "email", "asyncio", "requests"}
