"""`meshdemo load`: set the load that service-a makes."""

from __future__ import annotations

from typing import Annotated

import typer

from meshdemo.cli import _context, _values
from meshdemo.limits import MAX_RPS


def command(
    ctx: typer.Context,
    rps: Annotated[
        float,
        typer.Option(
            "--rps",
            metavar="N",
            help="Requests per second that each instance which makes load sends, 0 to 100000; 0 stops it.",
        ),
    ],
) -> None:
    """Set the load that service-a makes."""
    rps = _values.number(rps, "--rps", 0, MAX_RPS, "requests/s")
    context = _context.of(ctx)
    context.runtime.set_load(rps)
    if context.as_json:
        context.emit({"rps": rps})
    else:
        context.say(f"load: {rps:g} requests/s")
