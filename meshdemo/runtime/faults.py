"""Faults from request to effect: what may be asked, putting it in force, and ending it.

A fault lives in one of three places: in the sidecars (`at` mesh: the control plane alone), in the
environment of a workload (`at` app: a new revision, which the runtime rolls out), or in a process that is
killed or stopped (`at` process: the runtime). Whatever the place, the control plane keeps the record, so
that listing, clearing, watch and report know all of them. The record is made before anything is done, as
`starting`, and ended after everything is undone: whatever dies in between, no fault is in force that nobody
lists.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from meshdemo.errors import BadInput, MeshdemoError
from meshdemo.limits import MAX_FAULT_S, MAX_LATENCY_MS

if TYPE_CHECKING:
    from meshdemo.apps.model import App
    from meshdemo.control.model import Fault, Instance
    from meshdemo.runtime.base import Runtime

MIN_SHARE = 1e-6  # Envoy counts in millionths
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
    for option, value in (("--err", err_rate), ("--share", share)):
        if value and value < MIN_SHARE:
            raise BadInput(f"{option} {value:g}: the least share above 0 is {MIN_SHARE:f}, one in a million")
    if for_s is not None and not 0 < for_s <= MAX_FAULT_S:
        raise BadInput(f"--for {for_s:g} s: a duration is more than 0 s and at most 365 days")
    if route is not None and not route.startswith("/"):
        raise BadInput(f"--route {route!r}: a route is a path prefix that starts with '/'")
    if crash or hang:
        return _process_request(
            crash, hang, lat_ms=lat_ms, err_rate=err_rate, route=route, caller=caller, at=at, share=share,
            for_s=for_s, service=service, version=version, instance=instance,
        )  # fmt: skip
    place: Literal["app", "mesh"] = "mesh" if at == "mesh" else "app"
    for option, given in (("--route", route), ("--caller", caller), ("--share", share)):
        if place == "app" and given is not None:
            raise BadInput(f"{option} {given}: allowed with --at mesh only; the app breaks for everyone")
    if share is not None and not lat_ms:
        raise BadInput(f"--share {share:g}: it says which share of requests gets the latency, so give --lat")
    if lat_ms is None and err_rate is None:
        raise BadInput("nothing to break: give --lat MS, --err SHARE, --crash or --hang")
    if lat_ms and share == 0 and not err_rate:
        raise BadInput("nothing to break: with --share 0 no request gets the latency; give more, up to 1")
    if not lat_ms and not err_rate:
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
    versions = tuple(dict.fromkeys(one.version for one in meant))
    if asked.at == "app":
        _check_breakable(app, service, versions)
    return Target(service, versions, tuple(meant))


def _check_breakable(app: App, service: str, versions: Sequence[str]) -> None:
    """Raises BadInput if a workload does not read the variables, and so would only be restarted."""
    for version in versions:
        program = app.services[service].versions.get(version)
        if program is None or not program.honours_faults:
            raise BadInput(
                f"{service} {version} does not honour {LATENCY_VARIABLE} and {ERROR_VARIABLE} (if it does, "
                "say `faults: true` in the app file): break it in its sidecars, with --at mesh"
            )


def inject(
    runtime: Runtime,
    asked: FaultRequest,
    clock: Callable[[], float] = time.time,
    *,
    stays: Callable[[], None] = lambda: None,
) -> FaultOutcome:
    """Put a fault in force; returns when it is. Raises MeshdemoError, then nothing has changed.

    Args:
        stays: called when the fault is in force, as the last moment at which what is raised still undoes it.
    """
    target = resolve(asked, runtime.app(), runtime.instances())
    if asked.at == "mesh":
        return _inject_mesh(runtime, asked, target, stays)
    if asked.at == "process":
        return _inject_process(runtime, asked, target, clock, stays)
    return _inject_app(runtime, asked, target, clock, stays)


def _inject_mesh(
    runtime: Runtime, asked: FaultRequest, target: Target, stays: Callable[[], None]
) -> FaultOutcome:
    fault_id = _new_id()  # known before it is asked for, so that one of which no answer comes can be ended
    with _undone(runtime, fault_id):
        fault, effect = runtime.control().add_fault(
            at="mesh", service=target.service, version=asked.version, instance=asked.instance,
            route=asked.route, caller=asked.caller, lat_ms=asked.lat_ms or 0, err_rate=asked.err_rate or 0,
            share=asked.share, for_s=asked.for_s, fault_id=fault_id,
        )  # fmt: skip
        stays()
    ids = tuple(one.id for one in target.instances)
    return FaultOutcome(fault, effect.effective_ms, effect.sidecars, ids)


def _inject_process(
    runtime: Runtime,
    asked: FaultRequest,
    target: Target,
    clock: Callable[[], float],
    stays: Callable[[], None],
) -> FaultOutcome:
    # Without --instance any copy will do; one that takes traffic makes the better demonstration.
    victim = max(target.instances, key=lambda one: one.ready)
    fault_id = _new_id()

    def record(started_at: float, *, starting: bool) -> Fault:
        return (
            runtime.control()
            .add_fault(
                at="process", kind=asked.kind, service=target.service, version=victim.version,
                instance=victim.id, started_at=started_at, fault_id=fault_id, starting=starting,
            )
            .fault
        )  # fmt: skip

    def undo() -> None:
        if asked.kind == "hang":
            runtime.unhang(victim.id)

    with _undone(runtime, fault_id, undo):
        record(clock(), starting=True)
        started_at = clock()
        (runtime.crash if asked.kind == "crash" else runtime.hang)(victim.id)
        effective_ms = (clock() - started_at) * 1000
        fault = record(started_at, starting=False)
        stays()
    return FaultOutcome(fault, effective_ms, 0, (victim.id,))


def _inject_app(
    runtime: Runtime,
    asked: FaultRequest,
    target: Target,
    clock: Callable[[], float],
    stays: Callable[[], None],
) -> FaultOutcome:
    """Roll the fault out, and record it as begun when the first instance that carries it takes traffic.

    Recorded later, watch could find the harm before it knows of the fault, and when it began.
    """
    fault_id = _new_id()
    asked_at = clock()
    env = _env(asked.lat_ms or 0, asked.err_rate or 0)
    before = {one.id: one.revision for one in target.instances}
    given_up = threading.Event()
    only = {asked.instance}  # and the one that was made in its place, where a runtime does that
    fault: Fault | None = None

    def roll_out() -> None:
        for version in target.versions:
            if given_up.is_set():
                return
            rolled = runtime.set_env(
                target.service, version, dict(env), reason=f"fault {fault_id}", instance=asked.instance,
                expires_at=asked_at + asked.for_s if asked.for_s else None, fault_id=fault_id,
            )  # fmt: skip
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

    def record(carrying: Sequence[Instance], *, starting: bool = False) -> Fault:
        revisions = {one.revision for one in carrying}
        return (
            runtime.control()
            .add_fault(
                at="app", service=target.service, version=asked.version,
                instance=carrying[0].id if asked.instance and carrying else asked.instance,
                lat_ms=asked.lat_ms or 0, err_rate=asked.err_rate or 0, started_at=clock(),
                revision=revisions.pop() if len(revisions) == 1 else None, for_s=asked.for_s,
                fault_id=fault_id, starting=starting,
            )
            .fault
        )  # fmt: skip

    with ThreadPoolExecutor(1) as pool:
        rolling: Future[None] | None = None

        def undo() -> None:
            given_up.set()
            if rolling is not None:
                wait([rolling])
                runtime.end_faults([fault_id], reason=f"undo of fault {fault_id}")

        with _undone(runtime, fault_id, undo):
            record((), starting=True)
            rolling = pool.submit(roll_out)
            while fault is None and not wait([rolling], timeout=_CARRIER_POLL_S).done:
                if carrying := carriers():
                    fault = record(carrying)
            rolling.result()
            fault = fault or record(carriers())
            ids = tuple(one.id for one in meant())
            stays()
    return FaultOutcome(fault, (clock() - asked_at) * 1000, 0, ids)


@contextmanager
def _undone(runtime: Runtime, fault_id: str, undo: Callable[[], None] = lambda: None) -> Iterator[None]:
    """What raises in the block is raised again after the fault is undone, and then its record ended.

    A fault that cannot be undone stays on record, to be cleared later. That one stays is said at the end of
    the block, not here: an interrupt on the way out of it would undo nothing.
    """
    try:
        yield
    except BaseException:
        with suppress(MeshdemoError):
            undo()
            runtime.control().clear_fault(fault_id)
        raise


def _new_id() -> str:
    return f"f-{secrets.token_hex(3)}"


def _env(lat_ms: float, err_rate: float) -> dict[str, str | None]:
    """The variables that a fault sets: those in which it harms."""
    env: dict[str, str | None] = {}
    if lat_ms:
        env[LATENCY_VARIABLE] = f"{lat_ms:g}"
    if err_rate:
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

    Faults at the app end with a new revision of the workload, in which those that are left stay as they are
    (unless a remedy has rolled it back already), a hung process goes on, and a crashed one is back by its
    supervisor anyway. With all of them end faults in an app's environment that are on no record.

    Raises:
        BadInput: there is no fault of this id.
    """
    client = runtime.control()
    faults = client.faults()
    ended = tuple(fault for fault in faults if fault_id in {None, fault.id})
    if fault_id is not None and not ended:
        known = ", ".join(fault.id for fault in faults) or "none"
        raise BadInput(f"no fault '{fault_id}'; in force: {known}")
    started, effective_ms, sidecars = clock(), 0.0, 0
    in_apps = [fault.id for fault in ended if fault.at == "app"]
    if in_apps or fault_id is None:
        what = f"fault {fault_id}" if fault_id else "all faults"
        if runtime.end_faults(None if fault_id is None else in_apps, reason=f"end of {what}") or in_apps:
            effective_ms = (clock() - started) * 1000
    for fault in ended:
        started = clock()
        if fault.kind == "hang":
            _resume(runtime, fault)
            effective_ms += (clock() - started) * 1000
        with suppress(BadInput):  # its time was over just now
            effect = client.clear_fault(fault.id).effect
            effective_ms += effect.effective_ms if fault.at == "mesh" else 0
            sidecars = max(sidecars, effect.sidecars)
    return Cleared(ended, effective_ms, sidecars)


def _resume(runtime: Runtime, fault: Fault) -> None:
    if fault.instance is None or all(one.id != fault.instance for one in runtime.instances()):
        return  # replaced since
    runtime.unhang(fault.instance)
