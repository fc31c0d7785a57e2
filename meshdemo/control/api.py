"""The control plane's HTTP API, for the command line, watch and the dashboard.

Flask, on threads. What changes the mesh goes to the control plane's loop and comes back when it is in force;
what only reads is answered from values that any thread may read. Bound to loopback, and yet guarded: a
bearer token, and a Host header that is a loopback name, so that no page in a browser reaches it by a name of
its own that resolves to 127.0.0.1 (DNS rebinding).

A further front end (the dashboard) is a blueprint: give it to `create_app`, with an `authorize` of its own
if it signs in otherwise. It finds the mesh through `control()`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hmac
import ipaddress
import json
import logging
import math
import time
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, TypeVar, cast

from flask import Blueprint, Flask, Request, Response, current_app, jsonify, request
from pydantic import BaseModel, ConfigDict, ValidationError
from werkzeug.exceptions import HTTPException

from meshdemo.apps.model import GATEWAY
from meshdemo.control import aggregate, metrics, rules
from meshdemo.control import intent as intents
from meshdemo.control.client import TAP_PER_S, InstanceRow, StatusRow
from meshdemo.control.journal import Journal
from meshdemo.control.model import Effect, Fault, Intent, MeshState, Traffic
from meshdemo.control.plane import Change, ControlPlane
from meshdemo.control.signals import Signal, sample_to_json
from meshdemo.control.tap import Filter, Session, Tap
from meshdemo.control.telemetry import KEPT_S, Store
from meshdemo.errors import BadInput, Failed, MeshdemoError

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 256 << 10
MAX_WAIT_S = 30.0
_CALL_TIMEOUT_S = 30.0
_HEARTBEAT_S = 1.0
_T = TypeVar("_T")

Authorize = Callable[[Request], bool]


class Control:
    """The mesh as threads see it: what the API, and a dashboard beside it, are made from."""

    def __init__(
        self,
        *,
        plane: ControlPlane,
        store: Store,
        journal: Journal,
        tap: Tap,
        totals: metrics.Totals,
        loop: asyncio.AbstractEventLoop,
        read_mesh: Callable[[], MeshState],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.plane = plane
        self.store = store
        self.journal = journal
        self.tap = tap
        self.totals = totals
        self.clock = clock
        self._loop = loop
        self._read_mesh = read_mesh

    # -- what is

    @property
    def intent(self) -> Intent:
        """The intent in force."""
        return self.plane.intent

    @property
    def mesh(self) -> MeshState:
        """The mesh as the runtime last reported it, but for instances that are leaving."""
        whole = self.plane.mesh
        staying = tuple(instance for instance in whole.instances if not instance.leaving)
        if len(staying) == len(whole.instances):
            return whole
        return whole.model_copy(update={"instances": staying})

    def status(self) -> StatusRow:
        """Every instance and how its sidecar stands, and what sidecars rejected."""
        sidecars = self.run(self._sidecars())
        intent, mesh = self.intent, self.mesh
        ejected = {ejection.instance for ejection in intent.ejections}
        rows: list[InstanceRow] = []
        for sidecar in sidecars:
            instance = sidecar.instance
            if instance.leaving or instance.service == GATEWAY:
                continue
            report_s = self.store.last_report_s(instance.id)
            rows.append(
                {
                    "id": instance.id,
                    "service": instance.service,
                    "version": instance.version,
                    "revision": instance.revision,
                    "ready": instance.ready,
                    "restarts": instance.restarts,
                    "connected": sidecar.connected,
                    "acked": sidecar.acked,
                    "last_report_s": None if report_s is None else round(report_s, 3),
                    "silent": self.store.silent(instance.id),
                    "ejected": instance.id in ejected,
                }
            )
        return {
            "mesh": mesh.mesh,
            "revision": intent.revision,
            "instances": rows,
            "nacks": [
                {"instance": sidecar.instance.id, "type": kind, "error": words}
                for sidecar in sidecars
                for kind, words in sidecar.nacks.items()
            ],
            "trouble": self.journal.trouble,
        }

    def signals(self, by: aggregate.By, window_s: float, service: str | None = None) -> list[Signal]:
        """What happened in the last `window_s` seconds."""
        ejected = {ejection.instance for ejection in self.intent.ejections}
        scopes = [
            aggregate.Scope(i.id, i.service, i.version, self.store.silent(i.id), i.id in ejected)
            for i in self.mesh.instances
        ]
        return aggregate.signals(
            self.store.window(window_s),
            by=by,
            now=self.clock(),
            window_s=window_s,
            scopes=scopes,
            service=service,
        )

    # -- what should be

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Do this on the control plane's loop and wait for it.

        Raises:
            Failed: it took too long, and may still come into force; or the control plane is stopping.
        """
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(_CALL_TIMEOUT_S)
        except FutureTimeout:  # not cancelled: a change that is half done is worse than a late one
            raise Failed(
                f"the control plane did not finish within {_CALL_TIMEOUT_S:g} s",
                "`meshdemo status` names the sidecars that do not answer",
            ) from None
        except CancelledError:  # the loop is being ended under it
            raise Failed("the control plane is stopping", "ask again when it is back") from None

    def change(self, change: Change) -> Effect:
        """Change the intent; returns when it is in force."""
        return self.run(self.plane.change(change))

    def record(self, event: Mapping[str, Any]) -> dict[str, Any]:
        """Write an event to the journal; as `Journal.append`."""
        kept = self.journal.append(event)
        self.totals.event(kept)
        return kept

    def add_fault(self, asked: dict[str, Any]) -> tuple[Fault, Effect]:
        """Put a fault in force, or record one that was made elsewhere."""
        fault = intents.new_fault(asked, self.mesh, self.clock())
        effect = self.change(lambda intent, _: intents.add_fault(intent, fault))
        if fault.starting:
            return fault, effect
        self.record(
            {
                **fault.model_dump(mode="json", exclude={"id"}, exclude_none=True),
                "event": "fault",
                "fault": fault.id,
                "effective_ms": effect.effective_ms,
                "sidecars": effect.sidecars,
            }
        )
        return fault, effect

    def clear_faults(self, chosen: Callable[[Fault], bool]) -> tuple[list[Fault], Effect]:
        """End the faults that are chosen; those of the app or the process are only no longer recorded."""
        gone: list[Fault] = []

        def clear(intent: Intent, _: MeshState) -> Intent:
            gone[:] = [fault for fault in intent.faults if chosen(fault)]
            for fault in gone:
                intent = intents.clear_fault(intent, fault.id)
            return intent

        effect = self.change(clear)
        self._record_cleared(gone)
        return gone, effect

    def clear_fault(self, fault_id: str) -> tuple[Fault, Effect]:
        """End one fault.

        Raises:
            BadInput: there is none of this id.
        """
        gone: list[Fault] = []

        def clear(intent: Intent, _: MeshState) -> Intent:
            after = intents.clear_fault(intent, fault_id)
            gone[:] = [fault for fault in intent.faults if fault.id == fault_id]
            return after

        effect = self.change(clear)
        self._record_cleared(gone)
        return gone[0], effect

    def _record_cleared(self, gone: Sequence[Fault]) -> None:
        for fault in gone:
            if fault.starting:
                continue  # nothing was told of it yet
            self.record(
                {
                    "event": "fault_cleared",
                    "fault": fault.id,
                    "at": fault.at,
                    "service": fault.service,
                    "started_at": fault.started_at,
                }
            )

    def refresh(self) -> Effect:
        """Read the instances anew."""
        return self.run(self._refresh())

    async def _refresh(self) -> Effect:
        mesh = self._read_mesh()
        self.store.track([instance.id for instance in mesh.sidecars])
        return await self.plane.refresh(mesh)

    async def _sidecars(self) -> Sequence[Any]:
        return self.plane.sidecars()


