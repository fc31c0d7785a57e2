"""What the mesh should do otherwise: traffic, access, ejected instances, certificates, traces."""

from __future__ import annotations

import dataclasses

from flask import Blueprint, Response, jsonify

from meshdemo.control import intent as intents
from meshdemo.control import rules
from meshdemo.control.api.request import Body, body, control, effect_row, json_object
from meshdemo.control.model import Traffic
from meshdemo.errors import BadInput

views = Blueprint("changes", __name__)


class _AccessBody(Body):
    caller: str
    service: str
    allowed: bool


class _RotateBody(Body):
    root: bool = False


class _LeaseBody(Body):
    owner: str


class _TracesBody(Body):
    endpoint: str | None


class _CertificatesBody(Body):
    lifetime_s: float


class _EjectBody(Body):
    instance: str
    reason: str = ""
    by: str = ""


class _ReadmitBody(Body):
    instance: str


@views.get("/v1/traffic")
def traffic() -> Response:
    traffic = control().intent.traffic
    return jsonify({service: rule.model_dump(mode="json") for service, rule in traffic.items()})


@views.get("/v1/traffic/effective")
def effective_traffic() -> Response:
    mesh = control()
    return jsonify(rules.in_force(mesh.mesh, mesh.intent))


@views.put("/v1/traffic/<service>")
def set_traffic(service: str) -> Response:
    mesh, changes = control(), json_object()
    now = mesh.clock()
    lease = changes.pop("lease", None)
    if lease is None:
        effect = mesh.change(lambda intent, state: intents.set_traffic(intent, state, service, changes, now))
    elif isinstance(lease, dict) and set(changes) == {"split"}:
        split = changes["split"]
        effect = mesh.change(
            lambda intent, state: intents.lease_split(intent, state, service, split, lease, now)
        )
    else:
        raise BadInput("a lease is about the split alone", 'such as {"split": {...}, "lease": {...}}')
    traffic = mesh.intent.traffic.get(service, Traffic())
    mesh.record({"event": "traffic", "service": service, "changes": changes})
    return jsonify({"traffic": traffic.model_dump(mode="json"), **effect_row(effect)})


@views.post("/v1/traffic/<service>/lease")
def renew_lease(service: str) -> Response:
    """Go on holding the split; `held` says whether it still is, `ran_out` whether for want of renewal."""
    mesh, asked = control(), body(_LeaseBody)
    held, ran_out = mesh.run(mesh.plane.renew_lease(service, asked.owner))
    traffic = mesh.intent.traffic.get(service, Traffic())
    return jsonify({"held": held, "ran_out": ran_out, "split": traffic.split})


@views.get("/v1/access")
def access() -> Response:
    mesh = control()
    return jsonify([dataclasses.asdict(row) for row in intents.access(mesh.intent, mesh.mesh)])


@views.put("/v1/access")
def set_access() -> Response:
    asked = body(_AccessBody)
    mesh = control()
    effect = mesh.change(
        lambda intent, state: intents.set_access(intent, state, asked.caller, asked.service, asked.allowed)
    )
    mesh.record({"event": "access", **asked.model_dump()})
    return jsonify(effect_row(effect))


@views.post("/v1/eject")
def eject() -> Response:
    mesh, asked = control(), body(_EjectBody)
    now = mesh.clock()
    effect = mesh.change(
        lambda intent, state: intents.eject(
            intent, state, asked.instance, reason=asked.reason, by=asked.by, now=now
        )
    )
    mesh.record({"event": "ejected", **asked.model_dump()})
    return jsonify(effect_row(effect))


@views.post("/v1/readmit")
def readmit() -> Response:
    mesh, asked = control(), body(_ReadmitBody)
    effect = mesh.change(lambda intent, _: intents.readmit(intent, asked.instance))
    mesh.record({"event": "readmitted", **asked.model_dump()})
    return jsonify(effect_row(effect))


@views.get("/v1/identity")
def identity() -> Response:
    mesh = control()
    return jsonify(mesh.run(mesh.plane.identities()))


@views.put("/v1/identity")
def set_certificate_lifetime() -> Response:
    mesh, asked = control(), body(_CertificatesBody)
    before = mesh.intent.certificate_lifetime_s
    effect = mesh.change(lambda intent, _: intents.set_certificate_lifetime(intent, asked.lifetime_s))
    if mesh.intent.certificate_lifetime_s != before:
        mesh.record({"event": "certificate_lifetime", "lifetime_s": asked.lifetime_s})
    return jsonify({"lifetime_s": mesh.intent.certificate_lifetime_s, **effect_row(effect)})


@views.post("/v1/identity/rotate")
def rotate_identity() -> Response:
    mesh, asked = control(), body(_RotateBody)
    effect = mesh.run(mesh.plane.rotate_root() if asked.root else mesh.plane.rotate_certificates())
    mesh.record({"event": "rotated", "root": asked.root, "sidecars": effect.sidecars})
    return jsonify(effect_row(effect))


@views.put("/v1/traces")
def set_traces() -> Response:
    mesh, asked = control(), body(_TracesBody)
    effect = mesh.change(lambda intent, _: intents.set_traces(intent, asked.endpoint))
    mesh.record({"event": "traces", "endpoint": mesh.intent.traces})
    return jsonify({"endpoint": mesh.intent.traces, **effect_row(effect)})
