"""What the benchmark finds, as values: figures of suites, and what the machine was like meanwhile.

Nothing here measures or prints. Infinity ("not within the time that was observed") is null in JSON, beside
the time that was observed; so is a round that could not be measured, which `rounds` does not count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from meshdemo.bench.stats import NOISY_SPREAD, Spread, measured, ratios, spread

Better = Literal["lower", "higher"]
Verdict = Literal["met", "missed", "unclear"]


@dataclass(frozen=True, slots=True)
class Bar:
    """What a figure of ours should be: at most (at least) `limit`, as it is or as a ratio to `against`.

    `of` says whether the median of the rounds or the worst of them counts; `alternative` which one's, if not
    ours.
    """

    limit: float
    against: str | None = None
    of: Literal["median", "worst"] = "median"
    alternative: str | None = None


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure, of ours and of the alternatives: a value for each round, in the order of the rounds."""

    key: str
    title: str
    unit: str
    better: Better
    values: Mapping[str, Sequence[float]]  # alternative -> values
    ours: str = ""  # which alternative is the mesh; empty: there is no comparison
    bars: Sequence[Bar] = ()
    observed: float | None = None  # for values that may not come within the time that was observed
    varies: bool = False  # by nature (where in a second a fault falls), so that it is no sign of noise
    note: str = ""

    def spread(self, alternative: str) -> Spread:
        """How the values of an alternative lie."""
        return spread(measured(self.values[alternative]))

    def noisy(self, alternative: str) -> bool:
        """Whether the values of an alternative lie too far apart to be believed."""
        return not self.varies and self.spread(alternative).noisy

    def ratio(self, alternative: str) -> Spread | None:
        """Ours divided by the alternative, pair by pair; None where that makes no sense."""
        if not self.ours or alternative == self.ours or self.ours not in self.values:
            return None
        pairs = ratios(self.values[self.ours], self.values[alternative])
        return spread(pairs) if pairs else None

    def verdict(self, bar: Bar) -> Verdict | None:
        """Whether ours (the only one's, if none is ours) keeps to a bar; unclear if the bar lies within the
        middle half of noisy values, or if a round that could not be measured may have made it miss; None if
        none was measured."""
        name = bar.alternative or self.ours or next(iter(self.values), "")
        rounds = self.values.get(name, ())
        values = measured(rounds if bar.against is None else ratios(rounds, self.values.get(bar.against, ())))
        if not values:
            return None
        verdict = self._verdict(bar, values)
        if verdict == "met":
            worst = math.inf if self.better == "lower" else 0.0
            lost = [worst] * (len(rounds) - len(measured(rounds)))
            return "met" if self._verdict(bar, values + lost) == "met" else "unclear"
        return verdict

    def _verdict(self, bar: Bar, values: Sequence[float]) -> Verdict:
        lies = spread(values)
        if bar.of == "worst":
            counted = lies.high if self.better == "lower" else lies.low
        else:
            counted = lies.median
            if not self.varies and lies.noisy and lies.q1 < bar.limit < lies.q3:
                return "unclear"
        met = counted <= bar.limit if self.better == "lower" else counted >= bar.limit
        return "met" if met else "missed"

    def to_json(self) -> dict[str, Any]:
        """As `meshdemo bench -o json` prints it."""
        rows = []
        for name, values in self.values.items():
            lies, ratio = spread(values), self.ratio(name)
            one = {
                "alternative": name, "ours": name == self.ours, "values": [number(value) for value in values],
                **_spread_json(lies), "noisy": self.noisy(name),
                "ratio_ours_to_this": None if ratio is None else _spread_json(ratio),
            }  # fmt: skip
            rows.append(one)
        bars = [
            {
                "alternative": bar.alternative or self.ours, "limit": bar.limit, "against": bar.against,
                "of": bar.of, "at": "most" if self.better == "lower" else "least",
                "verdict": self.verdict(bar),
            }
            for bar in self.bars
        ]  # fmt: skip
        row: dict[str, Any] = {
            "key": self.key, "title": self.title, "unit": self.unit, "better": self.better,
            "alternatives": rows, "bars": bars, "note": self.note,
        }  # fmt: skip
        return {**row, "observed_s": self.observed} if self.observed is not None else row


