"""`meshdemo fault`: break something on purpose, see what is broken, and mend it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from meshdemo.cli import _context, _values
from meshdemo.errors import BadInput

if TYPE_CHECKING:
    from meshdemo.runtime.faults import FaultOutcome

app = typer.Typer(
    help="Break something on purpose. Without --at the fault is in the app's own environment, as a bad "
    "release would be; with --at mesh it is in the sidecars, and no process restarts.",
    subcommand_metavar="[list|clear]",
)


@app.callback(invoke_without_command=True)
def fault(
    ctx: typer.Context,
    lat: Annotated[
        float | None, typer.Option("--lat", metavar="MS", help="Latency to add, in ms, up to 3600000.")
    ] = None,
    err: Annotated[
        float | None, typer.Option("--err", metavar="SHARE", help="Share of requests that fail, 0 to 1.")
    ] = None,
    service: Annotated[
        str | None, typer.Option("--service", metavar="S", help="Where (default: service-b).")
    ] = None,
    version: Annotated[
        str | None, typer.Option("--version", metavar="V", help="Only this version (default: all).")
    ] = None,
    instance: Annotated[
        str | None, typer.Option("--instance", metavar="ID", help="Only this instance (default: all).")
    ] = None,
    route: Annotated[
        str | None,
        typer.Option(
            "--route", metavar="PREFIX", help="Only paths that begin so, such as /work (--at mesh)."
        ),
    ] = None,
    caller: Annotated[
        str | None,
        typer.Option("--caller", metavar="S", help="Only for this caller, gateway is one (--at mesh)."),
    ] = None,
    at: Annotated[
        str | None, typer.Option("--at", metavar="app|mesh", help="In the app (default), or its sidecars.")
    ] = None,
    share: Annotated[
        float | None,
        typer.Option(
            "--share",
            metavar="SHARE",
            help="Share of requests that get the latency, 0 to 1 (--at mesh; default: 1).",
        ),
    ] = None,
    for_: Annotated[
        str | None,
        typer.Option(
            "--for", metavar="DURATION", help="Clears itself after, such as 30s or 5m (default: never)."
        ),
    ] = None,
    crash: Annotated[
        bool,
        typer.Option("--crash", help="Kill an instance, the first that fits; the runtime starts it again."),
    ] = False,
    hang: Annotated[
        bool, typer.Option("--hang", help="Stop an instance, the first that fits, without killing it.")
    ] = False,
) -> None:
    """Break something on purpose."""
    if ctx.invoked_subcommand is not None:
        _refuse_options(ctx)
        return
    from meshdemo.runtime import faults

    asked = faults.request(
        lat_ms=lat, err_rate=err, service=service, version=version, instance=instance, route=route,
        caller=caller, at=at, share=share, for_s=None if for_ is None else _values.duration_s(for_, "--for"),
        crash=crash, hang=hang,
    )  # fmt: skip
    context = _context.of(ctx)
    with _context.stoppable(undoing=True) as too_late:
        with context.progress("Breaking it"):
            outcome = faults.inject(context.runtime, asked, stays=too_late)
        if context.as_json:
            context.emit(outcome.to_json())
        else:
            context.say(_sentence(outcome))


def _refuse_options(ctx: typer.Context) -> None:
    """Raises BadInput if options say what to break, and a subcommand says not to."""
    given = [
        option.opts[0]
        for option in ctx.command.params
        if option.expose_value and ctx.params.get(str(option.name)) not in (None, False)
    ]
    if given:
        raise BadInput(f"{', '.join(given)}: makes no sense with `fault {ctx.invoked_subcommand}`")


def _sentence(outcome: FaultOutcome) -> str:
    from meshdemo.ui import tables

    made = outcome.fault
    where = (
        f"on {_context.sidecars(outcome.sidecars)}"
        if made.at == "mesh"
        else f"on {', '.join(outcome.instances)}"
    )
    return (
        f"{made.id}: {tables.fault_words(made)}; in force after {outcome.effective_ms:.0f} ms {where}\n"
        f"  end it with: `meshdemo fault clear {made.id}`"
    )


@app.command("list")
def list_(ctx: typer.Context) -> None:
    """The faults in force."""
    context = _context.of(ctx)
    faults = context.client.faults()
    if context.as_json:
        context.emit([one.model_dump(mode="json") for one in faults])
    elif faults:
        from meshdemo.ui import tables

        context.console.print(tables.faults(faults))
    else:
        context.say("no fault is in force")


@app.command()
def clear(
    ctx: typer.Context,
    fault_id: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="Which one (default: all).", show_default=False)
    ] = None,
) -> None:
    """End one fault, or all of them."""
    from meshdemo.runtime import faults

    context = _context.of(ctx)
    with _context.stoppable(undoing=True), context.progress("Mending it"):
        cleared = faults.clear(context.runtime, fault_id)
    if context.as_json:
        context.emit(cleared.to_json())
    elif cleared.faults:
        ids = ", ".join(one.id for one in cleared.faults)
        context.say(f"cleared {ids} after {cleared.effective_ms:.0f} ms")
    else:
        context.say("no fault is in force")
