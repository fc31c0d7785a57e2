"""What is not HTTP: it passes, by mutual TLS, and its connections and bytes are counted and can be seen."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from local_harness import Cli, read_url, wait_for

ECHO = """
import os, socketserver

class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        while data := self.request.recv(65536):
            self.request.sendall(data)

socketserver.ThreadingTCPServer.allow_reuse_address = True
socketserver.ThreadingTCPServer(("127.0.0.1", int(os.environ["PORT"])), Echo).serve_forever()
"""
WEB = """
import os
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_): pass

HTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
"""


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    folder = tmp_path_factory.mktemp("tcp")
    (folder / "echo.py").write_text(ECHO)
    (folder / "web.py").write_text(WEB)
    app = {
        "name": "tcp",
        "front": "web",
        "services": {
            "web": {
                "port": 80,
                "calls": ["cache"],
                "metrics": None,
                "versions": {"v1": {"command": [sys.executable, "web.py"]}},
            },
            "cache": {
                "port": 6379,
                "protocol": "tcp",
                "metrics": None,
                "versions": {"v1": {"command": [sys.executable, "echo.py"]}},
            },
        },
    }
    (folder / "app.yaml").write_text(json.dumps(app))
    with Cli(folder / "home").up("--app", str(folder / "app.yaml")) as cli:
        yield cli


def connect(mesh: Cli) -> socket.socket:
    """A connection to the cache, as its caller makes one."""
    (web,) = (one for one in mesh.describe()["instances"] if one["service"] == "web")
    connection = socket.create_connection(("127.0.0.1", web["outbound_port"]), timeout=15)
    connection.sendall(b"CONNECT cache:6379 HTTP/1.1\r\nHost: cache:6379\r\n\r\n")
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        chunk = connection.recv(1)
        assert chunk, answer
        answer += chunk
    assert answer.startswith(b"HTTP/1.1 200"), answer
    return connection


def echoed(connection: socket.socket, size: int) -> None:
    connection.sendall(b"x" * size)
    left = size
    while left:
        left -= len(connection.recv(65536))


def row(mesh: Cli, *by: str) -> dict[str, Any]:
    (found,) = mesh.json("stat", "cache", "--window", "60s", *by)
    return dict(found)


def test_connections_and_bytes_are_counted_while_they_last(mesh: Cli) -> None:
    with connect(mesh) as first, connect(mesh) as second:
        echoed(first, 100_000)
        echoed(second, 1_000)
        wait_for("the connections", lambda: row(mesh)["connections"] >= 2)

        def bytes_seen() -> bool:
            found = row(mesh)
            # What the sidecars add for TLS is not counted.
            return bool(found["received_bytes"] == found["sent_bytes"] == 101_000)

        wait_for("the bytes", bytes_seen)
        assert row(mesh)["requests"] == 0
        by_caller = row(mesh, "--by", "caller")
        assert (by_caller["caller"], by_caller["connections"]) == ("web", 2)
        (edge,) = (one for one in mesh.json("edges", "--window", "60s") if one["service"] == "cache")
        assert (edge["caller"], edge["secured"]) == ("web", True)
        assert edge["identity"].endswith("/sa/web")
        text = mesh.run("stat", "cache", "--window", "60s")
        assert re.search(r"CONN +IN +OUT", text), text
        assert "101kB" in text
    metrics = read_url(mesh.json("status")["endpoints"]["dashboard"] + "metrics")
    assert 'meshdemo_tcp_connections_total{caller="web",service="cache",version="v1"} 2.0' in metrics
    assert 'meshdemo_tcp_received_bytes_total{service="cache",version="v1"} 101000.0' in metrics


def test_who_may_not_is_refused(mesh: Cli) -> None:
    mesh.run("access", "deny", "web", "cache")
    try:
        with connect(mesh) as connection:
            connection.sendall(b"hello")
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(100) == b""
        wait_for("a denied connection", lambda: row(mesh)["denied"] > 0)
    finally:
        mesh.run("access", "allow", "web", "cache")
