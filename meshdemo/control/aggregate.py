"""Samples into signals: what happened in a window, by service, version, instance, route or caller. Pure.

Which samples belong to a window: those that end in its `window_s` seconds, counted back from the newest
sample. Each sample counts whole, for requests cannot be told apart within one, so a window is never
shorter than the longest interval at which its sidecars report.

Requests a second: requests over the time that the scope's samples cover together. A mesh that started three
seconds ago is so not divided by ten; nor is an instance that was replaced halfway counted as if its load had
come twice. Samples that stick out of the window at its start count in it with the part of their time that
lies within: three samples of a second may end within a window of two.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from meshdemo.apps.model import GATEWAY
from meshdemo.control.signals import Cell, Histogram, Sample, Signal

if TYPE_CHECKING:
    from meshdemo.control.client import EdgeRow, SignalRow
    from meshdemo.control.model import Intent, MeshState

By = Literal["service", "version", "instance", "route", "caller"]
BY: tuple[By, ...] = get_args(By)

# No sample is taken to cover more than this, whatever its stamps say.
_LONGEST_S = 60.0


@dataclass(frozen=True, slots=True)
class Scope:
    """An instance that should be spoken of, whether or not anything was heard of it."""

    instance: str
    service: str
    version: str
    silent: bool = False
    ejected: bool = False


def scopes_of(mesh: MeshState, intent: Intent, silent: Callable[[str], bool]) -> list[Scope]:
    """All instances of the mesh. `silent`: does the sidecar of this instance report nothing?"""
    ejected = intent.ejected
    return [Scope(i.id, i.service, i.version, silent(i.id), i.id in ejected) for i in mesh.instances]


@dataclass(frozen=True, slots=True)
class Window:
    """The samples of a window and what it covers."""

    samples: Sequence[Sample]
    start: float
    end: float

    def share_within(self, sample: Sample) -> float:
        """The share of the sample's time that lies in the window (0..1)."""
        length = sample.end - sample.start
        return min(1.0, (sample.end - self.start) / length) if length > 0 else 1.0


@dataclass(slots=True)
class _Sum:
    """A signal while it is being added up."""

    requests: int = 0
    requests_within: float = 0.0  # of them, as far as they can be told to lie in the window
    failures: int = 0
    denied: int = 0
    refused: int = 0
    mirrored: int = 0
    mirrored_failures: int = 0
    connections: int = 0
    received: int = 0
    sent: int = 0
    outlier_ejected: int = 0
    overdue: int = 0
    effective_requests: int = 0
    effective_failures: int = 0
    latency: dict[int, int] = field(default_factory=dict)
    failed_latency: dict[int, int] = field(default_factory=dict)
    covered: list[tuple[float, float]] = field(default_factory=list)
    scopes: list[Scope] = field(default_factory=list)

    def add(self, cell: Cell, share_within: float) -> None:
        """Add an inbound cell, of whose sample such a share lies within the window."""
        self.requests += cell.requests
        self.requests_within += cell.requests * share_within
        self.failures += cell.failures
        self.denied += cell.denied
        self.refused += cell.refused
        self.mirrored += cell.mirrored
        self.mirrored_failures += cell.mirrored_failures
        self.connections += cell.connections
        self.received += cell.received
        self.sent += cell.sent
        _add(self.latency, cell.latency.counts)
        _add(self.failed_latency, cell.failed_latency.counts)

    def add_effective(self, cell: Cell) -> None:
        """Add an outbound cell: what a caller got in the end. A breaker refuses there, before the service."""
        self.effective_requests += cell.requests
        self.effective_failures += cell.failures
        self.refused += cell.refused


Key = tuple[str, str | None, str | None, str | None, str | None]  # service, version, instance, route, caller


def window(samples: Iterable[Sample], *, now: float, window_s: float, stale_after_s: float = 3.0) -> Window:
    """The samples that belong to the window of `window_s` seconds up to the newest one.

    If the newest is older than `stale_after_s`, nobody reports any more and the window ends `now`.
    """
    kept = list(samples)
    newest = max((sample.end for sample in kept), default=now)
    end = newest if now - newest <= max(stale_after_s, 2.5 * _interval(kept)) else now
    length = max(window_s, _interval(kept))
    start = end - length
    return Window([sample for sample in kept if start < sample.end <= end], start, end)


def _interval(samples: Sequence[Sample]) -> float:
    """The longest interval at which sidecars lately report."""
    last = {sample.instance: sample for sample in samples}
    return max((min(sample.end - sample.start, _LONGEST_S) for sample in last.values()), default=0.0)


