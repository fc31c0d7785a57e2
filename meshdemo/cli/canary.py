"""`meshdemo canary`: shift traffic to a new version step by step, while the objectives hold."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from meshdemo.cli import _context, _values
from meshdemo.errors import BadInput


def command(
    ctx: typer.Context,
    service: Annotated[str, typer.Argument(help="The service.")],
    to: Annotated[str, typer.Option("--to", metavar="VERSION", help="The version to shift to.")],
    steps: Annotated[
        str, typer.Option("--steps", metavar="W,W,...", help="Rising weights in percent.")
    ] = "5,25,50,100",
    hold: Annotated[
        str, typer.Option("--hold", metavar="DURATION", help="How long each step is held at least.")
    ] = "10s",
    policy: Annotated[
        Path | None,
        typer.Option("--policy", metavar="FILE", help="Whose objectives count (default: watch's)."),
    ] = None,
) -> None:
    """Shift traffic step by step while the objectives hold, and back to 0 when they do not."""
    from meshdemo.remediation import policyfile
    from meshdemo.remediation.canary_run import CanaryRun
    from meshdemo.resources import DEFAULT_POLICY

    context = _context.of(ctx)
    weights = _weights(steps)
    hold_s = _values.duration_s(hold, "--hold")
    run = CanaryRun(
        context.runtime,
        policyfile.load(policy or DEFAULT_POLICY).of_app(context.runtime.app().name),
        service,
        to,
        steps=weights,
        hold_s=hold_s,
        tell=context.say,
    )
    with _context.stoppable(), run:
        outcome = run.run()
    if context.as_json:
        context.emit(outcome.to_json())
    else:
        verdict = "promoted" if outcome.promoted else "not promoted"
        back = f" (stable has all traffic again after {outcome.back_s:.1f} s)" if outcome.back_s else ""
        context.say(f"{service} {to} is {verdict}: {outcome.reason}{back}")
    if not outcome.promoted:
        raise typer.Exit(1)


def _weights(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise BadInput(f"--steps {text!r}: write whole percentages, such as 5,25,50,100") from None
