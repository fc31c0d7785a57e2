"""Wires the control plane into one process: `python -m meshdemo.control.server --state DIR ...`.

One asyncio loop (the main thread) serves the sidecars over gRPC: ADS, telemetry, access logs. A thread
serves the HTTP API; what it asks of the control plane runs on the loop. Both addresses are given, and stay
the same over restarts, so that sidecars and clients find it again.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import secrets
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Read by grpc as it is loaded. Without the engine for connections that is its default of late, a message
# passes one thread less: a change that a thousand sidecars take in costs a quarter less of the processor.
os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_listener")

import grpc
from pydantic import ValidationError

from meshdemo.control import goals, hand, load, metrics, objectives, page, telemetry
from meshdemo.control.api.app import create_app
from meshdemo.control.api.mesh import Control
from meshdemo.control.identity import Authenticator
from meshdemo.control.intent import Intents
from meshdemo.control.journal import Journal
from meshdemo.control.model import MeshState
from meshdemo.control.plane import SERVER_OPTIONS, ControlPlane
from meshdemo.control.session import Sessions
from meshdemo.control.tap import Tap
from meshdemo.errors import Failed, MeshdemoError, Missing
from meshdemo.files import write_atomic
from meshdemo.resources import DEFAULT_POLICY

if TYPE_CHECKING:
    from flask import Flask

log = logging.getLogger(__name__)

# Each long poll, tap or page holds one thread; the rest answer calls, some of which wait for sidecars.
_HTTP_THREADS = 32
_STOP_S = 1.0
_BEAT_S = 0.5


@dataclass(frozen=True, slots=True)
class Place:
    """Where a control plane keeps its state, and where it is found."""

    state: Path
    grpc_port: int
    http_port: int
    grpc_host: str = "127.0.0.1"
    http_host: str = "127.0.0.1"
    allowed_hosts: tuple[str, ...] = ()
    open_listen: str | None = None  # HOST:PORT for /healthz and /metrics alone
    hand: tuple[str, ...] = ()  # the command line of `meshdemo` for this mesh; see `hand`

    @property
    def control(self) -> Path:
        """The folder that only the control plane writes to."""
        return self.state / "control"


class Backend:
    """Where the control plane learns of the mesh. This one: from a file that the supervisor writes.

    Another runtime has one of its own (see `meshdemo.runtime.kubernetes.server`).
    """

    authenticator: Authenticator | None = None  # whose tokens are accepted; None: as the mesh state says
    intents: Intents | None = None  # where the intent is kept; None: in the control plane's folder
    keep_authority: Callable[[], object] | None = None  # see `ControlPlane`; None: that folder lasts

    def __init__(self, place: Place) -> None:
        self._place = place

    async def start(self) -> MeshState:
        """Prepare the control plane's folder; the mesh as it is. Raises MeshdemoError."""
        return self.mesh()

    def mesh(self) -> MeshState:
        """The mesh as it is now; called from any thread. Raises MeshdemoError."""
        return read_mesh(self._place.state)

    async def follow(self, control: Control) -> None:
        """Tell the control plane of changes until cancelled. Here a client tells it, over the API."""
        await asyncio.Event().wait()

    async def stop(self) -> None:
        """The control plane has ended; nothing in its folder changes any more."""


def read_mesh(state: Path) -> MeshState:
    """The mesh as the runtime reports it.

    Raises:
        Missing: it has not reported yet. Failed: what it reported cannot be read.
    """
    path = state / "instances.json"
    try:
        return MeshState.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise Missing(f"{path} is not there", "`meshdemo up` writes it") from None
    except (OSError, ValidationError) as error:
        raise Failed(f"{path} cannot be read: {error}") from error


def api_token(path: Path) -> str:
    """The API's bearer token: that of the file, which is made if there is none and which its owner alone
    can read.

    Raises:
        Failed: it can neither be read nor be made.
    """
    try:
        with contextlib.suppress(FileNotFoundError):
            if token := path.read_text().strip():
                return token
        token = secrets.token_urlsafe(32)
        write_atomic(path, token.encode(), durable=True)
    except OSError as error:
        raise Failed(f"cannot keep the API's token in {path}: {error.strerror}") from error
    return token


