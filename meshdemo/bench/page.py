"""The report as one HTML page that needs nothing else: plots are SVG in it; no script, light and dark."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from meshdemo.bench import tables
from meshdemo.bench.model import NOISE_RULE, Curves, Figure, Report
from meshdemo.bench.stats import measured
from meshdemo.resources import TEMPLATES

_LEFT, _WIDTH, _ROW = 150.0, 760.0, 26.0  # of a plot of dots, in its own units
_CURVE_HEIGHT = 300.0
_BEYOND = 24.0  # room at the right for what did not come in the time observed
_FAR = 20.0  # values that differ more than so many times are shown on a logarithmic axis


def render(report: Report) -> str:
    """The page."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES / "bench"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        time=lambda at: time.strftime("%Y-%m-%d %H:%M", time.localtime(at)),
        value=tables.value,
        span=tables.span,
        dots=_dots,
        lines=_lines,
    )
    return environment.get_template("page.html.j2").render(
        report=report, noise_rule=NOISE_RULE, bar_words=tables.bar_words
    )


@dataclass(frozen=True, slots=True)
class Axis:
    """From values to places on a line."""

    low: float
    high: float
    start: float
    length: float
    log: bool = False

    @staticmethod
    def of(values: Iterable[float], start: float, length: float, *, log: bool | None = None) -> Axis:
        """An axis that shows these values; linear axes have the 0. `log` None: where they differ much."""
        finite = sorted(value for value in values if math.isfinite(value))
        if not finite:
            return Axis(0.0, 1.0, start, length)
        if log is None:
            log = finite[0] > 0 and finite[-1] / finite[0] > _FAR
        if log and finite[0] > 0:
            low, high = finite[0], finite[-1]
            return Axis(low / 1.2, max(high, low * 1.5) * 1.1, start, length, log=True)
        low, high = min(0.0, finite[0]), max(0.0, finite[-1])
        return Axis(low, (high if high > low else 1.0) * 1.05, start, length)

    def place(self, value: float) -> float:
        """Where a value stands."""
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * self.length, 1)

    def ticks(self) -> list[tuple[float, str]]:
        """Round values and where they stand."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            steps = (1, 2, 5) if last - first <= 3 else (1,)
            values = [step * 10.0**power for power in range(first, last + 1) for step in steps]
        else:
            raw = (self.high - self.low) / 5
            power = 10.0 ** math.floor(math.log10(raw))
            step = next(power * one for one in (1, 2, 5, 10) if power * one >= raw)
            values = [step * n for n in range(math.floor(self.low / step), math.ceil(self.high / step) + 1)]
        return [(self.place(one), f"{one:,.10g}") for one in values if self.low <= one <= self.high]


def _dots(figure: Figure) -> dict[str, Any]:
    """A row for each alternative: a dot for each round, a bar over the middle half, a line at the median."""
    axis = Axis.of(
        (value for values in figure.values.values() for value in measured(values)),
        _LEFT,
        _WIDTH - _LEFT - _BEYOND,
    )

    def place(value: float) -> float:
        return _WIDTH - _BEYOND / 2 if math.isinf(value) else axis.place(value)

    rows = []
    for number, (name, values) in enumerate(figure.values.items()):
        lies = figure.spread(name)
        row = {
            "name": name, "ours": name == figure.ours, "y": number * _ROW + _ROW / 2,
            "dots": [(place(value), value) for value in measured(values)],
            "q1": place(lies.q1), "median": place(lies.median), "q3": place(lies.q3),
        }  # fmt: skip
        rows.append(row)
    height = len(rows) * _ROW
    return {"rows": rows, "ticks": axis.ticks(), "height": height, "width": _WIDTH, "left": _LEFT}


def _lines(curves: Curves) -> dict[str, Any]:
    """A line for each series, over common axes."""
    series: Mapping[str, Sequence[tuple[float, float]]] = {
        name: [point for point in points if all(map(math.isfinite, point))]
        for name, points in curves.series.items()
    }
    points = [point for one in series.values() for point in one]
    x = Axis.of((point[0] for point in points), 60.0, _WIDTH - 190.0, log=curves.log_x)
    y = Axis.of((point[1] for point in points), _CURVE_HEIGHT, -_CURVE_HEIGHT + 10.0, log=curves.log_y)
    rows = [
        {"name": name, "points": [(x.place(a), y.place(b), a, b) for a, b in one], "color": number % 6}
        for number, (name, one) in enumerate(series.items())
        if one
    ]
    return {
        "rows": rows, "x": x.ticks(), "y": y.ticks(), "height": _CURVE_HEIGHT, "width": _WIDTH,
        "right": _WIDTH - 130.0,
    }  # fmt: skip
