"""`meshdemo stat`: requests/s, success rate and latency, one row each."""

from __future__ import annotations

from typing import Annotated

import typer

from meshdemo.cli import _context, _values
from meshdemo.errors import BadInput

SCOPES = ("service", "version", "instance", "route", "caller")


def command(
    ctx: typer.Context,
    service: Annotated[
        str | None, typer.Argument(help="Only this service (default: all).", show_default=False)
    ] = None,
    by: Annotated[str, typer.Option("--by", metavar="|".join(SCOPES), help="One row for each.")] = "service",
    window: Annotated[
        str, typer.Option("--window", metavar="DURATION", help="How far back, 1s to 10m.")
    ] = "10s",
) -> None:
    """Requests/s, success rate and latency, one row each."""
    if by not in SCOPES:
        raise BadInput(f"--by {by!r}: allowed is {', '.join(SCOPES)}")
    window_s = _values.number(_values.duration_s(window, "--window"), "--window", 1, 600, "s")
    context = _context.of(ctx)
    rows = context.client.signals(by=by, window_s=window_s, service=service)
    if context.as_json:
        context.emit(rows)
    elif rows:
        from meshdemo.ui import tables

        context.console.print(tables.signals(rows, by))
    else:
        context.say("no requests yet")
