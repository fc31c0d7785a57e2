"""`meshdemo traffic`: how callers reach a service: splits, timeouts, retries, circuit breakers, mirrors."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from meshdemo.cli import _context, _values
from meshdemo.errors import BadInput

app = typer.Typer(no_args_is_help=True, help="How callers reach a service.")


@app.command("set")
def set_(
    ctx: typer.Context,
    service: Annotated[str, typer.Argument(help="The service that is called.")],
    split: Annotated[
        str | None, typer.Option("--split", metavar="v1=90,v2=10", help="Weights by version; sum 100.")
    ] = None,
    timeout: Annotated[
        str | None,
        typer.Option("--timeout", metavar="DURATION", help="Of a request, such as 500ms (default: 15s)."),
    ] = None,
    retries: Annotated[
        int | None,
        typer.Option(
            "--retries",
            metavar="N",
            help="Of a failed request, 0: none (default: 2, of what no app has answered).",
        ),
    ] = None,
    max_connections: Annotated[
        int | None,
        typer.Option(
            "--max-connections", metavar="N", help="Circuit breaker: connections of a caller (default: 4096)."
        ),
    ] = None,
    max_pending: Annotated[
        int | None,
        typer.Option(
            "--max-pending",
            metavar="N",
            help="Circuit breaker: requests that wait for a connection (default: 4096).",
        ),
    ] = None,
    max_requests: Annotated[
        int | None,
        typer.Option(
            "--max-requests", metavar="N", help="Circuit breaker: requests in flight (default: 4096)."
        ),
    ] = None,
    mirror: Annotated[
        str | None,
        typer.Option("--mirror", metavar="V=SHARE", help="Copy a share of requests, 0 to 1, to version V."),
    ] = None,
    outlier: Annotated[
        str | None,
        typer.Option(
            "--outlier", metavar="on|off", help="Callers leave out instances that keep failing (default: on)."
        ),
    ] = None,
) -> None:
    """Change how callers reach SERVICE. What is not named stays as it is."""
    changes: dict[str, Any] = {
        "retries": retries,
        "max_connections": max_connections,
        "max_pending": max_pending,
        "max_requests": max_requests,
        "split": None if split is None else _values.split(split),
        "timeout_ms": None if timeout is None else _whole_ms(timeout),
        "mirror": None if mirror is None else _values.mirror(mirror),
        "outlier": None if outlier is None else _on_off(outlier),
    }
    changes = {field: value for field, value in changes.items() if value is not None}
    if not changes:
        raise BadInput("nothing to set: give --split, --timeout, --retries, ... (see --help)")
    context = _context.of(ctx)
    traffic, effect = context.client.set_traffic(service, changes)
    if context.as_json:
        context.emit(
            {"service": service, "traffic": traffic.model_dump(mode="json"), **_context.effect(effect)}
        )
    else:
        from meshdemo.ui import tables

        context.say(f"{service}: {tables.traffic_words(traffic)}; {_context.effect_words(effect)}")


def _whole_ms(text: str) -> int:
    ms = round(_values.duration_s(text, "--timeout") * 1000)
    if ms < 1:
        raise BadInput(f"--timeout {text!r}: at least 1ms")
    return ms


def _on_off(text: str) -> bool:
    if text not in {"on", "off"}:
        raise BadInput(f"--outlier {text!r}: allowed is on or off")
    return text == "on"


@app.command()
def show(
    ctx: typer.Context,
    service: Annotated[
        str | None, typer.Argument(help="Only this service (default: all).", show_default=False)
    ] = None,
) -> None:
    """The traffic rules in force: what was set and since when, and the defaults of the sidecars."""
    context = _context.of(ctx)
    rules = context.client.effective_traffic()
    if service is not None:
        context.check_service(service)
        rules = {name: rule for name, rule in rules.items() if name == service}
    if context.as_json:
        context.emit(
            {
                name: {**{field: rule["value"] for field, rule in fields.items()}, "fields": fields}
                for name, fields in rules.items()
            }
        )
    else:
        from meshdemo.ui import tables

        context.console.print(tables.traffic(rules))


_FIELDS = {
    "split": "split", "timeout": "timeout_ms", "retries": "retries", "max-connections": "max_connections",
    "max-pending": "max_pending", "max-requests": "max_requests", "mirror": "mirror", "outlier": "outlier",
}  # fmt: skip


@app.command()
def reset(
    ctx: typer.Context,
    service: Annotated[str, typer.Argument(help="The service that is called.")],
    fields: Annotated[
        list[str] | None, typer.Argument(metavar="[RULE]...", help=f"{', '.join(_FIELDS)} (default: all).")
    ] = None,
) -> None:
    """Back to the defaults of the sidecars, with all rules of SERVICE or with some."""
    for field in fields or ():
        if field not in _FIELDS:
            raise BadInput(f"no traffic rule '{field}'; there are: {', '.join(_FIELDS)}")
    context = _context.of(ctx)
    traffic, effect = context.client.set_traffic(
        service, {_FIELDS[field]: None for field in fields or _FIELDS}
    )
    if context.as_json:
        context.emit(
            {"service": service, "traffic": traffic.model_dump(mode="json"), **_context.effect(effect)}
        )
    else:
        from meshdemo.ui import tables

        context.say(f"{service}: {tables.traffic_words(traffic)}; {_context.effect_words(effect)}")
