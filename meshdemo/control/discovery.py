"""ADS: who is subscribed to what; push, ACK and NACK (state of the world, xDS v3).

https://www.envoyproxy.io/docs/envoy/latest/api-docs/xds_protocol

What a sidecar should have (a snapshot of bundles, see `xds`) is kept apart from the stream that carries it.
A stream compares the two, type by type in the order in which configuration must change, and sends what
differs; so one rule serves the first connection, a change, a reconnection and a roll-back. Responses are
bytes: whatever a thousand streams have in common is encoded once.

A push is in force when its sidecars have ACKed. One that rejects (NACK) keeps its last good configuration,
and is sent nothing of that type until it should have something else.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import grpc
from envoy.service.discovery.v3.discovery_pb2 import DiscoveryRequest
from google.protobuf.message import DecodeError

from meshdemo.control import xds
from meshdemo.control.model import Instance
from meshdemo.names import parted

log = logging.getLogger(__name__)

SERVER_OPTIONS: Sequence[tuple[str, int]] = (
    # A sidecar that vanished without a word is noticed.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Sidecars ping every 30 s, too; by default the server takes that for abuse and hangs up.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
    # No probing of the bandwidth: it answers each message with a ping, and what is sent here is small.
    ("grpc.http2.bdp_probe", 0),
    # Smaller TLS records, smaller buffers: 20 kB less for each sidecar.
    ("grpc.tsi.max_frame_size", 4096),
    # Two servers on one port would share the sidecars between them.
    ("grpc.so_reuseport", 0),
)
"""Options that the gRPC server must be made with."""

_REFUSALS_APART_S = 60.0
_REFUSALS_KEPT = 1000

Authenticate = Callable[[Collection[tuple[str, str | bytes]]], Awaitable[Instance | None]]
Journal = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Nack:
    """A sidecar rejected its configuration."""

    instance: str
    type: str  # short: "routes", "clusters", ...
    error: str  # Envoy's words


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a push ended: instances that confirmed it, instances that did not answer, rejections."""

    confirmed: int
    unconfirmed: tuple[str, ...]
    nacks: tuple[Nack, ...]
    last_ack: float  # time.perf_counter() of the last ACK, or of the start where nobody was affected


def envoys_words(message: str) -> str:
    """Envoy's reason for a rejection, without the whole resource that it prints before some of them."""
    dump, found, reason = message.rpartition("Proto constraint validation failed")
    words = f"{found}{reason}" if dump.lstrip().startswith("goo.gle/debug") else message
    return " ".join(words.split())[:1000] or "no reason given"


class Refused(Exception):
    """A sidecar asks for what its token does not entitle it to."""


@dataclass(frozen=True, slots=True)
class Request:
    """A DiscoveryRequest, as far as it is read."""

    type_url: str
    names: frozenset[str] = frozenset()
    version: str = ""
    nonce: str = ""
    node: str = ""
    error: str | None = None  # Envoy's words, if it rejects what it was sent

    @staticmethod
    def read(data: bytes) -> Request:
        """From the wire. Raises DecodeError."""
        # Sidecars with the same past ask in the same words, so most are read once for all of them.
        return _remembered(data) if len(data) <= _REMEMBERED_BYTES else _read(data)


@dataclass(slots=True)
class _Subscription:
    """One type on one stream.

    `names` are those that the sidecar asks for, `missing` those of them that it lacks whatever `sent` says;
    `sent` is what it should have by what it was sent; `nonce` is that of the last response, `number` counts
    that among all of the stream, and `waiting` says that it is neither ACKed nor rejected yet.
    """

    names: frozenset[str] = frozenset()
    missing: frozenset[str] = frozenset()
    sent: tuple[xds.Bundle, ...] = ()
    nonce: str = ""
    number: int = 0
    waiting: bool = False
    nack: str = ""


