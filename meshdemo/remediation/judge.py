"""Is an objective violated, beyond doubt? Rolling counts per objective, for the service and each instance.

Judging is done at every export of a sidecar, over three windows at once: the last export or two, so that an
outage is seen with the first that has it; ten seconds; and the objective's own window, so that a slow burn is
seen too. Each look has to be right with `ALPHA`, so that all the looks of a day together are (Bonferroni).

Counting is incremental: an export costs a few additions, however long the windows are. What lies before
`reset` is forgotten, so that the bad seconds before a remedy cannot condemn it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from meshdemo.control.goals import Objective
from meshdemo.control.signals import Cell, Sample, slow_from
from meshdemo.remediation import stats

# Looks a day: one per export and window for each instance and the service, about 1e6 in a small mesh. One
# in a billion each keeps even a service that runs at exactly its allowed share quiet for years.
ALPHA = 1e-9
SHORT_S = 0.75  # one export, with room for a late one
MIDDLE_S = 10.0
_BUDGET_PARTS = 60


@dataclass(frozen=True, slots=True)
class Measure:
    """What one export says about one objective."""

    requests: int
    bad: int
    overdue: int = 0  # still unanswered, and too slow already


def bad_of(objective: Objective) -> Callable[[Cell], int]:
    """How many requests of a cell are bad for this objective: failed ones, or too slow ones."""
    threshold = objective.threshold_ms
    if threshold is None:
        return lambda cell: cell.failures
    first = slow_from(threshold)

    def slow(cell: Cell) -> int:
        return sum([n for index, n in cell.latency.counts.items() if index >= first])

    return slow


def measure_of(objective: Objective) -> Callable[[Sample], Measure]:
    """How to read an export for this objective, from the inbound side of the service's own sidecars.

    One that is still waiting after as long as an answer may take is too slow already.
    """
    bad_in = bad_of(objective)
    may_take_s = math.inf if objective.threshold_ms is None else objective.threshold_ms / 1000

    def measure(sample: Sample) -> Measure:
        requests = bad = 0
        for cell in sample.cells:
            if cell.inbound:
                requests += cell.requests
                bad += bad_in(cell)
        return Measure(requests, min(bad, requests), sample.waiting_for(may_take_s))

    return measure


def effective_measure_of(objective: Objective, service: str) -> Callable[[Sample], Measure]:
    """As `measure_of`, from what a caller's sidecar got from the service after retries."""
    bad_in = bad_of(objective)

    def measure(sample: Sample) -> Measure:
        cells = [cell for cell in sample.cells if not cell.inbound and cell.peer == service]
        requests = sum(cell.requests for cell in cells)
        return Measure(requests, min(sum(bad_in(cell) for cell in cells), requests))

    return measure


@dataclass(frozen=True, slots=True)
class Verdict:
    """The counts of one window, and what the objective allows. `instance` None: the service as a whole."""

    objective: str
    service: str
    instance: str | None
    window_s: float
    end: float
    requests: int
    bad: int
    overdue: int  # of the bad ones, still unanswered
    allowed: float

    @property
    def share(self) -> float:
        """Share of bad requests, 0..1."""
        return self.bad / self.requests if self.requests else 0.0

    @property
    def surely(self) -> float:
        """The share is above this beyond doubt: the lower end of the confidence interval."""
        return stats.wilson(self.bad, self.requests, ALPHA)[0]


class Window:
    """Sums over the last `span_s` seconds of entries (end, requests, bad) that come in order of time."""

    __slots__ = ("_entries", "bad", "requests", "span_s")

    def __init__(self, span_s: float) -> None:
        self.span_s = span_s
        self.requests = 0
        self.bad = 0
        self._entries: deque[tuple[float, int, int]] = deque()

    def add(self, entry: tuple[float, int, int]) -> None:
        """Take in an entry; those that have become too old drop out."""
        entries = self._entries
        entries.append(entry)
        self.requests += entry[1]
        self.bad += entry[2]
        oldest = entry[0] - self.span_s
        while entries[0][0] <= oldest:
            _, requests, bad = entries.popleft()
            self.requests -= requests
            self.bad -= bad


class Track:
    """The windows of one scope, and the requests of it that are overdue right now."""

    __slots__ = ("overdue", "windows")

    def __init__(self, span_s: float) -> None:
        self.windows = tuple(Window(span) for span in (SHORT_S, MIDDLE_S, span_s) if span <= span_s)
        self.overdue = 0

    def add(self, entry: tuple[float, int, int]) -> None:
        """Take in an entry (end, requests, bad)."""
        for window in self.windows:
            window.add(entry)

    def violated(self, allowed: float, min_requests: int, alpha: float) -> Window | None:
        """The shortest window in which more is bad than allowed, beyond doubt.

        What hangs answers little, so the short windows have few requests of it just then. Where most of the
        bad ones still wait, it is enough that the longest window has as many as are asked for.
        """
        overdue = self.overdue
        busy = self.longest.requests + overdue >= min_requests
        for window in self.windows:
            bad, requests = window.bad + overdue, window.requests + overdue
            if (
                bad > allowed * requests
                and (requests >= min_requests or (busy and overdue * 2 >= bad))
                and stats.exceeds(bad, requests, allowed, alpha)
            ):
                return window
        return None

    @property
    def longest(self) -> Window:
        """The objective's own window."""
        return self.windows[-1]


