"""`meshdemo report`: the incidents so far, and what they cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meshdemo.cli import _context
from meshdemo.errors import BadInput

if TYPE_CHECKING:
    from rich.console import RenderableType

    from meshdemo.remediation.report import Incident, Report


def command(
    ctx: typer.Context,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write the report as one page that needs nothing else."),
    ] = None,
) -> None:
    """The incidents so far: cause, evidence, remedies tried, time to detect and recover, budget spent."""
    from meshdemo.remediation import report as reports

    context = _context.of(ctx)
    report = reports.make(context.name, context.client.events(after=0).events)
    if html is not None:
        from meshdemo.remediation.page import render

        try:
            html.write_text(render(report), encoding="utf-8")
        except OSError as error:
            raise BadInput(f"cannot write {html}: {error.strerror or error}") from error
    if context.as_json:
        context.emit(report.to_json())
    elif html is not None:
        context.say(f"{len(report.incidents)} incidents in {html}")
    else:
        for part in _parts(report):
            context.console.print(part)


def _parts(report: Report) -> list[RenderableType]:
    """The report as rich prints it: a table of all incidents, then each with its story."""
    from rich.text import Text

    from meshdemo.ui import format as fmt
    from meshdemo.ui import tables

    if not report.incidents:
        return [Text("no incidents so far; `meshdemo watch` looks for them")]
    overview = tables.plain(
        "TIME", "SERVICE", "OBJECTIVE", "CAUSE", "STATE", ">DETECT", ">RECOVER", ">BUDGET"
    )
    for one in report.incidents:
        overview.add_row(
            fmt.clock(one.opened_at),
            one.service,
            one.objective,
            f"{one.scope} {one.target}" if one.scope else "?",
            _state(one),
            fmt.duration(one.detect_s),
            fmt.duration(one.recover_s),
            fmt.percent(one.budget_spent) if one.budget_spent is not None else fmt.NOTHING,
        )
    parts: list[RenderableType] = [overview]
    for number, one in enumerate(report.incidents, start=1):
        parts.append(Text())
        parts.append(Text(f"{number}. {fmt.clock(one.opened_at)} {one.why}", "bold"))
        parts.extend(Text(f"   {line}") for line in _story(one))
    parts.extend([Text(), Text(_totals(report))])
    return parts


def _state(one: Incident) -> RenderableType:
    from rich.text import Text

    return {
        "healed": Text("✓ healed", "green"),
        "gave_up": Text("✗ gave up", "bold red"),
        "open": Text("↻ open", "yellow"),
    }[one.state]


def _story(one: Incident) -> list[str]:
    from meshdemo.ui import format as fmt

    lines = [f"cause     {one.cause}"]
    if one.faults:
        lines.append(f"fault     {', '.join(one.faults)}, put there on purpose")
    lines += [f"remedy    {tried.words}: {tried.outcome}" for tried in one.remedies]
    if not one.remedies:
        lines.append("remedy    none was needed" if one.state == "healed" else "remedy    none so far")
    known = "from the fault" if one.detect_s is not None else "from the alarm"
    times = [f"detected after {fmt.duration(one.detect_s)}"] if one.detect_s is not None else []
    if one.recover_s is not None:
        times.append(f"healthy again after {fmt.duration(one.recover_s)}")
    if times:
        lines.append(f"times     {', '.join(times)} ({known})")
    if one.bad_requests is not None:
        spent = fmt.percent(one.budget_spent) if one.budget_spent is not None else fmt.NOTHING
        lines.append(f"cost      {one.bad_requests} bad requests, {spent} of the error budget")
    return lines


def _totals(report: Report) -> str:
    from meshdemo.ui import format as fmt

    totals = report.totals()
    words = f"{totals['incidents']} incidents, {totals['healed']} healed, {totals['gave_up']} given up"
    for key, what in (("detect_s", "detected"), ("recover_s", "healthy again")):
        if figures := totals[key]:
            words += (
                f"; {what} after {fmt.duration(figures['median'])} (worst {fmt.duration(figures['worst'])})"
            )
    for name, spent in totals["budget_spent"].items():
        words += f"; error budget of {name}: {fmt.percent(spent)} spent"
    return words
