"""`meshdemo demo`: the whole story in about a minute, on its own.

It does what a person would do with two terminals: one for `meshdemo watch`, which runs as a process of its
own, and one to bring the mesh up, break it, and look. Whatever ends it, at whatever moment, what it
brought up is removed again (unless --keep says otherwise).
"""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meshdemo.cli import _context, _values
from meshdemo.errors import BadInput, Failed, MeshdemoError, Missing
from meshdemo.limits import MAX_RPS

if TYPE_CHECKING:
    from meshdemo.control.client import SignalRow
    from meshdemo.runtime.base import Runtime
    from meshdemo.runtime.faults import FaultRequest

SERVICE = "service-b"
_CALM_S = 5.0  # watch must have seen the mesh healthy to know what to go back to
_WELL = 0.995
_QUICK_MS = 250.0
_PATIENCE_S = 120.0  # for a machine that is busy with other things
_STOP_S = 10.0
_TOLD = {"violated", "localised", "chosen", "acted", "escalated", "blocked", "gave_up", "healed", "error"}


def command(
    ctx: typer.Context,
    runtime: Annotated[
        str, typer.Option("--runtime", metavar="R", help="Where: local, kind or kubernetes.")
    ] = "local",
    rps: Annotated[
        float,
        typer.Option(
            "--rps", metavar="N", help="Requests per second that service-a sends; less for a slow machine."
        ),
    ] = 200.0,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the mesh running at the end.")] = False,
) -> None:
    """The whole story in about a minute: up, load, fault, detection, healing, report, down."""
    from meshdemo.runtime.select import choose

    _values.number(rps, "--rps", 20, MAX_RPS, "requests/s")
    context = _context.of(ctx)
    where, _ = choose(runtime, context.name)
    ran_before = _runs(where)
    story = _Story(context, where, rps, ran_before=ran_before)
    with _context.stoppable(undoing=True), _cleaned_up(story, remove=not (keep or ran_before)):
        story.bring_up()
        for title, asked in _acts():
            story.wait_until_calm()
            story.play(title, asked)
        story.report()
    if context.as_json:
        context.emit(story.to_json())
    if not story.healed:
        raise Failed("the mesh was not healed", "`meshdemo demo --keep` leaves it running, to look into it")


def _acts() -> list[tuple[str, FaultRequest]]:
    from meshdemo.runtime import faults

    return [
        (
            "A bad release of service-b: 200 ms slower, and every fifth request fails",
            faults.request(lat_ms=200, err_rate=0.2, service=SERVICE),
        ),
        (
            "One instance hangs: it takes requests and answers none",
            faults.request(hang=True, service=SERVICE),
        ),
    ]


@dataclass(slots=True)
class _Act:
    """One fault and what became of it."""

    title: str
    fault_id: str
    started_at: float
    detect_s: float | None = None
    recover_s: float | None = None
    remedies: list[str] = field(default_factory=list)
    incidents: set[str] = field(default_factory=set)
    healed: bool = False


