"""`meshdemo bench`: what the mesh costs and how fast it heals, on this machine, next to the alternatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meshdemo.cli import _context
from meshdemo.errors import BadInput, Failed

if TYPE_CHECKING:
    from meshdemo.bench.model import Report

_MOST_RUNS = 1000


def command(
    ctx: typer.Context,
    suites: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[overhead|fault|heal|controlplane|up|load|see|steer|all]...",
            help="Which (default: all).", show_default=False,
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A short look, not figures to quote.")] = False,
    runs: Annotated[
        int | None, typer.Option("--runs", metavar="N", help="Rounds of each figure (default: the suite's).")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page with plots, too.")
    ] = None,
    large: Annotated[
        bool, typer.Option("--large", help="controlplane: also with 5,000 sidecars.")
    ] = False,
    alone: Annotated[
        bool, typer.Option("--alone", help="heal: watch alone, without the alternatives.")
    ] = False,
) -> None:  # fmt: skip
    """What the mesh costs and how fast it heals, on this machine, next to the alternatives.

    About an hour for all, of which heal is half (forty minutes more where kind is installed); ten
    minutes with --quick. How long it will take is said before.
    Everything runs in meshes of its own, which are gone afterwards.
    """
    from meshdemo.bench import runner
    from meshdemo.bench.scale import Scale

    context = _context.of(ctx)
    names = runner.chosen(suites or [])
    if runs is not None and not 1 <= runs <= _MOST_RUNS:
        raise BadInput(f"--runs {runs}: allowed is 1 to {_MOST_RUNS}")
    if html is not None:
        _check_writable(html)
    scale = Scale(quick=quick, runs=runs, large=large, alone=alone)
    if context.chatty:
        about = max(1, round(runner.minutes(names, scale)))
        context.stderr.print(f"about {about} minute{'s' if about > 1 else ''}")
    report = None
    try:
        with _context.stoppable(), _progress(context) as tell:
            for report in runner.run(names, scale, tell):
                if not context.as_json:
                    _print_newest(context, report)
                if html is not None:
                    from meshdemo.bench import page

                    _write(html, page.render(report))
    finally:  # what was measured before a Ctrl-C is not lost
        if report is not None:
            _print_end(context, report)
    assert report is not None
    if failed := [f"{suite.name}: {suite.error}" for suite in report.suites if suite.error]:
        raise Failed(f"not all could be measured: {'; '.join(failed)}")


def _print_newest(context: _context.Context, report: Report) -> None:
    from meshdemo.bench import tables

    if len(report.suites) == 1:
        for part in tables.head(report):
            context.console.print(part)
    for part in tables.suite(report.suites[-1]):
        context.console.print(part)


def _print_end(context: _context.Context, report: Report) -> None:
    from meshdemo.bench import tables

    if context.as_json:
        context.emit(report.to_json())
        return
    for part in tables.foot(report):
        context.console.print(part)


@contextmanager
def _progress(context: _context.Context) -> Iterator[Callable[[str], None]]:
    """Where the suites say what they do: a line that changes, for a person at a terminal only."""
    if not context.chatty:
        yield lambda line: None
        return
    with context.stderr.status("") as status:
        yield status.update


def _check_writable(path: Path) -> None:
    """Complain now, not after an hour; what the file has stays."""
    was_there = path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise _cannot_write(path, error) from error
    if not was_there:
        path.unlink()


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: Path, error: OSError) -> BadInput:
    return BadInput(f"cannot write {path}: {error.strerror or error}")
