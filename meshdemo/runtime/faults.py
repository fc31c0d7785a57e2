"""Faults from request to effect: what may be asked, putting it in force, and ending it.

A fault lives in one of three places: in the sidecars (`at` mesh: the control plane alone), in the
environment of a workload (`at` app: a new revision, which the runtime rolls out), or in a process that is
killed or stopped (`at` process: the runtime). Whatever the place, the control plane keeps the record, so
that listing, clearing, watch and report know all of them.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from meshdemo.errors import BadInput

if TYPE_CHECKING:
    from meshdemo.apps.model import App
    from meshdemo.control.model import Fault, Instance
    from meshdemo.runtime.base import Runtime

MAX_LATENCY_MS = 3_600_000.0  # as the control plane has it
DEFAULT_SERVICE = "service-b"
LATENCY_VARIABLE = "LAT_MS"
ERROR_VARIABLE = "ERR_RATE"
_CARRIER_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class FaultRequest:
    """What a user asks to break. `service` None: that of `instance`, else service-b."""

    at: Literal["app", "mesh", "process"]
    kind: Literal["degrade", "crash", "hang"]
    service: str | None = None
    version: str | None = None
    instance: str | None = None
    route: str | None = None
    caller: str | None = None
    lat_ms: float | None = None
    err_rate: float | None = None
    share: float = 1.0
    for_s: float | None = None


@dataclass(frozen=True, slots=True)
class FaultOutcome:
    """A fault in force: its record, and how long putting it in force took."""

    fault: Fault
    effective_ms: float
    sidecars: int
    instances: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The JSON that `meshdemo fault -o json` prints."""
        return {
            **self.fault.model_dump(mode="json"),
            "effective_ms": round(self.effective_ms, 2),
            "sidecars": self.sidecars,
            "instances": list(self.instances),
        }


def request(
    *,
    lat_ms: float | None = None,
    err_rate: float | None = None,
    service: str | None = None,
    version: str | None = None,
    instance: str | None = None,
    route: str | None = None,
    caller: str | None = None,
    at: str | None = None,
    share: float | None = None,
    for_s: float | None = None,
    crash: bool = False,
    hang: bool = False,
) -> FaultRequest:
    """The request that these options make; BadInput (one line: what is allowed) where they make none.

    Options not given are None. Whether the named service, version and instance exist is checked by
    `resolve`, which needs the mesh.
    """
    if at not in {None, "app", "mesh"}:
        raise BadInput(f"--at {at!r}: allowed is app or mesh")
    if lat_ms is not None and not 0 <= lat_ms <= MAX_LATENCY_MS:
        raise BadInput(f"--lat {lat_ms:g}: a latency is 0 to {MAX_LATENCY_MS:.0f} (ms)")
    if err_rate is not None and not 0 <= err_rate <= 1:
        raise BadInput(f"--err {err_rate:g}: an error share is 0 to 1")
    if share is not None and not 0 <= share <= 1:
        raise BadInput(f"--share {share:g}: a share of requests is 0 to 1")
    if for_s is not None and not 0 < for_s < math.inf:
        raise BadInput(f"--for {for_s:g}: a duration is more than zero")
    if route is not None and not route.startswith("/"):
        raise BadInput(f"--route {route!r}: a route is a path prefix that starts with '/'")
    if crash or hang:
        return _process_request(
            crash, hang, lat_ms=lat_ms, err_rate=err_rate, route=route, caller=caller, at=at, share=share,
            for_s=for_s, service=service, version=version, instance=instance,
        )  # fmt: skip
    place: Literal["app", "mesh"] = "mesh" if at == "mesh" else "app"
    for option, value in (("--route", route), ("--caller", caller), ("--share", share)):
        if place == "app" and value is not None:
            raise BadInput(f"{option} {value}: allowed with --at mesh only; the app breaks for everyone")
    if share is not None and not lat_ms:
        raise BadInput(f"--share {share:g}: it says which share of requests gets the latency, so give --lat")
    if lat_ms is None and err_rate is None:
        raise BadInput("nothing to break: give --lat MS, --err SHARE, --crash or --hang")
    if not (lat_ms and share != 0) and not err_rate:
        raise BadInput("nothing to break: a latency of 0 and no errors; `meshdemo fault clear` ends faults")
    return FaultRequest(
        place, "degrade", service, version, instance, route, caller, lat_ms, err_rate,
        1.0 if share is None else share, for_s,
    )  # fmt: skip


