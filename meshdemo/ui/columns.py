"""What a row of signals says, in which columns and with which words: for `stat` and for watch's dashboard.

A row of `stat` comes from the control plane's API, one of the dashboard from watch's own counts. Both are
`Figures` here, and drawn by the same columns, so that a figure looks and means the same wherever it stands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.text import Text

from meshdemo.ui import format as fmt

if TYPE_CHECKING:
    from meshdemo.control.client import SignalRow
    from meshdemo.remediation.view import Numbers

# Below this share of successes a figure is coloured red, below the other yellow. It is a hint for the eye;
# what is healthy is for the policy to say.
_BAD_SHARE = 0.95
_POOR_SHARE = 0.99


@dataclass(frozen=True, slots=True)
class Figures:
    """The signals of one scope. None: nothing can be said, for there were no requests."""

    rps: float
    success_rate: float | None
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    overdue: int = 0
    refused: int = 0
    denied: int = 0
    outliers: int = 0  # instances that callers' outlier detection keeps out

    @staticmethod
    def of_row(row: SignalRow) -> Figures:
        """From a row of the control plane's API."""
        return Figures(
            row["rps"], row["success_rate"], row["p50_ms"], row["p95_ms"], row["p99_ms"],
            overdue=row["overdue"], refused=row["refused"], denied=row["denied"],
        )  # fmt: skip

    @staticmethod
    def of_numbers(numbers: Numbers) -> Figures:
        """From what watch has counted."""
        return Figures(
            numbers.rps, numbers.success_rate, numbers.p50_ms, numbers.p95_ms, numbers.p99_ms,
            overdue=numbers.overdue, refused=numbers.refused, outliers=numbers.outliers,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Column:
    """One figure: its heading, how it is written, and the cells that takes at most."""

    heading: str
    cell: Callable[[Figures], Text]
    width: int
    always: bool = True  # False: left out on a narrow screen


def share(value: float | None) -> Text:
    """A success share, coloured where it is low."""
    style = ""
    if value is not None and value < _POOR_SHARE:
        style = "red" if value < _BAD_SHARE else "yellow"
    return Text(fmt.percent(value), style)


RATES: tuple[Column, ...] = (
    Column("RPS", lambda figures: Text(fmt.rate(figures.rps)), 5),
    Column("SUCCESS", lambda figures: share(figures.success_rate), 7),
)
LATENCIES: tuple[Column, ...] = (
    Column("P50", lambda figures: Text(fmt.latency(figures.p50_ms)), 6, always=False),
    Column("P95", lambda figures: Text(fmt.latency(figures.p95_ms)), 6, always=False),
    Column("P99", lambda figures: Text(fmt.latency(figures.p99_ms)), 6),
)


def note(figures: Figures, ejected: int = 0) -> Text:
    """What the columns do not say, where there is any: `! 3 overdue, 2 refused`; empty if there is not."""
    counts = {
        "overdue": figures.overdue,
        "refused": figures.refused,
        "denied": figures.denied,
        "ejected": ejected,
        "ejected by Envoy": figures.outliers,
    }
    parts = [f"{count} {word}" for word, count in counts.items() if count]
    return Text(f"! {', '.join(parts)}" if parts else "", "yellow")
