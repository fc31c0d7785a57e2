"""A canary as a pure state machine: exports and a clock in, the next weight out.

At each step the new version gets a share of the traffic and is judged by the same objectives and the same
statistics as watch uses, and against the stable version at the same time: a canary that is bad while the
stable version is just as bad is not to blame, and waits. Its requests are counted twice, since the canary
began and since the step began: the first finds what is rare at a small share, the second what only load
brings out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from meshdemo.control.goals import Objective
from meshdemo.control.signals import Sample
from meshdemo.remediation import stats
from meshdemo.remediation.judge import Measure, measure_of

# A canary is looked at for a minute, not for a day, and few requests reach it: with this, one bad request in
# five is seen after four of them, and of a thousand canaries at half their allowed share none is sent back.
_ALPHA = 1e-4
_WORSE = 1e-3  # than stable: the alarm is raised already, this only asks whom to blame
_FAR_WORSE = 1e-6  # ... where stable is bad as well, and exports that do not quite overlap may mislead
_LISTEN_S = 1.5  # how long to wait for what stable instances have to say about the same second
_SUSPECT = 1e-2  # not bad beyond doubt, but promotion can wait for more requests
_EXPORT_S = 1.0
_FEW = 10  # requests that a step must have seen
_COMPARABLE = 20  # requests of the stable version that make a comparison
_PATIENCE = 6.0  # a step may take so many times its hold until there is enough to tell
_PATIENCE_S = 30.0

Outcome = Literal["promoted", "rolled_back"]


@dataclass(slots=True)
class Count:
    """Requests, and the bad ones among them. `overdue`: by instance, still unanswered and thus bad."""

    requests: int = 0
    bad: int = 0
    overdue: dict[str, int] = field(default_factory=dict)

    def add(self, instance: str, measure: Measure) -> None:
        """Take in an export."""
        self.requests += measure.requests
        self.bad += measure.bad
        self.overdue[instance] = measure.overdue

    @property
    def all(self) -> int:
        """Requests with the overdue ones."""
        return self.requests + sum(self.overdue.values())

    @property
    def all_bad(self) -> int:
        """Bad requests with the overdue ones."""
        return self.bad + sum(self.overdue.values())

    def figures(self) -> dict[str, Any]:
        """For people and JSON."""
        share = self.all_bad / self.all if self.all else None
        return {
            "requests": self.all,
            "bad": self.all_bad,
            "bad_share": None if share is None else round(share, 4),
        }


@dataclass(slots=True)
class _Pair:
    """Counts of both versions over the same time."""

    canary: Count = field(default_factory=Count)
    stable: Count = field(default_factory=Count)


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step saw, by objective."""

    weight: int
    held_s: float
    outcome: str
    objectives: Mapping[str, Mapping[str, Mapping[str, Any]]]  # objective -> canary|stable -> figures


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do now. `weight` is the canary's share in percent."""

    kind: Literal["shift", "hold", "promoted", "rolled_back"]
    weight: int
    reason: str = ""
    step: StepReport | None = None  # of the step that has just ended


