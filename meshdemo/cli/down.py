"""`meshdemo down`: remove everything that `up` made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from meshdemo.cli import _context

if TYPE_CHECKING:
    from meshdemo.runtime.base import Runtime


def command(
    ctx: typer.Context,
    everything: Annotated[bool, typer.Option("--all", help="Every mesh, not only the one named.")] = False,
) -> None:
    """Remove everything that `up` made. Nothing running is fine too."""
    from meshdemo.runtime import select

    context = _context.of(ctx)
    runtimes: list[Runtime] = select.everything() if everything else [select.anything(context.name)]
    removed: list[str] = []
    for runtime in runtimes:
        with context.progress(f"Removing mesh '{runtime.name}'"):
            gone = runtime.down()
        removed += gone
        context.say(f"Mesh '{runtime.name}' is down." if gone else f"No mesh '{runtime.name}' to remove.")
    if not runtimes:
        context.say("No mesh to remove.")
    if context.as_json:
        context.emit({"removed": removed})
