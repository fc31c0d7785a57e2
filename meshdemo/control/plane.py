"""The control plane as one object: it owns what should be and brings it to the sidecars.

It holds the mesh as the runtime reports it (`MeshState`), the intent, the certificate authority and the ADS
streams. Whatever changes goes through `change` or `refresh`, one at a time: compute the new state, persist
it, push it, wait for the sidecars' ACKs. Everything here runs on one asyncio loop; the API, which is
threaded, calls it through `asyncio.run_coroutine_threadsafe`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from meshdemo.control.model import Effect, Instance, Intent, MeshState

Change = Callable[[Intent, MeshState], Intent]
"""A change of the intent: pure, and raises BadInput if it makes no sense. Those of `intent.py` fit through
a lambda: `plane.change(lambda intent, mesh: add_fault(intent, mesh, fault))`."""

Journal = Callable[[Mapping[str, Any]], None]
"""Where the control plane says what happened: a flat event with `event` and what belongs to it."""


@dataclass(frozen=True, slots=True)
class Sidecar:
    """How one instance's sidecar stands."""

    instance: Instance
    connected: bool  # it holds an ADS stream
    acked: bool  # it has confirmed all that it should run with
    nacks: Mapping[str, str]  # short type ("routes", "clusters", ...) -> Envoy's words, while rejected


@dataclass(frozen=True, slots=True)
class Settings:
    """What the control plane may be told at start."""

    ack_timeout_s: float = 5.0  # how long a change waits for a sidecar that does not answer
    certificate_lifetime_s: float = 3600.0


class ControlPlane:
    """The mesh's control plane, without its HTTP API and its telemetry."""

    def __init__(
        self,
        state: Path,
        mesh: MeshState,
        *,
        journal: Journal,
        settings: Settings | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Load (or make) the intent and the certificate authority in the folder `state`.

        Raises Failed with a remedy if what is stored there cannot be read.
        """
        raise NotImplementedError

    # -- life ---------------------------------------------------------------------------------------------
    async def start(self) -> None:
        """Start the timers (fault expiry, certificates). Call on the loop that serves."""
        raise NotImplementedError

    async def stop(self) -> None:
        """Stop the timers and close all streams."""
        raise NotImplementedError

    def server_credentials(self) -> grpc.ServerCredentials:
        """TLS for the gRPC server, from the mesh's own authority; follows the rotation of its certificate."""
        raise NotImplementedError

    def handlers(self) -> Sequence[grpc.GenericRpcHandler]:
        """The gRPC services to add to the server (`server.add_generic_rpc_handlers`): ADS."""
        raise NotImplementedError

    async def authenticate(self, metadata: Collection[tuple[str, str | bytes]]) -> Instance | None:
        """Whose token a gRPC call carries (`context.invocation_metadata()`); None if nobody's.

        OTLP and ALS ask this too: identity comes from here and never from what a message says.
        """
        raise NotImplementedError

    # -- what is ------------------------------------------------------------------------------------------
    @property
    def intent(self) -> Intent:
        """The intent in force. A value: safe to read from any thread."""
        raise NotImplementedError

    @property
    def mesh(self) -> MeshState:
        """The mesh as the runtime last reported it. A value: safe to read from any thread."""
        raise NotImplementedError

    def sidecars(self) -> list[Sidecar]:
        """How each instance's sidecar stands, in the order of the mesh state. On the loop only."""
        raise NotImplementedError

    # -- what should be -----------------------------------------------------------------------------------
    async def change(self, fn: Change) -> Effect:
        """Change the intent; returns when every affected sidecar that is connected has confirmed it.

        `Effect.effective_ms` runs from this call to the last ACK. `Effect.unconfirmed` names sidecars that
        are connected but did not answer in time; they take the change when they do. A change that changes
        nothing keeps the revision.

        Raises BadInput (from `fn`); Failed if the intent could not be stored, or a sidecar rejected it: the
        intent before stays (comes back) in force, and the message names the sidecar and Envoy's words.
        """
        raise NotImplementedError

    async def refresh(self, mesh: MeshState) -> Effect:
        """Take what the runtime reports: new, gone, (un)ready instances. Closes streams of those gone.

        Ejections of instances that are gone are dropped. A rejection is journalled and stands in
        `sidecars()`; it does not raise, for the instances are facts.
        """
        raise NotImplementedError

    async def set_tap(self, on: bool) -> Effect:
        """Have every sidecar send its access log (ALS) to the control plane, or stop that. Not persisted."""
        raise NotImplementedError

    async def rotate_certificates(self) -> Effect:
        """Give every connected sidecar a fresh key and certificate now (also done by itself in time)."""
        raise NotImplementedError

    async def rotate_root(self) -> Effect:
        """Replace the root: trust both, re-issue all certificates, then trust the new one alone."""
        raise NotImplementedError
