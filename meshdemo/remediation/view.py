"""What the live dashboard of `watch` shows: one immutable snapshot, made by the controller once a second.

The renderer (`meshdemo/ui/live.py`) gets nothing but this, so drawing can never block or disturb judging,
and a snapshot can be built by hand in a test. Times are seconds since the epoch by the control plane's clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# ok: the objective holds; unknown: too few requests, or silent; violated: beyond doubt, and a person or a
# remedy is needed; healing: a remedy is under way or being verified.
Health = Literal["ok", "unknown", "violated", "healing"]

# serving: takes traffic; ejected: kept out on purpose; silent: its sidecar reports nothing (unknown, not
# healthy); starting: not ready (yet, or any more); bad: named as the cause of an open incident.
InstanceState = Literal["serving", "ejected", "silent", "starting", "bad"]

IncidentState = Literal["localising", "blocked", "acting", "verifying", "waiting", "gave_up", "healed"]


@dataclass(frozen=True, slots=True)
class Numbers:
    """Signals of one scope over the last seconds. None: no requests, so nothing can be said."""

    rps: float
    success_rate: float | None
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    overdue: int = 0  # in flight for longer than one export, still unanswered
    refused: int = 0  # refused by a circuit breaker
    outliers: int = 0  # instances that callers' outlier detection keeps out just now


@dataclass(frozen=True, slots=True)
class Trend:
    """One value a second, oldest first, for sparklines (at most the last minute). None: no report."""

    rps: tuple[float | None, ...] = ()
    bad_share: tuple[float | None, ...] = ()  # failed or too slow for an objective, 0..1
    p95_ms: tuple[float | None, ...] = ()


@dataclass(frozen=True, slots=True)
class InstanceView:
    """One instance."""

    id: str
    version: str
    revision: int
    state: InstanceState
    numbers: Numbers
    trend: Trend


@dataclass(frozen=True, slots=True)
class ObjectiveView:
    """One objective as it applies to one service."""

    name: str
    text: str  # "99 % answered well", "95 % below 300 ms"
    health: Health
    good_share: float | None  # of the longest window judged, 0..1
    wanted_share: float  # 0..1
    budget_left: float  # 1: nothing spent of the budget period; 0: all spent; below 0: overspent
    kind: Literal["success", "latency", "in_service"] = "success"
    below_ms: float | None = None  # of one about latency
    effective: bool = False


@dataclass(frozen=True, slots=True)
class ServiceView:
    """One service with its instances (in the order of version and id) and objectives (as in the policy)."""

    name: str
    health: Health
    numbers: Numbers
    trend: Trend
    instances: tuple[InstanceView, ...]
    objectives: tuple[ObjectiveView, ...]
    split: tuple[tuple[str, int], ...] = ()  # version, weight; empty: no split set


@dataclass(frozen=True, slots=True)
class IncidentView:
    """One incident, open or past."""

    id: str
    service: str
    objective: str
    state: IncidentState
    opened_at: float
    closed_at: float | None
    scope: str | None  # instance, version, service, caller, dependency; None while localising
    target: str | None
    remedies: tuple[str, ...]  # tried so far, in order, such as "eject service-b-1"
    why: str  # the evidence in one line
    detect_s: float | None  # from the fault's start, where that is known
    recover_s: float | None


@dataclass(frozen=True, slots=True)
class LogLine:
    """One event in words."""

    time: float
    event: str  # as in the contract: violated, localised, chosen, acted, ...
    text: str


@dataclass(frozen=True, slots=True)
class WatchView:
    """All that there is to see at one moment."""

    mesh: str
    runtime: str
    now: float
    started_at: float
    policy: str  # path of the policy file
    dry_run: bool
    connected: bool  # false: the control plane does not answer; what is shown is old
    doing: str  # what watch is doing right now, "all objectives hold" when nothing
    why: str  # the reason for it; empty when nothing is to be done
    services: tuple[ServiceView, ...]
    incidents: tuple[IncidentView, ...]  # open ones first, then past ones, newest first
    log: tuple[LogLine, ...]  # newest last
    actions_used: int  # within the guardrail's period
    actions_allowed: int
    faults: tuple[str, ...] = ()  # faults in force, in words
