"""A real control plane, real Envoys and tiny real HTTP servers behind them, for end-to-end tests.

No supervisor, no CLI: this is the control plane's own ground. Everything listens on loopback, on ports that the
system chose, and waits are for conditions.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import itertools
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import grpc
from envoy.service.discovery.v3.discovery_pb2 import DiscoveryResponse

from meshdemo.apps.model import App
from meshdemo.control import xds
from meshdemo.control.bootstrap import Placement, bootstrap_files, envoy_arguments, find_envoy, is_ready
from meshdemo.control.model import Instance, MeshState
from meshdemo.control.plane import SERVER_OPTIONS, ControlPlane, Settings, Sidecar

T = TypeVar("T")
DEADLINE_S = 30.0


def pair(**services: Mapping[str, Any]) -> App:
    """service-a calls service-b (v1, v2), service-c calls nobody; fields of services may be overridden."""
    workload = {"command": ["true"]}
    definitions: dict[str, dict[str, Any]] = {
        "service-a": {"port": 5000, "calls": ["service-b"], "versions": {"v1": workload}},
        "service-b": {
            "port": 5000,
            "routes": [{"name": "work", "path": "/work"}, {"name": "api", "prefix": "/api"}],
            "versions": {"v1": workload, "v2": {**workload, "initial": False}},
        },
        "service-c": {"port": 5000, "versions": {"v1": workload}},
    }
    for name, fields in services.items():
        definitions.setdefault(name.replace("_", "-"), {"port": 5000, "versions": {"v1": workload}}).update(
            fields
        )
    return App.model_validate({"name": "pair", "front": "service-b", "services": definitions})


_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_ports = itertools.cycle(secrets.SystemRandom().sample(range(12_000 + _worker % 8, 32_000, 8), 2_000))


def free_port() -> int:
    """A port that nobody listens on, given out once. Below the ephemeral range, so that no client takes it
    meanwhile; workers of a parallel test run share none."""
    while True:
        port = next(_ports)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def resources(snapshot: xds.Snapshot, type_url: str, kind: type) -> dict[str, Any]:
    """The resources of a type in a snapshot, by name."""
    response = DiscoveryResponse.FromString(
        b"".join(bundle.part(bundle.names) for bundle in snapshot[type_url])
    )
    found = []
    for packed in response.resources:
        message = kind()
        packed.Unpack(message)
        found.append(message)
    return {getattr(one, "name", "") or one.cluster_name: one for one in found}


def until(condition: Callable[[], T], what: str, deadline_s: float = DEADLINE_S) -> T:
    """Wait for a condition; what it gave."""
    end = time.monotonic() + deadline_s
    while True:
        if found := condition():
            return found
        assert time.monotonic() < end, f"gave up waiting for: {what}"
        time.sleep(0.01)


class _Server(ThreadingHTTPServer):
    # Where many connect at once, the default of 5 makes the kernel turn some away; Envoy calls it an error.
    request_queue_size = 1024
    daemon_threads = True


class Upstream:
    """A tiny HTTP server: an instance's app. It counts what it gets and says who it is."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.requests: list[tuple[str, str]] = []
        self.headers: list[dict[str, str]] = []
        self.status = 200
        upstream = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                upstream.requests.append((self.command, self.path))
                upstream.headers.append({key.lower(): value for key, value in self.headers.items()})
                body = upstream.name.encode()
                self.send_response(upstream.status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_PUT = do_GET

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@dataclass
class Answer:
    """An HTTP response."""

    status: int
    body: str
    headers: dict[str, str]
    seconds: float


class Proxied:
    """A client of one sidecar's outbound listener, as the app beside it: one kept-alive connection."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)

    def get(self, url: str, method: str = "GET", headers: Mapping[str, str] | None = None) -> Answer:
        began = time.perf_counter()
        self._connection.request(method, url, headers=dict(headers or {}))
        response = self._connection.getresponse()
        body = response.read().decode(errors="replace")
        return Answer(
            response.status,
            body,
            {key.lower(): value for key, value in response.getheaders()},
            time.perf_counter() - began,
        )

    def close(self) -> None:
        self._connection.close()


class ControlThread:
    """A control plane and its gRPC server on a loop of their own, in a thread."""

    def __init__(
        self,
        state: Path,
        mesh: MeshState,
        port: int,
        settings: Settings,
        extra: tuple[Any, ...] = (),
        keep_authority: Callable[[], object] | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        self.events: list[dict[str, Any]] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

        async def boot() -> tuple[ControlPlane, Any]:
            plane = ControlPlane(
                state,
                mesh,
                journal=lambda e: self.events.append(dict(e)),
                settings=settings,
                keep_authority=keep_authority,
            )
            server = grpc.aio.server(options=SERVER_OPTIONS)
            server.add_generic_rpc_handlers((*plane.handlers(), *extra))
            server.add_secure_port(f"{host}:{port}", plane.server_credentials())
            await server.start()
            await plane.start()
            return plane, server

        self.plane, self._server = self.run(boot())

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run something on the control plane's loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(DEADLINE_S)

    def close(self, *, abruptly: bool = False) -> None:
        async def end() -> None:
            if abruptly:
                await self._server.stop(0)
                await self.plane.stop()
            else:
                await self.plane.stop()
                await self._server.stop(0.1)

        self.run(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(DEADLINE_S)
        self._loop.close()


@dataclass
class Member:
    """An instance: its app, its sidecar, its token."""

    instance: Instance
    token: str
    folder: Path
    upstream: Upstream
    process: subprocess.Popen[bytes] | None = None
    clients: list[Proxied] = field(default_factory=list)

    def client(self) -> Proxied:
        """A client of what this instance may call."""
        client = Proxied(self.instance.outbound_port)
        self.clients.append(client)
        return client

    @property
    def admin(self) -> Path:
        return self.folder / "admin.sock"

    def log(self) -> str:
        return (self.folder / "envoy.log").read_text(errors="replace")[-1500:]


class Mesh:
    """A mesh under test."""

    def __init__(self, folder: Path, app: App, settings: Settings | None = None) -> None:
        self.folder = folder
        self.state = folder / "control"
        self.state.mkdir(mode=0o700)
        self.app = app
        # Long enough for a sidecar that a loaded machine lets wait: it is not one that hangs.
        self.settings = settings or Settings(ack_timeout_s=20)
        self.members: dict[str, Member] = {}
        self.control: ControlThread | None = None
        self.control_port = free_port()  # the same one after a restart, so none that anybody may be given
        self.host = "127.0.0.1"  # where the control plane listens
        self.extra: tuple[Any, ...] = ()
        self.keep_authority: Callable[[], object] | None = None

    # -- instances

    def add(self, service: str, version: str = "v1", *, ready: bool = True) -> Member:
        number = sum(1 for m in self.members.values() if m.instance.service == service) + 1
        name = f"{service}-{number}"
        token = secrets.token_hex(16)
        upstream = Upstream(name)
        instance = Instance(
            id=name,
            service=service,
            version=version,
            inbound_port=free_port(),
            outbound_port=free_port(),
            metrics_port=free_port(),
            app_port=upstream.port,
            ready=ready,
            token_sha256=hashlib.sha256(token.encode()).hexdigest(),
        )
        folder = self.folder / name
        folder.mkdir()
        member = self.members[name] = Member(instance, token, folder, upstream)
        return member

    def mesh_state(self) -> MeshState:
        return MeshState(mesh="m", app=self.app, instances=tuple(m.instance for m in self.members.values()))

    def update(self, name: str, **changes: Any) -> None:
        """Change fields of an instance and tell the control plane."""
        member = self.members[name]
        member.instance = member.instance.model_copy(update=changes)
        self.refresh()

    def refresh(self) -> Any:
        assert self.control
        return self.control.run(self.control.plane.refresh(self.mesh_state()))

    # -- processes

    def start(self) -> None:
        self.start_control()
        for member in self.members.values():
            self.start_sidecar(member)
        for member in self.members.values():
            self.await_ready(member)

    def start_control(self) -> None:
        self.control = ControlThread(
            self.state, self.mesh_state(), self.control_port, self.settings, self.extra, self.keep_authority,
            self.host,
        )  # fmt: skip

    def stop_control(self, *, abruptly: bool = False) -> None:
        if self.control:
            self.control.close(abruptly=abruptly)
            self.control = None

    def start_sidecar(self, member: Member) -> None:
        assert self.control
        placement = Placement(
            folder=member.folder,
            trust=self.control.plane.trust_path,
            admin=member.admin,
            control_host="127.0.0.1",
            control_port=self.control_port,
        )
        (member.folder / "token").write_text(member.token)
        for name, content in bootstrap_files(member.instance, placement).items():
            (member.folder / name).write_text(content)
        self.run_envoy(member, member.folder / "bootstrap.yaml")

    @staticmethod
    def run_envoy(member: Member, bootstrap: Path) -> None:
        with (member.folder / "envoy.log").open("wb") as log:
            member.process = subprocess.Popen(
                envoy_arguments(find_envoy(), bootstrap), stdout=log, stderr=log
            )

    def await_ready(self, member: Member) -> None:
        def ready() -> bool:
            assert member.process
            assert member.process.poll() is None, f"{member.instance.id} died:\n{member.log()}"
            return is_ready(member.admin)

        until(ready, f"{member.instance.id} to be ready\n{member.log()}")

    def stop(self) -> None:
        for member in self.members.values():
            for client in member.clients:
                client.close()
            if member.process:
                member.process.kill()
                member.process.wait()
            member.upstream.close()
        self.stop_control()

    # -- shortcuts

    def sidecars(self) -> list[Sidecar]:
        """How each sidecar stands, as the control plane sees it between two steps of its loop."""

        async def ask() -> list[Sidecar]:
            return self.plane.sidecars()

        assert self.control
        return self.control.run(ask())

    def change(self, fn: Callable[..., Any]) -> Any:
        """Change the intent."""
        assert self.control
        return self.control.run(self.control.plane.change(fn))

    @property
    def plane(self) -> ControlPlane:
        assert self.control
        return self.control.plane

    def journal(self, event: str) -> list[dict[str, Any]]:
        assert self.control
        return [entry for entry in self.control.events if entry["event"] == event]


@contextlib.contextmanager
def mesh_of(app: App, settings: Settings | None = None) -> Iterator[Mesh]:
    """A mesh to add instances to and start; gone afterwards. Its folder has a short path (Unix sockets)."""
    folder = Path(tempfile.mkdtemp(prefix="mx"))
    mesh = Mesh(folder, app, settings)
    try:
        yield mesh
    finally:
        mesh.stop()
        shutil.rmtree(folder, ignore_errors=True)


class Load:
    """Requests in a closed loop from some threads, while something happens; counts what came back."""

    def __init__(self, member: Member, url: str, threads: int = 4, pause_s: float = 0.002) -> None:
        self.answers: list[Answer] = []
        self.errors: list[str] = []
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(member, url, pause_s), daemon=True)
            for _ in range(threads)
        ]

    def _run(self, member: Member, url: str, pause_s: float) -> None:
        client = Proxied(member.instance.outbound_port)
        while not self._stop.wait(pause_s):
            try:
                self.answers.append(client.get(url))
            except (OSError, http.client.HTTPException) as error:
                self.errors.append(repr(error))
                client.close()
                client = Proxied(member.instance.outbound_port)
        client.close()

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        until(lambda: len(self.answers) > 20, "load to flow")
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(DEADLINE_S)

    def more(self, count: int) -> None:
        """Wait for so many further answers."""
        target = len(self.answers) + count
        until(lambda: len(self.answers) >= target, f"{count} more answers")

    @property
    def failed(self) -> list[str]:
        """Requests that did not come back 200."""
        return self.errors + [f"{a.status} {a.body}" for a in self.answers if a.status != 200]
