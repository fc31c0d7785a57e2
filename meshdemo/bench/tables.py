"""The benchmark's findings as tables for the terminal."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from meshdemo.bench.model import NOISE_RULE, Bar, Figure, Report, SuiteResult
from meshdemo.bench.stats import Spread

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
        yield from _figures(result)
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


_HEADINGS = ("", "MEDIAN", "MIN..MAX", "RATIO", "MIN..MAX", "")


def _figures(result: SuiteResult) -> Iterator[RenderableType]:
    """Each figure's name on a line of its own, so that nothing is cut on a terminal of 80 columns."""
    figures = [(figure, _rows(figure)) for figure in result.findings.figures]
    every = [_HEADINGS, *(tuple(map(str, row)) for _, rows in figures for row in rows)]
    widths = [max(map(cell_len, cells)) for cells in zip(*every, strict=True)]
    yield _table(widths, [], heading=True)
    for figure, rows in figures:
        title = Text(f"{figure.title}{f' ({figure.note})' if figure.note else ''}, {figure.unit}", "bold")
        for bar in figure.bars:
            title.append_text(_verdict(figure, bar))
        yield title
        yield _table(widths, rows)


def _rows(figure: Figure) -> list[tuple[Text | str, ...]]:
    rows: list[tuple[Text | str, ...]] = []
    for name in figure.values:
        lies, ratio = figure.spread(name), figure.ratio(name)
        row = (
            Text(f"  {name}", "bold" if name == figure.ours else ""),
            value(lies.median, figure.observed),
            span(lies, figure.observed),
            value(ratio.median) if ratio else _NOTHING,
            span(ratio) if ratio else _NOTHING,
            Text("~ noisy", "yellow") if figure.noisy(name) else "",
        )
        rows.append(row)
    return rows


def _table(
    widths: Sequence[int], rows: Sequence[Sequence[Text | str]], *, heading: bool = False
) -> RenderableType:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=heading, header_style="bold")
    for position, (name, width) in enumerate(zip(_HEADINGS, widths, strict=True)):
        figures = 0 < position < len(widths) - 1
        table.add_column(name, min_width=width, justify="right" if figures else "left", no_wrap=figures)
    for row in rows:
        table.add_row(*row)
    return table


def _verdict(figure: Figure, bar: Bar) -> Text:
    verdict = figure.verdict(bar)
    if verdict is None:
        return Text()
    mark, style = {"met": ("✓", "green"), "missed": ("✗", "red"), "unclear": ("?", "yellow")}[verdict]
    return Text(f"  {mark} {bar_words(figure, bar)}", style)


def bar_words(figure: Figure, bar: Bar) -> str:
    """A bar in words: `at most 1.15 x envoy`; of another than ours, whose it is."""
    whose = f"{bar.alternative}: " if bar.alternative and bar.alternative != figure.ours else ""
    limit = f"{bar.limit:g} x {bar.against}" if bar.against else f"{bar.limit:g} {figure.unit}"
    most = "most" if figure.better == "lower" else "least"
    return f"{whose}{'worst ' if bar.of == 'worst' else ''}at {most} {limit}"


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
