"""The control plane as one object: it owns what should be and brings it to the sidecars.

It holds the mesh as the runtime reports it (`MeshState`), the intent, the certificate authority and the ADS
streams. Whatever changes goes through `change` or `refresh`, one at a time: compute the new state, persist
it, push it, wait for the sidecars' ACKs. Everything here runs on one asyncio loop; the API, which is
threaded, calls it through `asyncio.run_coroutine_threadsafe`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import jinja2
import yaml
from google.protobuf.json_format import ParseError

from meshdemo.control import xds
from meshdemo.control.certificates import Certificates
from meshdemo.control.discovery import SERVER_OPTIONS, Discovery, Journal, Nack, Outcome
from meshdemo.control.expiry import Expiry
from meshdemo.control.garbage import expect_streams
from meshdemo.control.identity import Authenticator, Authority, TokenHashes, bearer, spiffe_id
from meshdemo.control.intent import Change, Intents, IntentStore, Overtaken, forget_gone
from meshdemo.control.model import Effect, Instance, Intent, MeshState
from meshdemo.control.render.renderer import Renderer
from meshdemo.control.render.split import real_share
from meshdemo.errors import Failed
from meshdemo.resources import TEMPLATES

__all__ = ["SERVER_OPTIONS", "ControlPlane", "Settings", "Sidecar"]

log = logging.getLogger(__name__)


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
    certificate_lifetime_s: float = 3600.0  # unless the intent says otherwise
    root_overlap_s: float = 2.0  # how long both roots are trusted after all certificates are re-issued
    templates: Path = TEMPLATES / "envoy"


class ControlPlane:
    """The mesh's control plane, without its HTTP API and its telemetry."""

    def __init__(
        self,
        state: Path,
        mesh: MeshState,
        *,
        journal: Journal,
        settings: Settings | None = None,
        authenticator: Authenticator | None = None,
        intents: Intents | None = None,
        keep_authority: Callable[[], object] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Load (or make) the intent and the certificate authority in the folder `state`.

        Args:
            authenticator: whose tokens are accepted; default: those whose hashes the mesh state holds.
            intents: where the intent is kept; default: in `state`.
            keep_authority: what brings the authority's files to where they outlive `state`, if that does not
                last. Called in a thread of its own, each time before what they say is used; raises Failed.

        Raises:
            Failed: what is stored there cannot be read, or the templates are broken.
        """
        self._settings = settings or Settings()
        self._journal = journal
        self._clock = clock
        self._authenticator = authenticator or TokenHashes()
        self._store: Intents = intents or IntentStore(state / "intent.json")
        self._authority = Authority(state, mesh.mesh, clock())
        self._mesh = mesh
        self._intent = forget_gone(self._store.load(), mesh)
        self._certificates = Certificates(self._authority, self._lifetime_s, clock)
        self._tap = False
        self.load_token = secrets.token_urlsafe(24)
        """What sidecars let the load of an instance be set by; another one each time."""
        self._renderer = Renderer(self._settings.templates, self.load_token)
        self._rendered = self._render(self._mesh, self._intent)
        self._composed: dict[str, tuple[tuple[Any, ...], xds.Snapshot]] = {}
        self._discovery = Discovery(self._wanted, self.authenticate, journal)
        self._keep_authority = keep_authority or (lambda: None)
        self._changing = asyncio.Lock()
        self._rotating = asyncio.Lock()  # the root
        self._lifetime_changed = asyncio.Event()
        self._timers: list[asyncio.Task[None]] = []
        self._expiry = Expiry(lambda: self._intent, self.change, journal, clock)

    # -- life ---------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the timers (fault expiry, certificates). Call on the loop that serves."""
        _allow_many_streams()
        expect_streams(len(self._mesh.sidecars))
        self._timers = [
            asyncio.create_task(self._expiry.end_faults()),
            asyncio.create_task(self._expiry.end_splits()),
            asyncio.create_task(self._renew_certificates()),
        ]
        if self._authority.replacing_root:
            self._timers.append(asyncio.create_task(self._finish_root()))

    async def stop(self) -> None:
        """Stop the timers and close all streams."""
        for timer in self._timers:
            timer.cancel()
        await asyncio.gather(*self._timers, return_exceptions=True)
        self._discovery.close()

    def server_credentials(self) -> grpc.ServerCredentials:
        """TLS for the gRPC server, from the mesh's own authority; follows the rotation of its certificate."""
        return self._certificates.server_credentials()

    def handlers(self) -> Sequence[grpc.GenericRpcHandler]:
        """The gRPC services to add to the server (`server.add_generic_rpc_handlers`): ADS.

        The server is to be made with `SERVER_OPTIONS`.
        """
        return (self._discovery.handler(),)

    async def authenticate(self, metadata: Collection[tuple[str, str | bytes]]) -> Instance | None:
        """Whose token a gRPC call carries (`context.invocation_metadata()`); None if nobody's.

        OTLP and ALS ask this too: identity comes from here and never from what a message says.
        """
        token = bearer(metadata)
        return await self._authenticator.instance(token, self._mesh) if token else None

    @property
    def calm(self) -> asyncio.Event:
        """Set unless a push is at work, and gets on; then what can wait waits for it (not for long)."""
        return self._discovery.calm

    # -- what is ------------------------------------------------------------------------------------------

    @property
    def intent(self) -> Intent:
        """The intent in force. A value: safe to read from any thread."""
        return self._intent

    @property
    def mesh(self) -> MeshState:
        """The mesh as the runtime last reported it. A value: safe to read from any thread."""
        return self._mesh

    def real_share(self, instance: Instance) -> float:
        """Of what callers send to an instance, the share (0..1) that is not the copy of a request."""
        return real_share(self._mesh, self._intent, instance)

    @property
    def replacing_root(self) -> bool:
        """Is the root being replaced, or was that left half-way?"""
        return self._authority.replacing_root

    @property
    def trust_path(self) -> Path:
        """The file with the certificates that the mesh trusts (PEM): what sidecars check this server by."""
        return self._authority.trust_path

    def sidecars(self) -> list[Sidecar]:
        """How each sidecar stands, in the order of the mesh state, gateways last. On the loop only."""
        found = []
        for instance in self._mesh.sidecars:
            stream = self._discovery.stream(instance.id)
            nacks = stream.nacks() if stream else {}
            acked = stream is not None and stream.settled() and not nacks
            found.append(Sidecar(instance, stream is not None, acked, nacks))
        return found

    # -- what should be -----------------------------------------------------------------------------------

    async def change(self, fn: Change) -> Effect:
        """Change the intent; returns when every affected sidecar that is connected has confirmed it.

        `Effect.effective_ms` runs from this call to the last ACK. `Effect.unconfirmed` names sidecars that
        are connected but did not answer in time; they take the change when they do. A change that changes
        nothing keeps the revision.

        Raises:
            BadInput: from `fn`.
            Failed: the intent could not be stored, or a sidecar rejected it: the intent before stays (comes
                back) in force, and the message names the sidecar and Envoy's words.
        """
        started = time.perf_counter()
        async with self._changing:
            before, rendered = self._intent, self._rendered
            after = fn(before, self._mesh)
            if after is before:
                return Effect(revision=before.revision, effective_ms=0, sidecars=0)
            new = self._render(self._mesh, after)
            try:
                await asyncio.to_thread(self._store.save, after)
            except Overtaken:
                theirs = forget_gone(await asyncio.to_thread(self._store.load), self._mesh)
                self._take(theirs, self._render(self._mesh, theirs))
                await self._push()
                raise
            self._take(after, new)
            outcome = await self._push()
            if outcome.nacks:
                self._take(before, rendered)
                await asyncio.to_thread(self._store.save, before)
                await self._push()
                raise _rejected(outcome.nacks)
        return self._effect(started, outcome)

    async def refresh(self, mesh: MeshState) -> Effect:
        """Take what the runtime reports: new, gone, (un)ready instances. Closes streams of those gone.

        Ejections of instances that are gone are dropped. A rejection is journalled and stands in
        `sidecars()`; it does not raise, for the instances are facts.
        """
        started = time.perf_counter()
        async with self._changing:
            if mesh == self._mesh:
                return Effect(revision=self._intent.revision, effective_ms=0, sidecars=0)
            intent = forget_gone(self._intent, mesh)
            if intent is not self._intent:
                intent = await self._store_facts(intent, mesh)
            rendered = self._render(mesh, intent)
            was = {instance.id: instance.service for instance in self._mesh.sidecars}
            self._mesh = mesh
            expect_streams(len(mesh.sidecars))
            self._take(intent, rendered)
            for instance in mesh.sidecars:
                if was.get(instance.id, instance.service) != instance.service:
                    self._certificates.forget(instance.id)  # somebody else's now
            there = {instance.id for instance in mesh.sidecars}
            self._certificates.retain(there)
            for gone in set(self._composed) - there:
                del self._composed[gone]
            self._discovery.retain(mesh.sidecars)
        # Not under the lock: there is nothing to take back, and a sidecar that hangs must not keep the next
        # report, or a change, from the others for as long as it is waited for.
        outcome = await self._push()
        return self._effect(started, outcome)

    async def _store_facts(self, intent: Intent, mesh: MeshState) -> Intent:
        """Store an intent that was adapted to the mesh; the one to go on with, whether or not that works.

        Who is there and who is not is followed in any case. What is not stored now is stored with the next
        change, or found out again after a restart.
        """
        try:
            await asyncio.to_thread(self._store.save, intent)
        except Overtaken:
            with contextlib.suppress(Failed):
                return forget_gone(await asyncio.to_thread(self._store.load), mesh)
        except Failed as error:
            log.warning("that instances are gone is not stored yet: %s", error)
        return intent

    async def set_tap(self, on: bool) -> Effect:
        """Have every sidecar send its access log (ALS) to the control plane, or stop that. Not persisted."""
        started = time.perf_counter()
        async with self._changing:
            self._tap = on
            self._rendered = self._render(self._mesh, self._intent)
            outcome = await self._push()
        return self._effect(started, outcome)

    async def identities(self) -> dict[str, Any]:
        """Who each instance is and until when its certificate is valid; and how the root stands."""
        return {
            "instances": [
                {
                    "instance": instance.id,
                    "identity": spiffe_id(self._mesh.mesh, self._mesh.namespace, instance.service),
                    "expires_at": self._certificates.expires_at(instance.id),
                }
                for instance in self._mesh.instances
            ],
            "lifetime_s": self._certificates.lifetime_s,
            "trusted_roots": self._authority.trust.count(b"BEGIN CERTIFICATE"),
            "replacing_root": self._authority.replacing_root,
        }

    async def rotate_certificates(self) -> Effect:
        """Give every connected sidecar a fresh key and certificate now (also done by itself in time)."""
        started = time.perf_counter()
        async with self._changing:
            self._certificates.reissue()
            outcome = await self._push()
        return self._effect(started, outcome)

    async def rotate_root(self) -> Effect:
        """Replace the root: trust both, re-issue all certificates, then trust the new one alone.

        Each step is stored before it is used, and is confirmed by every sidecar that serves before the next:
        whenever this stops, or the control plane with it, everyone goes on trusting everyone.

        Raises:
            Failed: a step could not be stored, or a sidecar did not confirm it. Both roots stay trusted then,
                everything goes on working, and a second call (or a restart) goes on where this one stopped.
        """
        if self._rotating.locked():
            raise Failed(
                "the root is being replaced already", "`meshdemo identity show` says whether it is done"
            )
        started = time.perf_counter()
        async with self._rotating:
            self._authority.prepare_root(self._clock())
            await asyncio.to_thread(self._keep_authority)
            self._certificates.trust_anew()
            await self._everyone("trusting the new root as well")
            self._authority.switch_root()
            await asyncio.to_thread(self._keep_authority)
            self._certificates.reissue()
            await self._everyone("its certificate of the new root")
            # Handshakes that began with the old certificates end with them.
            await asyncio.sleep(self._settings.root_overlap_s)
            self._authority.retire_root()
            try:
                await asyncio.to_thread(self._keep_authority)
            except Failed as error:
                # A restart would find both trusted and finish the replacement; nobody is worse off till then.
                log.warning("that the old root is retired is not stored yet: %s", error.message)
            self._certificates.trust_anew()
            outcome = await self._push()
        return self._effect(started, outcome)

    async def renew_lease(self, service: str, owner: str) -> tuple[bool, bool]:
        """Go on holding the split of a service: is it still theirs, and if not, did the lease run out?"""
        leases = self._expiry.leases
        held = leases.renew(self._intent, service, owner)
        return held, not held and leases.ran_out(service, owner)

    # -- inside -------------------------------------------------------------------------------------------

    def _take(self, intent: Intent, rendered: Mapping[str, xds.Snapshot]) -> None:
        """Make an intent the one in force; what it means for certificates shows in the next push."""
        self._intent, self._rendered = intent, rendered
        self._expiry.look_again()
        if self._certificates.set_lifetime(self._lifetime_s):
            self._lifetime_changed.set()

    @property
    def _lifetime_s(self) -> float:
        return self._intent.certificate_lifetime_s or self._settings.certificate_lifetime_s

    def _render(self, mesh: MeshState, intent: Intent) -> Mapping[str, xds.Snapshot]:
        try:
            return self._renderer.snapshots(mesh, intent, tap=self._tap)
        except (jinja2.TemplateError, yaml.YAMLError, ParseError) as error:
            raise Failed(
                f"the Envoy templates are broken: {error}", f"mend them in {self._settings.templates}"
            ) from error

    def _wanted(self, instance: Instance) -> xds.Snapshot:
        """What an instance's sidecar should have now: what was rendered, and its secrets."""
        rendered = self._rendered.get(instance.id, {})
        _, identity = self._certificates.of(instance, self._mesh)
        trust = self._certificates.trust
        parts = (rendered, trust, identity)
        composed = self._composed.get(instance.id)
        if composed is None or any(a is not b for a, b in zip(composed[0], parts, strict=True)):
            composed = (parts, {**rendered, xds.SECRETS: (trust, identity)})
            self._composed[instance.id] = composed
        return composed[1]

    async def _push(self) -> Outcome:
        return await self._discovery.push(self._settings.ack_timeout_s)

    async def _everyone(self, what: str) -> None:
        """Push, and return once every sidecar that is there has confirmed it, or is at work without one.

        Raises Failed if one rejects it, or does not answer in time: one that is connected, or one whose
        instance is being sent requests although it is not (it is just coming back, say).
        """
        give_up = time.monotonic() + self._settings.ack_timeout_s
        outcome = await self._push()
        if outcome.nacks:
            raise _rejected(outcome.nacks)
        # The mesh may change meanwhile: who is gone is not waited for.
        while late := [one.id for one in self._mesh.sidecars if not self._has_answered(one)]:
            if time.monotonic() > give_up:
                raise Failed(
                    f"no answer from {', '.join(late[:5])} (of {len(late)}) to {what}",
                    "both roots stay trusted; try again when these sidecars answer",
                )
            await asyncio.sleep(0.02)

    def _has_answered(self, instance: Instance) -> bool:
        """Has a sidecar confirmed all that it should have, its secrets with it? One that starts need not."""
        stream = self._discovery.stream(instance.id)
        if stream is None:
            return not instance.ready
        return stream.settled()

    def _effect(self, started: float, outcome: Outcome) -> Effect:
        return Effect(
            revision=self._intent.revision,
            effective_ms=round((outcome.last_ack - started) * 1000, 3),
            sidecars=outcome.confirmed,
            unconfirmed=outcome.unconfirmed,
        )

    # -- timers -------------------------------------------------------------------------------------------

    async def _renew_certificates(self) -> None:
        """Replace certificates when about two thirds of their lifetime are over."""
        while True:
            self._lifetime_changed.clear()
            with contextlib.suppress(TimeoutError):
                # A shorter lifetime must not be found out about at the end of a pause that is longer.
                async with asyncio.timeout(min(30.0, self._certificates.lifetime_s / 20)):
                    await self._lifetime_changed.wait()
                continue
            async with self._changing:
                if self._certificates.renew_due():
                    await self._push()

    async def _finish_root(self) -> None:
        """Go on with the replacement of the root that a restart interrupted, once sidecars are back."""
        while self._authority.replacing_root:
            await asyncio.sleep(self._settings.ack_timeout_s)
            try:
                await self.rotate_root()
            except Failed as error:
                log.error("the replacement of the root is still unfinished; trying again: %s", error)
            else:
                self._journal({"event": "rotated", "root": True, "by": "control-plane"})


def _allow_many_streams() -> None:
    """Let the process have thousands of files open, for each stream is one.

    What a shell allows by default (1024) is too little.
    """
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _rejected(nacks: Sequence[Nack]) -> Failed:
    first = nacks[0]
    more = f" (and {len(nacks) - 1} more)" if len(nacks) > 1 else ""
    return Failed(
        f"the sidecar of {first.instance} rejected its {first.type}{more}: {first.error}",
        "nothing was changed; Envoy's words say what it will not take",
    )
