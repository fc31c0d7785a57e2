"""watch on a real mesh: the core's edge. Polls signals, has remedies carried out, tells everybody.

The thread that judges does nothing else: remedies run in workers, events go to the journal and to webhooks
through queues, and whoever draws the screen takes views from a queue too. So judging goes on while a restart
takes its seconds, a terminal does not read, or the control plane is away.
"""

from __future__ import annotations

import queue
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from meshdemo.control.client import ControlClient, SampleBatch
from meshdemo.control.model import Fault, Intent
from meshdemo.errors import MeshdemoError, Missing
from meshdemo.remediation.board import Board
from meshdemo.remediation.core import Action, Core, Result
from meshdemo.remediation.events import Event
from meshdemo.remediation.notify import Notifier
from meshdemo.remediation.policy import Policy
from meshdemo.remediation.recording import Look, Recorder
from meshdemo.remediation.remedies import Remedies
from meshdemo.remediation.view import WatchView
from meshdemo.runtime.base import Runtime

_POLL_S = 0.1  # how soon an instance that died is noticed; exports are noticed as they come
_AWAY_S = 0.2  # between tries while the control plane is away
_GONE_S = 0.5  # between looks whether it is the mesh that is gone
_RECALLED = 5000  # of the journal's newest events, for what earlier watches did
_INTENT_S = 1.0
_VIEW_S = 1.0
_SIGNALS_S = 2.0
_WORKERS = 4
_HISTORY_INSTANCES = 50  # in a bigger mesh the last ten minutes are too much to read at once
_LAST_WORDS_S = 2.0  # for the journal and webhooks, when watch ends
_FINISH_S = 60.0  # for a remedy that is under way when watch ends


@dataclass(frozen=True, slots=True)
class Settings:
    """How to watch."""

    policy: Policy
    policy_name: str
    dry_run: bool = False
    for_s: float | None = None
    until_healed: bool = False
    record: Path | None = None


@dataclass(slots=True)
class Outcome:
    """How it ended."""

    healed: int = 0
    violated: int = 0
    open: list[str] = field(default_factory=list)  # services with an open incident
    ejected: list[str] = field(default_factory=list)  # instances that watch has taken out


class ControlPlaneClock:
    """The control plane's clock, from its last answer on. Safe to read from any thread."""

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()

    def heard(self, now: float) -> None:
        """The control plane said that it is `now`."""
        self._offset = now - time.monotonic()

    def __call__(self) -> float:
        return time.monotonic() + self._offset


class Journalist:
    """Posts events to the journal, in order, again and again until it takes them."""

    def __init__(self, client: Callable[[], ControlClient]) -> None:
        self._client = client
        self._queue: queue.Queue[Event | WatchView | None] = queue.Queue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def post(self, event: Event) -> None:
        """Have an event posted; returns at once."""
        self._queue.put(event)

    def stand(self, view: WatchView) -> None:
        """Have the control plane told how the objectives stand; returns at once."""
        self._queue.put(view)

    def close(self, timeout_s: float) -> None:
        """Post what is left, for at most so long."""
        self._closing.set()
        self._queue.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (event := self._queue.get()) is not None:
            if not isinstance(event, Event):
                with suppress(MeshdemoError, OSError):  # it is said again soon
                    self._client().say_objectives(_standings(event))
                continue
            row = {"by": "watch", **event.to_json()}
            while not self._posted(row) and not self._closing.is_set():
                self._closing.wait(_AWAY_S)

    def _posted(self, row: dict[str, object]) -> bool:
        try:
            self._client().post_event(row)
        except (MeshdemoError, OSError):
            return False
        return True


def _standings(view: WatchView) -> list[dict[str, object]]:
    """How the objectives stand, as the control plane is told."""
    return [
        {
            "service": service.name,
            "objective": one.name,
            "text": one.text,
            "health": one.health,
            "good_share": one.good_share,
            "wanted_share": one.wanted_share,
            "budget_left": round(one.budget_left, 4),
            "kind": one.kind,
            "below_ms": one.below_ms,
            "effective": one.effective,
        }
        for service in view.services
        for one in service.objectives
    ]


