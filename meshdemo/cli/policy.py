"""`meshdemo policy`: is a policy sound, and what would it do on recorded signals?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meshdemo.cli import _context
from meshdemo.errors import BadInput

if TYPE_CHECKING:
    from meshdemo.positions import Problem
    from meshdemo.remediation.policy import Policy

app = typer.Typer(no_args_is_help=True, help="Check a policy file, or test it on recorded signals.")


@app.command()
def check(
    ctx: typer.Context, file: Annotated[Path, typer.Argument(metavar="FILE", help="The policy.")]
) -> None:
    """Is the policy sound? Every problem with its line and column."""
    from meshdemo.remediation import policyfile

    context = _context.of(ctx)
    checked = policyfile.check_file(file)
    if context.as_json:
        context.emit(
            {
                "ok": checked.policy is not None,
                "file": str(file),
                "problems": _places(checked.problems),
                "warnings": _places([*checked.unset, *checked.remarks]),
            }
        )
        if checked.policy is None:
            raise typer.Exit(2)
        return
    if checked.policy is None:
        raise policyfile.PolicyError(str(file), checked.problems)
    policy = checked.policy
    for warning in sorted([*checked.unset, *checked.remarks]):
        context.stderr.print(f"Warning: {file}:{warning}", markup=False, soft_wrap=True)
    context.say(f"{file} is sound: {len(policy.objectives)} objectives, {len(policy.rules)} rules")


def _places(problems: Sequence[Problem]) -> list[dict[str, object]]:
    return [{"line": one.line, "column": one.column, "message": one.message} for one in problems]


@app.command()
def test(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The policy.")],
    signals: Annotated[
        Path,
        typer.Option("--signals", metavar="FILE", help="Recorded with `meshdemo watch --record FILE`."),
    ],
    app: Annotated[
        str | None,
        typer.Option(
            "--app",
            metavar="NAME|FILE",
            help="The app that the signals are of: what the policy says of it alone counts, too.",
        ),
    ] = None,
) -> None:
    """What the policy would do on recorded signals, were each remedy carried out at once."""
    from meshdemo.remediation import policyfile, policytest, recording
    from meshdemo.remediation.view import LogLine
    from meshdemo.ui.live import event_line

    context = _context.of(ctx)
    policy = policyfile.load(file)
    if app is not None:
        policy = policy.of_app(_name_of(app, policy))
    events = list(policytest.decisions(policy, recording.read(signals)))
    if context.output is _context.Output.json:
        context.emit([event.to_json() for event in events])
        return
    for event in events:
        if context.as_json:
            context.emit_line(event.to_json())
        else:
            context.say(event_line(LogLine(event.time, event.event, event.text)))
    if not events:
        context.say("the policy would do nothing: every objective holds on these signals")


def _name_of(reference: str, policy: Policy) -> str:
    """The name of an app: a built-in one, one that the policy speaks of, or what a file names.

    Raises BadInput.
    """
    from meshdemo.apps import loader

    known = sorted({*loader.built_in(), *policy.apps()})
    if reference in known:
        return reference
    if Path(reference).is_file():
        return loader.load(reference).name
    raise BadInput(f"--app {reference}: no such app", f"allowed: {', '.join(known)}, or the file of an app")
