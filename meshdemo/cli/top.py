"""`meshdemo top`: the live table of routes, made from a tap."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from meshdemo.cli import _context, _values

if TYPE_CHECKING:
    from rich.console import RenderableType

    from meshdemo.control.client import TapEvent
    from meshdemo.ui.top import Top

_REDRAW_S = 0.5
_ONCE_S = 5.0


def command(
    ctx: typer.Context,
    service: Annotated[
        str | None, typer.Argument(help="Only requests to this service.", show_default=False)
    ] = None,
    route: Annotated[
        str | None, typer.Option("--route", metavar="P", help="Only this route, or paths with this prefix.")
    ] = None,
    for_: Annotated[
        str | None,
        typer.Option("--for", metavar="DURATION", help="Stop after (default, where nobody looks on: 5s)."),
    ] = None,
) -> None:
    """The live table of routes: who asks whom for what, how often, how fast, how well."""
    from meshdemo.ui.top import Top

    context = _context.of(ctx)
    for_s = None if for_ is None else _values.duration_s(for_, "--for")
    if not context.chatty:
        for_s = for_s or _ONCE_S
    context.check_service(service)
    top = Top()
    batches = _batches(context.client.tap(service=service, route=route), for_s)
    if context.chatty:
        _live(context, top, batches)
    else:
        for batch in batches:
            _count(top, batch)
    if context.as_json:
        context.emit(top.rows())
    else:
        context.console.print(top.table())


def _live(context: _context.Context, top: Top, batches: Iterator[list[TapEvent]]) -> None:
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    def drawn() -> RenderableType:
        hint = Text("Ctrl-C ends; a busy mesh shows a sample of its requests", "dim", no_wrap=True)
        return Group(hint, top.table(most=max(1, context.screen.height - 3)))

    with Live(drawn(), console=context.screen, screen=True, auto_refresh=False) as live:
        for batch in batches:
            _count(top, batch)
            live.update(drawn(), refresh=True)


def _count(top: Top, batch: list[TapEvent]) -> None:
    for request in batch:
        if not request["mirrored"]:
            top.add(request)


def _batches(requests: Iterator[TapEvent], for_s: float | None) -> Iterator[list[TapEvent]]:
    """What came in each half second, also where nothing came; for `for_s`, or until the tap ends."""
    arrived: queue.SimpleQueue[TapEvent | BaseException | None] = queue.SimpleQueue()

    def read() -> None:
        try:
            for request in requests:
                arrived.put(request)
            arrived.put(None)
        except BaseException as error:  # handed on: it is raised where the table is drawn
            arrived.put(error)

    threading.Thread(target=read, name="tap", daemon=True).start()
    now = time.monotonic()
    stop_at = float("inf") if for_s is None else now + for_s
    while now < stop_at:
        batch: list[TapEvent] = []
        batch_ends = min(now + _REDRAW_S, stop_at)
        while (left := batch_ends - time.monotonic()) > 0:
            try:
                item = arrived.get(timeout=left)
            except queue.Empty:
                break
            if item is None:
                yield batch
                return
            if isinstance(item, BaseException):
                raise item
            batch.append(item)
        yield batch
        now = time.monotonic()
