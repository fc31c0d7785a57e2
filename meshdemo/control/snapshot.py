"""What the page shows at one moment, from what the control plane knows. Pure: values in, JSON out.

Names of the keys are read by `ui/web/main.js`. Figures are rounded to what can be seen, since the whole of it
goes to each viewer every time; a success rate is rounded down, so that a failure never disappears.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from meshdemo.control import aggregate
from meshdemo.control.goals import Goals, verdict
from meshdemo.control.model import Fault, Intent, MeshState
from meshdemo.control.render.split import effective_split
from meshdemo.control.signals import Sample, Signal

WINDOW_S = 3.0

# What is kept of a service each second, in the order in which `point` gives it.
POINT = ("time", "rps", "success_rate", "effective_success_rate", "p50_ms", "p95_ms", "p99_ms", "refused")


def snapshot(
    mesh: MeshState,
    intent: Intent,
    samples: Sequence[Sample],
    *,
    silent: Callable[[str], bool],
    now: float,
    services: Sequence[Signal] | None = None,
    goals: Goals = MappingProxyType({}),
) -> dict[str, Any]:
    """The mesh at `now`.

    Args:
        samples: those of the last seconds, oldest first.
        silent: does the sidecar of this instance report nothing?
        services: the signals by service, if they are known already (`by_service`).
        goals: what the objectives ask of each service; what misses them says so (`wrong`).
    """
    scopes = aggregate.scopes_of(mesh, intent, silent)
    if services is None:
        services = by_service(samples, scopes, now)
    of_service = {signal.service: signal for signal in services}
    of_instance = {
        signal.instance: signal
        for signal in aggregate.signals(samples, by="instance", now=now, window_s=WINDOW_S, scopes=scopes)
    }
    instances: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for instance in mesh.instances:
        signal = of_instance[instance.id]
        row = {**_judged(signal, goals), "id": instance.id, "ready": instance.ready}
        if instance.revision != 1:
            row["revision"] = instance.revision
        instances.setdefault((instance.service, instance.version), []).append(row)
    outliers = _outliers(samples, now)
    return {
        "time": round(now, 3),
        "mesh": mesh.mesh,
        "app": mesh.app.name,
        "revision": intent.revision,
        "front": mesh.app.front,
        "load": [name for name, service in mesh.app.services.items() if service.load],
        "load_rps": _load(mesh, intent),
        "window_s": WINDOW_S,
        "services": [
            {
                "name": name,
                "protocol": service.protocol,
                **({"lease": intent.leases[name].by} if name in intent.leases else {}),
                **(_judged(of_service[name], goals) if name in of_service else {}),
                "versions": _versions(mesh, name, intent, instances, outliers),
            }
            for name, service in mesh.app.services.items()
        ],
        "edges": _edges(mesh, samples, now, goals),
        "routes": [
            {**_judged(signal, goals), "service": signal.service, "route": signal.route or ""}
            for signal in aggregate.signals(samples, by="route", now=now, window_s=WINDOW_S)
        ],
        "faults": [_fault(fault) for fault in intent.faults],
    }


def by_service(samples: Sequence[Sample], scopes: Collection[aggregate.Scope], now: float) -> list[Signal]:
    """The signals of all services over the page's window."""
    return aggregate.signals(samples, by="service", now=now, window_s=WINDOW_S, scopes=scopes)


def point(signal: Signal, now: float) -> tuple[float | None, ...]:
    """What the history keeps of a service; see `POINT`."""
    figures = _figures(signal)
    return (round(now, 2), *(figures.get(name) for name in POINT[1:]))


def _versions(
    mesh: MeshState,
    name: str,
    intent: Intent,
    instances: Mapping[tuple[str, str], list[dict[str, Any]]],
    outliers: Mapping[tuple[str, str], int],
) -> list[dict[str, Any]]:
    """Those that run, and those that `up` would have started; each with its share of the traffic in %."""
    service = mesh.app.services[name]
    there = [version for of, version in instances if of == name]
    known = dict.fromkeys(
        [*(v for v, workload in service.versions.items() if workload.initial or v in there), *there]
    )
    rules = intent.traffic.get(name)
    split = {}
    if rules is not None:
        split = effective_split(service, rules, mesh.ready_by_version(name, intent.ejected))
    total = sum(split.values())
    return [
        {
            "version": version,
            "weight": round(100 * split.get(version, 0) / total) if total and len(known) > 1 else None,
            "instances": instances.get((name, version), []),
            **({"outliers": outliers[name, version]} if (name, version) in outliers else {}),
        }
        for version in known
    ]