class Stream:
    """One sidecar's ADS stream: the protocol alone, no I/O."""

    def __init__(self, instance: Instance, wanted: xds.Snapshot) -> None:
        """`wanted` is what the sidecar should have; it is replaced when that changes."""
        self.instance = instance
        self.wanted = wanted
        self.responses = 0
        self.lagging = False  # it let a push time out, and has not caught up yet
        self.opened_at = time.monotonic()
        self._subscriptions: dict[str, _Subscription] = {}
        self._owed: frozenset[str] = frozenset()  # endpoints of changed clusters

    # -- requests -----------------------------------------------------------------------------------------

    def receive(self, request: Request) -> None:
        """Take a request in: a subscription, an ACK or a NACK, and which names the sidecar wants now.

        Raises:
            Refused: it asks for a secret that is not its own, or claims to be another instance.
        """
        type_url, names = request.type_url, request.names
        self._check(request)
        subscription = self._subscriptions.get(type_url)
        if subscription is None:
            subscription = self._subscriptions[type_url] = _Subscription(names=names, missing=names)
            wanted = self.wanted.get(type_url, ())
            if type_url in xds.STATE_OF_THE_WORLD and request.version == _version(wanted):
                # It is back, with all that it should have. (Of other types it may lack some of it.)
                subscription.sent = wanted
            return
        if request.nonce != subscription.nonce:
            return  # about what has been superseded; the answer to the last response will come
        answered, subscription.waiting = subscription.waiting, False
        if request.error is not None:
            subscription.nack = request.error
            if type_url == xds.CLUSTERS:
                self._owed = frozenset()
        if names == subscription.names and not answered:
            # It asks again for what it has: so it does for the endpoints of a cluster that was changed, and
            # that cluster serves nobody until it gets them.
            subscription.missing = names
        else:
            subscription.missing = (subscription.missing & names) | (names - subscription.names)
        subscription.names = names

    def _check(self, request: Request) -> None:
        if request.type_url not in xds.ORDER:
            raise Refused(f"there is nothing of type '{request.type_url}'")
        # A pod knows its name, and not whether the mesh calls it by its namespace as well.
        if request.node and request.node not in (self.instance.id, parted(self.instance.id, "")[0]):
            raise Refused(f"says that it is '{request.node}'")
        if request.type_url == xds.SECRETS:
            own = _names(self.wanted.get(xds.SECRETS, ()))
            for name in sorted(request.names - own):
                raise Refused(f"asks for the secret '{name}'")

    # -- responses ----------------------------------------------------------------------------------------

    def next_response(self) -> bytes | None:
        """The next response that may be sent now, in the order of types; None if there is none."""
        for type_url in self._order():
            subscription = self._subscriptions.get(type_url)
            if subscription is None:
                continue
            if type_url in (xds.LISTENERS, xds.ROUTES) and self._clusters_unsettled():
                return None  # what these refer to must be there first
            wanted = self.wanted.get(type_url, ())
            if subscription.sent is wanted and not subscription.missing:
                continue  # as mostly
            names = self._due(type_url, subscription)
            if names is None:
                subscription.sent = wanted
            else:
                return self._respond(type_url, subscription, names)
        return None

    def _order(self) -> Sequence[str]:
        clusters = self._subscriptions.get(xds.CLUSTERS)
        if clusters is not None and _only_removes(clusters.sent, self.wanted.get(xds.CLUSTERS, ())):
            return _REMOVAL_ORDER
        return xds.ORDER

    def _clusters_unsettled(self) -> bool:
        clusters = self._subscriptions.get(xds.CLUSTERS)
        return self._owes() or (clusters is not None and clusters.waiting)

    def _owes(self) -> bool:
        """Are there endpoints that a changed cluster waits for?"""
        return bool(self._owed and self._owed & _names(self.wanted.get(xds.ENDPOINTS, ())))

    def _due(self, type_url: str, subscription: _Subscription) -> frozenset[str] | None:
        """Names to send now, None if nothing is due; everything of a state-of-the-world type."""
        wanted = self.wanted.get(type_url, ())
        if type_url in xds.STATE_OF_THE_WORLD:
            return None if subscription.sent == wanted else _names(wanted)
        due = subscription.missing & _names(wanted) if subscription.missing else subscription.missing
        if subscription.sent != wanted:
            due |= _changed(subscription.sent, wanted) & subscription.names
        return due or None

    def _respond(self, type_url: str, subscription: _Subscription, names: frozenset[str]) -> bytes:
        wanted = self.wanted[type_url]
        if type_url == xds.CLUSTERS and not _only_removes(subscription.sent, wanted):
            # Those that go are kept until routes have moved on; then they alone are left to do.
            wanted = _with_gone(subscription.sent, wanted)
            names = _names(wanted)
            # A changed cluster warms until its endpoints are sent again, asked for or not.
            self._owed |= _changed(subscription.sent, wanted)
            if assigned := self._subscriptions.get(xds.ENDPOINTS):
                assigned.missing |= self._owed & assigned.names
        elif type_url == xds.ENDPOINTS:
            self._owed -= names
        self.responses += 1
        subscription.number = self.responses
        # Counted by type: streams with the same past get the same bytes, nonce included.
        subscription.nonce = str(int(subscription.nonce or "0") + 1)
        subscription.sent = wanted
        subscription.missing -= names
        subscription.waiting = True
        subscription.nack = ""
        return _encoded(type_url, wanted, names, subscription.nonce)

    # -- standing -----------------------------------------------------------------------------------------

    def settled(self) -> bool:
        """Has the sidecar answered everything, and is nothing left to send?"""
        if self._owes() or any(subscription.waiting for subscription in self._subscriptions.values()):
            return False
        return all(
            self._due(type_url, subscription) is None
            for type_url, subscription in self._subscriptions.items()
        )

    def asks_for(self, type_url: str) -> bool:
        """Has the sidecar asked for any of this type on this stream?"""
        return type_url in self._subscriptions

    def nacks(self, after: int = 0) -> dict[str, str]:
        """What the sidecar rejected and still lacks: short type -> Envoy's words.

        Args:
            after: only of responses after this one (counted as `responses` does).
        """
        return {
            xds.SHORT[type_url]: subscription.nack
            for type_url, subscription in self._subscriptions.items()
            if subscription.nack and subscription.number > after
        }


