"""A second door to a server on this machine: what connects to one loopback port is passed on to another."""

from __future__ import annotations

import socket
import socketserver
import threading
from contextlib import suppress

from meshdemo.errors import BadInput

_CHUNK = 65536


class Relay(socketserver.ThreadingTCPServer):
    """Listens on 127.0.0.1:`port` and passes every connection on to `target` (host, port).

    Raises BadInput if the port is taken or may not be used.
    """

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, port: int, target: tuple[str, int]) -> None:
        self.target = target
        try:
            super().__init__(("127.0.0.1", port), _Connection)
        except OSError as error:
            raise BadInput(f"--port {port}: {error.strerror}; choose another one") from error


class _Connection(socketserver.BaseRequestHandler):
    server: Relay
    request: socket.socket

    def handle(self) -> None:
        with suppress(OSError), socket.create_connection(self.server.target, timeout=5) as there:
            there.settimeout(None)
            back = threading.Thread(target=_copy, args=(there, self.request), daemon=True)
            back.start()
            _copy(self.request, there)
            back.join()


def _copy(source: socket.socket, sink: socket.socket) -> None:
    """Pass bytes on until the source ends, then end the sink's side too."""
    with suppress(OSError):
        while data := source.recv(_CHUNK):
            sink.sendall(data)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
