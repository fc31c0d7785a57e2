"""`meshdemo tap`: single requests, live."""

from __future__ import annotations

import re
from itertools import islice
from typing import Annotated

import typer

from meshdemo.cli import _context, _values
from meshdemo.control.client import TAP_PER_S, TAP_STATUS
from meshdemo.errors import BadInput


def command(
    ctx: typer.Context,
    service: Annotated[
        str | None, typer.Argument(help="Only requests to this service.", show_default=False)
    ] = None,
    route: Annotated[
        str | None, typer.Option("--route", metavar="P", help="Only this route, or paths with this prefix.")
    ] = None,
    status: Annotated[
        str | None,
        typer.Option(
            "--status", metavar="5xx", help="Only this status, or class of status (5xx: gRPC errors too)."
        ),
    ] = None,
    failed: Annotated[
        bool, typer.Option("--failed", help="Only failures: 5xx, gRPC errors, resets and timeouts.")
    ] = False,
    caller: Annotated[
        str | None, typer.Option("--caller", metavar="S", help="Only requests of this caller.")
    ] = None,
    instance: Annotated[
        str | None, typer.Option("--instance", metavar="ID", help="Only requests to this instance.")
    ] = None,
    max_: Annotated[
        int | None, typer.Option("--max", metavar="N", min=1, help="Stop after so many requests.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option("--rate", metavar="N", help="Show at most so many requests a second.")
    ] = None,
) -> None:
    """Single requests, live, as the called instance's sidecar sees them; until Ctrl-C or --max."""
    if rate is not None:
        _values.number(rate, "--rate", *TAP_PER_S, "a second")
    if status is not None and not re.fullmatch(TAP_STATUS, status):
        raise BadInput(
            f"--status {status!r}: give a status such as 503, a class such as 5xx, or 0 for no answer"
        )
    context = _context.of(ctx)
    context.check_service(service)
    context.check_service(caller, "caller")
    ids = [one.id for one in context.runtime.instances()] if instance is not None else []
    if instance is not None and instance not in ids:
        raise BadInput(f"no instance '{instance}'; there are: {', '.join(ids)}")
    requests = context.client.tap(
        service=service,
        caller=caller,
        route=route,
        status=status,
        instance=instance,
        failed=failed,
        max_per_s=rate,
    )
    if context.as_json:
        for request in islice(requests, max_):
            context.emit_line(request)
        return
    from meshdemo.ui import tables

    for request in islice(requests, max_):
        context.console.print(tables.tap_line(request), soft_wrap=True)
