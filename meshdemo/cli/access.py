"""`meshdemo access`: who may call whom."""

from __future__ import annotations

from typing import Annotated

import typer

from meshdemo.cli import _context

app = typer.Typer(no_args_is_help=True, help="Who may call whom.")

_Caller = Annotated[str, typer.Argument(help="The service that calls.")]
_Service = Annotated[str, typer.Argument(help="The service that is called.")]


@app.command()
def allow(ctx: typer.Context, caller: _Caller, service: _Service) -> None:
    """Let CALLER call SERVICE."""
    _set(ctx, caller, service, allowed=True)


@app.command()
def deny(ctx: typer.Context, caller: _Caller, service: _Service) -> None:
    """Refuse CALLER at SERVICE's sidecars, with 403."""
    _set(ctx, caller, service, allowed=False)


def _set(ctx: typer.Context, caller: str, service: str, *, allowed: bool) -> None:
    context = _context.of(ctx)
    effect = context.client.set_access(caller, service, allowed)
    if context.as_json:
        context.emit({"caller": caller, "service": service, "allowed": allowed, **_context.effect(effect)})
    else:
        verb = "may" if allowed else "may not"
        context.say(f"{caller} {verb} call {service}; {_context.effect_words(effect)}")


@app.command()
def show(ctx: typer.Context) -> None:
    """Every pair of services that the app file or a command speaks of."""
    context = _context.of(ctx)
    rows = context.client.access()
    if context.as_json:
        context.emit(rows)
    elif rows:
        from meshdemo.ui import tables

        context.console.print(tables.access(rows))
    else:
        context.say("no service of this app calls another")