def _process_request(
    crash: bool,
    hang: bool,
    *,
    service: str | None,
    version: str | None,
    instance: str | None,
    **others: float | str | None,
) -> FaultRequest:
    option = "--crash" if crash else "--hang"
    names = {"lat_ms": "--lat", "err_rate": "--err", "for_s": "--for"}
    given = [names.get(name, f"--{name}") for name, value in others.items() if value is not None]
    if crash and hang:
        given.append("--hang")
    if given:
        raise BadInput(
            f"{option} with {', '.join(given)}: allowed beside it are --service, --version and --instance"
        )
    return FaultRequest("process", "crash" if crash else "hang", service, version, instance)


@dataclass(frozen=True, slots=True)
class Target:
    """What a request comes down to in a running mesh."""

    service: str
    versions: tuple[str, ...]
    instances: tuple[Instance, ...]


def resolve(asked: FaultRequest, app: App, instances: Sequence[Instance]) -> Target:
    """The service, versions and instances that a request means; BadInput names what there is instead."""
    by_id = {one.id: one for one in instances}
    if asked.instance is not None and asked.instance not in by_id:
        raise BadInput(f"no instance '{asked.instance}'; there are: {', '.join(sorted(by_id)) or 'none'}")
    only = by_id[asked.instance] if asked.instance is not None else None
    service = asked.service
    if service is None:
        service = only.service if only else DEFAULT_SERVICE
    if service not in app.services:
        hint = "" if asked.service is not None else "name one with --service; "
        raise BadInput(f"no service '{service}'; {hint}there are: {', '.join(app.services)}")
    if asked.caller is not None:
        from meshdemo.apps.model import GATEWAY

        callers = (*app.services, GATEWAY)
        if asked.caller not in callers:
            raise BadInput(f"no caller '{asked.caller}'; there are: {', '.join(callers)}")
    of_service = [one for one in instances if one.service == service]
    if only is not None and only.service != service:
        own = ", ".join(one.id for one in of_service) or "none"
        raise BadInput(f"'{only.id}' is an instance of {only.service}; those of {service} are: {own}")
    running = tuple(dict.fromkeys(one.version for one in of_service))
    if asked.version is not None and asked.version not in running:
        there = ", ".join(running) or "none"
        raise BadInput(f"{service} runs no version '{asked.version}'; there are: {there}")
    if only is not None and asked.version not in {None, only.version}:
        raise BadInput(f"'{only.id}' runs version {only.version}, not {asked.version}")
    meant = [
        one for one in of_service if asked.version in {None, one.version} and asked.instance in {None, one.id}
    ]
    if not meant:
        raise BadInput(f"{service} has no instance that runs; `meshdemo status` shows what does")
    return Target(service, tuple(dict.fromkeys(one.version for one in meant)), tuple(meant))


def inject(runtime: Runtime, asked: FaultRequest, clock: Callable[[], float] = time.time) -> FaultOutcome:
    """Put a fault in force; returns when it is. Raises MeshdemoError, then nothing has changed."""
    target = resolve(asked, runtime.app(), runtime.instances())
    if asked.at == "mesh":
        return _inject_mesh(runtime, asked, target)
    if asked.at == "process":
        return _inject_process(runtime, asked, target, clock)
    return _inject_app(runtime, asked, target, clock)


