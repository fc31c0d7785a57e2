"""The ADS server: who is connected; push, ACK and NACK (xDS v3, state of the world and incremental).

https://www.envoyproxy.io/docs/envoy/latest/api-docs/xds_protocol

What a sidecar should have (a snapshot of bundles, see `xds`) is kept apart from the stream that carries it
(`stream`) and from how that is encoded (`wire`).

A push is in force when its sidecars have ACKed. One that rejects (NACK) keeps its last good configuration,
and is sent nothing of that until it should have something else.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from meshdemo.control import xds
from meshdemo.control.model import Instance
from meshdemo.control.stream import Doubts, Refused, Stream
from meshdemo.control.wire import SERVICE, WIRES, Wire

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

# How long a push may send nothing, and all of it may take, while what can wait gives way to it.
_PROGRESS_S, _GIVE_WAY_S = 0.1, 5.0
_ASKS_WITHIN_S = 1.0  # a sidecar for all that it needs, after it has connected
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
    asking: asyncio.TimerHandle | None = None  # until it has had time to ask for all that it needs


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
        self._doubts: dict[str, Doubts] = {}  # left by streams that ended, by instance id
        self._pushes: set[_Push] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._refused: dict[tuple[str, str], float] = {}  # (host, reason) -> when it was journalled
        # No push is at work, or it gets nowhere. What can wait waits for this: thousands of sidecars report
        # several times in the time that a change takes to reach them all.
        self.calm = asyncio.Event()
        self.calm.set()
        self._sent_at = 0.0  # when a response was last sent (time.perf_counter())
        self._look: asyncio.TimerHandle | None = None

    def handler(self) -> grpc.GenericRpcHandler:
        """The gRPC service."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                wire.method: grpc.stream_stream_rpc_method_handler(partial(self._serve, wire))
                for wire in WIRES
            },
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
            if not self._pushes:
                self.calm.clear()
                self._sent_at = push.started
                self._look_for_calm(push.started + _GIVE_WAY_S)
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
                if not self._pushes:
                    self._calm_down()
        nacks = [
            Nack(stream.instance.id, kind, error)
            for stream, responses in affected.items()
            for kind, error in stream.nacks(after=responses).items()
        ]
        return Outcome(push.confirmed, tuple(late), tuple(nacks), push.last_ack)

    def _look_for_calm(self, until: float) -> None:
        now = time.perf_counter()
        if now > min(until, self._sent_at + _PROGRESS_S):
            self._calm_down()
        else:
            self._look = asyncio.get_running_loop().call_later(_PROGRESS_S, self._look_for_calm, until)

    def _calm_down(self) -> None:
        self.calm.set()
        if self._look is not None:
            self._look.cancel()
            self._look = None

    async def _send(self, connection: _Connection) -> None:
        """Send what may be sent now. A call that finds another at work leaves it to that one."""
        if connection.sending:
            return
        connection.sending = True
        try:
            while (response := connection.stream.next_response()) is not None:
                await connection.context.write(response)
                self._sent_at = time.perf_counter()
        finally:
            connection.sending = False
        self._note(connection.stream)

    def _give_time_to_ask(self, connection: _Connection, halves: int = 2) -> None:
        """A half begins when the one before is over: a loop that was held up does not count its own delay."""
        loop, half_s = asyncio.get_running_loop(), _ASKS_WITHIN_S / 2
        if halves:
            connection.asking = loop.call_later(half_s, self._give_time_to_ask, connection, halves - 1)
        else:
            self._had_time_to_ask(connection.stream)

    def _had_time_to_ask(self, stream: Stream) -> None:
        stream.had_time_to_ask()
        self._note(stream)

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

    async def _serve(self, wire: Wire, _: Any, context: Any) -> None:
        """One stream, from its first request to its end."""
        instance = await self._authenticate(context.invocation_metadata())
        if instance is None:
            self._refuse(context, "", "a stream without a valid token")
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no valid token")
            return
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a stream is served by a task")
        before = self._connections.get(instance.id)
        doubts = self._doubts.pop(instance.id, None) if before is None else before.stream.doubts()
        connection = _Connection(Stream(instance, self._wanted(instance), wire, doubts), context, task)
        self._connections[instance.id] = connection
        # A sidecar need not ask for all that there is for it; then no request tells that it has asked.
        self._give_time_to_ask(connection)
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
            if connection.asking is not None:
                connection.asking.cancel()
            if self._connections.get(instance.id) is connection:
                del self._connections[instance.id]
                if doubts := connection.stream.doubts():
                    self._doubts[instance.id] = doubts
            for push in list(self._pushes):
                push.drop(connection.stream)

    async def _converse(self, connection: _Connection) -> None:
        stream = connection.stream
        while (data := await connection.context.read()) is not grpc.aio.EOF:
            request = stream.wire.read(data)
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
        for gone in self._doubts.keys() - valid.keys():
            del self._doubts[gone]
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
