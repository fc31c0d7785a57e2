"""`meshdemo logs`: what instances, sidecars and the control plane say."""

from __future__ import annotations

from typing import Annotated

import typer

from meshdemo.cli import _context


def command(
    ctx: typer.Context,
    service: Annotated[
        str | None, typer.Argument(metavar="[SERVICE]", help="Only its instances and their sidecars.")
    ] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on with what comes.")] = False,
) -> None:
    """Logs of instances, sidecars and the control plane, by time."""
    context = _context.of(ctx)
    for source, line in context.runtime.logs(service, follow):
        if context.as_json:
            context.emit_line({"source": source, "line": line})
        else:
            print(f"{source}: {line}", flush=follow)