class _Story:
    """The mesh, the watch beside it, and what has happened so far."""

    def __init__(self, context: _context.Context, runtime: Runtime, rps: float, *, ran_before: bool) -> None:
        self.runtime = runtime
        self._rps = rps
        self.acts: list[_Act] = []
        self.up_s = 0.0
        self._context = context
        self._watch: subprocess.Popen[str] | None = None
        self._events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._open: set[str] = set()  # incidents
        self._complaints = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it lives as long as the story
        self._began = time.monotonic()
        self._load_before = _load(runtime) if ran_before else None

    @property
    def healed(self) -> bool:
        """Whether every fault was healed."""
        return bool(self.acts) and all(act.healed for act in self.acts)

    # -- the steps of the story ---------------------------------------------------------------------------

    def bring_up(self) -> None:
        """Bring the mesh up, with load on it and a watch beside it."""
        from meshdemo.apps import loader
        from meshdemo.runtime.base import UpOptions
        from meshdemo.runtime.steps import run_steps

        context = self._context
        started = time.monotonic()
        self._tell(f"Bringing up mesh '{context.name}' on the {self.runtime.kind} runtime")
        options = UpOptions(
            name=context.name,
            app=loader.load("pair"),
            rps=self._rps,
            extra={"cwd": str(loader.folder("pair"))},
        )
        run_steps(self.runtime.steps(options), context.stderr if context.chatty else None)
        self.up_s = time.monotonic() - started
        self._tell(f"Up after {self.up_s:.1f} s; service-a makes {self._rps:g} requests/s on {SERVICE}")
        self._start_watch()

    def wait_until_calm(self) -> None:
        """Wait until service-b has answered well for a few seconds."""
        give_up = time.monotonic() + _PATIENCE_S
        with self._context.progress("Watching it run well"):
            while True:
                rows = self.runtime.control().signals(window_s=_CALM_S, service=SERVICE)
                row = next((one for one in rows if one["service"] == SERVICE), None)
                self._take_events()
                long_enough = row is not None and row["window_s"] >= _CALM_S - 1
                if row is not None and long_enough and _is_well(row, self._rps) and not self._open:
                    break
                late = time.monotonic() > give_up
                if late and row is not None and (row["success_rate"] or 0) >= _WELL:
                    break  # a machine that is slow today has a story to tell too
                if late:
                    seen = f"{row['rps']:.0f} requests/s, {row['success_rate']} well" if row else "no signals"
                    raise Failed(f"{SERVICE} does not run well, though nothing is broken: {seen}")
                time.sleep(0.25)
        self._print_signals()

    def play(self, title: str, asked: FaultRequest) -> None:
        """Break something, and follow how watch heals it."""
        from meshdemo.runtime import faults
        from meshdemo.ui import tables

        self._tell(title)
        outcome = faults.inject(self.runtime, asked)
        self._show(f"  {tables.fault_words(outcome.fault)}, in force after {outcome.effective_ms:.0f} ms")
        act = _Act(title, outcome.fault.id, outcome.fault.started_at)
        # What is amiss already may swallow the fault, instead of becoming an incident of its own. That it is
        # amiss may have been said while the fault was made.
        act.incidents |= self._open
        said_meanwhile = self._take_events()
        act.incidents |= {event["incident"] for event in said_meanwhile if event["event"] == "violated"}
        self.acts.append(act)
        for event in said_meanwhile:
            self._follow(act, event)
        give_up = time.monotonic() + _PATIENCE_S
        with self._context.progress("Waiting for watch to heal it"):
            while not act.healed and time.monotonic() < give_up:
                for event in self._take_events(0.5):
                    self._follow(act, event)
        self._clear(act)

    def _clear(self, act: _Act) -> None:
        """End what watch did not end (the record of a fault whose harm it has undone), and nothing else."""
        from meshdemo.runtime import faults

        with suppress(BadInput):
            faults.clear(self.runtime, act.fault_id)

    def restore(self) -> None:
        """Leave a mesh that ran before as it was: without our faults, at the load that it had."""
        if self._load_before is None:
            return
        for act in self.acts:
            self._clear(act)
        self.runtime.set_load(self._load_before)

    def report(self) -> None:
        """Print the report of what happened."""
        if self._context.as_json:
            return
        self._tell("Report")
        subprocess.run(
            [sys.executable, "-P", "-m", "meshdemo", "report", "--name", self._context.name],
            check=False,
        )

    def stop_watch(self) -> None:
        """End the watch, as Ctrl-C does."""
        watch, self._watch = self._watch, None
        if watch is None:
            return
        watch.send_signal(signal.SIGINT)
        try:
            watch.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            watch.kill()
            watch.wait()

    def remove(self) -> None:
        """Take the mesh down."""
        with self._context.progress(f"Removing mesh '{self._context.name}'"):
            self.runtime.down()
        self._tell(f"Mesh '{self._context.name}' is removed; nothing is left")

    def to_json(self) -> dict[str, Any]:
        """The story in figures; detect_s and recover_s are those of the worst act."""
        detected = [act.detect_s for act in self.acts if act.detect_s is not None]
        recovered = [act.recover_s for act in self.acts if act.recover_s is not None]
        return {
            "name": self._context.name,
            "runtime": self.runtime.kind,
            "healed": self.healed,
            "detect_s": max(detected, default=None),
            "recover_s": max(recovered, default=None),
            "up_s": round(self.up_s, 3),
            "total_s": round(time.monotonic() - self._began, 3),
            "acts": [
                {
                    "title": act.title, "fault": act.fault_id, "healed": act.healed, "detect_s": act.detect_s,
                    "recover_s": act.recover_s, "remedies": act.remedies,
                }
                for act in self.acts
            ],
        }  # fmt: skip

    # -- the watch beside it ------------------------------------------------------------------------------

    def _start_watch(self) -> None:
        self._watch = subprocess.Popen(
            [sys.executable, "-P", "-m", "meshdemo", "watch", "--name", self._context.name, "-o", "jsonl"],
            stdout=subprocess.PIPE, stderr=self._complaints, text=True,
            # Ctrl-C is for the story, which ends the watch itself, after it has stopped listening to it.
            start_new_session=True,
        )  # fmt: skip
        threading.Thread(target=self._read, args=(self._watch,), name="watch", daemon=True).start()
        give_up = time.monotonic() + _PATIENCE_S
        while time.monotonic() < give_up:
            if any(event["event"] == "started" for event in self._take_events(0.5)):
                return
        raise Failed("watch does not start", "`meshdemo watch` says why")

    def _read(self, watch: subprocess.Popen[str]) -> None:
        assert watch.stdout is not None
        for line in watch.stdout:
            self._events.put(json.loads(line))
        self._events.put(None)

    def _take_events(self, wait_s: float = 0.0) -> list[dict[str, Any]]:
        """What watch has said since; waits for something. Raises Failed if watch has ended."""
        events: list[dict[str, Any]] = []
        while True:
            try:
                event = (
                    self._events.get(timeout=wait_s) if wait_s and not events else self._events.get_nowait()
                )
            except queue.Empty:
                return events
            if event is None:
                self._complaints.seek(0)
                said = " ".join(self._complaints.read().split())
                raise Failed(f"watch has ended: {said or 'it does not say why'}")
            if event["event"] == "violated":
                self._open.add(event["incident"])
            elif event["event"] == "healed":
                self._open.discard(event["incident"])
            events.append(event)

    def _follow(self, act: _Act, event: dict[str, Any]) -> None:
        name = event["event"]
        if name not in _TOLD or event["time"] < act.started_at or event["service"] != SERVICE:
            return
        self._print_event(event)
        if name == "violated":
            act.incidents.add(event["incident"])
        if name == "violated" and act.detect_s is None:
            act.detect_s = event.get("detect_s")
        elif name == "acted":
            act.remedies.append(event["remedy"])
        elif name == "healed" and event["incident"] in act.incidents:
            act.recover_s = event.get("recover_s")
            act.healed = True

    # -- telling ------------------------------------------------------------------------------------------

    def _show(self, what: Any) -> None:
        """Progress: for a person at a terminal only."""
        if self._context.chatty:
            self._context.stderr.print(what)

    def _tell(self, line: str) -> None:
        from rich.text import Text

        self._show(Text(f"▸ {line}", "bold"))

    def _print_event(self, event: dict[str, Any]) -> None:
        from rich.table import Table

        from meshdemo.ui import format as fmt

        row = Table.grid(padding=(0, 1))  # a long text goes on below itself, not below the time
        row.add_column(no_wrap=True)
        row.add_column()
        row.add_row(f"  {fmt.clock(event['time'])} {event['event']:<10}", str(event.get("text", "")))
        self._show(row)

    def _print_signals(self) -> None:
        if not self._context.chatty:
            return
        from rich.padding import Padding

        from meshdemo.ui import tables

        rows = self.runtime.control().signals(by="instance", window_s=2, service=SERVICE)
        self._show(Padding(tables.signals(rows, "instance"), (0, 0, 0, 2), expand=False))


def _is_well(row: SignalRow, rps: float) -> bool:
    quick = row["p95_ms"] is not None and row["p95_ms"] < _QUICK_MS
    return quick and (row["success_rate"] or 0) >= _WELL and row["rps"] > rps / 2


def _load(runtime: Runtime) -> float | None:
    """The load that a running mesh makes (requests/s of each instance that makes some)."""
    asked = runtime.control().intent().load_rps
    return runtime.load() if asked is None else asked


def _runs(runtime: Runtime) -> bool:
    try:
        runtime.app()
    except Missing:
        return False
    return True


@contextmanager
def _cleaned_up(story: _Story, *, remove: bool) -> Iterator[None]:
    """Whatever happens in the block: no watch is left, and no mesh that it brought up."""
    failed = True
    try:
        yield
        failed = False
    finally:
        # From here on nothing may interrupt: a second Ctrl-C would leave half a mesh.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        try:
            story.stop_watch()
            story.restore()
        finally:
            if remove:
                try:
                    story.remove()
                except MeshdemoError:
                    if not failed:
                        raise