class _Push:
    """A push under way: whose answer it waits for."""

    def __init__(self) -> None:
        self.started = self.last_ack = time.perf_counter()
        self.pending: dict[Stream, int] = {}  # stream -> responses sent to it before
        self.confirmed = 0
        self.done = asyncio.Event()

    def settle(self, stream: Stream) -> None:
        """A stream has answered everything; it counts if there was something to answer."""
        before = self.pending.pop(stream, None)
        if before is not None and stream.responses > before:
            self.confirmed += 1
            self.last_ack = time.perf_counter()
        self._check()

    def drop(self, stream: Stream) -> None:
        """A stream has ended; its sidecar gets everything when it comes back."""
        self.pending.pop(stream, None)
        self._check()

    def _check(self) -> None:
        if not self.pending:
            self.done.set()


@dataclass(slots=True)
class _Connection:
    """A stream and the call that carries it."""

    stream: Stream
    context: Any
    task: asyncio.Task[Any]
    closing: str = ""  # why the control plane ends it
    sending: bool = False


class Discovery:
    """The ADS server: all streams, and pushes to them. To be used on one asyncio loop."""

    def __init__(
        self, wanted: Callable[[Instance], xds.Snapshot], authenticate: Authenticate, journal: Journal
    ) -> None:
        """`wanted` says what an instance's sidecar should have now; `authenticate` whose call one is."""
        self._wanted = wanted
        self._authenticate = authenticate
        self._journal = journal
        self._connections: dict[str, _Connection] = {}  # by instance id
        self._pushes: set[_Push] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._refused: dict[tuple[str, str], float] = {}  # (host, reason) -> when it was journalled

    def handler(self) -> grpc.GenericRpcHandler:
        """The gRPC service."""
        return grpc.method_handlers_generic_handler(
            "envoy.service.discovery.v3.AggregatedDiscoveryService",
            {"StreamAggregatedResources": grpc.stream_stream_rpc_method_handler(self._serve)},
        )

    def stream(self, instance: str) -> Stream | None:
        """The stream of an instance's sidecar, None while it has none."""
        connection = self._connections.get(instance)
        return connection.stream if connection else None

    # -- pushing ------------------------------------------------------------------------------------------

    async def push(self, timeout_s: float) -> Outcome:
        """Bring every connected sidecar to what it should have now; returns when all have answered.

        A sidecar that does not answer within `timeout_s` is named, and not waited for again until it has
        caught up.
        """
        push = _Push()
        for connection in self._connections.values():
            stream = connection.stream
            wanted = self._wanted(stream.instance)
            if wanted is stream.wanted or wanted == stream.wanted:
                continue
            stream.wanted = wanted
            if not stream.lagging:
                push.pending[stream] = stream.responses
            self._spawn(self._send(connection))
        late = [c.stream.instance.id for c in self._connections.values() if c.stream.lagging]
        affected = dict(push.pending)
        if affected:
            self._pushes.add(push)
            try:
                async with asyncio.timeout(timeout_s):
                    await push.done.wait()
            except TimeoutError:
                for stream in push.pending:
                    stream.lagging = True
                    late.append(stream.instance.id)
            finally:
                self._pushes.discard(push)
        nacks = [
            Nack(stream.instance.id, kind, error)
            for stream, responses in affected.items()
            for kind, error in stream.nacks(after=responses).items()
        ]
        return Outcome(push.confirmed, tuple(late), tuple(nacks), push.last_ack)

    async def _send(self, connection: _Connection) -> None:
        """Send what may be sent now. A call that finds another at work leaves it to that one."""
        if connection.sending:
            return
        connection.sending = True
        try:
            while (response := connection.stream.next_response()) is not None:
                await connection.context.write(response)
        finally:
            connection.sending = False
        self._note(connection.stream)

    def _note(self, stream: Stream) -> None:
        if stream.settled():
            stream.lagging = False
            for push in self._pushes:
                push.settle(stream)

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(_quietly(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- streams ------------------------------------------------------------------------------------------

    async def _serve(self, _: Any, context: Any) -> None:
        """One stream, from its first request to its end."""
        instance = await self._authenticate(context.invocation_metadata())
        if instance is None:
            self._refuse(context, "", "a stream without a valid token")
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no valid token")
            return
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a stream is served by a task")
        connection = _Connection(Stream(instance, self._wanted(instance)), context, task)
        before = self._connections.get(instance.id)
        self._connections[instance.id] = connection
        if before is not None:
            # Mostly the sidecar itself, after its connection broke; or somebody who has its token.
            self._journal(
                {
                    "event": "taken_over",
                    "instance": instance.id,
                    "peer": context.peer().rpartition(":")[0],
                    "reason": "another stream with this instance's token was opened; the first is closed",
                }
            )
            self._close(before, "the sidecar opened another stream")
        try:
            await self._converse(connection)
        except Refused as error:
            self._refuse(context, instance.id, f"the holder of the token of {instance.id} {error}")
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"the holder of this token {error}")
        except DecodeError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except asyncio.CancelledError:
            if not connection.closing:
                raise
            task.uncancel()
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, connection.closing)
        finally:
            if self._connections.get(instance.id) is connection:
                del self._connections[instance.id]
            for push in list(self._pushes):
                push.drop(connection.stream)

    async def _converse(self, connection: _Connection) -> None:
        stream = connection.stream
        while (data := await connection.context.read()) is not grpc.aio.EOF:
            request = Request.read(data)
            stream.receive(request)
            if request.error is not None:
                self._journal(
                    {
                        "event": "rejected",
                        "instance": stream.instance.id,
                        "type": xds.SHORT[request.type_url],
                        "reason": request.error,
                    }
                )
            await self._send(connection)

    def _refuse(self, context: Any, instance: str, reason: str) -> None:
        """Journal a refusal; the same one again only after a while, for who is refused tries again."""
        host = context.peer().rpartition(":")[0]
        now = time.monotonic()
        if now - self._refused.get((host, reason), -math.inf) < _REFUSALS_APART_S:
            return
        if len(self._refused) >= _REFUSALS_KEPT:
            self._refused.clear()
        self._refused[host, reason] = now
        self._journal({"event": "refused", "peer": host, "instance": instance, "reason": reason})

    def retain(self, instances: Iterable[Instance]) -> None:
        """Close the streams of all other instances, and of those whose token is no longer theirs."""
        valid = {instance.id: instance.token_sha256 for instance in instances}
        for connection in list(self._connections.values()):
            instance = connection.stream.instance
            if valid.get(instance.id) != instance.token_sha256:
                self._close(connection, "this token is no longer valid")

    def close(self) -> None:
        """Close all streams."""
        for connection in list(self._connections.values()):
            self._close(connection, "the control plane stops")

    def _close(self, connection: _Connection, why: str) -> None:
        if not connection.closing:
            connection.closing = why
            connection.task.cancel()


