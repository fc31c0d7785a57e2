"""What watch knows: exports counted as they come, instances, intent, and what of it raises an alarm.

The part of the core that runs for every export, so it does little for a healthy one: count it, look whether
it completes a violation. Who is told is the open incident of the service, if there is one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from meshdemo.control.goals import Objective
from meshdemo.control.signals import Sample
from meshdemo.remediation.incident import Incident
from meshdemo.remediation.judge import ALPHA, Measure, ObjectiveJudge, Verdict
from meshdemo.remediation.policy import Policy
from meshdemo.remediation.situation import Seen, Situation

_RECENT_S = 30.0  # exports kept to localise with
_HISTORY_S = 2.0  # an export that was older when watch started is history: it is counted, not judged
_STILL_ALPHA = 1e-6  # a remedy is on trial, for seconds: fewer looks than a day has
_WAS_DOWN_S = 3.0
_STARTING_S = 60.0  # an instance that is not ready for so long is no part of a start any more
_GLIMPSE_S = 0.05  # a readiness that was lost for less is not worth an incident


class Observer:
    """Counts and remembers.

    Args:
        incidents: the open incidents by service; the owner of the observer keeps it.
    """

    def __init__(self, policy: Policy, incidents: Mapping[str, Incident]) -> None:
        self.situation = Situation()
        self.now = 0.0
        self.alarms: dict[str, Verdict] = {}  # by service; emptied by who acts on them
        self._policy = policy
        self._incidents = incidents
        self._judges: dict[str, list[ObjectiveJudge]] = {}
        self._instance_objectives: dict[str, Objective | None] = {}
        self._any_effective = any(objective.effective for objective in policy.objectives)
        self._live_from = -math.inf
        self._first_seen: float | None = None
        self._is_up = False
        self._last_end: dict[str, float] = {}
        self._recent: dict[str, deque[Sample]] = {}
        self._rows: Sequence[Mapping[str, Any]] = ()
        self._ever_ready: set[str] = set()
        self._down_since: dict[str, float] = {}
        self._died: set[str] = set()  # since the last look
        self._was_down: dict[str, float] = {}

    # -- what is known ------------------------------------------------------------------------------------

    def judges_of(self, service: str) -> list[ObjectiveJudge]:
        """The judges of a service's objectives about requests, in the order of the policy."""
        judges = self._judges.get(service)
        if judges is None:
            judges = self._judges[service] = [
                ObjectiveJudge(objective, service)
                for objective in self._policy.objectives_of(service)
                if objective.in_service is None
            ]
        return judges

    def in_service_objective(self, service: str) -> Objective | None:
        """The objective about a service's instances, if there is one."""
        if service not in self._instance_objectives:
            self._instance_objectives[service] = next(
                (one for one in self._policy.objectives_of(service) if one.in_service is not None), None
            )
        return self._instance_objectives[service]

    def recent(self, service: str) -> Sequence[Sample]:
        """The exports of the last seconds, oldest first."""
        return self._recent.get(service, ())

    def down_in(self, service: str) -> list[str]:
        """Instances that have served, should serve, and do not; or have died just now and may be back."""
        return [name for name in self._down_since if self.situation.instances[name].service == service]

    def died_in(self, service: str) -> list[str]:
        """Instances that have died since the last look."""
        return [name for name in self.down_in(service) if name in self._died]

    def lately_down(self, name: str) -> bool:
        """Is the instance down, or was it a moment ago?"""
        return self._was_down.get(name, -math.inf) > self.now - _WAS_DOWN_S

    def short_of(self, service: str) -> bool:
        """Are more of its instances down than the objective about them allows?"""
        if not self._down_since or not self._is_up:
            return False
        objective = self.in_service_objective(service)
        if objective is None or objective.in_service is None:
            return False
        down = self.down_in(service)
        up = sum(one.ready and one.id not in down for one in self.situation.of_service(service))
        return bool(down) and up / (up + len(down)) < objective.in_service

    def short_services(self) -> list[str]:
        """The services for which that is so, and has been for a moment."""
        services = {
            self.situation.instances[name].service
            for name, since in self._down_since.items()
            if self.now - since >= _GLIMPSE_S or name in self._died
        }
        return sorted(service for service in services if self.short_of(service))

    # -- observing ----------------------------------------------------------------------------------------

    def observe(self, now: float, samples: Iterable[Sample], rows: Sequence[Mapping[str, Any]]) -> None:
        """Take in a batch of exports, and the instances as the control plane sees them."""
        if self._live_from == -math.inf:
            self._live_from = now - _HISTORY_S
        self.now = max(self.now, now)
        if rows != self._rows or self._down_since or not self._is_up:
            self._rows = list(rows)
            self._see(rows)
        for sample in samples:
            self._take(sample)

    def _see(self, rows: Iterable[Mapping[str, Any]]) -> None:
        before = self.situation.instances
        seen = self.situation.instances = {row["id"]: Seen.of(row) for row in rows}
        for name, one in before.items():
            if name not in seen or (seen[name].silent and not one.silent):
                for judge in self._judges.get(one.service, ()):
                    judge.forget(name)
        self._learn_up()
        newest: dict[tuple[str, str], int] = {}
        for one in seen.values():
            if one.ready:
                key = (one.service, one.version)
                newest[key] = max(newest.get(key, 0), one.revision)
        restarting = {
            name
            for incident in self._incidents.values()
            if incident.state == "acting" and incident.plan is not None
            for name in incident.plan.instances
        }
        down: dict[str, float] = {}
        self._died = {
            name
            for name, one in seen.items()
            if name in before and one.restarts > before[name].restarts and name in self._ever_ready
        }
        for name, one in seen.items():
            if one.ready and name not in self._died:
                self._ever_ready.add(name)
            elif (
                name in self._ever_ready
                and name not in restarting
                and not one.ejected
                # One of an older revision is on its way out.
                and one.revision >= newest.get((one.service, one.version), 0)
            ):
                down[name] = self._down_since.get(name, self.now)
                self._was_down[name] = self.now
        self._down_since = down
        self._ever_ready &= seen.keys()

    def _learn_up(self) -> None:
        """Is the mesh up, or still being started? Who is missed in a start is not missing yet."""
        seen = self.situation.instances
        if self._is_up or not seen:
            return
        if self._first_seen is None:
            self._first_seen = self.now
        self._is_up = all(one.ready for one in seen.values()) or self.now > self._first_seen + _STARTING_S

    def _take(self, sample: Sample) -> None:
        """Count one export, once."""
        if sample.end <= self._last_end.get(sample.instance, -math.inf):
            return
        self._last_end[sample.instance] = sample.end
        service, old = sample.service, sample.end < self._live_from
        judges = self.judges_of(service)
        if judges:
            self._remember(sample)
            own = [judge for judge in judges if not judge.objective.effective]
            measures = [(judge, judge.count(sample) if old else judge.add(sample)) for judge in own]
            self.situation.revisions.add(sample, measures)
            if not old:
                self._tell(service, sample, measures)
        if self._any_effective and not old:
            for callee in {cell.peer for cell in sample.cells if not cell.inbound and cell.peer}:
                judges = [judge for judge in self.judges_of(callee) if judge.objective.effective]
                self._tell(callee, sample, [(judge, judge.add(sample)) for judge in judges])

    def _remember(self, sample: Sample) -> None:
        recent = self._recent.get(sample.service)
        if recent is None:
            recent = self._recent[sample.service] = deque()
        recent.append(sample)
        while recent[0].end < sample.end - _RECENT_S:
            recent.popleft()

    def _tell(self, service: str, sample: Sample, measures: Sequence[tuple[ObjectiveJudge, Measure]]) -> None:
        """Raise an alarm, or tell the incident there is."""
        incident = self._incidents.get(service)
        if incident is None:
            if service not in self.alarms and (verdict := _verdict(sample, measures, ALPHA)) is not None:
                self.alarms[service] = verdict
            return
        for judge, measure in measures:
            incident.recovery.add(sample, judge, measure)
        if incident.again is None and incident.state in ("verifying", "waiting"):
            incident.again = _verdict(sample, measures, _STILL_ALPHA)


def _verdict(
    sample: Sample, measures: Sequence[tuple[ObjectiveJudge, Measure]], alpha: float
) -> Verdict | None:
    for judge, _ in measures:
        if (verdict := judge.verdict(sample.instance, sample.end, alpha)) is not None:
            return verdict
    return None
