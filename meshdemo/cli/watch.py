"""`meshdemo watch`: judge, localise and heal by policy, with a live dashboard."""

from __future__ import annotations

import queue
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meshdemo.cli import _context, _values
from meshdemo.errors import Failed

if TYPE_CHECKING:
    from meshdemo.remediation.controller import Watch
    from meshdemo.ui.live import Display

_LOOK_S = 0.2


def command(
    ctx: typer.Context,
    policy: Annotated[
        Path | None,
        typer.Option("--policy", metavar="FILE", help="The policy (default: the one that comes along)."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Decide and say, and touch nothing.")] = False,
    for_: Annotated[
        str | None,
        typer.Option("--for", metavar="DURATION", help="End after so long, such as 60s (default: never)."),
    ] = None,
    until_healed: Annotated[
        bool,
        typer.Option(
            "--until-healed",
            help="End when an incident is over and none is open, or when all that are open are given up "
            "(exit status 1). Waits for the first one; with --for at most so long (0 if there was none).",
        ),
    ] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Lines instead of the dashboard.")] = False,
    record: Annotated[
        Path | None,
        typer.Option("--record", metavar="FILE", help="Keep the signals, for `meshdemo policy test`."),
    ] = None,
) -> None:
    """Judge, localise and heal by policy, until Ctrl-C."""
    from meshdemo.remediation import policyfile
    from meshdemo.remediation.controller import Settings, Watch
    from meshdemo.resources import DEFAULT_POLICY
    from meshdemo.ui import tables

    context = _context.of(ctx)
    path = policy or DEFAULT_POLICY
    # A variable that is not set is complained about before anything starts.
    rules = policyfile.load(path, to_notify=True)
    rules.webhooks()
    settings = Settings(
        policy=rules.of_app(context.runtime.app().name),
        policy_name=str(path),
        dry_run=dry_run,
        for_s=None if for_ is None else _values.duration_s(for_, "--for"),
        until_healed=until_healed,
        record=record,
    )
    lock: AbstractContextManager[None] = nullcontext() if dry_run else context.runtime.watch_lock()
    with lock:
        watch = Watch(context.runtime, settings, tables.fault_words)
        with _context.stoppable(), _display(context, plain) as display:
            _run(context, watch, display)
    if watch.error is not None:
        raise watch.error
    if until_healed and watch.outcome.open:
        raise Failed(
            f"not healed: {', '.join(watch.outcome.open)}", "`meshdemo report` shows what was tried and why"
        )


def _display(context: _context.Context, plain: bool) -> Display:
    from meshdemo.ui.live import LiveDisplay, PlainDisplay

    if context.chatty and not plain:
        return LiveDisplay(context.screen)
    return PlainDisplay(context.say)


def _run(context: _context.Context, watch: Watch, display: Display) -> None:
    """Show what watch says until it ends; Ctrl-C lets it finish what it is doing, a second one does not."""
    watch.start()
    stopping = False
    while True:
        try:
            while (event := _next(watch)) is not _NOTHING:
                if event is None:
                    _show_newest(watch, display)
                    return
                if context.as_json:
                    context.emit_line(event.to_json())  # type: ignore[attr-defined]
            _show_newest(watch, display)
        except KeyboardInterrupt:
            watch.stop()
            if stopping:
                raise
            stopping = True
            if watch.busy_with:
                context.stderr.print(f"finishing: {'; '.join(watch.busy_with)} (Ctrl-C again to leave it)")


_NOTHING = object()


def _next(watch: Watch) -> object:
    try:
        return watch.events.get(timeout=_LOOK_S)
    except queue.Empty:
        return _NOTHING


def _show_newest(watch: Watch, display: Display) -> None:
    newest = None
    while not watch.views.empty():
        newest = watch.views.get()
    if newest is not None:
        display.show(newest)
