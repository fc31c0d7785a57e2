"""Reports give way to a change that is on its way: the ADS and OTLP services on a gRPC server, without Envoy."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from envoy.config.cluster.v3.cluster_pb2 import Cluster
from envoy.config.route.v3.route_pb2 import RouteConfiguration
from envoy.service.discovery.v3.discovery_pb2 import DiscoveryRequest, DiscoveryResponse
from test_discovery import INSTANCE
from test_telemetry import Message

from meshdemo.control import discovery, telemetry, xds
from meshdemo.control.discovery import Discovery
from meshdemo.control.model import Instance
from meshdemo.control.wire import SERVICE, STATE_OF_THE_WORLD

ADS = f"/{SERVICE}/{STATE_OF_THE_WORLD.method}"
OTLP = "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export"
PATIENCE_S = 60.0


async def authenticate(_: Any) -> Instance:
    return INSTANCE


@asynccontextmanager
async def serving(handler: grpc.GenericRpcHandler) -> AsyncIterator[grpc.aio.Channel]:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield channel
    await server.stop(None)


class Sidecar:
    """Asks for a route, and answers what it is sent when it is told to."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._call = channel.stream_stream(ADS)()

    async def ask(self, nonce: str = "") -> None:
        request = DiscoveryRequest(type_url=xds.ROUTES, resource_names=["r"], response_nonce=nonce)
        await self._call.write(request.SerializeToString())

    async def sent(self) -> str:
        """The nonce of the next response."""
        return DiscoveryResponse.FromString(await self._call.read()).nonce


def pushed(work: Callable[[Discovery, Sidecar, asyncio.Task[Any]], Awaitable[None]]) -> None:
    """Do something while a push waits for a sidecar."""

    async def go() -> None:
        route = [xds.Bundle({"r": xds.encode(xds.ROUTES, RouteConfiguration(name="r"))})]
        served = Discovery(lambda _: {xds.ROUTES: (route[-1],)}, authenticate, lambda _: None)
        async with serving(served.handler()) as channel:
            sidecar = Sidecar(channel)
            await sidecar.ask()
            await sidecar.ask(await sidecar.sent())
            changed = RouteConfiguration(name="r", internal_only_headers=["x"])
            route.append(xds.Bundle({"r": xds.encode(xds.ROUTES, changed)}))
            push = asyncio.create_task(served.push(PATIENCE_S))
            await work(served, sidecar, push)
            await sidecar.ask(await sidecar.sent())
            assert (await push).confirmed == 1
            await served.calm.wait()

    asyncio.run(asyncio.wait_for(go(), 2 * PATIENCE_S))


def test_a_control_plane_that_was_held_up_takes_no_sidecar_for_one_that_has_asked() -> None:
    settled: list[bool] = []

    async def go() -> None:
        loop = asyncio.get_running_loop()

        def is_settled() -> bool:
            stream = served.stream(INSTANCE.id)
            assert stream is not None
            return stream.settled()

        def hold_up() -> None:
            time.sleep(discovery._ASKS_WITHIN_S + 0.1)
            loop.call_later(0, lambda: settled.append(is_settled()))  # after all that was due meanwhile

        async def authenticate_and_stall(_: object) -> Instance:
            loop.call_soon(hold_up)
            return INSTANCE

        made = {
            xds.ROUTES: (xds.Bundle({"r": xds.encode(xds.ROUTES, RouteConfiguration(name="r"))}),),
            xds.CLUSTERS: (xds.Bundle({"c": xds.encode(xds.CLUSTERS, Cluster(name="c"))}),),
        }
        served = Discovery(lambda _: made, authenticate_and_stall, lambda _: None)
        async with serving(served.handler()) as channel:
            sidecar = Sidecar(channel)
            await sidecar.ask()
            await sidecar.ask(await sidecar.sent())
            while not is_settled():  # noqa: ASYNC110 (there is nothing to wait on)
                await asyncio.sleep(0.05)

    asyncio.run(asyncio.wait_for(go(), 2 * PATIENCE_S))
    assert settled == [False]


def test_what_can_wait_waits_while_a_push_gets_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "_PROGRESS_S", PATIENCE_S)
    waiting: list[asyncio.Task[Any]] = []
    over: list[bool] = []  # was the push, when the waiting was?

    async def work(served: Discovery, _: Sidecar, push: asyncio.Task[Any]) -> None:
        await asyncio.sleep(0)  # the push begins
        waiting.append(asyncio.create_task(served.calm.wait()))
        waiting[0].add_done_callback(lambda _: over.append(push.done()))

    pushed(work)
    assert over == [True]


def test_a_push_that_gets_nowhere_holds_nothing_up() -> None:
    async def work(served: Discovery, _: Sidecar, push: asyncio.Task[Any]) -> None:
        await asyncio.sleep(0)  # the push begins
        await served.calm.wait()
        assert not push.done()

    pushed(work)


def test_who_reports_meanwhile_is_not_silent_and_loses_nothing() -> None:
    async def go() -> None:
        now = [1000.0]
        store, calm = telemetry.Store(clock=lambda: now[0]), asyncio.Event()
        calm.set()
        handler = telemetry.handler(store, authenticate, lambda _: None, calm=calm)
        async with serving(handler) as channel:
            export = channel.unary_unary(OTLP)

            def report() -> Awaitable[bytes]:
                message = Message(now[0] - 1, now[0]).count("inbound.requests", 5, caller="-", code="200")
                return export(message.request.SerializeToString(), timeout=PATIENCE_S)

            await report()
            calm.clear()
            while not store.silent("i"):
                now[0] += 1.0
                store.beat()
            waiting = asyncio.ensure_future(report())
            give_up = time.monotonic() + PATIENCE_S
            while store.silent("i") and time.monotonic() < give_up:  # noqa: ASYNC110 - it has no event
                await asyncio.sleep(0.01)
            assert not store.silent("i")
            assert not waiting.done()
            assert len(store.window(60)) == 1
            calm.set()
            await waiting
            assert [sample.end for sample in store.window(60)] == [1000.0, now[0]]

    asyncio.run(asyncio.wait_for(go(), 2 * PATIENCE_S))


def test_what_nobody_understands_is_no_sign_of_life() -> None:
    async def go() -> None:
        now = [1000.0]
        store, calm = telemetry.Store(clock=lambda: now[0]), asyncio.Event()
        calm.set()
        async with serving(telemetry.handler(store, authenticate, lambda _: None, calm=calm)) as channel:
            export = channel.unary_unary(OTLP)
            message = Message(999.0, 1000.0).count("inbound.requests", 5, caller="-", code="200")
            await export(message.request.SerializeToString(), timeout=PATIENCE_S)
            while not store.silent("i"):
                now[0] += 1.0
                store.beat()
            with pytest.raises(grpc.aio.AioRpcError):
                await export(b"nonsense", timeout=PATIENCE_S)
            assert store.silent("i")

    asyncio.run(asyncio.wait_for(go(), 2 * PATIENCE_S))