def _inject_mesh(runtime: Runtime, asked: FaultRequest, target: Target) -> FaultOutcome:
    fault, effect = runtime.control().add_fault(
        at="mesh", service=target.service, version=asked.version, instance=asked.instance, route=asked.route,
        caller=asked.caller, lat_ms=asked.lat_ms or 0, err_rate=asked.err_rate or 0, share=asked.share,
        for_s=asked.for_s,
    )  # fmt: skip
    ids = tuple(one.id for one in target.instances)
    return FaultOutcome(fault, effect.effective_ms, effect.sidecars, ids)


def _inject_process(
    runtime: Runtime, asked: FaultRequest, target: Target, clock: Callable[[], float]
) -> FaultOutcome:
    # Without --instance any copy will do; one that takes traffic makes the better demonstration.
    victim = max(target.instances, key=lambda one: one.ready)
    started_at = clock()
    (runtime.crash if asked.kind == "crash" else runtime.hang)(victim.id)
    effective_ms = (clock() - started_at) * 1000
    fault, _ = runtime.control().add_fault(
        at="process", kind=asked.kind, service=target.service, version=victim.version, instance=victim.id,
        started_at=started_at,
    )  # fmt: skip
    return FaultOutcome(fault, effective_ms, 0, (victim.id,))


def _inject_app(
    runtime: Runtime, asked: FaultRequest, target: Target, clock: Callable[[], float]
) -> FaultOutcome:
    """Roll the fault out, and record it as soon as the first instance that carries it takes traffic.

    Recorded later, watch could find the harm before it knows of the fault, and when it began.
    """
    fault_id = f"f-{secrets.token_hex(3)}"
    asked_at = clock()
    env = _env(asked.lat_ms, asked.err_rate)
    before = {one.id: one.revision for one in target.instances}
    done: list[str] = []
    only = {asked.instance}  # and the one that was made in its place, where a runtime does that
    fault: Fault | None = None

    def roll_out() -> None:
        for version in target.versions:
            rolled = runtime.set_env(
                target.service, version, dict(env), reason=f"fault {fault_id}", instance=asked.instance,
                expires_at=asked_at + asked.for_s if asked.for_s else None, fault_id=fault_id,
            )  # fmt: skip
            done.append(version)
            if rolled.instance is not None:
                only.add(rolled.instance)

    def meant() -> list[Instance]:
        return [
            one
            for one in runtime.instances()
            if one.service == target.service
            and one.version in target.versions
            and (asked.instance is None or one.id in only)
        ]

    def carriers() -> list[Instance]:
        return [one for one in meant() if one.ready and one.revision != before.get(one.id)]

    def record(carrying: Sequence[Instance]) -> Fault:
        revisions = {one.revision for one in carrying}
        return (
            runtime.control()
            .add_fault(
                at="app", service=target.service, version=asked.version,
                instance=carrying[0].id if asked.instance and carrying else asked.instance,
                lat_ms=asked.lat_ms or 0, err_rate=asked.err_rate or 0, started_at=clock(),
                revision=revisions.pop() if len(revisions) == 1 else None, for_s=asked.for_s,
                fault_id=fault_id,
            )
            .fault
        )  # fmt: skip

    with ThreadPoolExecutor(1) as pool:
        rolling = pool.submit(roll_out)
        try:
            while fault is None and not wait([rolling], timeout=_CARRIER_POLL_S).done:
                if carrying := carriers():
                    fault = record(carrying)
            rolling.result()
            fault = fault or record(carriers())
            ids = tuple(one.id for one in meant())
        except BaseException:
            wait([rolling])
            for version in done:
                runtime.set_env(
                    target.service, version, _baseline(runtime, target.service, version, asked.instance, env),
                    reason=f"undo of fault {fault_id}", instance=asked.instance,
                )  # fmt: skip
            if fault is not None:
                runtime.control().clear_fault(fault_id)
            raise
    return FaultOutcome(fault, (clock() - asked_at) * 1000, 0, ids)