async def _quietly(work: Awaitable[None]) -> None:
    """A stream that ends while it is written to is no error: its reader notices."""
    try:
        await work
    except (grpc.aio.UsageError, grpc.aio.InternalError, grpc.RpcError) as error:
        log.debug("a stream ended while it was sent to: %s", error)


# -- arithmetic on bundles, remembered, for a thousand streams ask the same ----------------------------------

_REMOVAL_ORDER: Sequence[str] = (*(kind for kind in xds.ORDER if kind != xds.CLUSTERS), xds.CLUSTERS)
"""Clusters that go, go last: nothing may refer to them any more."""


@lru_cache(maxsize=16)  # few: a push brings one or two, and each may be large
def _encoded(type_url: str, wanted: tuple[xds.Bundle, ...], names: frozenset[str], nonce: str) -> bytes:
    resources = [bundle.part(names) for bundle in wanted]
    return xds.response(type_url, _version(wanted), nonce, resources)


def _version(bundles: tuple[xds.Bundle, ...]) -> str:
    return ".".join(bundle.version for bundle in bundles)


def _read(data: bytes) -> Request:
    message = DiscoveryRequest.FromString(data)
    error = envoys_words(message.error_detail.message) if message.HasField("error_detail") else None
    names = _interned(tuple(message.resource_names))
    return Request(
        message.type_url, names, message.version_info, message.response_nonce, message.node.id, error
    )