@dataclass(frozen=True, slots=True)
class Curves:
    """Lines over a common axis: how a figure depends on something."""

    key: str
    title: str
    x: str
    y: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    log_x: bool = False
    log_y: bool = False

    def to_json(self) -> dict[str, Any]:
        """As `meshdemo bench -o json` prints it."""
        return {
            "key": self.key, "title": self.title, "x": self.x, "y": self.y,
            "series": {
                name: [[number(x), number(y)] for x, y in points] for name, points in self.series.items()
            },
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class LeftOut:
    """An alternative that was not measured, and why."""

    name: str
    why: str


BUSY_LIMIT = 0.10
STOLEN_LIMIT = 0.02
LOAD_LIMIT = 0.75

NOISE_RULE = (
    f"A suite is too noisy to believe if others used more than {BUSY_LIMIT:.0%} of the processors just "
    f"before or after it, or if the hypervisor took more than {STOLEN_LIMIT:.0%} of their time during it; "
    f"the whole run is, if the load average when it began was above {LOAD_LIMIT:g} per processor. A figure "
    f"is noisy if the middle half of its values is wider than {NOISY_SPREAD:.0%} of their median."
)


@dataclass(frozen=True, slots=True)
class Quiet:
    """What the machine did before or after a suite, while nothing of the benchmark ran."""

    load: tuple[float, float, float]  # load average over 1, 5 and 15 minutes
    busy: float  # share of all processors that others used, 0..1


@dataclass(frozen=True, slots=True)
class Findings:
    """What a suite gives back."""

    figures: Sequence[Figure] = ()
    curves: Sequence[Curves] = ()
    left_out: Sequence[LeftOut] = ()
    notes: Sequence[str] = ()

    def measured(self) -> Findings:
        """These without the alternatives, and the figures, of which every round failed (the notes say so)."""
        with_values = [
            replace(one, values={name: values for name, values in one.values.items() if measured(values)})
            for one in self.figures
        ]
        return replace(self, figures=[one for one in with_values if one.values])


@dataclass(frozen=True, slots=True)
class SuiteResult:
    """A suite that ran: what it found, and what the machine was like."""

    name: str
    title: str
    seconds: float
    before: Quiet
    after: Quiet
    stolen: float  # share of the processors' time that the hypervisor gave to others meanwhile, 0..1
    findings: Findings = field(default_factory=Findings)
    error: str = ""  # why it ended early; empty if it did not

    @property
    def doubts(self) -> list[str]:
        """Why its figures should not be believed, in words; empty if nothing speaks against them."""
        found = [
            f"others used {quiet.busy:.0%} of the processors {when} it"
            for when, quiet in (("before", self.before), ("after", self.after))
            if quiet.busy > BUSY_LIMIT
        ]
        if self.stolen > STOLEN_LIMIT:
            found.append(f"the hypervisor took {self.stolen:.0%} of the processors' time")
        return found

    def to_json(self) -> dict[str, Any]:
        """As `meshdemo bench -o json` prints it."""
        found = self.findings
        reasons = self.doubts
        return {
            "suite": self.name,
            "title": self.title,
            "seconds": round(self.seconds, 1),
            "load_before": list(self.before.load),
            "load_after": list(self.after.load),
            "busy_before": round(self.before.busy, 3),
            "busy_after": round(self.after.busy, 3),
            "stolen": round(self.stolen, 4),
            "noisy": bool(reasons),
            "noisy_because": reasons,
            "error": self.error or None,
            "figures": [figure.to_json() for figure in found.figures],
            "curves": [curves.to_json() for curves in found.curves],
            "left_out": [{"name": one.name, "why": one.why} for one in found.left_out],
            "notes": list(found.notes),
        }


@dataclass(frozen=True, slots=True)
class Machine:
    """What the figures are from."""

    processor: str
    processors: int
    memory_gb: float
    system: str
    versions: Mapping[str, str]  # program -> version

    def to_json(self) -> dict[str, Any]:
        """As `meshdemo bench -o json` prints it."""
        return {
            "processor": self.processor, "processors": self.processors,
            "memory_gb": round(self.memory_gb, 1), "system": self.system, "versions": dict(self.versions),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Report:
    """A run of the benchmark."""

    at: float  # seconds since the epoch
    load: tuple[float, float, float]  # load average when it began
    quick: bool
    machine: Machine
    suites: Sequence[SuiteResult] = ()

    @property
    def doubts(self) -> list[str]:
        """Why the whole run should not be believed, in words; empty if nothing speaks against it."""
        if self.load[0] > LOAD_LIMIT * self.machine.processors:
            return [f"the load average was {self.load[0]:.1f} when it began"]
        return []

    def to_json(self) -> dict[str, Any]:
        """As `meshdemo bench -o json` prints it."""
        return {
            "time": round(self.at, 3),
            "quick": self.quick,
            "machine": self.machine.to_json(),
            "load": list(self.load),
            "noise_rule": NOISE_RULE,
            "noisy": bool(self.doubts),
            "noisy_because": self.doubts,
            "suites": [suite.to_json() for suite in self.suites],
        }


def number(value: float) -> float | None:
    """A figure as JSON has it: six digits are enough, and infinity is null."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _spread_json(lies: Spread) -> dict[str, float | int | None]:
    return {
        "rounds": lies.count, "min": number(lies.low), "q1": number(lies.q1), "median": number(lies.median),
        "q3": number(lies.q3), "max": number(lies.high),
    }  # fmt: skip
