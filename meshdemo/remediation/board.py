"""From what watch knows to the snapshot that the dashboard shows. Pure; made once a second at most."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from meshdemo.control.goals import Objective
from meshdemo.control.model import Fault
from meshdemo.control.signals import Histogram, Sample, merge
from meshdemo.remediation.core import Core
from meshdemo.remediation.events import Event
from meshdemo.remediation.incident import Incident
from meshdemo.remediation.judge import ObjectiveJudge
from meshdemo.remediation.situation import Seen
from meshdemo.remediation.view import (
    Health,
    IncidentView,
    InstanceState,
    InstanceView,
    LogLine,
    Numbers,
    ObjectiveView,
    ServiceView,
    Trend,
    WatchView,
)

WINDOW_S = 10.0
_TREND_S = 60
_LOG_LINES = 200


@dataclass(slots=True)
class _Second:
    """What one instance, or one service, did in one second."""

    requests: int = 0
    bad: int = 0
    latency: list[Histogram] = field(default_factory=list)
    _known: tuple[int, float | None] = (0, None)  # p95 of so many histograms

    def p95_ms(self) -> float | None:
        """Worked out once, not with every view that shows it."""
        if self._known[0] != len(self.latency):
            self._known = (len(self.latency), merge(self.latency).quantile_ms(0.95))
        return self._known[1]


class Board:
    """Keeps what the trends need, and draws the snapshot.

    Args:
        mesh, runtime, policy: names, for the head.
        fault_words: says a fault in a few words.
    """

    def __init__(
        self, mesh: str, runtime: str, policy: str, core: Core, fault_words: Callable[[Fault], str]
    ) -> None:
        self._mesh, self._runtime, self._policy = mesh, runtime, policy
        self._core = core
        self._fault_words = fault_words
        self._started_at = 0.0
        self._recent: dict[str, deque[Sample]] = {}
        self._members: dict[str, set[str]] = {}  # service -> instances
        self._trends: dict[str, deque[tuple[int, _Second]]] = {}
        self._log: deque[LogLine] = deque(maxlen=_LOG_LINES)

    def add(self, samples: Iterable[Sample]) -> None:
        """Take in exports."""
        for sample in samples:
            self._members.setdefault(sample.service, set()).add(sample.instance)
            recent = self._recent.setdefault(sample.instance, deque())
            recent.append(sample)
            while recent[0].end <= sample.end - WINDOW_S:
                recent.popleft()
            judges = self._core.observer.judges_of(sample.service)
            bad = max((judge.measure(sample).bad for judge in judges), default=0)
            for name in (sample.instance, sample.service):
                second = self._second(name, int(sample.end))
                inbound = [cell for cell in sample.cells if cell.inbound]
                second.requests += sum(cell.requests for cell in inbound)
                second.bad += bad
                second.latency.extend(cell.latency for cell in inbound)

    def _second(self, name: str, at: int) -> _Second:
        trend = self._trends.setdefault(name, deque(maxlen=_TREND_S))
        for known, second in reversed(trend):
            if known == at:
                return second
            if known < at:
                break
        second = _Second()
        trend.append((at, second))
        return second

    def log(self, events: Iterable[Event]) -> None:
        """Take in what was decided."""
        for event in events:
            if event.event != "signals":
                self._log.append(LogLine(event.time, event.event, event.text))

    def forget(self) -> None:
        """Drop what belongs to instances that are gone."""
        there = self._core.situation.instances
        services = {one.service for one in there.values()}
        for name in [name for name in self._recent if name not in there]:
            del self._recent[name]
        for members in self._members.values():
            members.intersection_update(there)
        for name in [name for name in self._trends if name not in there and name not in services]:
            del self._trends[name]

    # -- the snapshot -------------------------------------------------------------------------------------

    def view(self, now: float, *, connected: bool) -> WatchView:
        """All that there is to see."""
        self._started_at = self._started_at or now
        self.forget()
        core = self._core
        seen = core.situation.instances
        services = sorted({one.service for one in seen.values()})
        incidents = [*sorted(core.open.values(), key=lambda one: -one.opened_at), *reversed(core.past)]
        refused, outliers = self._refused(), self._outliers()
        shown = tuple(self._service(name, now, refused, outliers) for name in services)
        doing, why = self._doing(shown)
        return WatchView(
            mesh=self._mesh,
            runtime=self._runtime,
            now=now,
            started_at=self._started_at,
            policy=self._policy,
            dry_run=core.dry_run,
            connected=connected,
            doing=doing,
            why=why,
            services=shown,
            incidents=tuple(_incident(incident) for incident in incidents),
            log=tuple(self._log),
            actions_used=core.guard.used(now),
            actions_allowed=core.policy.guardrails.max_actions.count,
            faults=tuple(self._fault_words(fault) for fault in core.situation.intent.faults),
        )

    def numbers(self, samples: Sequence[Sample]) -> Numbers:
        """Signals of some exports together."""
        cells = [cell for sample in samples for cell in sample.cells if cell.inbound]
        requests = sum(cell.requests for cell in cells)
        latency = merge(cell.latency for cell in cells)
        start = min((sample.start for sample in samples), default=0.0)
        seconds = max((sample.end for sample in samples), default=0.0) - start
        newest = {sample.instance: sample for sample in samples}
        return Numbers(
            rps=requests / seconds if seconds > 0 else 0.0,
            success_rate=1 - sum(cell.failures for cell in cells) / requests if requests else None,
            p50_ms=latency.quantile_ms(0.5),
            p95_ms=latency.quantile_ms(0.95),
            p99_ms=latency.quantile_ms(0.99),
            overdue=sum(sample.overdue for sample in newest.values()),
        )

    def service_numbers(self, service: str) -> Numbers:
        """Signals of a service over the last seconds."""
        names = self._members.get(service, ())
        return self.numbers([sample for name in names for sample in self._recent.get(name, ())])

    def _refused(self) -> Counter[str]:
        """By service: requests that the breakers of its callers' sidecars refused."""
        refused: Counter[str] = Counter()
        for recent in self._recent.values():
            for sample in recent:
                for cell in sample.cells:
                    if cell.refused:
                        refused[cell.peer] += cell.refused
        return refused

    def _outliers(self) -> Counter[str]:
        """By service: instances that Envoy's outlier detection keeps out; the most that one caller does."""
        most: dict[tuple[str, str], int] = {}
        for recent in self._recent.values():
            for cell in recent[-1].cells if recent else ():
                if cell.ejected:
                    key = (cell.peer, cell.version)
                    most[key] = max(most.get(key, 0), cell.ejected)
        outliers: Counter[str] = Counter()
        for (service, _), count in most.items():
            outliers[service] += count
        return outliers

    def _service(self, name: str, now: float, refused: Counter[str], outliers: Counter[str]) -> ServiceView:
        core = self._core
        incident = core.open.get(name)
        rules = core.situation.intent.traffic.get(name)
        objectives = tuple(
            self._objective(objective, name, now) for objective in core.policy.objectives_of(name)
        )
        health = _worst([one.health for one in objectives]) if objectives else "unknown"
        return ServiceView(
            name=name,
            health=_health(incident) if incident else health,
            numbers=replace(self.service_numbers(name), refused=refused[name], outliers=outliers[name]),
            trend=self._trend(name, now),
            instances=tuple(self._instance(one, incident, now) for one in core.situation.of_service(name)),
            objectives=objectives,
            split=tuple(rules.split.items()) if rules else (),
        )

    def _instance(self, one: Seen, incident: Incident | None, now: float) -> InstanceView:
        blamed = incident is not None and incident.place is not None and one.id in incident.place.instances
        state: InstanceState = "serving"
        if one.ejected:
            state = "ejected"
        elif blamed:
            state = "bad"
        elif not one.ready:
            state = "starting"
        elif one.silent:
            state = "silent"
        recent = [] if one.silent else list(self._recent.get(one.id, ()))
        return InstanceView(
            one.id, one.version, one.revision, state, self.numbers(recent), self._trend(one.id, now)
        )

    def _trend(self, name: str, now: float) -> Trend:
        by_second = dict(self._trends.get(name, ()))
        if not by_second:
            return Trend()
        # The current second is not complete, and the one before it may lack a late export.
        last = int(now) - 1
        seconds = [by_second.get(at) for at in range(max(min(by_second), last - _TREND_S + 1), last + 1)]
        return Trend(
            rps=tuple(None if one is None else float(one.requests) for one in seconds),
            bad_share=tuple(
                None if one is None or not one.requests else min(1.0, one.bad / one.requests)
                for one in seconds
            ),
            p95_ms=tuple(None if one is None else one.p95_ms() for one in seconds),
        )

    def _objective(self, objective: Objective, service: str, now: float) -> ObjectiveView:
        core = self._core
        incident = core.open.get(service)
        own = _health(incident) if incident and incident.objective == objective.name else None
        if objective.in_service is not None:
            instances = core.situation.of_service(service)
            down = len(core.observer.down_in(service))
            expected = down + sum(one.ready for one in instances)
            share = (expected - down) / expected if expected else None
            state: Health = own or ("unknown" if share is None else "ok")
            return ObjectiveView(
                objective.name, objective.text, state, share, objective.in_service, 1.0 if not down else 0.0,
                kind="in_service",
            )  # fmt: skip
        judge = next(one for one in core.observer.judges_of(service) if one.objective is objective)
        window = judge.whole.longest
        requests = window.requests + judge.whole.overdue
        good = 1 - (window.bad + judge.whole.overdue) / requests if requests else None
        enough = requests >= objective.min_requests and not self._silent(service)
        return ObjectiveView(
            name=objective.name,
            text=objective.text,
            health=own or ("ok" if enough else "unknown"),
            good_share=good,
            wanted_share=1 - judge.allowed,
            budget_left=_left(judge, now),
            kind="success" if objective.success is not None else "latency",
            below_ms=objective.threshold_ms,
            effective=objective.effective,
        )

    def _silent(self, service: str) -> bool:
        instances = self._core.situation.of_service(service)
        return bool(instances) and all(one.silent for one in instances)

    def _doing(self, services: Sequence[ServiceView]) -> tuple[str, str]:
        core = self._core
        if not services:
            return "waiting for the first signals", ""
        if not core.open:
            silent = [one.id for one in core.situation.instances.values() if one.silent]
            if silent:
                return (
                    "all objectives that can be judged hold",
                    f"silent, so unknown: {', '.join(silent[:5])}",
                )
            if all(service.health == "unknown" for service in services):
                return "nothing to judge yet", "too few requests in the window of any objective"
            return "all objectives hold", ""
        incident = min(core.open.values(), key=lambda one: one.opened_at)
        plan = incident.plan.words if incident.plan else ""
        place = f"{incident.place.scope} {incident.place.target}" if incident.place else incident.service
        words = {
            "localising": f"finding out where {incident.service} fails",
            "acting": plan,
            "verifying": f"seeing whether it helped to {plan}",
            "blocked": f"waiting until a guardrail allows to act on {place}",
            "gave_up": f"gave up on {place}; a person is needed",
        }
        waits = {
            "dependency": f"waiting for {incident.place.target if incident.place else 'a dependency'}",
            "nobody": f"dry run: would {plan}",
            "itself": f"seeing whether {place} mends itself",
        }
        return words.get(incident.state) or waits[incident.waiting_for], incident.why


def _left(judge: ObjectiveJudge, now: float) -> float:
    return max(-9.99, judge.budget.left(now))


def _health(incident: Incident) -> Health:
    return "healing" if incident.state in ("acting", "verifying", "waiting") else "violated"


def _worst(states: Sequence[Health]) -> Health:
    order: Mapping[Health, int] = {"violated": 0, "healing": 1, "unknown": 2, "ok": 3}
    return min(states, key=lambda state: order[state])


def _incident(incident: Incident) -> IncidentView:
    place = incident.place
    return IncidentView(
        id=incident.id,
        service=incident.service,
        objective=incident.objective,
        state=incident.state,
        opened_at=incident.opened_at,
        closed_at=incident.closed_at,
        scope=place.scope if place else None,
        target=place.target if place else None,
        remedies=tuple(incident.remedies),
        why=incident.why,
        detect_s=incident.detect_s,
        recover_s=incident.recover_s,
    )
