"""The benchmark's own clients, as a process of their own: `python -m meshdemo.bench.client open|closed ...`.

open    the project's load engine (open loop): requests are sent when they are due, and a latency counts from
        then. Each request is written to FILE soon after its end, as three doubles: due, took, status.
closed  so many connections, each with one request after the other: what is used where wrk is not installed.
        Writes one JSON object to stdout.
"""

from __future__ import annotations

import argparse
import json
import math
import selectors
import signal
import socket
import struct
import sys
import time
from typing import IO

import gevent
import httptools

from meshdemo.bench.stats import quantile
from meshdemo.workloads.load import Load, Schedule, Target

RECORD = struct.Struct("=ddd")  # due (monotonic s), took (s, infinity: did not end), status (0: none)
QUANTILES = (0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)

_FLUSH_S = 0.1
_LAST_ANSWERS_S = 1.0
_MAX_IN_FLIGHT = 20_000
_CHUNK = 65536


def request(host: str, path: str) -> bytes:
    """The bytes of the request, the same for every alternative."""
    return f"GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: meshdemo-bench\r\n\r\n".encode("ascii")


def open_loop(
    target: Target, data: bytes, file: IO[bytes], *, rps: float, seconds: float | None, timeout_s: float
) -> None:
    """Make load until `seconds` are over or SIGTERM comes."""
    ended = False

    def end() -> None:
        nonlocal ended
        ended = True

    def record(code: str, seconds: float | None) -> None:
        now = time.monotonic()
        status = float(code) if code.isdigit() else 0.0
        if seconds is None:  # never sent: too many in flight
            file.write(RECORD.pack(now, math.inf, status))
        else:
            file.write(RECORD.pack(now - seconds, seconds, status))

    for number in (signal.SIGTERM, signal.SIGINT):
        gevent.signal_handler(number, end)
    load = Load(
        target, Schedule(), next_request=lambda: data, max_in_flight=_MAX_IN_FLIGHT, timeout_s=timeout_s,
        record=record,
    )  # fmt: skip
    load.start()
    load.set(rps, _MAX_IN_FLIGHT)
    stop_at = None if seconds is None else time.monotonic() + seconds
    while not ended and (stop_at is None or time.monotonic() < stop_at):
        gevent.sleep(_FLUSH_S)
        file.flush()
    load.stop(_LAST_ANSWERS_S)
    for connection in load.active:
        file.write(RECORD.pack(connection.due, math.inf, 0.0))
    file.flush()


def closed_loop(port: int, data: bytes, *, connections: int, seconds: float) -> dict[str, object]:
    """Requests one after the other on each connection: how many a second, how long each took (µs)."""
    selector = selectors.DefaultSelector()
    took_s: list[float] = []
    errors = 0
    clients = [_Connection(port, data) for _ in range(connections)]
    for client in clients:
        selector.register(client.socket, selectors.EVENT_READ, client)
    began = now = time.perf_counter()
    for client in clients:
        client.send()
    while now < began + seconds:
        for key, _ in selector.select(began + seconds - now):
            client = key.data
            if not client.receive():
                continue
            if client.ok:
                took_s.append(time.perf_counter() - client.sent)
            else:
                errors += 1
            client.send()
        now = time.perf_counter()
    return {
        "requests": len(took_s),
        "seconds": now - began,
        "errors": errors,
        "us": {f"{q:g}": quantile(took_s, q) * 1e6 for q in QUANTILES} if took_s else {},
    }


class _Connection:
    """One kept-alive connection of the closed loop."""

    def __init__(self, port: int, data: bytes) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.ok = False
        self.sent = 0.0
        self._data = data
        self._complete = False
        self._parser = httptools.HttpResponseParser(self)

    def send(self) -> None:
        self._complete = False
        self.sent = time.perf_counter()
        self.socket.sendall(self._data)

    def receive(self) -> bool:
        """Take in what has come; is the answer complete? Raises OSError if the connection is gone."""
        data = self.socket.recv(_CHUNK)
        if not data:
            raise OSError("the server closed the connection")
        self._parser.feed_data(data)
        return self._complete

    def on_message_complete(self) -> None:
        """Called by the parser."""
        self.ok = self._parser.get_status_code() == 200
        self._complete = True


def main() -> None:
    """The process."""
    parser = argparse.ArgumentParser(prog="meshdemo.bench.client", description=__doc__.splitlines()[0])
    parser.add_argument("loop", choices=("open", "closed"))
    parser.add_argument("--port", type=int, required=True, help="on loopback")
    parser.add_argument("--host", default="service-b:5000", help="what the Host header says")
    parser.add_argument("--path", default="/work")
    parser.add_argument("--seconds", type=float, help="open: default is until SIGTERM")
    parser.add_argument("--rps", type=float, help="open")
    parser.add_argument("--timeout", type=float, default=30.0, help="open: of one request (s)")
    parser.add_argument("--file", help="open: where requests are written to")
    parser.add_argument("--connections", type=int, help="closed")
    given = parser.parse_args()
    data = request(given.host, given.path)
    if given.loop == "open":
        url = f"http://{given.host}{given.path}"
        target = Target(url, "127.0.0.1", given.port, "", given.host, given.path)
        with open(given.file, "wb") as file:  # noqa: PTH123
            open_loop(target, data, file, rps=given.rps, seconds=given.seconds, timeout_s=given.timeout)
        return
    found = closed_loop(given.port, data, connections=given.connections, seconds=given.seconds)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
