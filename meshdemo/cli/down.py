"""`meshdemo down`: remove everything that `up` made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from meshdemo.cli import _context
from meshdemo.errors import Failed, MeshdemoError

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
    failures: list[MeshdemoError] = []
    for runtime in runtimes:
        try:
            with context.progress(f"Removing mesh '{runtime.name}'"):
                gone = runtime.down()
        except MeshdemoError as error:
            failures.append(error)  # the others go all the same
            if everything:
                context.stderr.print(f"Mesh '{runtime.name}': {error.message}", markup=False, soft_wrap=True)
            continue
        removed += gone
        for note in getattr(runtime, "notes", ()):
            context.stderr.print(f"Note: {note}", markup=False, soft_wrap=True)
        context.say(f"Mesh '{runtime.name}' is down." if gone else f"No mesh '{runtime.name}' to remove.")
    if not runtimes:
        context.say("No mesh to remove.")
    if context.as_json and (removed or not failures):
        context.emit({"removed": removed})
    if len(failures) > 1:
        raise Failed(f"{len(failures)} of {len(runtimes)} meshes could not be removed", failures[0].remedy)
    if failures:
        raise failures[0]
