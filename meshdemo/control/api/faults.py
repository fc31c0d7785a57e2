"""Faults: which there are, one more, one less."""

from __future__ import annotations

from flask import Blueprint, Response, jsonify, request

from meshdemo.control.api.request import Body, body, control, dumped, effect_row

views = Blueprint("faults", __name__)


class _FaultBody(Body):
    id: str | None = None
    at: str = "mesh"
    kind: str = "degrade"
    service: str
    version: str | None = None
    instance: str | None = None
    route: str | None = None
    caller: str | None = None
    lat_ms: float = 0
    err_rate: float = 0
    share: float = 1
    revision: int | None = None
    started_at: float | None = None
    for_s: float | None = None
    starting: bool = False


@views.get("/v1/faults")
def faults() -> Response:
    return jsonify(dumped(control().intent.faults))


@views.post("/v1/faults")
def add_fault() -> Response:
    asked = body(_FaultBody).model_dump(exclude_none=True)
    fault, effect = control().add_fault(asked)
    return jsonify({"fault": fault.model_dump(mode="json"), **effect_row(effect)})


@views.delete("/v1/faults")
def clear_faults() -> Response:
    """All faults, or those of one kind of place (`?at=mesh`)."""
    at = request.args.get("at")
    gone, effect = control().clear_faults(lambda fault: at is None or fault.at == at)
    return jsonify({"faults": dumped(gone), **effect_row(effect)})


@views.delete("/v1/faults/<fault_id>")
def clear_fault(fault_id: str) -> Response:
    gone, effect = control().clear_fault(fault_id)
    return jsonify({"faults": dumped([gone]), **effect_row(effect)})
