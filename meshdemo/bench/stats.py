"""The statistics of the benchmark. Pure: numbers in, numbers out.

Every figure is a list of values, one for each round. What is told of it is its median and spread; two
alternatives are compared pair by pair (the ratio within each round), which takes out what the machine did
to both in that round. Infinity stands for "not within the time that was observed", NaN for a round that
could not be measured: it keeps its place, for the pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

UNMEASURED = math.nan
"""The value of a round that could not be measured."""

NOISY_SPREAD = 0.25
"""A figure whose middle half is wider than this share of its median is marked as noisy."""


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile (0..1), linear between neighbours (Hyndman and Fan's type 7, as in R and NumPy).

    Raises:
        ValueError: there are no values, or q is out of range.
    """
    if not values or not 0 <= q <= 1:
        raise ValueError(f"no {q}-quantile of {len(values)} values")
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    below = math.floor(position)
    low, high = ordered[below], ordered[math.ceil(position)]
    if low == high or position == below:  # without arithmetic on infinities
        return low
    return low + (high - low) * (position - below)


@dataclass(frozen=True, slots=True)
class Spread:
    """How values lie."""

    count: int
    low: float
    q1: float
    median: float
    q3: float
    high: float

    @property
    def relative(self) -> float:
        """Width of the middle half as a share of the median; 0 for fewer than two values or a median of 0."""
        if self.count < 2 or self.median == 0 or self.q1 == self.q3:
            return 0.0
        return abs((self.q3 - self.q1) / self.median) if math.isfinite(self.median) else 0.0

    @property
    def noisy(self) -> bool:
        """Whether the values lie too far apart to be believed."""
        return self.relative > NOISY_SPREAD


def measured(values: Iterable[float]) -> list[float]:
    """Those of the rounds that could be measured."""
    return [value for value in values if not math.isnan(value)]


def spread(values: Sequence[float]) -> Spread:
    """How these values lie. Raises ValueError without any."""
    return Spread(len(values), *(quantile(values, q) for q in (0.0, 0.25, 0.5, 0.75, 1.0)))


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Ours divided by theirs, round by round; rounds that either lacks or that make no sense are left out."""
    return [
        a / b
        for a, b in zip(ours, theirs, strict=False)
        if b != 0 and not (math.isinf(a) and math.isinf(b)) and not math.isnan(a / b)
    ]


def growth(points: Sequence[tuple[float, float]]) -> float | None:
    """The exponent k of the power law y ~ x^k that fits best (least squares on logarithms).

    1 is growth in proportion, less than 1 means that each one more costs less. None where fewer than two
    distinct x have a positive y.
    """
    logs = [(math.log(x), math.log(y)) for x, y in points if x > 0 and 0 < y < math.inf]
    if len({x for x, _ in logs}) < 2:
        return None
    mean_x = sum(x for x, _ in logs) / len(logs)
    mean_y = sum(y for _, y in logs) / len(logs)
    square = sum((x - mean_x) ** 2 for x, _ in logs)
    return sum((x - mean_x) * (y - mean_y) for x, y in logs) / square


# -- requests ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a load: when it was due (s, monotonic clock), how long it took (s; infinity: it has not
    ended) and its status (0: none)."""

    due: float
    took_s: float
    status: int

    @property
    def failed(self) -> bool:
        """A 5xx or no answer, as the mesh's own signals count it."""
        return self.status == 0 or self.status >= 500

    @property
    def ended(self) -> float:
        """When it ended."""
        return self.due + self.took_s


@dataclass(frozen=True, slots=True)
class Objective:
    """What healthy means: at most so large a share of failed, and of failed or too slow requests."""

    failed: float = 0.01
    slow: float = 0.05
    slower_than_s: float = 0.3

    def holds(self, requests: int, failed: int, failed_or_slow: int) -> bool:
        """Whether so many requests keep to it."""
        return failed <= self.failed * requests and failed_or_slow <= self.slow * requests


def felt(requests: Sequence[Request], since: float) -> tuple[float, float]:
    """From `since` to the first answer that is a failure, and to the last that is none (s).

    The second is when the fault reaches everybody. Infinity where no request fails, or where the last
    answer is a good one.
    """
    after = [one for one in requests if one.ended >= since and math.isfinite(one.ended)]
    bad = [one.ended for one in after if one.failed]
    good = [one.ended for one in after if not one.failed]
    first = min(bad, default=math.inf)
    if not bad or (good and max(good) > max(bad)):
        return first - since, math.inf
    return first - since, max(0.0, max(good, default=since) - since)


def healthy_after(
    requests: Sequence[Request], start: float, end: float, objective: Objective, window_s: float = 1.0
) -> float:
    """From `start` to the moment from which every second until `end` keeps to the objective (s).

    A request counts where it was due, and one that has not ended is a failure, so nothing is hidden by
    waiting. 0 if the objective holds throughout; infinity if it does not hold in the last full second.
    """
    ordered = sorted((one for one in requests if start <= one.due < end), key=lambda one: one.due)
    bad = [one.failed or math.isinf(one.took_s) for one in ordered]
    off = [fails or one.took_s > objective.slower_than_s for fails, one in zip(bad, ordered, strict=True)]
    stop = failed = failed_or_slow = 0
    healthy_from: float | None = start
    for index, one in enumerate(ordered):
        if one.due + window_s > end:
            break
        while stop < len(ordered) and ordered[stop].due < one.due + window_s:
            failed += bad[stop]
            failed_or_slow += off[stop]
            stop += 1
        if not objective.holds(stop - index, failed, failed_or_slow):
            healthy_from = None
        elif healthy_from is None:
            healthy_from = one.due
        failed -= bad[index]
        failed_or_slow -= off[index]
    return math.inf if healthy_from is None else healthy_from - start