class Budget:
    """What is left of an error budget over a rolling period.

    The budget of the period is what the objective allows of the requests of the period, at the rate seen so
    far: a watch that has just started would otherwise call a handful of errors the end of an hour's budget.
    """

    def __init__(self, allowed: float, period_s: float) -> None:
        self._allowed, self._period_s = allowed, period_s
        self._part_s = period_s / _BUDGET_PARTS
        self._first: float | None = None
        self._window = Window(period_s)
        self._requests = 0
        self._bad = 0
        self._part_end = 0.0

    def add(self, start: float, end: float, requests: int, bad: int) -> None:
        """Count an export."""
        if self._first is None:
            self._first, self._part_end = start, end + self._part_s
        if end > self._part_end:
            self._window.add((self._part_end, self._requests, self._bad))
            self._requests = self._bad = 0
            self._part_end = end + self._part_s
        self._requests += requests
        self._bad += bad

    def allowance(self, end: float) -> float:
        """Bad requests that the period allows at the rate seen so far."""
        seen_s = min(self._period_s, end - self._first) if self._first is not None else 0.0
        if seen_s <= 0:
            return 0.0
        requests = self._window.requests + self._requests
        return self._allowed * requests * max(1.0, self._period_s / seen_s)

    def left(self, end: float) -> float:
        """Share of the budget that is left: 1 untouched, 0 all spent, negative overspent."""
        allowance = self.allowance(end)
        bad = self._window.bad + self._bad
        if allowance <= 0:
            return 1.0 if bad == 0 else -math.inf
        return 1 - bad / allowance


class ObjectiveJudge:
    """One objective on one service: counts for the service and each of its instances."""

    def __init__(self, objective: Objective, service: str) -> None:
        self.objective = objective
        self.service = service
        self.allowed = objective.allowed
        self.budget = Budget(objective.allowed, objective.budget)
        self.since = -math.inf
        self.bad_of = bad_of(objective)
        self.measure = (
            effective_measure_of(objective, service) if objective.effective else measure_of(objective)
        )
        self.whole = Track(objective.window)
        self.instances: dict[str, Track] = {}
        self._debts: dict[str, int] = {}  # requests in flight when a remedy took effect, by instance

    def count(self, sample: Sample) -> Measure:
        """Count an export for the error budget alone: it is too old to judge by."""
        measure = self.measure(sample)
        self.budget.add(sample.start, sample.end, measure.requests, measure.bad)
        return measure

    def add(self, sample: Sample) -> Measure:
        """Count an export of an instance of the service (of a caller, for an effective objective)."""
        measure = self.count(sample)
        if sample.start < self.since:
            self._debts[sample.instance] = sample.in_flight
            return measure
        requests, bad = measure.requests, measure.bad
        if self._debts:
            forgiven = self._forgive(sample, bad)
            requests, bad = requests - forgiven, bad - forgiven
        track = self.instances.get(sample.instance)
        if track is None:
            track = self.instances[sample.instance] = Track(self.objective.window)
        self.whole.overdue += measure.overdue - track.overdue
        track.overdue = measure.overdue
        entry = (sample.end, requests, bad)
        track.add(entry)
        self.whole.add(entry)
        return measure

    def _forgive(self, sample: Sample, bad: int) -> int:
        """Bad answers to requests in flight when the remedy took effect: it came too late for them."""
        debt = self._debts.pop(sample.instance, 0)
        forgiven = min(debt, bad)
        if left := min(debt - forgiven, sample.in_flight):
            self._debts[sample.instance] = left
        return forgiven

    def verdict(self, instance: str, end: float, alpha: float = ALPHA) -> Verdict | None:
        """Is the objective violated, as of an export of `instance`? The service first, then the instance."""
        scopes = [(None, self.whole), (instance, self.instances.get(instance))]
        for scope, track in scopes[: 1 if self.objective.effective else 2]:
            if track is None:
                continue
            window = track.violated(self.allowed, self.objective.min_requests, alpha)
            if window is not None:
                return Verdict(
                    objective=self.objective.name,
                    service=self.service,
                    instance=scope,
                    window_s=window.span_s,
                    end=end,
                    requests=window.requests + track.overdue,
                    bad=window.bad + track.overdue,
                    overdue=track.overdue,
                    allowed=self.allowed,
                )
        return None

    def forget(self, instance: str) -> None:
        """An instance is gone or silent: what was overdue on it is unknown now."""
        track = self.instances.pop(instance, None)
        if track is not None:
            self.whole.overdue -= track.overdue

    def reset(self, at: float) -> None:
        """A remedy took effect at `at`: forget what was, and ignore exports that began before."""
        self.since = max(self.since, at)
        self.whole = Track(self.objective.window)
        self.instances = {}