def signals(
    samples: Iterable[Sample],
    *,
    by: By,
    now: float,
    window_s: float,
    scopes: Collection[Scope] = (),
    service: str | None = None,
) -> list[Signal]:
    """What happened in the last `window_s` seconds, a signal for each scope, in order of name.

    Args:
        samples: in order of time; older ones than the window needs do no harm.
        scopes: the instances that there should be; a scope without requests gets a signal too.
        service: of this service alone.
    """
    within = window(samples, now=now, window_s=window_s)
    sums: defaultdict[Key, _Sum] = defaultdict(_Sum)
    for scope in scopes:
        key = _key_of_instance(by, scope.service, scope.version, scope.instance)
        if key is not None:
            sums[key].scopes.append(scope)
    last: dict[str, Sample] = {}
    for sample in within.samples:
        last[sample.instance] = sample
        key = _key_of_instance(by, sample.service, sample.version, sample.instance)
        if key is not None:
            sums[key].covered.append((sample.start, sample.end))
        share = within.share_within(sample)
        for cell in sample.cells:
            if cell.inbound:
                if by == "caller" and not cell.peer and (cell.received or cell.sent):
                    continue  # bytes are not told apart by caller
                if by == "route" and (cell.connections or cell.received or cell.sent):
                    continue  # nor have connections a route
                sums[_key_of_inbound(by, sample, cell)].add(cell, share)
            elif cell.peer and cell.requests and (key := _key_of_outbound(by, sample, cell)) is not None:
                sums[key].add_effective(cell)
    for sample in last.values():
        key = _key_of_instance(by, sample.service, sample.version, sample.instance)
        if key is not None:
            sums[key].overdue += sample.overdue
    _spread_outliers(by, outliers(last.values()), sums)
    covered = _covered_by_service(within) if by in ("route", "caller") else {}
    return [
        _signal(key, added, within, added.covered or covered.get(key[0], ()))
        for key, added in sorted(sums.items(), key=lambda item: tuple(part or "" for part in item[0]))
        if service is None or key[0] == service
    ]


def outliers(last: Iterable[Sample]) -> dict[tuple[str, str], int]:
    """By service and version: the instances that outlier detection keeps out, by the caller that ejects most.

    Args:
        last: the newest sample of each caller.
    """
    found: dict[tuple[str, str], int] = {}
    for sample in last:
        for cell in sample.cells:
            if cell.ejected:
                key = (cell.peer, cell.version)
                found[key] = max(found.get(key, 0), cell.ejected)
    return found


def _spread_outliers(by: By, found: Mapping[tuple[str, str], int], sums: Mapping[Key, _Sum]) -> None:
    """Say it of each scope. Callers report how many they keep out, not whom: it is those that failed most."""
    for (service, version), n in found.items():
        if by == "instance":
            failing = [
                added for key, added in sums.items() if key[:2] == (service, version) and added.failures
            ]
            failing.sort(key=lambda added: added.failures / max(1, added.requests), reverse=True)
            for added in failing[:n]:
                added.outlier_ejected = 1
        elif by in ("service", "version"):
            wanted = (service, version if by == "version" else None)
            for key, added in sums.items():
                if key[:2] == wanted:
                    added.outlier_ejected += n


def edges(samples: Iterable[Sample], *, now: float, window_s: float) -> list[EdgeRow]:
    """Who called whom, as the sidecars of the called saw it; secured: every request came over mutual TLS.

    `identity` is the caller's as the called saw it, `service_identity` that of the called as its caller saw
    it: each side vouches for the other.
    """
    within = window(samples, now=now, window_s=window_s)
    sums: dict[tuple[str, str], _Sum] = {}
    secured: dict[tuple[str, str], tuple[int, str]] = {}
    called: dict[tuple[str, str], str] = {}
    for sample in within.samples:
        for cell in sample.cells:
            if not cell.inbound and cell.identity:
                called[sample.service, cell.peer] = cell.identity
            if cell.inbound and (cell.requests or cell.denied or cell.connections):
                key = (cell.peer, sample.service)
                sums.setdefault(key, _Sum()).add(cell, within.share_within(sample))
                before, identity = secured.get(key, (0, ""))
                secured[key] = (before + cell.secured, cell.identity or identity)
    covered = _covered_by_service(within)
    rows: list[EdgeRow] = []
    for key, added in sorted(sums.items()):
        signal = _signal((key[1], None, None, None, key[0]), added, within, covered[key[1]])
        rows.append(
            {
                "caller": key[0],
                "service": key[1],
                "secured": 0 < signal.requests + signal.denied + signal.connections == secured[key][0],
                "identity": secured[key][1],
                "service_identity": called.get(key, ""),
                "rps": round(signal.rps, 3),
                "success_rate": signal.success_rate,
                "p50_ms": _rounded(signal.latency.quantile_ms(0.5)),
                "p99_ms": _rounded(signal.latency.quantile_ms(0.99)),
                "requests": signal.requests,
                "denied": signal.denied,
                "connections": signal.connections,
            }
        )
    return rows


