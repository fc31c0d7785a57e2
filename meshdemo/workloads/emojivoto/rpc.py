"""gRPC as emojivoto uses it: servers that stop gracefully, channels that go through the sidecar.

The handlers are registered by name instead of through generated stubs, so that one generated module
(`emojivoto_pb2`) is all that the protocol costs.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import grpc

from meshdemo.workloads.breakable import Breakage
from meshdemo.workloads.emojivoto import emojivoto_pb2
from meshdemo.workloads.settings import BadSetting, Environment

pb: Any = emojivoto_pb2  # its messages are made when it is imported, so no type checker knows them

SERVICES: Mapping[str, Any] = {
    name: pb.DESCRIPTOR.services_by_name[name] for name in ("EmojiService", "VotingService")
}


def _messages(service: str, method: str) -> tuple[Any, Any]:
    descriptor = SERVICES[service].methods_by_name[method]
    return getattr(pb, descriptor.input_type.name), getattr(pb, descriptor.output_type.name)


def serve(service: str, methods: Mapping[str, Callable[[Any, grpc.ServicerContext], Any]]) -> None:
    """Serve one gRPC service on HOST:PORT until SIGTERM, then finish what is in flight (10 s at most).

    LAT_MS and ERR_RATE make every method slow and faulty (`breakable`).
    """
    try:
        breakage = Breakage.of(Environment(os.environ))
    except BadSetting as error:
        sys.exit(str(error))
    handlers = {}
    for name, function in methods.items():
        request, reply = _messages(service, name)
        handlers[name] = grpc.unary_unary_rpc_method_handler(
            _broken(function, breakage),
            request_deserializer=request.FromString,
            response_serializer=reply.SerializeToString,
        )
    # A slow method holds a thread for as long as it sleeps; nobody else should wait for one.
    server = grpc.server(ThreadPoolExecutor(max_workers=500 if breakage.latency_s else 16))
    full_name = SERVICES[service].full_name
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(full_name, handlers),))
    address = f"{os.environ.get('HOST', '127.0.0.1')}:{os.environ.get('PORT', '5000')}"
    try:
        server.add_insecure_port(address)
    except RuntimeError:
        sys.exit(f"cannot listen on {address}: is it taken? Set HOST and PORT.")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    server.start()
    stop.wait()
    server.stop(grace=10).wait()


def _broken(
    function: Callable[[Any, grpc.ServicerContext], Any], breakage: Breakage
) -> Callable[[Any, grpc.ServicerContext], Any]:
    def handle(request: Any, context: grpc.ServicerContext) -> Any:
        if breakage.strike(time.sleep):
            context.abort(grpc.StatusCode.INTERNAL, "injected")
        return function(request, context)

    return handle


def channel(target: str) -> grpc.Channel:
    """A channel to `target` ("voting:8080"); through the sidecar where HTTP_PROXY names its outbound port.

    gRPC's own proxy support opens a tunnel (CONNECT), which would hide the calls from the mesh; a sidecar
    takes plain HTTP/2 and goes by the authority.
    """
    proxy = urlsplit(os.environ.get("HTTP_PROXY", "")).netloc
    return grpc.insecure_channel(
        proxy or target,
        options=[
            ("grpc.default_authority", target),
            ("grpc.enable_http_proxy", 0),
            # A sidecar that restarts must not be left alone for gRPC's default of two minutes.
            ("grpc.max_reconnect_backoff_ms", 1000),
        ],
    )


def method(via: grpc.Channel, service: str, name: str) -> Callable[..., Any]:
    """A callable for one method: `method(via, "VotingService", "Vote")(pb.VoteRequest(...), timeout=s)`."""
    request, reply = _messages(service, name)
    call: Callable[..., Any] = via.unary_unary(
        f"/{SERVICES[service].full_name}/{name}",
        request_serializer=request.SerializeToString,
        response_deserializer=reply.FromString,
    )
    return call