async def serve(place: Place, backend: Backend | None = None) -> None:
    """Run until SIGTERM or SIGINT.

    Raises:
        MeshdemoError: the state cannot be read, or a port is taken.
    """
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    backend = backend or Backend(place)
    place.control.mkdir(mode=0o700, parents=True, exist_ok=True)
    mesh = await backend.start()
    journal, totals, store = Journal(place.control / "events.jsonl"), metrics.Totals(), telemetry.Store()

    def record(event: Mapping[str, Any]) -> None:
        totals.event(journal.append(event))

    store.track([instance.id for instance in mesh.sidecars])
    plane = ControlPlane(
        place.control,
        mesh,
        journal=record,
        authenticator=backend.authenticator,
        intents=backend.intents,
        keep_authority=backend.keep_authority,
    )
    tap = Tap(plane.set_tap, plane.authenticate, home=mesh.namespace)
    server = grpc.aio.server(options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers(
        (
            *plane.handlers(),
            telemetry.handler(
                store,
                plane.authenticate,
                totals.sample,
                plane.real_share,
                calm=plane.calm,
                home=mesh.namespace,
            ),
            tap.handler(),
        )
    )
    address = f"{place.grpc_host}:{place.grpc_port}"
    try:
        server.add_secure_port(address, plane.server_credentials())
    except RuntimeError as error:
        raise Failed(f"cannot listen on {address} for sidecars: {error}", "is the port taken?") from error
    control = Control(
        plane=plane,
        store=store,
        journal=journal,
        tap=tap,
        totals=totals,
        loop=loop,
        read_mesh=backend.mesh,
    )
    await plane.start()
    await server.start()
    _serve_http(place, control)
    record({"event": "control_plane_started", "revision": plane.intent.revision})
    log.info("serving sidecars on %s and the API on %s:%d", address, place.http_host, place.http_port)
    listening = asyncio.create_task(_beat(store))
    following = asyncio.create_task(backend.follow(control))
    stopping = asyncio.create_task(stopped.wait())
    await asyncio.wait((following, stopping), return_when=asyncio.FIRST_COMPLETED)
    log.info("stopping")
    listening.cancel()
    following.cancel()
    (failure,) = await asyncio.gather(following, return_exceptions=True)
    await plane.stop()
    await server.stop(_STOP_S)
    journal.close()
    await backend.stop()
    if isinstance(failure, Exception):
        raise failure


async def _beat(store: telemetry.Store) -> None:
    while True:
        store.beat()
        await asyncio.sleep(_BEAT_S)


def _serve_http(place: Place, control: Control) -> None:
    """Serve the API from a thread that ends with the process."""
    import waitress

    open_port = None
    listen = [f"{place.http_host}:{place.http_port}"]
    if place.open_listen is not None:
        open_port = int(place.open_listen.rsplit(":", 1)[1])
        listen.append(place.open_listen)
    token = api_token(place.control / "api-token")
    sessions = Sessions(token, control.mesh.mesh)
    ours = hand.Hand(place.hand)
    broadcast = page.Broadcast(control, default_goals=goals.by_policy(DEFAULT_POLICY), by_hand=ours.there)
    keeper = load.LoadKeeper(control)
    broadcast.start()
    keeper.start()
    app: Flask = create_app(
        control,
        token=token,
        allowed_hosts=place.allowed_hosts,
        blueprints=[
            page.blueprint(broadcast, sessions),
            hand.blueprint(ours),
            load.blueprint(keeper),
            objectives.blueprint(control.totals.objectives),
        ],
        authorize=[sessions.authorize],
        open_port=open_port,
    )
    try:
        server = waitress.create_server(
            app,
            listen=" ".join(listen),
            threads=_HTTP_THREADS,
            ident=None,
            clear_untrusted_proxy_headers=True,
            # select() takes no descriptor above 1023, and each sidecar has one.
            asyncore_use_poll=True,
        )
    except OSError as error:
        raise Failed(
            f"cannot listen on {' and '.join(listen)}: {error.strerror}", "is the port taken?"
        ) from error
    threading.Thread(target=server.run, name="http", daemon=True).start()


def run(place: Place, backend: Callable[[], Backend] | None = None, *, verbose: bool = False) -> int:
    """Log to stderr and serve until told to end; the exit status as of `MeshdemoError`.

    Args:
        backend: makes the backend; default: the one of this module.
    """
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    try:
        asyncio.run(serve(place, backend() if backend else None))
    except MeshdemoError as error:
        log.error("%s", error)
        return error.exit_status
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The process; its exit status as of `MeshdemoError`."""
    parser = argparse.ArgumentParser(prog="meshdemo.control.server", description=__doc__.splitlines()[0])
    parser.add_argument("--state", type=Path, required=True, help="the mesh's state folder")
    parser.add_argument("--grpc-port", type=int, required=True, help="for sidecars (TLS)")
    parser.add_argument("--http-port", type=int, required=True, help="for the API")
    parser.add_argument("--grpc-host", default="127.0.0.1")
    parser.add_argument("--http-host", default="127.0.0.1")
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="may stand in a Host header"
    )
    parser.add_argument(
        "--open-listen", metavar="HOST:PORT", help="/healthz and /metrics alone, without token"
    )
    parser.add_argument(
        "--hand", metavar="JSON", help="the words of the command that changes what runs (meshdemo --name M)"
    )
    parser.add_argument("--verbose", action="store_true")
    given = parser.parse_args(arguments)
    place = Place(
        state=given.state,
        grpc_port=given.grpc_port,
        http_port=given.http_port,
        grpc_host=given.grpc_host,
        http_host=given.http_host,
        allowed_hosts=tuple(given.allow_host),
        open_listen=given.open_listen,
        hand=tuple(json.loads(given.hand)) if given.hand else (),
    )
    return run(place, verbose=given.verbose)


if __name__ == "__main__":
    sys.exit(main())
