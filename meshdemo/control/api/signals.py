"""What the sidecars report: signals, the samples that they are made of, edges, single requests."""

from __future__ import annotations

import json
from collections.abc import Iterator

from flask import Blueprint, Response, jsonify, request

from meshdemo.control import aggregate
from meshdemo.control.api.request import MAX_WAIT_S, control, number, sequence
from meshdemo.control.client import TAP_PER_S
from meshdemo.control.signals import sample_to_json
from meshdemo.control.tap import Filter, Session
from meshdemo.control.telemetry import KEPT_S
from meshdemo.errors import BadInput

_HEARTBEAT_S = 1.0

views = Blueprint("signals", __name__)


@views.get("/v1/signals")
def signals() -> Response:
    by = request.args.get("by", "service")
    if by not in aggregate.BY:
        raise BadInput(f"signals by '{by}'", f"by one of {', '.join(aggregate.BY)}")
    window_s = number("window_s", 10, 0.1, KEPT_S)
    service = request.args.get("service")
    mesh = control()
    if service is not None and service not in mesh.mesh.app.services:
        raise BadInput(f"unknown service '{service}'", f"services: {', '.join(mesh.mesh.app.services)}")
    return jsonify([aggregate.row(signal) for signal in mesh.signals(by, window_s, service)])


@views.get("/v1/samples")
def samples() -> Response:
    mesh = control()
    after, wait_s = sequence(), number("wait_s", 0, 0, MAX_WAIT_S)
    seq, found = mesh.store.after(after, wait_s)
    answer = {
        "seq": seq,
        "now": mesh.clock(),
        "samples": [sample_to_json(sample) for sample in found],
        "instances": mesh.status()["instances"],
    }
    return Response(json.dumps(answer, separators=(",", ":")), content_type="application/json")


@views.get("/v1/edges")
def edges() -> Response:
    mesh = control()
    window_s = number("window_s", 10, 0.1, KEPT_S)
    return jsonify(aggregate.edges(mesh.store.window(window_s), now=mesh.clock(), window_s=window_s))


@views.get("/v1/tap")
def tap() -> Response:
    """JSON lines as requests happen; an empty line is a heartbeat, by which a caller that left is noticed."""
    mesh = control()
    fields = ("service", "caller", "route", "status", "instance")
    asked = {name: request.args.get(name) or None for name in fields}
    wanted = Filter(**asked, failed=request.args.get("failed") == "1")
    session = mesh.run(mesh.tap.open(wanted, number("max_per_s", TAP_PER_S[1], *TAP_PER_S)))
    response = Response(_tapped(session), content_type="application/jsonl")
    # Not at the end of the iterator: one that was never begun is never ended.
    response.call_on_close(lambda: mesh.run(mesh.tap.close(session)))
    return response


def _tapped(session: Session) -> Iterator[str]:
    yield "\n"  # the headers go out now, not with the first request
    while True:
        events = session.take(_HEARTBEAT_S)
        yield "".join(json.dumps(event, separators=(",", ":")) + "\n" for event in events) or "\n"
