"""`meshdemo edges`: who calls whom, and whether it is secured."""

from __future__ import annotations

from typing import Annotated

import typer

from meshdemo.cli import _context, _values


def command(
    ctx: typer.Context,
    window: Annotated[
        str, typer.Option("--window", metavar="DURATION", help="How far back, 1s to 10m.")
    ] = "10s",
) -> None:
    """Who calls whom, and whether it is secured (every request of the window over mutual TLS)."""
    window_s = _values.number(_values.duration_s(window, "--window"), "--window", 1, 600, "s")
    context = _context.of(ctx)
    rows = context.client.edges(window_s)
    if context.as_json:
        context.emit(rows)
    elif rows:
        from meshdemo.ui import tables

        context.console.print(tables.edges(rows))
    else:
        context.say("nobody has called anybody yet")
