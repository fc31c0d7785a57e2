"""What every command is given: the global options, where to print, and the way to the mesh.

Costs nothing until used: consoles, the runtime and the client of the control plane are made on first use,
because the time of a cold `meshdemo stat` goes into imports.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any

import typer

from meshdemo.errors import BadInput

if TYPE_CHECKING:
    from rich.console import Console

    from meshdemo.control.client import ControlClient
    from meshdemo.control.model import Effect
    from meshdemo.runtime.base import Runtime

DEFAULT_NAME = "mesh-demo"
_PIPE_WIDTH = 240
_LEAST_WIDTH = 80
_COMMAND = re.compile(r"`meshdemo (?!check\b)([^`]*)`")


class Output(StrEnum):
    """Forms of output; `jsonl` is one JSON object a line, where events stream."""

    text = "text"
    json = "json"
    jsonl = "jsonl"


class Context:
    """The global options and what hangs on them; one per invocation."""

    def __init__(self) -> None:
        self.name = DEFAULT_NAME
        self.output = Output.text
        self.verbose = False

    @property
    def as_json(self) -> bool:
        """Whether nothing but JSON may go to stdout."""
        return self.output is not Output.text

    @property
    def chatty(self) -> bool:
        """Whether progress may be shown: for a person at a terminal only."""
        return not self.as_json and sys.stdout.isatty()

    @cached_property
    def console(self) -> Console:
        """stdout, for tables and text."""
        from rich.console import Console

        # Into a pipe a table is as wide as it needs to be, not cut to the 80 columns that rich assumes; and
        # where a terminal is too narrow for any table, rows that it breaks are better than names left out.
        if not (sys.stdout.isatty() or "COLUMNS" in os.environ):
            return Console(highlight=False, width=_PIPE_WIDTH)
        return (
            self.screen if self.screen.width >= _LEAST_WIDTH else Console(highlight=False, width=_LEAST_WIDTH)
        )

    @cached_property
    def screen(self) -> Console:
        """stdout as it is, for what fills a terminal and fits itself to its size."""
        from rich.console import Console

        return Console(highlight=False)

    @cached_property
    def stderr(self) -> Console:
        """stderr, for progress and remarks."""
        from rich.console import Console

        return Console(stderr=True, highlight=False)

    def emit(self, value: Any) -> None:
        """Print one JSON value to stdout: on one line for `jsonl`, indented otherwise."""
        indent = None if self.output is Output.jsonl else 2
        print(json.dumps(value, indent=indent, ensure_ascii=False), flush=True)

    def emit_line(self, value: Any) -> None:
        """Print one event of a stream as one line of JSON, whichever JSON form was asked for."""
        print(json.dumps(value, ensure_ascii=False), flush=True)

    def say(self, message: str) -> None:
        """Print a line for people: the result of a command, not its progress."""
        if not self.as_json:
            print(self.naming(message), flush=True)

    def naming(self, text: str) -> str:
        """`text` with the commands in it (between backquotes) as they must be typed for this mesh."""
        if self.name == DEFAULT_NAME:
            return text
        return _COMMAND.sub(
            lambda command: (
                command[0] if "--name" in command[1] else f"`meshdemo {command[1]} --name {self.name}`"
            ),
            text,
        )

    @contextmanager
    def progress(self, title: str) -> Iterator[None]:
        """Show that something is under way, on stderr and only to a person at a terminal."""
        if not self.chatty:
            yield
            return
        with self.stderr.status(title):
            yield

    @cached_property
    def runtime(self) -> Runtime:
        """The runtime of the mesh of this name; raises Missing if it does not run."""
        from meshdemo.runtime.select import find

        return find(self.name)

    @cached_property
    def client(self) -> ControlClient:
        """A client of the mesh's control plane; raises Missing if the mesh does not run.

        Made without the runtime where that is possible, since `stat` has 300 ms in all.
        """
        from meshdemo.runtime.select import control

        return control(self.name)

    def check_service(self, name: str | None, what: str = "service") -> None:
        """Raise BadInput naming the services that there are, if this is none of them."""
        if name is not None and name not in (services := self.runtime.app().services):
            raise BadInput(f"no {what} '{name}'; there are: {', '.join(services)}")


def of(ctx: typer.Context) -> Context:
    """The Context of this invocation."""
    return ctx.ensure_object(Context)


def effect(value: Effect) -> dict[str, Any]:
    """What a change took, as the JSON that every changing command prints."""
    return {
        "revision": value.revision,
        "effective_ms": round(value.effective_ms, 2),
        "sidecars": value.sidecars,
        "unconfirmed": list(value.unconfirmed),
    }


def effect_words(value: Effect) -> str:
    """What a change took, in words."""
    words = f"in force after {value.effective_ms:.0f} ms on {sidecars(value.sidecars)}"
    if value.unconfirmed:
        words += f"; no answer yet from {', '.join(value.unconfirmed)}"
    return words


def sidecars(count: int) -> str:
    """`1 sidecar`, `3 sidecars`."""
    return f"{count} sidecar{'' if count == 1 else 's'}"


@contextmanager
def stoppable(*, undoing: bool = False) -> Iterator[Callable[[], None]]:
    """A SIGTERM or SIGHUP in the block ends it like Ctrl-C: what was started is undone.

    Args:
        undoing: say so, and ignore further ones, Ctrl-C too, until the block is left: half an undoing would
            leave half of what was begun.

    Yields:
        What to call once nothing is undone any more: from then on they are ignored until the block is left,
        so that it can say what it did.
    """
    import signal

    numbers = [signal.SIGTERM, signal.SIGHUP, *([signal.SIGINT] if undoing else [])]

    def ignore() -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)

    def interrupt(*_: object) -> None:
        if undoing:
            ignore()
            os.write(2, b"meshdemo: interrupted; undoing what was begun\n")
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield ignore
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
