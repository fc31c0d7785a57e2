"""What all workloads share: the web server, its graceful stop, /healthz, /metrics and request metrics.

The server is gevent's pywsgi: a waiting request costs a greenlet, not a thread, so a slow dependency never
makes requests queue for one, and everything is in one process, so that killing or stopping that process
kills or stops the workload. Measured against granian, cheroot, waitress and gunicorn with 500 requests in
flight it needed the least CPU per request, once its header parser was replaced (`_Headers`).
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, BinaryIO

import gevent
from flask import Flask, Response
from gevent.event import Event
from gevent.pywsgi import WSGIHandler, WSGIServer
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, Gauge, disable_created_metrics, generate_latest
from werkzeug.exceptions import HTTPException

from meshdemo.workloads.settings import BadSetting, Environment, Identity

# Asked by machines about the workload itself: not part of the work that request metrics count.
OPERATIONAL = frozenset({"/healthz", "/metrics"})

# Seconds. Dense where objectives usually lie (50 ms to 1 s), so that quantiles from them mean something.
LATENCY_BUCKETS = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75,
    1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0,
)  # fmt: skip

_BACKLOG = 4096  # connections that may wait to be accepted; the system caps it
_MAX_HEADERS = 200

disable_created_metrics()  # type: ignore[no-untyped-call]


@lru_cache(maxsize=512)
def _header_keys(raw: str) -> tuple[str, str]:
    """The name of a header as it is looked up, and as WSGI calls it ('' where WSGI must not see it).

    A name with an underscore would be taken for the one with a dash that a sidecar vouches for.

    Raises:
        ValueError: it is no name.
    """
    if not raw or raw != raw.strip():
        raise ValueError("malformed header name")
    name = raw.lower()
    hidden = "_" in name or name in ("content-type", "content-length")
    return name, "" if hidden else "HTTP_" + name.upper().replace("-", "_")


class _Headers:
    """Request headers, parsed without the email package, which costs more than all the rest of a request.

    Has just what `WSGIHandler` asks of its `MessageClass`.

    Raises:
        ValueError: a line is no header; the handler answers 400.
    """

    __slots__ = ("_values", "environ", "status")

    def __init__(self, rfile: BinaryIO, _seekable: int = 0) -> None:
        self.status = ""
        self.environ: dict[str, str] = {}
        self._values: dict[str, str] = {}
        for _ in range(_MAX_HEADERS):
            line = rfile.readline(65537)
            if line in (b"\r\n", b"\n"):
                return
            raw, colon, value = line.decode("latin-1").partition(":")
            if not colon or value[-1:] != "\n":
                raise ValueError("malformed header line")
            name, key = _header_keys(raw)
            value = value.strip()
            if name in self._values:  # a repeated Content-Length thus becomes no number: 400, not a guess
                value = f"{self._values[name]}{';' if name == 'cookie' else ','} {value}"
            self._values[name] = value
            if key:
                self.environ[key] = value
        raise ValueError("too many headers")

    def get(self, name: str, default: str | None = None) -> str | None:
        return self._values.get(name.lower(), default)

    getheader = get

    def __delitem__(self, name: str) -> None:
        del self._values[name.lower()]

    @property
    def typeheader(self) -> str | None:
        return self._values.get("content-type")


class _Handler(WSGIHandler):  # type: ignore[misc]
    """pywsgi's handler, cheaper, fair between connections, and able to end them politely."""

    MessageClass = _Headers
    waiting = False  # between two requests

    def handle(self) -> None:
        handlers = self.server.handlers
        handlers.add(self)
        try:
            super().handle()
        finally:
            handlers.discard(self)

    def _headers(self) -> Iterable[tuple[str, str]]:
        items: Iterable[tuple[str, str]] = self.headers.environ.items()
        return items

    def read_requestline(self) -> str:
        # Without this a client that always has the next request ready keeps all others waiting, because
        # gevent only lets others run when there is nothing to read.
        gevent.sleep(0)
        self.waiting = True
        line: str = super().read_requestline()
        self.waiting = False
        return line

    def finalize_headers(self) -> None:
        super().finalize_headers()
        if self.server.draining:
            self.close_connection = True
            self.response_headers.append((b"Connection", b"close"))

    def _write_with_headers(self, data: bytes) -> None:
        """Head and body in one packet: half the system calls here and at the receiver."""
        self.headers_sent = True
        self.finalize_headers()
        head = b"".join(b"%b: %b\r\n" % header for header in self.response_headers)
        head = b"HTTP/1.1 %b\r\n%b\r\n" % (self.status, head)
        if self.response_use_chunked:
            self._sendall(head)
            self._write(data)
            return
        packet = head + data
        sent = self.socket.send(packet)
        self.response_length += sent
        if sent < len(packet):
            self._sendall(packet[sent:])

    def log_request(self) -> None:
        """No access log: the sidecar sees every request (and formatting a line costs even if unused)."""

    def end_if_waiting(self) -> None:
        """Close the connection unless a request is being answered or has arrived."""
        if not self.waiting:
            return
        try:
            self.socket._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            self.socket.shutdown(socket.SHUT_RD)  # wakes the greenlet with an end of file
        except OSError:
            pass