def row(signal: Signal) -> SignalRow:
    """A signal as a line of `stat`: the keys of its scope, and the figures."""
    content: SignalRow = {
        "service": signal.service,
        "rps": round(signal.rps, 3),
        "success_rate": signal.success_rate,
        "effective_success_rate": signal.effective_success_rate,
        "p50_ms": _rounded(signal.latency.quantile_ms(0.5)),
        "p95_ms": _rounded(signal.latency.quantile_ms(0.95)),
        "p99_ms": _rounded(signal.latency.quantile_ms(0.99)),
        "requests": signal.requests,
        "failures": signal.failures,
        "overdue": signal.overdue,
        "denied": signal.denied,
        "refused": signal.refused,
        "outlier_ejected": signal.outlier_ejected,
        "mirrored": signal.mirrored,
        "mirrored_failures": signal.mirrored_failures,
        "connections": signal.connections,
        "received_bytes": signal.received,
        "sent_bytes": signal.sent,
        "silent": signal.silent,
        "ejected": signal.ejected,
        "window_s": round(signal.end - signal.start, 3),
    }
    if signal.version is not None:
        content["version"] = signal.version
    if signal.instance is not None:
        content["instance"] = signal.instance
    if signal.route is not None:
        content["route"] = signal.route
    if signal.caller is not None:
        content["caller"] = signal.caller
    return content


# -- within -----------------------------------------------------------------------------------------------


def _key_of_instance(by: By, service: str, version: str, instance: str) -> Key | None:
    """The scope that an instance is part of. None where scopes are parts of an instance's requests, and for
    the gateway, which nobody in the mesh calls."""
    if service == GATEWAY:
        return None
    match by:
        case "service":
            return (service, None, None, None, None)
        case "version":
            return (service, version, None, None, None)
        case "instance":
            return (service, version, instance, None, None)
    return None


def _key_of_inbound(by: By, sample: Sample, cell: Cell) -> Key:
    match by:
        case "route":
            return (sample.service, None, None, cell.route, None)
        case "caller":
            return (sample.service, None, None, None, cell.peer)
        case "version":
            return (sample.service, sample.version, None, None, None)
        case "instance":
            return (sample.service, sample.version, sample.instance, None, None)
    return (sample.service, None, None, None, None)


def _key_of_outbound(by: By, sample: Sample, cell: Cell) -> Key | None:
    """The scope that was called; None where the caller cannot know it (which instance)."""
    match by:
        case "service":
            return (cell.peer, None, None, None, None)
        case "version":
            return (cell.peer, cell.version, None, None, None)
        case "route":
            return (cell.peer, None, None, cell.route, None)
        case "caller":
            return (cell.peer, None, None, None, sample.service)
    return None


def _covered_by_service(within: Window) -> dict[str, list[tuple[float, float]]]:
    spans: dict[str, list[tuple[float, float]]] = {}
    for sample in within.samples:
        spans.setdefault(sample.service, []).append((sample.start, sample.end))
    return spans


def _signal(key: Key, added: _Sum, within: Window, covered: Sequence[tuple[float, float]]) -> Signal:
    length = _union([(max(start, within.start), end) for start, end in covered])
    service, version, instance, route, caller = key
    return Signal(
        service=service,
        version=version,
        instance=instance,
        route=route,
        caller=caller,
        start=within.end - length,
        end=within.end,
        requests=added.requests,
        requests_within=added.requests_within,
        failures=added.failures,
        latency=Histogram(added.latency),
        failed_latency=Histogram(added.failed_latency),
        overdue=added.overdue,
        denied=added.denied,
        refused=added.refused,
        outlier_ejected=added.outlier_ejected,
        mirrored=added.mirrored,
        mirrored_failures=added.mirrored_failures,
        connections=added.connections,
        received=added.received,
        sent=added.sent,
        silent=bool(added.scopes) and all(scope.silent for scope in added.scopes),
        ejected=bool(added.scopes) and all(scope.ejected for scope in added.scopes),
        effective_requests=added.effective_requests if instance is None else None,
        effective_failures=added.effective_failures if instance is None else None,
    )


def _union(spans: Sequence[tuple[float, float]]) -> float:
    """Seconds covered by at least one of the spans."""
    length, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length


def _add(into: dict[int, int], counts: Mapping[int, int]) -> None:
    for index, n in counts.items():
        into[index] = into.get(index, 0) + n


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