_REMEMBERED_BYTES = 8192  # what is longer is not kept: a sidecar may send megabytes
_remembered = lru_cache(maxsize=256)(_read)


@lru_cache(maxsize=256)
def _interned(names: tuple[str, ...]) -> frozenset[str]:
    """Sidecars subscribe to the same names: one set for all of them."""
    return frozenset(names)


def _names(bundles: tuple[xds.Bundle, ...]) -> frozenset[str]:
    if len(bundles) == 1:
        return bundles[0].names
    return frozenset[str]().union(*(bundle.names for bundle in bundles))


def _changed(old: tuple[xds.Bundle, ...], new: tuple[xds.Bundle, ...]) -> frozenset[str]:
    """Names in `new` that are not the same in `old`."""
    if not old:
        return _names(new)
    if len(old) != len(new):
        before = {name: data for bundle in old for name, data in bundle.resources.items()}
        after = {name: data for bundle in new for name, data in bundle.resources.items()}
        return frozenset(name for name, data in after.items() if before.get(name) != data)
    changed = [
        _changed_in(before, after) for before, after in zip(old, new, strict=True) if before is not after
    ]
    return changed[0] if len(changed) == 1 else frozenset[str]().union(*changed)


@lru_cache(maxsize=32)  # few: an entry keeps two bundles alive
def _changed_in(old: xds.Bundle, new: xds.Bundle) -> frozenset[str]:
    return frozenset(name for name, data in new.resources.items() if old.resources.get(name) != data)


def _only_removes(old: tuple[xds.Bundle, ...], new: tuple[xds.Bundle, ...]) -> bool:
    return old != new and not _changed(old, new)


@lru_cache(maxsize=4)
def _with_gone(old: tuple[xds.Bundle, ...], new: tuple[xds.Bundle, ...]) -> tuple[xds.Bundle, ...]:
    """`new`, and what of `old` is no longer in it."""
    gone = _names(old) - _names(new)
    if not gone:
        return new
    kept = {n: data for bundle in old for n, data in bundle.resources.items() if n in gone}
    return (*new, xds.Bundle(kept))
