"""Sends one request through the mesh, as an instance of a caller would."""

from __future__ import annotations

from collections.abc import Sequence
from http.client import HTTPConnection, HTTPException

from meshdemo.apps.model import App
from meshdemo.control.model import Instance

_TIMEOUT_S = 2.0


def request_through(app: App, instances: Sequence[Instance]) -> str:
    """Why a request does not come back with 200; empty if it does.

    It goes through the sidecar of a caller of the front service (or, where nobody calls that one, of any
    service that speaks HTTP). An app whose services do not call each other has nothing to be tried.
    """
    edge = _edge(app, instances)
    if edge is None:
        return ""
    caller, callee = edge
    service = app.services[callee]
    path = next((route.path for route in service.routes if route.path and route.method in {None, "GET"}), "/")
    url = f"http://{callee}:{service.port}{path}"
    connection = HTTPConnection(caller.host, caller.outbound_port, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", url, headers={"Host": f"{callee}:{service.port}"})
        response = connection.getresponse()
        body = response.read(200).decode("utf-8", "replace").strip()
    except (OSError, HTTPException) as error:
        return f"no answer from {callee} through the sidecar of {caller.id}: {error}"
    finally:
        connection.close()
    if response.status == 200:
        return ""
    return f"{callee} answers {response.status} ({body}) through the sidecar of {caller.id}"


def _edge(app: App, instances: Sequence[Instance]) -> tuple[Instance, str] | None:
    ready = {instance.service: instance for instance in instances if instance.ready}
    edges = [(caller, callee) for caller, service in app.services.items() for callee in service.calls]
    edges.sort(key=lambda edge: edge[1] != app.front)
    for caller, callee in edges:
        if caller in ready and callee in ready and app.services[callee].protocol == "http":
            return ready[caller], callee
    return None