class Canary:
    """One canary.

    Args:
        objectives: those of the service; the ones about instances and about retries are left to watch.
        version: the new version; every other one is stable.
        steps: rising weights in percent.
        hold_s: how long each step lasts at least.
    """

    def __init__(
        self, objectives: Sequence[Objective], version: str, steps: Sequence[int], hold_s: float
    ) -> None:
        self._version = version
        self._steps = list(steps)
        self._hold_s = hold_s
        self._objectives = [one for one in objectives if one.in_service is None and not one.effective]
        self._measures: dict[str, Callable[[Sample], Measure]] = {
            one.name: measure_of(one) for one in self._objectives
        }
        self._number = -1
        self._began_at = self._since = -math.inf
        self._good_since = -math.inf  # the hold counts from here: stable was not bad since
        self._counted_from = -math.inf
        self._whole = self._fresh()
        self._step = self._fresh()
        self._last_end: dict[str, float] = {}
        self._own: set[str] = set()  # instances of the new version
        self._alarm_at: float | None = None  # end of the export that first showed it bad
        self.reports: list[StepReport] = []

    def _fresh(self) -> dict[str, _Pair]:
        return {one.name: _Pair() for one in self._objectives}

    @property
    def weight(self) -> int:
        """The share of the present step, in percent; 0 before the first one."""
        return self._steps[self._number] if self._number >= 0 else 0

    def begin(self) -> Decision:
        """The first shift."""
        return Decision("shift", self._steps[0], "the first step")

    def in_force(self, weight: int, at: float) -> None:
        """The shift to this weight is in force since `at`: a step begins."""
        self._number = self._steps.index(weight)
        self._since = self._good_since = at
        if self._began_at == -math.inf:
            self._began_at = at
        self._step = self._fresh()

    def observe(self, samples: Collection[Sample]) -> None:
        """Count exports of instances of the service."""
        for sample in samples:
            if sample.end <= self._last_end.get(sample.instance, self._began_at):
                continue
            self._last_end[sample.instance] = sample.end
            own = sample.version == self._version
            if own:
                self._own.add(sample.instance)
            # The new version is not asked about a moment of which the stable one is not asked, too.
            if sample.start < self._counted_from + own * _EXPORT_S:
                continue
            for name, measure_sample in self._measures.items():
                measure = measure_sample(sample)
                pairs = [self._whole[name]]
                # Of an export that began before the step a part belongs to the step before.
                if sample.start >= self._since or self._number == 0:
                    pairs.append(self._step[name])
                for pair in pairs:
                    (pair.canary if own else pair.stable).add(sample.instance, measure)

    def step(self, now: float, *, in_service: bool = True) -> Decision:
        """What to do at this moment.

        Args:
            in_service: has the new version any instance that takes traffic?
        """
        if not in_service:
            return self._end("rolled_back", now, f"no instance of {self._version} is in service")
        held = now - self._since
        for objective in self._objectives:
            whole, step = self._whole[objective.name], self._step[objective.name]
            for pair, where in ((step, " in this step"), (whole, "")):
                if self._bad(objective, pair.canary, _ALPHA):
                    if not self._heard(now):
                        return Decision("hold", self.weight, "bad; hearing what the stable version says")
                    if self._worse(objective, pair, whole.stable):
                        return self._end("rolled_back", now, self._why(objective, pair, where))
                    return self._start_over(now, held)
        self._alarm_at = None
        waited = self._waited(held)
        requests = max((pair.canary.all for pair in self._step.values()), default=_FEW)
        if now - self._good_since < self._hold_s:
            return Decision("hold", self.weight)
        if requests < _FEW:
            if waited:
                return self._end("rolled_back", now, f"only {requests} requests reached {self._version}")
            return Decision("hold", self.weight, f"too few requests at {self._version} yet")
        if not waited and any(
            self._bad(one, self._step[one.name].canary, _SUSPECT)
            and self._worse(one, self._step[one.name], self._whole[one.name].stable)
            for one in self._objectives
        ):
            return Decision("hold", self.weight, "suspicious, but not bad beyond doubt: holding longer")
        return self._advance(now)

    def _waited(self, held: float) -> bool:
        return held > max(self._hold_s * _PATIENCE, _PATIENCE_S)

    def _start_over(self, now: float, held: float) -> Decision:
        """Both versions are bad: what was counted says nothing about the new one."""
        if self._waited(held):
            return self._end("rolled_back", now, "the stable version is bad too, for too long to judge by")
        self._good_since = now
        self._alarm_at = None
        self._counted_from = now
        self._whole, self._step = self._fresh(), self._fresh()
        return Decision("hold", self.weight, "the stable version is just as bad: waiting")

    def _advance(self, now: float) -> Decision:
        if self._number + 1 == len(self._steps):
            return self._end("promoted", now, "the objectives held at every step")
        report = self._report(now, "held")
        return Decision("shift", self._steps[self._number + 1], "the objectives hold", report)

    def _end(self, outcome: Outcome, now: float, reason: str) -> Decision:
        report = self._report(now, "held" if outcome == "promoted" else "failed")
        return Decision(outcome, self.weight if outcome == "promoted" else 0, reason, report)

    def _report(self, now: float, outcome: str) -> StepReport:
        report = StepReport(
            self.weight,
            round(now - self._since, 2),
            outcome,
            {
                name: {"canary": pair.canary.figures(), "stable": pair.stable.figures()}
                for name, pair in self._step.items()
            },
        )
        self.reports.append(report)
        return report

    @staticmethod
    def _bad(objective: Objective, count: Count, alpha: float) -> bool:
        return stats.exceeds(count.all_bad, count.all, objective.allowed, alpha)

    def _heard(self, now: float) -> bool:
        """Has every stable instance reported about the second in which the canary was found bad?"""
        ends = {name: end for name, end in self._last_end.items() if name not in self._own}
        if self._alarm_at is None:
            self._alarm_at = max(end for name, end in self._last_end.items() if name in self._own)
        alarm_at = self._alarm_at
        return now > alarm_at + _LISTEN_S or all(end >= alarm_at for end in ends.values())

    def _worse(self, objective: Objective, pair: _Pair, stable_before: Count) -> bool:
        """Is the canary worse than the stable version at the same time (or before, if that is too little)?"""
        canary = pair.canary
        stable = pair.stable if pair.stable.all >= _COMPARABLE else stable_before
        if stable.all < _COMPARABLE:
            return True
        needed = _FAR_WORSE if self._bad(objective, stable, _SUSPECT) else _WORSE
        return stats.worse(canary.all_bad, canary.all, stable.all_bad, stable.all) <= needed

    def _why(self, objective: Objective, pair: _Pair, where: str) -> str:
        canary, stable = pair.canary, pair.stable
        surely = stats.wilson(canary.all_bad, canary.all, _ALPHA)[0]
        what = "too slow" if objective.latency is not None else "failed"
        words = (
            f"{objective.name}: {canary.all_bad} of {canary.all} requests to {self._version} {what}"
            f"{where}, surely above {surely * 100:.1f}%, allowed "
            f"{objective.allowed * 100:g}%"
        )
        if stable.all:
            words += f"; stable at the same time: {stable.all_bad} of {stable.all}"
        return words