class Watch:
    """One run of watch.

    `events` and `views` are what there is to show; None in `events` is the end.

    Args:
        fault_words: says a fault in a few words, for the views.
    """

    def __init__(self, runtime: Runtime, settings: Settings, fault_words: Callable[[Fault], str]) -> None:
        # Read by the main thread, which signals interrupt at any moment: not queues that Python locks.
        self.events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self.views: queue.SimpleQueue[WatchView] = queue.SimpleQueue()
        self.outcome = Outcome()
        self._journal: Journalist | None = None
        self.error: BaseException | None = None
        self._runtime = runtime
        self._settings = settings
        self._clock = ControlPlaneClock()
        self._control = runtime.control()
        self._identity = runtime.identity()
        self._run_id = f"w{secrets.token_hex(3)}"
        self._core = Core(settings.policy, self._run_id, dry_run=settings.dry_run)
        self._board = Board(runtime.name, runtime.kind, settings.policy_name, self._core, fault_words)
        self._remedies = Remedies(lambda: self._control, runtime, self._clock)
        self._results: queue.Queue[Result] = queue.Queue()
        self._complaints: queue.SimpleQueue[str] = queue.SimpleQueue()  # of the threads of webhooks
        self._recalled = False
        self._gone = False
        self._running: set[Future[None]] = set()
        self._stop = threading.Event()
        self._connected = True
        self._seq = 0
        self._own_events = 0
        self._intent: Intent | None = None
        self._due: dict[str, float] = {}
        self._thread = threading.Thread(target=self._main, name="watch", daemon=True)

    def start(self) -> None:
        """Begin to watch, in a thread of its own."""
        self._thread.start()

    def stop(self) -> None:
        """End soon; a remedy that is under way is finished."""
        self._stop.set()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait for the end; has it come?"""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def busy_with(self) -> list[str]:
        """The remedies that are under way, in words."""
        return [incident.plan.words for incident in list(self._core.open.values())
                if incident.state == "acting" and incident.plan is not None]  # fmt: skip

    # -- the thread that judges ---------------------------------------------------------------------------

    def _main(self) -> None:
        settings = self._settings
        journal = None if settings.dry_run else Journalist(lambda: self._control)
        recorder = None
        notifier = None
        try:
            recorder = Recorder(settings.record) if settings.record else None
            webhooks = [] if settings.dry_run else settings.policy.webhooks()
            notifier = Notifier(self._runtime.name, webhooks, self._complaints.put)
            self._journal = journal
            self._tell_to = [journal.post] if journal else []
            self._tell_to.append(notifier.tell)
            with ThreadPoolExecutor(_WORKERS, thread_name_prefix="remedy") as workers:
                self._workers = workers
                self._loop(recorder)
                self._finish()
        except BaseException as error:
            self.error = error
        finally:
            if recorder is not None:
                recorder.__exit__(None, None, None)
            if notifier is not None:
                notifier.close(_LAST_WORDS_S)
                self._hear_complaints()
            if journal is not None:
                journal.close(_LAST_WORDS_S)
            self.events.put(None)

    def _loop(self, recorder: Recorder | None) -> None:
        settings = self._settings
        end = None if settings.for_s is None else time.monotonic() + settings.for_s
        self._say_started()
        while not self._stop.is_set() and (end is None or time.monotonic() < end):
            batch = self._poll()
            if batch is not None:
                self._take(batch, recorder)
            elif self._gone:
                self.error = Missing(
                    f"mesh '{self._runtime.name}' is gone: it was taken down while watch ran",
                    f"`meshdemo up --name {self._runtime.name}` brings up a new one, for a new watch",
                )
                break
            else:
                self._stop.wait(_AWAY_S)
            self._hear_complaints()
            self._show(now=False)
            if settings.until_healed and self._is_settled():
                break

    def _is_settled(self) -> bool:
        """Is every incident that there was over, or given up?"""
        incidents = self._core.open.values()
        if not incidents:
            return bool(self.outcome.healed)
        return all(incident.state == "gave_up" for incident in incidents)

    def _poll(self) -> SampleBatch | None:
        """One look; None if the control plane is away."""
        try:
            batch = self._control.samples(self._seq, wait_s=_POLL_S)
            if not self._seq and len(batch.instances) > _HISTORY_INSTANCES:
                batch = batch._replace(samples=[])
        except (MeshdemoError, OSError) as error:
            if self._connected:
                self._connected = False
                self._say_own("error", f"the control plane does not answer, trying again: {error}")
                self._show(now=True)
            self._reconnect()
            return None
        self._clock.heard(batch.now)
        if not self._connected:
            self._connected = True
            self._say_own("started", "the control plane answers again")
        self._seq = batch.seq
        return batch

    def _reconnect(self) -> None:
        with suppress(MeshdemoError, OSError):  # that it is gone has to be seen, not guessed
            # A control plane that is being restarted comes back; a mesh that was removed does not, and one
            # that is brought up under its name is another.
            if self._is_due("identity", _GONE_S) and self._runtime.identity() != self._identity:
                self._gone = True
                return
        with suppress(MeshdemoError, OSError):  # then the one that we have may do
            self._control = self._runtime.control()

    def _take(self, batch: SampleBatch, recorder: Recorder | None) -> None:
        core = self._core
        if not self._recalled:
            self._recalled = self._recall()
        core.observe(batch.now, batch.samples, batch.instances)
        self._board.add(batch.samples)
        intent = self._fresh_intent() if core.alarmed or self._is_due("intent", _INTENT_S) else None
        if recorder is not None:
            recorder.write(Look(batch.now, batch.samples, batch.instances, self._intent))
        if intent is not None:
            core.set_intent(intent)
        while not self._results.empty():
            core.done(self._results.get())
        step = core.step(self._clock())
        for action in step.actions:
            future = self._workers.submit(self._act, action)
            self._running.add(future)
            future.add_done_callback(self._running.discard)
        for event in step.events:
            self._say(event)
        if self._is_due("signals", _SIGNALS_S):
            self._say_signals()
            if self._journal is not None:
                self._journal.stand(self._board.view(self._clock(), connected=self._connected))

    def _recall(self) -> bool:
        """Have the core learn what earlier watches did."""
        try:
            newest = self._control.events(-1).seq
            journal = self._control.events(max(0, newest - _RECALLED)).events
        except (MeshdemoError, OSError):
            return False
        self._core.recall(journal)
        return True

    def _act(self, action: Action) -> None:
        self._results.put(self._remedies.carry_out(action))

    def _fresh_intent(self) -> Intent | None:
        try:
            self._intent = self._control.intent()
        except (MeshdemoError, OSError):
            return None  # the next poll will say what is wrong
        return self._intent

    def _is_due(self, what: str, every_s: float) -> bool:
        now = time.monotonic()
        if now < self._due.get(what, 0.0):
            return False
        self._due[what] = now + every_s
        return True

    def _finish(self) -> None:
        """Wait for remedies that are under way, and say how things stand."""
        end = time.monotonic() + _FINISH_S
        while self._running and time.monotonic() < end:
            time.sleep(0.02)
        results = [self._results.get() for _ in range(self._results.qsize())]
        for event in self._core.finish(self._clock(), results):
            self._say(event)
        self.outcome.open = sorted(self._core.open)
        intent = None if self._gone else self._fresh_intent() or self._intent
        if intent is not None:
            self.outcome.ejected = [one.instance for one in intent.ejections if one.by == "watch"]
        text = "watch has ended"
        if self._gone:
            text += f": mesh '{self._runtime.name}' was taken down"
        elif not self.outcome.violated:
            text += "; no objective was violated"
        if self.outcome.ejected:
            text += f"; still ejected, until the next watch lets them in: {', '.join(self.outcome.ejected)}"
        self._say_own("stopped", text)
        self._show(now=True)

    # -- saying -------------------------------------------------------------------------------------------

    def _say(self, event: Event) -> None:
        if event.event == "healed":
            self.outcome.healed += 1
        elif event.event == "violated":
            self.outcome.violated += 1
        self._board.log([event])
        self.events.put(event)
        if event.event != "signals":
            for tell in self._tell_to:
                tell(event)
            self._show(now=True)

    def _hear_complaints(self) -> None:
        while not self._complaints.empty():
            self._say_own("error", self._complaints.get())

    def _say_own(self, name: str, text: str, **fields: object) -> None:
        self._own_events += 1
        self._say(
            Event(
                id=f"{self._run_id}-o{self._own_events}",
                time=self._clock(),
                event=name,  # type: ignore[arg-type]
                text=text,
                dry_run=self._settings.dry_run,
                **fields,  # type: ignore[arg-type]
            )
        )

    def _say_started(self) -> None:
        settings = self._settings
        count = len(settings.policy.objectives)
        how = " (dry run: nothing will be touched)" if settings.dry_run else ""
        self._say_own(
            "started",
            f"watching {self._runtime.name} by {settings.policy_name}: {count} objectives{how}",
            evidence={
                "policy": settings.policy_name,
                "objectives": [objective.name for objective in settings.policy.objectives],
                "dry_run": settings.dry_run,
            },
        )

    def _say_signals(self) -> None:
        for service in sorted({one.service for one in self._core.situation.instances.values()}):
            if not self._core.policy.objectives_of(service):
                continue
            numbers = self._board.service_numbers(service)
            success = "-" if numbers.success_rate is None else f"{numbers.success_rate * 100:.2f}%"
            self._say_own(
                "signals",
                f"{service}: {numbers.rps:.0f} requests/s, {success} answered well",
                service=service,
                evidence={
                    "rps": round(numbers.rps, 2),
                    "success_rate": numbers.success_rate,
                    "p50_ms": numbers.p50_ms,
                    "p95_ms": numbers.p95_ms,
                    "p99_ms": numbers.p99_ms,
                    "overdue": numbers.overdue,
                },
            )

    def _show(self, *, now: bool) -> None:
        if now or self._is_due("view", _VIEW_S):
            self.views.put(self._board.view(self._clock(), connected=self._connected))
