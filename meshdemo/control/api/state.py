"""What is, and what happened: the mesh's status, its metrics and its journal."""

from __future__ import annotations

from flask import Blueprint, Response, jsonify

from meshdemo.control import metrics
from meshdemo.control.api.request import (
    MAX_WAIT_S,
    control,
    effect_row,
    json_object,
    number,
    open_to_all,
    sequence,
)

views = Blueprint("state", __name__)


@views.get("/healthz")
@open_to_all
def healthz() -> Response:
    """Is the process alive?"""
    return jsonify({"ok": True})


@views.get("/metrics")
@open_to_all
def prometheus() -> Response:
    """The mesh in Prometheus' text format. Open: loopback reaches it, and names and rates are no secret."""
    mesh = control()
    intent = mesh.intent
    page = metrics.page(
        mesh.totals,
        mesh.status()["instances"],
        revision=intent.revision,
        faults=len(intent.faults),
        trouble=bool(mesh.journal.trouble),
    )
    return Response(page, content_type="text/plain; version=0.0.4; charset=utf-8")


@views.get("/v1/status")
def status() -> Response:
    return jsonify(control().status())


@views.get("/v1/intent")
def intent() -> Response:
    return jsonify(control().intent.model_dump(mode="json"))


@views.post("/v1/instances/refresh")
def refresh() -> Response:
    return jsonify(effect_row(control().refresh()))


@views.post("/v1/events")
def post_event() -> Response:
    return jsonify({"seq": control().record(json_object())["seq"]})


@views.get("/v1/events")
def events() -> Response:
    seq, found = control().journal.after(sequence(), number("wait_s", 0, 0, MAX_WAIT_S))
    return jsonify({"seq": seq, "events": found})