def _env(lat_ms: float | None, err_rate: float | None) -> dict[str, str | None]:
    env: dict[str, str | None] = {}
    if lat_ms is not None:
        env[LATENCY_VARIABLE] = f"{lat_ms:g}"
    if err_rate is not None:
        env[ERROR_VARIABLE] = f"{err_rate:g}"
    return env


@dataclass(frozen=True, slots=True)
class Cleared:
    """Faults that were ended, and what putting that in force took."""

    faults: tuple[Fault, ...]
    effective_ms: float
    sidecars: int

    def to_json(self) -> dict[str, Any]:
        """The JSON that `meshdemo fault clear -o json` prints."""
        return {
            "cleared": [fault.model_dump(mode="json") for fault in self.faults],
            "effective_ms": round(self.effective_ms, 2),
            "sidecars": self.sidecars,
        }


def clear(
    runtime: Runtime, fault_id: str | None = None, clock: Callable[[], float] = time.monotonic
) -> Cleared:
    """End one fault, or all of them; returns when callers feel nothing of it any more.

    A fault at the app ends with a new revision of the workload (unless a remedy has rolled it back
    already), a hung process goes on, and a crashed one is back by its supervisor anyway.

    Raises:
        BadInput: there is no fault of this id.
    """
    client = runtime.control()
    faults = client.faults()
    ended = tuple(fault for fault in faults if fault_id in {None, fault.id})
    if fault_id is not None and not ended:
        known = ", ".join(fault.id for fault in faults) or "none"
        raise BadInput(f"no fault '{fault_id}'; in force: {known}")
    left = [fault for fault in faults if fault not in ended]
    effective_ms, sidecars = 0.0, 0
    for fault in ended:
        started = clock()
        if fault.at == "app":
            _restore(runtime, fault, left)
        elif fault.kind == "hang":
            _resume(runtime, fault)
        effect = client.clear_fault(fault.id).effect
        effective_ms += effect.effective_ms if fault.at == "mesh" else (clock() - started) * 1000
        sidecars = max(sidecars, effect.sidecars)
    return Cleared(ended, effective_ms, sidecars)


def _resume(runtime: Runtime, fault: Fault) -> None:
    if fault.instance is None or all(one.id != fault.instance for one in runtime.instances()):
        return  # replaced since
    runtime.unhang(fault.instance)


def _restore(runtime: Runtime, fault: Fault, left: Sequence[Fault]) -> None:
    """Give a workload the environment that it has without this fault (but with those that are left)."""
    versions = dict.fromkeys(
        one.version
        for one in runtime.instances()
        if one.service == fault.service
        and fault.version in {None, one.version}
        and fault.instance in {None, one.id}
    )
    for version in versions:
        mine = _env(fault.lat_ms or None, fault.err_rate or None)
        if fault.instance is None:
            # A workload that does not carry the fault any more was rolled back by watch: leave it as it is.
            current = runtime.revisions(fault.service, version)[-1].env
            mine = {name: value for name, value in mine.items() if current.get(name) == value}
        env = _baseline(runtime, fault.service, version, fault.instance, mine)
        for other in left:
            same = other.at == "app" and other.service == fault.service and other.instance == fault.instance
            if same and other.version in {None, version}:
                others = _env(other.lat_ms or None, other.err_rate or None)
                env.update({name: value for name, value in others.items() if name in env})
        if env:
            runtime.set_env(
                fault.service, version, env, reason=f"end of fault {fault.id}", instance=fault.instance
            )


def _baseline(
    runtime: Runtime, service: str, version: str, instance: str | None, names: Iterable[str]
) -> dict[str, str | None]:
    """What these variables are without a fault: as in the app file; for one instance, as its workload has."""
    if instance is not None:
        env: Mapping[str, str] = runtime.revisions(service, version)[-1].env
    else:
        env = runtime.app().services[service].versions[version].env
    return {name: env.get(name) for name in names}
