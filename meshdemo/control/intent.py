"""Desired state: change it, version it, persist it.

Every change is a pure function from an intent to the next one. It checks what the user asked for against the
app and its instances and raises BadInput, naming the value, what is allowed and what to do, before anything
changes. `IntentStore` keeps the intent on disk so that it survives the control plane.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from pydantic import ValidationError

from meshdemo.apps.model import GATEWAY, Service
from meshdemo.control import gateway
from meshdemo.control.model import Ejection, Fault, Instance, Intent, MeshState, SplitLease, Traffic
from meshdemo.errors import BadInput, Failed
from meshdemo.files import write_atomic
from meshdemo.limits import MAX_FAULT_S, MAX_LATENCY_MS, MAX_RPS

MAX_TIMEOUT_MS = 3_600_000
MAX_RETRIES = 10
MAX_LIMIT = 1_000_000
# Certificates are renewed after two thirds of their lifetime: a third of the shortest must be enough for that
# on a busy machine. Nothing needs longer ones than a year; the root lives ten.
MIN_CERTIFICATE_S, MAX_CERTIFICATE_S = 10.0, 365 * 86_400.0

_REQUEST_FIELDS = frozenset(
    ("id", "at", "kind", "service", "version", "instance", "route", "caller", "lat_ms", "err_rate", "share",
     "revision", "started_at", "for_s", "starting")
)  # fmt: skip

Change = Callable[[Intent, MeshState], Intent]
"""A change of the intent: pure, and raises BadInput if it makes no sense. The functions here fit through a
lambda: `plane.change(lambda intent, mesh: add_fault(intent, fault))`."""


# -- faults -----------------------------------------------------------------------------------------------


def new_fault(request: Mapping[str, Any], mesh: MeshState, now: float) -> Fault:
    """The fault that a request (the fields of `Fault`, `for_s` instead of `expires_at`) asks for.

    Args:
        now: when it begins, unless the request carries `started_at` (a fault made elsewhere, recorded late).

    Raises:
        BadInput: a value makes no sense, or names what the mesh does not have.
    """
    for key in request:
        if key not in _REQUEST_FIELDS:
            raise BadInput(f"a fault has no field '{key}'", f"it has: {', '.join(sorted(_REQUEST_FIELDS))}")
    at, kind = request.get("at", "mesh"), request.get("kind", "degrade")
    _one_of("at", at, ("app", "mesh", "process"))
    _one_of("kind", kind, ("degrade", "crash", "hang"))
    if (at == "process") == (kind == "degrade"):
        raise BadInput(f"a fault of kind '{kind}' cannot be at '{at}'", "crash and hang are at 'process'")
    service, version = _service(mesh, request.get("service")), request.get("version")
    instance, caller, route = request.get("instance"), request.get("caller"), request.get("route")
    if version is not None:
        _version(mesh, request["service"], version)
    if instance is not None:
        _instance(mesh, instance, request["service"], version)
    if caller is not None:
        _caller(mesh, caller)
    if route is not None and not (isinstance(route, str) and route.startswith("/")):
        raise BadInput(f"route '{route}' does not start with '/'", "give a path prefix such as /work")
    lat_ms = _number("latency", request.get("lat_ms", 0), 0, MAX_LATENCY_MS, "ms")
    err_rate = _number("error share", request.get("err_rate", 0), 0, 1)
    share = _number("share", request.get("share", 1), 0, 1)
    if kind == "degrade" and not (lat_ms or err_rate):
        raise BadInput("a fault needs a latency or an error share above 0", "such as --lat 200 or --err 0.2")
    if at == "mesh" and service.without_requests:
        raise BadInput(
            f"service '{request['service']}' speaks tcp, and sidecars break requests of http and grpc only",
            "use --at app, --crash or --hang",
        )
    for_s = request.get("for_s")
    if for_s is not None:
        for_s = _number("duration", for_s, 0, MAX_FAULT_S, "seconds")
        if for_s == 0:
            raise BadInput("duration 0 would end before it began", "give seconds above 0, or leave it out")
    started_at = _number("started_at", request.get("started_at", now), 0, 1e11)
    try:
        return Fault(
            id=request.get("id") or f"f-{secrets.token_hex(3)}",
            at=at,
            kind=kind,
            service=request["service"],
            version=version,
            instance=instance,
            route=route,
            caller=caller,
            lat_ms=lat_ms,
            err_rate=err_rate,
            share=share,
            revision=request.get("revision"),
            started_at=started_at,
            starting=bool(request.get("starting")) and at != "mesh",
            expires_at=None if for_s is None else started_at + for_s,
        )
    except ValidationError as error:
        raise BadInput(f"the fault makes no sense: {_words(error)}") from error


def add_fault(intent: Intent, fault: Fault) -> Intent:
    """The intent with one more fault, or with one that was `starting` as it is now.

    Raises:
        BadInput: its id is taken.
    """
    if any(other.id == fault.id and not other.starting for other in intent.faults):
        raise BadInput(f"fault '{fault.id}' exists already", "leave the id out, or clear the other one first")
    return _next(intent, faults=(*(other for other in intent.faults if other.id != fault.id), fault))


def clear_fault(intent: Intent, fault_id: str) -> Intent:
    """The intent without this fault.

    Raises:
        BadInput: there is none of this id.
    """
    left = tuple(fault for fault in intent.faults if fault.id != fault_id)
    if len(left) == len(intent.faults):
        known = ", ".join(fault.id for fault in intent.faults) or "none"
        raise BadInput(f"no fault '{fault_id}'", f"faults in force: {known}")
    return _next(intent, faults=left)


def clear_faults(intent: Intent) -> Intent:
    """The intent without any fault."""
    return _next(intent, faults=())


def expire_faults(intent: Intent, now: float) -> Intent:
    """The intent without the faults whose time is over."""
    return _next(
        intent,
        faults=tuple(fault for fault in intent.faults if fault.expires_at is None or fault.expires_at > now),
    )


# -- traffic ----------------------------------------------------------------------------------------------


def set_traffic(
    intent: Intent, mesh: MeshState, service: str, changes: Mapping[str, Any], now: float
) -> Intent:
    """The intent with some fields of a service's `Traffic` changed.

    Args:
        changes: field -> value; fields not named stay as they are; None (or an empty mapping) goes back to
            the default. `split` and `mirror` are replaced whole.

    Raises:
        BadInput: unknown service, version or field; weights that do not sum to 100; a number out of range.
    """
    definition = _service(mesh, service)
    checked: dict[str, Any] = {}
    for key, value in changes.items():
        checked[key] = _traffic_field(mesh, service, definition, key, value)
    before = intent.traffic.get(service, Traffic())
    after = before.model_copy(update=checked)
    if after == before and not ("split" in checked and service in intent.leases):
        return intent
    traffic = {name: rules for name, rules in intent.traffic.items() if name != service}
    if after.model_copy(update={"since": None, "field_since": {}}) != Traffic():
        changed = {key: now for key in checked if getattr(before, key) != getattr(after, key)}
        since = {**before.field_since, **changed}
        traffic[service] = after.model_copy(update={"since": now, "field_since": since})
    leases = intent.leases
    if "split" in checked and service in leases:  # whoever held the split does not any more
        leases = {name: lease for name, lease in leases.items() if name != service}
    return _next(intent, traffic=traffic, leases=leases)


def lease_split(
    intent: Intent,
    mesh: MeshState,
    service: str,
    split: Mapping[str, int],
    lease: Mapping[str, Any],
    now: float,
) -> Intent:
    """The intent with the split of a service set by whoever holds it, or begins to.

    Args:
        lease: the fields of `SplitLease`; besides `begins`: the first shift, otherwise the split must be held
            already; and `ends`: this shift is the last one.

    Raises:
        BadInput: a value that makes no sense, or somebody else holds the split.
        Failed: it is not held any more: somebody else has set it, or it was given back.
    """
    fields = {key: value for key, value in lease.items() if key not in ("begins", "ends")}
    try:
        wanted = SplitLease.model_validate(fields)
    except ValidationError as error:
        raise BadInput(f"the lease makes no sense: {_words(error)}") from error
    _split(mesh, service, wanted.fallback)
    held = intent.leases.get(service)
    if held is not None and held.owner != wanted.owner and lease.get("begins"):
        raise BadInput(
            f"the split of {service} is in the hands of {held.by}",
            "wait for it to end, or end it: meshdemo traffic set SERVICE --split ...",
        )
    if not lease.get("begins") and (held is None or held.owner != wanted.owner):
        raise Failed(f"the split of {service} is not held by {wanted.by} any more")
    after = set_traffic(intent, mesh, service, {"split": split}, now)
    leases = {name: other for name, other in after.leases.items() if name != service}
    if not lease.get("ends"):
        leases[service] = wanted
    return _next(after, leases=leases)


def expire_leases(intent: Intent, services: Collection[str], now: float) -> Intent:
    """The intent with the splits of these services back at what their leases say, and without those."""
    for service in services:
        lease = intent.leases[service]
        rules = intent.traffic.get(service, Traffic())
        since = {**rules.field_since, "split": now}
        back = rules.model_copy(update={"split": dict(lease.fallback), "since": now, "field_since": since})
        left = {name: other for name, other in intent.leases.items() if name != service}
        intent = _next(intent, traffic={**intent.traffic, service: back}, leases=left)
    return intent


def _traffic_field(mesh: MeshState, service: str, definition: Service, key: str, value: Any) -> Any:
    fields = [name for name in Traffic.model_fields if name not in ("since", "field_since")]
    if key not in fields:
        raise BadInput(f"traffic has no field '{key}'", f"it has: {', '.join(fields)}")
    if value is None or value in ({}, ""):
        return {} if key in ("split", "mirror") else None
    if definition.without_requests and key in ("timeout_ms", "retries", "mirror", "max_requests"):
        raise BadInput(
            f"service '{service}' speaks tcp, which has no requests for '{key}' to apply to",
            "set split, max_connections, max_pending or outlier",
        )
    match key:
        case "split":
            return _split(mesh, service, value)
        case "mirror":
            return _mirror(mesh, service, value)
        case "outlier":
            if not isinstance(value, bool):
                raise BadInput(f"outlier '{value}' is neither true nor false", "say on or off")
            return value
        case "timeout_ms":
            return _whole("timeout", value, 1, MAX_TIMEOUT_MS, "ms")
        case "retries":
            return _whole("retries", value, 0, MAX_RETRIES)
        case _:
            return _whole(key.replace("_", " "), value, 1, MAX_LIMIT)


def _split(mesh: MeshState, service: str, value: Any) -> dict[str, int]:
    if not isinstance(value, Mapping):
        raise BadInput(f"split '{value}' is not version=weight", "such as v1=90,v2=10")
    weights: dict[str, int] = {}
    for version, weight in value.items():
        _version(mesh, service, version)
        weights[version] = _whole(f"weight of {version}", weight, 0, 100)
        if weights[version] and not _running(mesh, service, version):
            raise BadInput(
                f"version '{version}' of {service} has no instance to send traffic to",
                f"start it first: `meshdemo up --version {service}={version}`",
            )
    if sum(weights.values()) != 100:
        given = ", ".join(f"{version}={weight}" for version, weight in weights.items())
        raise BadInput(f"weights {given} sum to {sum(weights.values())}, not to 100", "such as v1=90,v2=10")
    return weights


def _mirror(mesh: MeshState, service: str, value: Any) -> dict[str, float]:
    if not isinstance(value, Mapping):
        raise BadInput(f"mirror '{value}' is not version=share", "such as v2=0.1")
    shares: dict[str, float] = {}
    for version, share in value.items():
        _version(mesh, service, version)
        shares[version] = _number(f"mirrored share of {version}", share, 0, 1)
        if shares[version] and not _running(mesh, service, version):
            raise BadInput(
                f"version '{version}' of {service} has no instance to mirror to",
                f"start it first: `meshdemo up --version {service}={version}`",
            )
    return shares


# -- access -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Access:
    """May `caller` call `service`; `explicit`: the intent says so, else the app file does."""

    caller: str
    service: str
    allowed: bool
    explicit: bool


def set_access(intent: Intent, mesh: MeshState, caller: str, service: str, allowed: bool) -> Intent:
    """The intent with a caller allowed, or denied.

    Raises:
        BadInput: an unknown service, or a value that is not a truth value.
    """
    _caller(mesh, caller)
    _service(mesh, service)
    if not isinstance(allowed, bool):
        raise BadInput(f"allowed '{allowed}' is neither true nor false")
    return _next(intent, access={**intent.access, f"{caller}>{service}": allowed})


def access(intent: Intent, mesh: MeshState) -> Iterator[Access]:
    """Every pair of services that the app file or the intent speaks of, and then those of the gateway."""
    declared = {f"{name}>{callee}" for name, service in mesh.app.services.items() for callee in service.calls}
    declared |= gateway.pairs(mesh)
    for pair in sorted(
        declared | set(intent.access), key=lambda pair: (pair.startswith(f"{GATEWAY}>"), pair)
    ):
        caller, _, service = pair.partition(">")
        yield Access(caller, service, intent.access.get(pair, pair in declared), pair in intent.access)


def callers(intent: Intent, mesh: MeshState) -> dict[str, list[str]]:
    """By service, the services that may call it, in order."""
    allowed: dict[str, list[str]] = {}
    for row in access(intent, mesh):
        if row.allowed:
            allowed.setdefault(row.service, []).append(row.caller)
    return allowed


# -- ejections --------------------------------------------------------------------------------------------


def eject(intent: Intent, mesh: MeshState, instance: str, *, reason: str, by: str, now: float) -> Intent:
    """The intent with an instance kept out of load balancing; a second time changes nothing.

    Raises:
        BadInput: no such instance.
    """
    _instance(mesh, instance)
    if any(ejection.instance == instance for ejection in intent.ejections):
        return intent
    return _next(
        intent, ejections=(*intent.ejections, Ejection(instance=instance, reason=reason, by=by, at=now))
    )


def readmit(intent: Intent, instance: str) -> Intent:
    """The intent with an ejected instance back in load balancing.

    Raises:
        BadInput: it is not ejected.
    """
    left = tuple(ejection for ejection in intent.ejections if ejection.instance != instance)
    if len(left) == len(intent.ejections):
        known = ", ".join(ejection.instance for ejection in intent.ejections) or "none"
        raise BadInput(f"instance '{instance}' is not ejected", f"ejected: {known}")
    return _next(intent, ejections=left)


def forget_gone(intent: Intent, mesh: MeshState) -> Intent:
    """The intent without ejections of instances that are gone: their successors are not to blame."""
    there = {instance.id for instance in mesh.instances}
    return _next(
        intent, ejections=tuple(ejection for ejection in intent.ejections if ejection.instance in there)
    )


# -- load -------------------------------------------------------------------------------------------------


def set_load(intent: Intent, mesh: MeshState, rps: Any) -> Intent:
    """The intent with another rate of the instances that make load.

    Raises:
        BadInput: a rate out of range, or an app in which nobody makes load.
    """
    rate = _number("load", rps, 0, MAX_RPS, "requests/s")
    if not any(service.load for service in mesh.app.services.values()):
        raise BadInput(f"no service of the app '{mesh.app.name}' makes load", "mark one with `load: true`")
    return _next(intent, load_rps=rate)


# -- traces -----------------------------------------------------------------------------------------------


def trace_endpoint(text: Any) -> str:
    """HOST:PORT of an OTLP collector that is given as such, or as a URL.

    Raises:
        BadInput: it is neither, or wants TLS.
    """
    parts = urlsplit(text if isinstance(text, str) and "://" in text else f"http://{text}")
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if parts.scheme not in ("http", "grpc") or not host or not port or parts.path.strip("/") or parts.query:
        raise BadInput(
            f"OTLP endpoint '{text}' is not http://HOST:PORT", "sidecars send spans over gRPC, without TLS"
        )
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def set_traces(intent: Intent, endpoint: str | None) -> Intent:
    """The intent with spans going to another collector; None: to nobody.

    Raises:
        BadInput: an endpoint that makes no sense.
    """
    return _next(intent, traces=None if endpoint is None else trace_endpoint(endpoint))


# -- certificates -----------------------------------------------------------------------------------------


def set_certificate_lifetime(intent: Intent, lifetime_s: float) -> Intent:
    """The intent with certificates that live so long.

    Raises:
        BadInput: shorter than renewal can bear, or longer than anybody needs.
    """
    if not MIN_CERTIFICATE_S <= lifetime_s <= MAX_CERTIFICATE_S:
        raise BadInput(f"a certificate lifetime of {lifetime_s:g} s: allowed is 10s to 365d")
    return _next(intent, certificate_lifetime_s=float(lifetime_s))


# -- checks -----------------------------------------------------------------------------------------------


def _next(intent: Intent, **changes: Any) -> Intent:
    """The intent with these fields, as a new revision; itself where nothing differs."""
    after = intent.model_copy(update=changes)
    return intent if after == intent else after.model_copy(update={"revision": intent.revision + 1})


def _service(mesh: MeshState, name: Any, what: str = "service") -> Service:
    if isinstance(name, str) and name in mesh.app.services:
        return mesh.app.services[name]
    raise BadInput(f"unknown {what} '{name}'", f"services of this mesh: {', '.join(mesh.app.services)}")


def _caller(mesh: MeshState, name: Any) -> None:
    if not (name == GATEWAY and mesh.gateways):
        _service(mesh, name, what="caller")


def _version(mesh: MeshState, service: str, version: Any) -> None:
    known = dict.fromkeys(
        [*mesh.app.services[service].versions, *(i.version for i in mesh.instances if i.service == service)]
    )
    if not isinstance(version, str) or version not in known:
        raise BadInput(f"unknown version '{version}' of {service}", f"its versions: {', '.join(known)}")


def _instance(mesh: MeshState, name: Any, service: str | None = None, version: str | None = None) -> Instance:
    fitting = [
        instance
        for instance in mesh.instances
        if (service is None or instance.service == service)
        and (version is None or instance.version == version)
    ]
    for instance in fitting:
        if instance.id == name:
            return instance
    of = f" of {service}" + (f" {version}" if version else "") if service else ""
    known = ", ".join(instance.id for instance in fitting[:20]) or "none"
    raise BadInput(f"unknown instance '{name}'{of}", f"instances{of}: {known}")


def _running(mesh: MeshState, service: str, version: str) -> bool:
    return any(i.service == service and i.version == version for i in mesh.instances)


def _one_of(what: str, value: Any, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise BadInput(f"{what} '{value}' is unknown", f"allowed: {', '.join(allowed)}")


def _number(what: str, value: Any, low: float, high: float, unit: str = "") -> float:
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or not low <= value <= high:
        raise BadInput(f"{what} {value} is out of range", f"allowed: {low:g} to {high:g} {unit}".rstrip())
    return float(value)


def _whole(what: str, value: Any, low: int, high: int, unit: str = "") -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise BadInput(
            f"{what} {value} is out of range", f"allowed: a whole number, {low} to {high} {unit}".rstrip()
        )
    return value


def _words(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())


# -- persistence ------------------------------------------------------------------------------------------


class Overtaken(Failed):
    """Somebody else has changed the stored intent: theirs is in force, and may be loaded."""


class Intents(Protocol):
    """Where the intent is kept. Both methods may take a while, and are called in a thread."""

    def load(self) -> Intent:
        """The stored intent, or a fresh one if none was stored yet. Raises Failed if it cannot be read."""
        ...

    def save(self, intent: Intent) -> None:
        """Store the intent; the one before stays if that fails. Raises Failed, Overtaken."""
        ...


class IntentStore:
    """The intent on disk: one JSON file, replaced whole, so that a reader never sees half of one."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self) -> Intent:
        """The stored intent, or a fresh one if none was stored yet.

        Raises:
            Failed: the file cannot be read or does not hold an intent.
        """
        try:
            return Intent.model_validate_json(self._path.read_bytes())
        except FileNotFoundError:
            return Intent()
        except OSError as error:
            raise Failed(f"cannot read the intent from {self._path}: {error.strerror}") from error
        except ValidationError as error:
            raise Failed(
                f"{self._path} does not hold an intent: {_words(error)}",
                "repair it, or remove it to start from an intent without faults, traffic or access rules",
            ) from error

    def save(self, intent: Intent) -> None:
        """Store the intent; the one before stays if that fails.

        Raises:
            Failed: it could not be written (a full disk, no permission).
        """
        try:
            write_atomic(self._path, intent.model_dump_json(indent=2).encode(), durable=True)
        except OSError as error:
            raise Failed(
                f"cannot store the intent in {self._path}: {error.strerror}; nothing was changed",
                "make room or mend the permissions, and try again",
            ) from error
