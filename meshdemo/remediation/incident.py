"""One incident: from the alarm until the service is healthy again. Plain state, no decisions.

`Recovery` answers the question that ends an incident: since when has every objective of the service held?
It is asked of single exports rather than of windows, so that the answer is exact to the second and is not
smeared by the bad seconds before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from meshdemo.control.signals import Sample
from meshdemo.remediation import stats
from meshdemo.remediation.choose import Plan
from meshdemo.remediation.judge import Measure, ObjectiveJudge, Verdict
from meshdemo.remediation.localise import Location
from meshdemo.remediation.policy import Rule
from meshdemo.remediation.view import IncidentState

# itself: it may mend itself; dependency: another service is to blame; nobody: this is a dry run.
Waiting = Literal["itself", "dependency", "nobody"]

# An incident is open, so a suspicion is enough to call a second bad.
_SUSPECT = 1e-3
_BETTER = 1e-2
_MARKED = 1e-4  # asked of every instance, so stricter


@dataclass(slots=True)
class _Count:
    requests: int = 0
    bad: int = 0

    def add(self, measure: Measure) -> None:
        self.requests += measure.requests + measure.overdue
        self.bad += measure.bad + measure.overdue


class Recovery:
    """Watches for the first second from which all objectives of a service hold."""

    def __init__(
        self, judges: Sequence[ObjectiveJudge], since: float, verdict: Verdict | None = None
    ) -> None:
        self.last_bad = since  # end of the last export that was bad
        self.base = since  # exports that began before this show the time before the remedy
        self.newest = since
        self._spent: dict[str, _Count] = {}
        self._verdict = verdict
        self._judges = list(judges)
        self._whole: dict[str, _Count] = {}
        self._instances: dict[tuple[str, str], _Count] = {}

    def rebase(self, at: float) -> None:
        """A remedy took effect: only what began after it may prove it good."""
        self.base = max(self.base, at)
        self._clear()

    def mark_bad(self, at: float) -> None:
        """Something was still wrong at this time: what was good before it proves nothing."""
        self.last_bad = max(self.last_bad, at)
        self._clear()

    def count(self, objective: str, requests: int, bad: int) -> None:
        """Count what was seen before the alarm was raised."""
        count = self._spent.setdefault(objective, _Count())
        count.requests += requests
        count.bad += bad

    def bad(self, objective: str) -> int:
        """Bad requests of the incident so far."""
        count = self._spent.get(objective)
        return count.bad if count else 0

    def add(self, sample: Sample, judge: ObjectiveJudge, measure: Measure) -> None:
        """Take in what an export says of one objective."""
        name = judge.objective.name
        self._spent.setdefault(name, _Count()).add(measure)
        requests, bad = measure.requests + measure.overdue, measure.bad + measure.overdue
        if bad and stats.exceeds(bad, requests, judge.allowed, _SUSPECT):
            self.mark_bad(sample.end)
        elif sample.start >= self.base:
            self.newest = max(self.newest, sample.end)
            self._whole.setdefault(name, _Count()).add(measure)
            self._instances.setdefault((name, sample.instance), _Count()).add(measure)

    def _clear(self) -> None:
        self._whole.clear()
        self._instances.clear()

    def counted(self) -> dict[str, tuple[int, int]]:
        """(requests, bad) by objective since the last bad second and the last remedy."""
        return {name: (count.requests, count.bad) for name, count in self._whole.items()}

    def healthy(self, verify_s: float, *, idle_is_fine: bool = False) -> bool:
        """Have all objectives held for so long?

        Args:
            idle_is_fine: the incident was about instances, so without requests there is nothing to prove.
        """
        if self.newest < max(self.last_bad, self.base) + verify_s:
            return False
        idle = not any(count.requests for count in self._whole.values())
        for judge in self._judges:
            count = self._whole.get(judge.objective.name, _Count())
            if count.requests < judge.objective.min_requests / 2 and not (idle and idle_is_fine):
                return False
            if stats.exceeds(count.bad, count.requests, judge.allowed, _SUSPECT):
                return False
        if not self._better():
            return False
        allowed = {judge.objective.name: judge.allowed for judge in self._judges}
        return not any(
            stats.exceeds(count.bad, count.requests, allowed[name], _MARKED)
            for (name, _), count in self._instances.items()
        )

    def _better(self) -> bool:
        """Is it clearly better than at the alarm? A slow burn looks fine for seconds without being so."""
        verdict = self._verdict
        if verdict is None:
            return True
        name = verdict.objective
        count = (
            self._whole.get(name)
            if verdict.instance is None
            else self._instances.get((name, verdict.instance))
        )
        if count is None or not count.requests or count.bad <= verdict.allowed * count.requests:
            return True
        return stats.head(count.bad, count.requests, verdict.share) < _BETTER


@dataclass(slots=True)
class Incident:
    """What is known of one incident and what is being done about it."""

    id: str
    service: str
    objective: str
    opened_at: float
    recovery: Recovery
    verdict: Verdict | None = None  # None: an instance is down
    state: IncidentState = "localising"
    alarm_at: float = 0.0  # end of the export that raised the (latest) alarm
    window_s: float = 0.0  # that the alarm was raised over
    again: Verdict | None = None  # still, or again, violated while a remedy is being verified
    place: Location | None = None
    symptom: str = ""
    rule: Rule | None = None
    position: int = 0  # of the next remedy of the rule
    postponed: set[int] = field(default_factory=set)  # positions of those that a guardrail lets wait
    tried: list[tuple[str, str]] = field(default_factory=list)  # (remedy, target)
    remedies: list[str] = field(default_factory=list)  # in words
    plan: Plan | None = None
    action: str | None = None  # id of the one under way
    effective_at: float | None = None
    deadline: float = math.inf  # of the present state
    blocked: list[str] = field(default_factory=list)  # plans that a guardrail forbade, in words
    waiting_for: Waiting = "itself"
    fault_at: float | None = None  # when the fault began, where that is known
    detect_s: float | None = None
    recover_s: float | None = None
    closed_at: float | None = None
    gave_up: bool = False
    why: str = ""
    bad: int = 0
    budget_spent: float = 0.0

    @property
    def open(self) -> bool:
        """Is it going on?"""
        return self.state != "healed"
