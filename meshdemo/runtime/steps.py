"""Runs the steps of `up`: independent ones at the same time, one status line each, undone on failure.

After kind's `create cluster` (a short list of actions, and everything removed again if one fails), with two
differences: a step says what it comes `after` and the rest runs at once, and each step brings its own undo.
A step that was only begun is undone as well, since half of what it makes may be there. Steps run in
threads; one that waits does so with `pause`, so that a failure elsewhere or Ctrl-C ends the wait at once.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from meshdemo.errors import Failed, MeshdemoError

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    from meshdemo.runtime.base import Step

_cancelled: ContextVar[threading.Event | None] = ContextVar("cancelled", default=None)


class Cancelled(Exception):
    """Raised by `pause` in a step whose run is being given up."""


def pause(seconds: float) -> None:
    """Sleep inside a step. Raises Cancelled as soon as the run is given up; elsewhere it just sleeps."""
    event = _cancelled.get()
    if event is None:
        time.sleep(seconds)
    elif event.wait(seconds):
        raise Cancelled


@dataclass(slots=True)
class _Progress:
    """How one step stands."""

    step: Step
    state: Literal["waiting", "running", "done", "failed", "undoing", "undone"] = "waiting"
    started: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class _Outcome:
    progress: _Progress
    error: BaseException | None


@dataclass(slots=True)
class _Run:
    steps: Sequence[_Progress]
    outcomes: queue.SimpleQueue[_Outcome] = field(default_factory=queue.SimpleQueue)
    cancelled: threading.Event = field(default_factory=threading.Event)
    order: list[_Progress] = field(default_factory=list)  # as they were started
    running: int = 0

    def start_ready(self) -> None:
        """Start every step whose predecessors are done, each in a thread of its own."""
        done = {progress.step.title for progress in self.steps if progress.state == "done"}
        for progress in self.steps:
            if progress.state == "waiting" and done.issuperset(progress.step.after):
                progress.state, progress.started = "running", time.monotonic()
                self.order.append(progress)
                self.running += 1
                context = copy_context()
                context.run(_cancelled.set, self.cancelled)
                threading.Thread(
                    target=context.run, args=(self._run_one, progress), name=progress.step.title, daemon=True
                ).start()

    def _run_one(self, progress: _Progress) -> None:
        error: BaseException | None = None
        try:
            progress.step.run()
        except BaseException as raised:
            error = raised
        progress.seconds = time.monotonic() - progress.started
        progress.state = "done" if error is None else "failed"
        self.outcomes.put(_Outcome(progress, error))

    def take_outcome(self, timeout: float | None = None) -> BaseException | None:
        outcome = self.outcomes.get(timeout=timeout)
        self.running -= 1
        return outcome.error

    def too_late(self, timeout_s: float | None) -> Failed:
        """What is not done when the time is over."""
        said = []
        for progress in self.steps:
            if progress.state == "running":
                doing = progress.step.detail() if progress.step.detail else ""
                said.append(f"'{progress.step.title}' is not done" + (doing and f" ({doing})"))
        return Failed(
            f"after {timeout_s:g} s {' and '.join(said)}",
            "a higher --timeout waits longer; `meshdemo up` again goes on from here",
        )

    def settle(self) -> None:
        """Tell the steps under way to give up and wait for them, each as long as it may take for that."""
        self.cancelled.set()
        told = time.monotonic()
        while self.running:
            # One that is not running any more has its outcome there, or all but.
            under_way = [one.step.settle_s for one in self.steps if one.state == "running"]
            left_s = told + max(under_way, default=1.0) - time.monotonic()
            try:
                self.take_outcome(max(0.0, left_s))
            except queue.Empty:
                return

    def undo(self) -> list[str]:
        """Undo what was started, the last first; what could not be undone, in words."""
        problems = []
        for progress in reversed(self.order):
            if progress.step.undo is None:
                continue
            progress.state = "undoing"
            try:
                progress.step.undo()
                progress.state = "undone"
            except Exception as error:
                progress.state = "failed"
                problems.append(f"undoing '{progress.step.title}' failed: {error}")
        return problems


def run_steps(
    steps: Sequence[Step], console: Console | None = None, *, timeout_s: float | None = None
) -> dict[str, float]:
    """Run all steps; how long each took (s), by title.

    On the first failure, on KeyboardInterrupt, and when the time is over, the others are told to give up,
    everything that was started is undone in reverse order, and the failure is raised again.

    Args:
        console: where the status lines go; None: nowhere.
        timeout_s: for all of them; a step that knows why it cannot go on gives up shortly before.

    Raises:
        ValueError: `after` names no step, or the steps wait for each other in a circle.
        Failed: the time is over, and what was being done.
    """
    _check(steps)
    run = _Run([_Progress(step) for step in steps])
    give_up = math.inf if timeout_s is None else time.monotonic() + timeout_s
    with _shown(run, console):
        try:
            run.start_ready()
            while run.running:
                left_s = None if timeout_s is None else max(0, give_up - time.monotonic())
                try:
                    error = run.take_outcome(left_s)
                except queue.Empty:
                    error = run.too_late(timeout_s)
                if error:
                    raise error
                run.start_ready()
        except BaseException as error:
            run.settle()
            if problems := run.undo():
                raise _with_problems(error, problems) from error
            raise
    return {progress.step.title: progress.seconds for progress in run.steps}


def _check(steps: Sequence[Step]) -> None:
    waiting = {step.title: set(step.after) for step in steps}
    if len(waiting) != len(steps):
        raise ValueError("two steps have the same title")
    while waiting:
        free = {title for title, after in waiting.items() if not after & waiting.keys()}
        known = {step.title for step in steps}
        for title, after in waiting.items():
            if unknown := after - known:
                raise ValueError(f"step '{title}' comes after {sorted(unknown)}, which are no steps")
        if not free:
            raise ValueError(f"steps wait for each other: {sorted(waiting)}")
        waiting = {title: after for title, after in waiting.items() if title not in free}


def _with_problems(error: BaseException, problems: Sequence[str]) -> Failed:
    message = error.message if isinstance(error, MeshdemoError) else (str(error) or "interrupted")
    return Failed(f"{message}; {'; '.join(problems)}", "`meshdemo down` removes what is left")


class _shown:
    """Shows the status lines while the block runs."""

    def __init__(self, run: _Run, console: Console | None) -> None:
        self._enter: Callable[[], object] = lambda: None
        self._exit: Callable[[], object] = lambda: None
        if console is not None:
            from rich.live import Live

            live = Live(_Board(run.steps), console=console, refresh_per_second=12)
            self._enter, self._exit = live.start, live.stop

    def __enter__(self) -> None:
        self._enter()

    def __exit__(self, *_: object) -> None:
        self._exit()


_MARKS = {"done": "[green]✓[/]", "failed": "[red]✗[/]", "undone": "[yellow]↩[/]", "waiting": "[dim]·[/]"}


class _Board:
    """The status lines as rich draws them."""

    def __init__(self, steps: Sequence[_Progress]) -> None:
        from rich.spinner import Spinner

        self._steps = steps
        self._spinner = Spinner("dots")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table
        from rich.text import Text

        now = time.monotonic()
        grid = Table.grid(padding=(0, 1))
        for progress in self._steps:
            state, title = progress.state, progress.step.title
            mark = _MARKS.get(state) or self._spinner.render(console.get_time())
            note = {"done": f"{progress.seconds:.1f} s", "undoing": "undoing"}.get(state, "")
            if state == "running":
                doing = progress.step.detail() if progress.step.detail else ""
                waited = f"{now - progress.started:.0f} s" if now - progress.started >= 2 else ""
                note = "  ".join(part for part in (waited, doing) if part)
            style = "dim" if state == "waiting" else ""
            grid.add_row("", mark, Text(title, style), Text(note, "dim", no_wrap=True, overflow="ellipsis"))
        yield grid