# -- the application --------------------------------------------------------------------------------------


def create_app(
    mesh: Control,
    *,
    token: str,
    allowed_hosts: Collection[str] = (),
    blueprints: Sequence[Blueprint] = (),
    authorize: Sequence[Authorize] = (),
    open_port: int | None = None,
) -> Flask:
    """The WSGI application.

    Args:
        token: what `Authorization: Bearer` must carry.
        allowed_hosts: names besides those of loopback that a Host header may say.
        blueprints: further front ends. Their views are guarded as the API's are, unless one is marked with
            `open_to_all`.
        authorize: other ways to sign in, each told of the request.
        open_port: on this port, of another address, only `/healthz` and `/metrics` answer, under any name.
    """
    app = Flask("meshdemo.control", static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = MAX_BODY_BYTES
    app.extensions["meshdemo"] = mesh
    expected = f"Bearer {token}".encode()
    hosts = frozenset(host.lower() for host in allowed_hosts)

    def signed_in() -> bool:
        given = request.headers.get("Authorization", "").encode()
        return hmac.compare_digest(given, expected) or any(check(request) for check in authorize)

    @app.before_request
    def guard() -> Response | None:
        view = app.view_functions.get(request.endpoint or "")
        is_open = getattr(view, "open_to_all", False)
        if open_port is not None and request.environ.get("SERVER_PORT") == str(open_port):
            # Reached from elsewhere, by whatever name; what stands here is no secret.
            return None if is_open and request.path in ("/healthz", "/metrics") else _refusal(404, "not here")
        if not _host_allowed(request.host, hosts):
            return _refusal(
                403,
                f"this server is not called '{request.host}'",
                "call it by a loopback address or localhost",
            )
        if is_open or signed_in():
            return None
        refusal = _refusal(401, "no valid token", "`meshdemo dashboard` prints a link that signs in")
        refusal.headers["WWW-Authenticate"] = "Bearer"
        return refusal

    @app.after_request
    def headers(response: Response) -> Response:
        response.headers.setdefault("X-Content-Type-Options", "nosniff")
        response.headers.setdefault("Cache-Control", "no-store")
        return response

    app.register_error_handler(MeshdemoError, _user_error)
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(Exception, _bug)
    app.register_blueprint(api)
    for blueprint in blueprints:
        app.register_blueprint(blueprint)
    return app


def control() -> Control:
    """The mesh that the current request is about."""
    return cast(Control, current_app.extensions["meshdemo"])


_View = TypeVar("_View", bound=Callable[..., Any])


def open_to_all(view: _View) -> _View:
    """Mark a view that needs no token; the Host header is checked all the same."""
    view.open_to_all = True  # type: ignore[attr-defined]
    return view


def _host_allowed(host: str, allowed: Collection[str]) -> bool:
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    name = name.strip("[]").lower()
    if name == "localhost" or name in allowed:
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _refusal(status: int, error: str, remedy: str = "") -> Response:
    response = jsonify({"error": error, "remedy": remedy})
    response.status_code = status
    return response


def _user_error(error: MeshdemoError) -> Response:
    return _refusal(400 if isinstance(error, BadInput) else 409, error.message, error.remedy)


def _http_error(error: HTTPException) -> Response:
    return _refusal(error.code or 500, f"{request.method} {request.path}: {error.description or error.name}")


def _bug(error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.path, exc_info=error)
    return _refusal(
        500, f"the control plane failed at {request.method} {request.path}", "see `meshdemo logs`"
    )


# -- what a request may say -------------------------------------------------------------------------------


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _FaultBody(_Body):
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


class _AccessBody(_Body):
    caller: str
    service: str
    allowed: bool


class _RotateBody(_Body):
    root: bool = False


class _LeaseBody(_Body):
    owner: str


class _TracesBody(_Body):
    endpoint: str | None


class _CertificatesBody(_Body):
    lifetime_s: float


class _EjectBody(_Body):
    instance: str
    reason: str = ""
    by: str = ""


class _ReadmitBody(_Body):
    instance: str


_B = TypeVar("_B", bound=_Body)


def _object() -> dict[str, Any]:
    """The request's body, which is a JSON object.

    Raises:
        BadInput: it is not.
    """
    if not request.is_json:
        raise BadInput("the body is not application/json", "send a JSON object")
    body = request.get_json(silent=True)
    if not isinstance(body, dict):
        raise BadInput("the body is no JSON object", 'such as {"service": "service-b"}')
    return body


def _body(model: type[_B]) -> _B:
    try:
        return model.model_validate(_object())
    except ValidationError as error:
        raise BadInput(
            "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()),
            f"fields: {', '.join(model.model_fields)}",
        ) from error


def _number(name: str, default: float, low: float, high: float) -> float:
    """A number of the query."""
    given = request.args.get(name)
    if given is None:
        return default
    try:
        value = float(given)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        raise BadInput(f"{name} '{given}' is out of range", f"a number, {low:g} to {high:g}")
    return value


def _sequence() -> int:
    given = request.args.get("after", "0")
    try:
        return int(given)
    except ValueError:
        raise BadInput(f"after '{given}' is no sequence number", "a whole number") from None


def _effect(effect: Effect) -> dict[str, Any]:
    return {"effect": effect.model_dump(mode="json")}


def _dumped(values: Sequence[BaseModel]) -> list[dict[str, Any]]:
    return [value.model_dump(mode="json") for value in values]


# -- the views --------------------------------------------------------------------------------------------

api = Blueprint("api", __name__)


@api.get("/healthz")
@open_to_all
def healthz() -> Response:
    """Is the process alive?"""
    return jsonify({"ok": True})


@api.get("/metrics")
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


@api.get("/v1/status")
def status() -> Response:
    return jsonify(control().status())


@api.get("/v1/intent")
def intent() -> Response:
    return jsonify(control().intent.model_dump(mode="json"))


@api.post("/v1/instances/refresh")
def refresh() -> Response:
    return jsonify(_effect(control().refresh()))


@api.get("/v1/faults")
def faults() -> Response:
    return jsonify(_dumped(control().intent.faults))


@api.post("/v1/faults")
def add_fault() -> Response:
    asked = _body(_FaultBody).model_dump(exclude_none=True)
    fault, effect = control().add_fault(asked)
    return jsonify({"fault": fault.model_dump(mode="json"), **_effect(effect)})


@api.delete("/v1/faults")
def clear_faults() -> Response:
    """All faults, or those of one kind of place (`?at=mesh`)."""
    at = request.args.get("at")
    gone, effect = control().clear_faults(lambda fault: at is None or fault.at == at)
    return jsonify({"faults": _dumped(gone), **_effect(effect)})


@api.delete("/v1/faults/<fault_id>")
def clear_fault(fault_id: str) -> Response:
    gone, effect = control().clear_fault(fault_id)
    return jsonify({"faults": _dumped([gone]), **_effect(effect)})


@api.get("/v1/traffic")
def traffic() -> Response:
    traffic = control().intent.traffic
    return jsonify({service: rule.model_dump(mode="json") for service, rule in traffic.items()})


@api.get("/v1/traffic/effective")
def effective_traffic() -> Response:
    mesh = control()
    return jsonify(rules.in_force(mesh.mesh, mesh.intent))


@api.put("/v1/traffic/<service>")
def set_traffic(service: str) -> Response:
    mesh, changes = control(), _object()
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
    return jsonify({"traffic": traffic.model_dump(mode="json"), **_effect(effect)})


@api.post("/v1/traffic/<service>/lease")
def renew_lease(service: str) -> Response:
    """Go on holding the split; `held` says whether it still is."""
    mesh, asked = control(), _body(_LeaseBody)
    held = mesh.run(mesh.plane.renew_lease(service, asked.owner))
    traffic = mesh.intent.traffic.get(service, Traffic())
    return jsonify({"held": held, "split": traffic.split})


@api.put("/v1/traces")
def set_traces() -> Response:
    mesh, asked = control(), _body(_TracesBody)
    effect = mesh.change(lambda intent, _: intents.set_traces(intent, asked.endpoint))
    mesh.record({"event": "traces", "endpoint": mesh.intent.traces})
    return jsonify({"endpoint": mesh.intent.traces, **_effect(effect)})


@api.get("/v1/identity")
def identity() -> Response:
    mesh = control()
    return jsonify(mesh.run(mesh.plane.identities()))


@api.put("/v1/identity")
def set_certificate_lifetime() -> Response:
    mesh, asked = control(), _body(_CertificatesBody)
    before = mesh.intent.certificate_lifetime_s
    effect = mesh.change(lambda intent, _: intents.set_certificate_lifetime(intent, asked.lifetime_s))
    if mesh.intent.certificate_lifetime_s != before:
        mesh.record({"event": "certificate_lifetime", "lifetime_s": asked.lifetime_s})
    return jsonify({"lifetime_s": mesh.intent.certificate_lifetime_s, **_effect(effect)})


@api.post("/v1/identity/rotate")
def rotate_identity() -> Response:
    mesh, asked = control(), _body(_RotateBody)
    effect = mesh.run(mesh.plane.rotate_root() if asked.root else mesh.plane.rotate_certificates())
    mesh.record({"event": "rotated", "root": asked.root, "sidecars": effect.sidecars})
    return jsonify(_effect(effect))


@api.get("/v1/access")
def access() -> Response:
    mesh = control()
    return jsonify([dataclasses.asdict(row) for row in intents.access(mesh.intent, mesh.mesh)])


@api.put("/v1/access")
def set_access() -> Response:
    asked = _body(_AccessBody)
    mesh = control()
    effect = mesh.change(
        lambda intent, state: intents.set_access(intent, state, asked.caller, asked.service, asked.allowed)
    )
    mesh.record({"event": "access", **asked.model_dump()})
    return jsonify(_effect(effect))


@api.post("/v1/eject")
def eject() -> Response:
    mesh, asked = control(), _body(_EjectBody)
    now = mesh.clock()
    effect = mesh.change(
        lambda intent, state: intents.eject(
            intent, state, asked.instance, reason=asked.reason, by=asked.by, now=now
        )
    )
    mesh.record({"event": "ejected", **asked.model_dump()})
    return jsonify(_effect(effect))


@api.post("/v1/readmit")
def readmit() -> Response:
    mesh, asked = control(), _body(_ReadmitBody)
    effect = mesh.change(lambda intent, _: intents.readmit(intent, asked.instance))
    mesh.record({"event": "readmitted", **asked.model_dump()})
    return jsonify(_effect(effect))


@api.get("/v1/signals")
def signals() -> Response:
    by = request.args.get("by", "service")
    if by not in aggregate.BY:
        raise BadInput(f"signals by '{by}'", f"by one of {', '.join(aggregate.BY)}")
    window_s = _number("window_s", 10, 0.1, KEPT_S)
    service = request.args.get("service")
    mesh = control()
    if service is not None and service not in mesh.mesh.app.services:
        raise BadInput(f"unknown service '{service}'", f"services: {', '.join(mesh.mesh.app.services)}")
    return jsonify([aggregate.row(signal) for signal in mesh.signals(by, window_s, service)])


@api.get("/v1/samples")
def samples() -> Response:
    mesh = control()
    after, wait_s = _sequence(), _number("wait_s", 0, 0, MAX_WAIT_S)
    seq, found = mesh.store.after(after, wait_s)
    answer = {
        "seq": seq,
        "now": mesh.clock(),
        "samples": [sample_to_json(sample) for sample in found],
        "instances": mesh.status()["instances"],
    }
    return Response(json.dumps(answer, separators=(",", ":")), content_type="application/json")


@api.get("/v1/edges")
def edges() -> Response:
    mesh = control()
    window_s = _number("window_s", 10, 0.1, KEPT_S)
    return jsonify(aggregate.edges(mesh.store.window(window_s), now=mesh.clock(), window_s=window_s))


@api.get("/v1/tap")
def tap() -> Response:
    """JSON lines as requests happen; an empty line is a heartbeat, by which a caller that left is noticed."""
    mesh = control()
    fields = ("service", "caller", "route", "status", "instance")
    asked = {name: request.args.get(name) or None for name in fields}
    wanted = Filter(**asked, failed=request.args.get("failed") == "1")
    session = mesh.run(mesh.tap.open(wanted, _number("max_per_s", TAP_PER_S[1], *TAP_PER_S)))
    response = Response(_tapped(session), content_type="application/jsonl")
    # Not at the end of the iterator: one that was never begun is never ended.
    response.call_on_close(lambda: mesh.run(mesh.tap.close(session)))
    return response


def _tapped(session: Session) -> Iterator[str]:
    yield "\n"  # the headers go out now, not with the first request
    while True:
        events = session.take(_HEARTBEAT_S)
        yield "".join(json.dumps(event, separators=(",", ":")) + "\n" for event in events) or "\n"


@api.post("/v1/events")
def post_event() -> Response:
    return jsonify({"seq": control().record(_object())["seq"]})


@api.get("/v1/events")
def events() -> Response:
    seq, found = control().journal.after(_sequence(), _number("wait_s", 0, 0, MAX_WAIT_S))
    return jsonify({"seq": seq, "events": found})
