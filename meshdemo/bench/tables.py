"""The benchmark's findings as tables for the terminal."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

from rich.console import RenderableType
from rich.text import Text

from meshdemo.bench.model import NOISE_RULE, Bar, Figure, Report, SuiteResult
from meshdemo.bench.stats import Spread
from meshdemo.ui import tables

_NOTHING = "-"


def head(report: Report) -> Iterator[RenderableType]:
    """The machine, its versions, and how it was when the run began."""
    machine = report.machine
    yield Text(
        f"{machine.processors} x {machine.processor}, {machine.memory_gb:.0f} GB, {machine.system}; "
        f"{time.strftime('%Y-%m-%d %H:%M', time.localtime(report.at))}",
        "bold",
    )
    yield Text(", ".join(f"{name} {version}" for name, version in machine.versions.items()))
    load = " ".join(f"{value:.1f}" for value in report.load)
    yield Text(f"load average when it began: {load}{'; a quick run' if report.quick else ''}")
    for doubt in report.doubts:
        yield Text(f"! too noisy to believe: {doubt}", "yellow")


def suite(result: SuiteResult) -> Iterator[RenderableType]:
    """One suite: its figures, and what must be said of them."""
    before, after = result.before, result.after
    yield Text()
    yield Text(f"{result.name}: {result.title}", "bold")
    yield Text(
        f"took {result.seconds:.0f} s; load average {before.load[0]:.1f} before, {after.load[0]:.1f} after; "
        f"others used {before.busy:.0%} of the processors before, {after.busy:.0%} after",
        "dim",
    )
    for doubt in result.doubts:
        yield Text(f"! too noisy to believe: {doubt}", "yellow")
    if result.error:
        yield Text(f"✗ it ended early: {result.error}", "red")
    if result.findings.figures:
        yield _figures(result)
    for left_out in result.findings.left_out:
        yield Text(f"left out: {left_out.name}: {left_out.why}")
    for note in result.findings.notes:
        yield Text(note, "dim")


def foot(report: Report) -> Iterator[RenderableType]:
    """How to read all this."""
    yield Text()
    yield Text(
        "Each figure is the median of its rounds, with the lowest and highest; alternatives took turns "
        "within each round. RATIO is ours divided by the alternative, pair by pair: its median, lowest and "
        "highest.",
        "dim",
    )
    yield Text(NOISE_RULE, "dim")


def _figures(result: SuiteResult) -> RenderableType:
    table = tables.plain("FIGURE", "", ">MEDIAN", ">MIN..MAX", "UNIT", ">RATIO", ">MIN..MAX", "")
    for figure in result.findings.figures:
        for position, name in enumerate(figure.values):
            lies, ratio = figure.spread(name), figure.ratio(name)
            notes = Text()
            for bar in figure.bars:
                if name == (bar.alternative or figure.ours) or len(figure.values) == 1:
                    notes.append_text(_verdict(figure, bar))
            if figure.noisy(name):
                notes.append("~ noisy", "yellow")
            table.add_row(
                f"{figure.title}{f' ({figure.note})' if figure.note else ''}" if not position else "",
                Text(name, "bold" if name == figure.ours else ""),
                value(lies.median, figure.observed),
                span(lies, figure.observed),
                figure.unit,
                f"{ratio.median:.2f}" if ratio else _NOTHING,
                span(ratio) if ratio else _NOTHING,
                notes,
            )
    return table


def _verdict(figure: Figure, bar: Bar) -> Text:
    verdict = figure.verdict(bar)
    if verdict is None:
        return Text()
    mark, style = {"met": ("✓", "green"), "missed": ("✗", "red"), "unclear": ("?", "yellow")}[verdict]
    return Text(f"{mark} {bar_words(figure, bar)}  ", style)


def bar_words(figure: Figure, bar: Bar) -> str:
    """A bar in words: `at most 1.15 x envoy`."""
    limit = f"{bar.limit:g} x {bar.against}" if bar.against else f"{bar.limit:g} {figure.unit}"
    return (
        f"{'worst ' if bar.of == 'worst' else ''}at {'most' if figure.better == 'lower' else 'least'} {limit}"
    )


def value(number: float, observed: float | None = None) -> str:
    """A figure with three digits that count; what did not come in the time observed is more than that."""
    if math.isinf(number):
        return f"> {observed:g}" if observed is not None else "∞"
    if number == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(number))))
    return f"{number:,.{digits}f}"


def span(lies: Spread, observed: float | None = None) -> str:
    """Lowest to highest."""
    return f"{value(lies.low, observed)}..{value(lies.high, observed)}"