class _Server(WSGIServer):  # type: ignore[misc]
    """The server, with its open connections known, so that a stop can tell idle ones from busy ones."""

    def __init__(self, identity: Identity, app: Flask) -> None:
        self.handlers: set[_Handler] = set()
        self.draining = False
        address = (identity.host, identity.port)
        super().__init__(
            address,
            app,
            backlog=_BACKLOG,
            log=None,
            handler_class=_Handler,
            spawn=gevent.spawn_raw,
            environ={"SERVER_NAME": identity.host},  # else it asks the DNS for one, which may take long
        )

    def drain(self, deadline: float) -> None:
        """Take no new connections, answer what is in flight, and return, at `deadline` at the latest."""
        gevent.sleep(0.01)  # connections that are already there get accepted
        self.draining = True  # from here on each answer ends its connection
        self.close()
        while self.handlers and time.monotonic() < deadline:
            for handler in list(self.handlers):
                handler.end_if_waiting()
            gevent.sleep(0.01)


class Measured:
    """WSGI middleware that reports status and latency (s) of every response but the operational ones."""

    def __init__(self, app: Callable[..., Iterable[bytes]], record: Callable[[int, float], None]) -> None:
        self._app = app
        self._record = record

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] in OPERATIONAL:
            return self._app(environ, start_response)
        started = time.perf_counter()
        code = 500

        def note(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
            nonlocal code
            code = int(status[:3])
            return start_response(status, headers, exc_info)

        try:
            return self._app(environ, note)
        finally:
            self._record(code, time.perf_counter() - started)


class Canned:
    """A response made once, to be given any number of times."""

    def __init__(self, body: bytes, status: int = 200, mimetype: str = "application/json") -> None:
        self.response = Response(body, status=status, mimetype=mimetype)
        self._status = self.response.status
        self._headers = list(self.response.headers)
        self._body = [body]

    def __call__(self, _environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        start_response(self._status, self._headers)
        return self._body


class App(Flask):
    """Flask, with a short way for views that do not look at the request.

    Contexts, signals and URL matching cost Flask more than all the rest of a request, and they need not be
    done again and again for a view that asks nothing of them.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name, static_folder=None)
        self._short: dict[str, Callable[[], Canned]] = {}

    def short(self, path: str, view: Callable[[], Canned]) -> None:
        """Route GET `path` to `view`, which must neither use Flask's contexts nor raise."""
        self.add_url_rule(path, view.__name__, lambda: view().response)
        self._short[path] = view

    def wsgi_app(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        view = self._short.get(environ["PATH_INFO"])
        if view is not None and environ["REQUEST_METHOD"] == "GET":
            return view()(environ, start_response)
        return super().wsgi_app(environ, start_response)


def flask_app(identity: Identity) -> App:
    """A Flask app with /healthz and /metrics, and errors as JSON: {"error": ...}."""
    app = App(identity.service)
    labels = {"service": identity.service, "version": identity.version, "instance": identity.instance}
    info = Gauge("workload_info", "Which workload this is; always 1.", labels.keys())
    info.labels(**labels).set(1)

    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        return {"status": "ok", **labels}

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(generate_latest(REGISTRY), content_type=CONTENT_TYPE_LATEST)

    @app.errorhandler(HTTPException)
    def failed(error: HTTPException) -> tuple[dict[str, str], int]:
        return {"error": error.description or error.name}, error.code or 500

    return app


# Makes the app, and a function that stops what the workload does besides answering, called first on a stop.
Build = Callable[[Environment, Identity], tuple[Flask, Callable[[], None]]]


def run(service: str, build: Build) -> None:
    """Run a workload until SIGTERM or SIGINT, let it finish what is in flight, and exit.

    Exit status: 0 stopped when asked to, 1 cannot listen, 2 bad setting.
    """
    env = Environment(os.environ)
    try:
        identity = Identity.of(env, service)
        app, stop_work = build(env, identity)
    except BadSetting as error:
        sys.exit(_complain(service, str(error), 2))
    _raise_file_limit()
    server = _Server(identity, app)
    stopping = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        gevent.signal_handler(number, stopping.set)
    try:
        server.start()
    except OSError as error:
        reason = error.strerror or str(error)
        sys.exit(_complain(service, f"cannot listen on {identity.host}:{identity.port}: {reason}", 1))
    host = f"[{server.server_host}]" if ":" in server.server_host else server.server_host
    print(f"{identity.service} {identity.version} listens on http://{host}:{server.server_port}", flush=True)
    gc.collect()
    gc.freeze()  # what is there now stays: later collections need not look at it
    gc.set_threshold(10_000, 20, 100)  # requests in flight are many young objects, and no garbage
    stopping.wait()
    deadline = time.monotonic() + identity.drain_s
    stop_work()
    server.drain(deadline)
    sys.exit(0)


def _complain(service: str, message: str, status: int) -> int:
    print(f"{service}: {message}", file=sys.stderr, flush=True)
    return status


def _raise_file_limit() -> None:
    """A request in flight is an open socket, and common soft limits (256, 1024) are too low for a load."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