def _outliers(samples: Sequence[Sample], now: float) -> dict[tuple[str, str], int]:
    """Instances of each version that outlier detection keeps out: the most that one caller keeps out now.

    Envoy counts them for each caller by itself, and does not say which.
    """
    newest = {sample.instance: sample for sample in samples if sample.end > now - WINDOW_S}
    return aggregate.outliers(newest.values())


def _load(mesh: MeshState, intent: Intent) -> float | None:
    """Requests/s that a load-making instance makes: what was asked for, else what it starts with."""
    if intent.load_rps is not None:
        return intent.load_rps
    for service in mesh.app.services.values():
        for workload in service.versions.values() if service.load else ():
            with contextlib.suppress(KeyError, ValueError):
                return float(workload.env["RPS"])
    return None


def _edges(mesh: MeshState, samples: Sequence[Sample], now: float, goals: Goals) -> list[dict[str, Any]]:
    """Who called whom, and who might: a pair that the app file names stands here without requests too."""
    rows: dict[tuple[str, str], dict[str, Any]] = {
        (caller, callee): {"caller": caller, "service": callee, "requests": 0, "rps": 0.0}
        for caller, service in mesh.app.services.items()
        for callee in service.calls
    }
    callers = {
        (signal.caller, signal.service): signal
        for signal in aggregate.signals(samples, by="caller", now=now, window_s=WINDOW_S)
    }
    for edge in aggregate.edges(samples, now=now, window_s=WINDOW_S):
        rows[edge["caller"], edge["service"]] = {
            "caller": edge["caller"],
            "service": edge["service"],
            "secured": edge["secured"],
            "identity": edge["identity"],
            "service_identity": edge["service_identity"],
            "rps": _rate(edge["rps"]),
            "success_rate": _share(edge["success_rate"]),
            "p50_ms": _ms(edge["p50_ms"]),
            "p99_ms": _ms(edge["p99_ms"]),
            "requests": edge["requests"],
            "denied": edge["denied"],
        }
    for at, signal in callers.items():
        if at not in rows:
            continue
        row = rows[at]
        if wrong := verdict(goals.get(signal.service, ()), signal):
            row["wrong"] = wrong
        row["effective_success_rate"] = _share(signal.effective_success_rate)
        if signal.refused and signal.end > signal.start:
            row["refused"] = _rate(signal.refused / (signal.end - signal.start))
    return list(rows.values())


def _judged(signal: Signal, goals: Goals) -> dict[str, Any]:
    """A signal's figures, and what is wrong with it."""
    row = _figures(signal)
    of_service = goals.get(signal.service, ())
    if wrong := verdict(of_service, signal):
        row["wrong"] = wrong
        if wrong in ("slow", "too_slow"):
            slow = {
                goal.below_ms: signal.latency.above(goal.below_ms) for goal in of_service if goal.below_ms
            }
            limit = max(slow, key=lambda limit: slow[limit])
            row["why"] = f"{100 * slow[limit] / signal.requests:.0f} % take longer than {limit:g} ms"
    return row


def _figures(signal: Signal) -> dict[str, Any]:
    """A signal's figures; those that are nought and seldom otherwise are left out."""
    row: dict[str, Any] = {
        "requests": signal.requests,
        "rps": _rate(signal.rps),
        "success_rate": _share(signal.success_rate),
        "p50_ms": _ms(signal.latency.quantile_ms(0.5)),
        "p95_ms": _ms(signal.latency.quantile_ms(0.95)),
        "p99_ms": _ms(signal.latency.quantile_ms(0.99)),
    }
    if signal.instance is None:
        row["effective_success_rate"] = _share(signal.effective_success_rate)
    seconds = signal.end - signal.start
    for name in ("denied", "refused"):
        if (count := getattr(signal, name)) and seconds > 0:
            row[name] = _rate(count / seconds)
    for name in ("overdue", "silent", "ejected"):
        if value := getattr(signal, name):
            row[name] = value
    return row


def _fault(fault: Fault) -> dict[str, Any]:
    return fault.model_dump(mode="json", exclude_none=True, exclude_defaults=True) | {
        "at": fault.at,
        "kind": fault.kind,
    }


def _rate(value: float) -> float:
    return round(value, 2)


def _share(value: float | None) -> float | None:
    return None if value is None else math.floor(value * 1e5) / 1e5


def _ms(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
