"""`meshdemo identity`: the certificates of the mesh, and their rotation."""

from __future__ import annotations

from typing import Annotated

import typer

from meshdemo.cli import _context

app = typer.Typer(no_args_is_help=True, help="The certificates of the mesh, and their rotation.")


@app.command()
def show(ctx: typer.Context) -> None:
    """Who each instance is, and until when its certificate and the root are valid."""
    context = _context.of(ctx)
    found = context.client.identities()
    if context.as_json:
        context.emit(found)
        return
    from meshdemo.ui import format as fmt
    from meshdemo.ui import tables

    table = tables.plain("INSTANCE", "IDENTITY", "VALID UNTIL")
    for row in found["instances"]:
        until = fmt.clock(row["expires_at"]) if row["expires_at"] else fmt.NOTHING
        table.add_row(row["instance"], row["identity"], until)
    context.console.print(table)
    state = "; it is being replaced" if found["replacing_root"] else ""
    lives = fmt.duration(found["lifetime_s"])
    context.say(f"{found['trusted_roots']} root trusted{state}; a certificate lives {lives}")


@app.command()
def rotate(
    ctx: typer.Context,
    root: Annotated[
        bool, typer.Option("--root", help="The root too: both are trusted until all have the new one.")
    ] = False,
) -> None:
    """Give every sidecar a fresh key and certificate now; no request fails."""
    context = _context.of(ctx)
    effect = context.client.rotate_identities(root=root)
    if context.as_json:
        context.emit({"root": root, **_context.effect(effect)})
    else:
        what = "the root and all certificates are new" if root else "all certificates are new"
        context.say(f"{what}; {_context.effect_words(effect)}")
