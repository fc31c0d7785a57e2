"""watch's edge on a made-up mesh: how it ends, what it remembers, and which thread does what."""

from __future__ import annotations

import contextlib
import queue
import random
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from simmesh import SimMesh

from meshdemo.control.client import EventBatch, SampleBatch
from meshdemo.control.model import Intent
from meshdemo.errors import Missing
from meshdemo.remediation.board import Board
from meshdemo.remediation.controller import Settings, Watch
from meshdemo.remediation.events import Event
from meshdemo.remediation.notify import Notifier
from meshdemo.remediation.policy import Policy, Webhook
from meshdemo.remediation.policyfile import check

TEXT = """\
objectives: [{name: success, success: 99%}]
rules: [{name: all, scope: [instance, version, service], remedies: [notify]}]
"""


def policy(text: str = TEXT) -> Policy:
    checked = check(text)
    assert checked.policy is not None, checked.problems
    return checked.policy


class MadeUp:
    """A control plane and a runtime in one, whose time passes as fast as it is asked."""

    name, kind = "m", "local"

    def __init__(self, mesh: SimMesh, step_s: float = 0.5) -> None:
        self.mesh = mesh
        self.step_s = step_s
        self.alive = True
        self.who: str | None = "first"
        self.journal: list[dict[str, Any]] = []
        self.posted: list[dict[str, Any]] = []
        self.seq = 0

    def control(self) -> Any:
        self._answer()
        return self

    def identity(self) -> str | None:
        return self.who

    def _answer(self) -> None:
        if not self.alive:
            raise Missing("it does not answer")

    def samples(self, after: int, wait_s: float) -> SampleBatch:
        self._answer()
        time.sleep(0.005)
        found = [sample for _ in range(int(self.step_s / 0.02)) for sample in self.mesh.tick()]
        self.seq += len(found)
        return SampleBatch(self.seq, self.mesh.now, found, self.mesh.rows())  # type: ignore[arg-type]

    def intent(self) -> Intent:
        self._answer()
        return self.mesh.intent()

    def events(self, after: int = 0, wait_s: float = 0.0) -> EventBatch:
        newest = self.journal[-1]["seq"] if self.journal else 0
        return EventBatch(newest, [] if after < 0 else [one for one in self.journal if one["seq"] > after])

    def post_event(self, row: dict[str, Any]) -> int:
        self.posted.append(row)
        return len(self.posted)

    def say_objectives(self, rows: Any) -> None:
        self._answer()


def watch(made: MadeUp, rules: Policy | None = None, **settings: Any) -> Watch:
    return Watch(made, Settings(rules or policy(), "p", **settings), str)  # type: ignore[arg-type]


def until(what: Callable[[], object], timeout_s: float = 20) -> None:
    give_up = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < give_up
        time.sleep(0.005)


def said(one: Watch) -> list[Event]:
    events = []
    while (event := one.events.get(timeout=20)) is not None:
        events.append(event)
    return events


def test_a_watch_ends_with_its_mesh_and_leaves_the_next_one_alone() -> None:
    made = MadeUp(SimMesh(1))
    one = watch(made)
    one.start()
    until(lambda: made.seq > 10)
    made.alive = False
    until(lambda: one._due.get("identity"))  # it has looked, and the mesh is still there
    assert not one.join(0.3), "a control plane that does not answer is no reason to end"
    made.who = "second"  # brought up anew under the same name
    events = said(one)
    assert "gone" in str(one.error)
    assert "taken down" in events[-1].text
    assert "violated" not in [event.event for event in events]


def test_a_watch_ends_when_the_mesh_was_removed() -> None:
    made = MadeUp(SimMesh(1))
    one = watch(made)
    one.start()
    until(lambda: made.seq > 10)
    made.alive, made.who = False, None
    events = said(one)
    assert isinstance(one.error, Missing) and "gone" in str(one.error)
    assert events[-1].event == "stopped"


def test_until_healed_ends_when_all_is_given_up() -> None:
    made = MadeUp(SimMesh(1, background=0.0))
    one = watch(made, until_healed=True)
    one.start()
    until(lambda: made.seq > 10)
    for name in made.mesh.instances:
        made.mesh.broken[name] = 0.5
    events = said(one)
    told = [event for event in events if event.event != "signals"]
    assert told[-2].event == "gave_up", [event.text for event in events]
    assert one.outcome.open == ["service-b"]


def test_until_healed_without_an_incident_ends_with_its_time() -> None:
    made = MadeUp(SimMesh(1, background=0.0))
    one = watch(made, until_healed=True, for_s=0.5)
    one.start()
    events = said(one)
    assert (one.outcome.open, one.outcome.healed, one.error) == ([], 0, None)
    assert "no objective was violated" in events[-1].text


def _acted(seq: int, at: float, kind: str, target: str, **fields: Any) -> dict[str, Any]:
    return {"seq": seq, "time": at, "by": "watch", "event": "acted", "service": "service-b", "remedy": kind,
            "target": target, "incident": f"i{seq}", "evidence": {"target": target}, **fields}  # fmt: skip


def test_the_guardrails_remember_what_an_earlier_watch_did() -> None:
    rules = policy(
        TEXT.replace("[notify]", "[eject]") + "guardrails: {cooldown: 1h, max_actions: {count: 3, per: 1h}}"
    )
    made = MadeUp(SimMesh(1, background=0.0))
    made.journal = [
        _acted(1, made.mesh.now - 5, "eject", "service-b-1"),
        _acted(2, made.mesh.now - 4, "notify", "service-b-1"),
        {**_acted(3, made.mesh.now - 5.1, "eject", "service-b-1", incident="i1"), "event": "chosen"},
        _acted(4, made.mesh.now - 3, "eject", "service-b-2", dry_run=True),
    ]
    one = watch(made, rules, until_healed=True)
    one.start()
    until(lambda: made.seq > 10)
    made.mesh.broken["service-b-1"] = 0.5
    blocked = next(event for event in iter(one.events.get, None) if event.event == "blocked")
    assert "eject was used on service-b-1" in blocked.text
    one.stop()
    said(one)
    assert one._core.guard.used(made.mesh.now) == 1, "what was chosen and done counts once"


def test_webhooks_complain_to_the_thread_that_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn_by: set[str] = set()
    draw = Board.view
    log = Board.log

    def drawing(self: Board, *args: Any, **kwargs: Any) -> Any:
        drawn_by.add(threading.current_thread().name)
        return draw(self, *args, **kwargs)

    def logging(self: Board, events: Any) -> None:
        drawn_by.add(threading.current_thread().name)
        log(self, events)

    monkeypatch.setattr(Board, "view", drawing)
    monkeypatch.setattr(Board, "log", logging)
    hook = "notify: [{name: hook, url: 'http://127.0.0.1:9/', timeout: 100ms, events: [violated]}]"
    made = MadeUp(SimMesh(1, background=0.0))
    one = watch(made, policy(TEXT + hook))
    one.start()
    until(lambda: made.seq > 10)
    for name in made.mesh.instances:
        made.mesh.broken[name] = 0.5
    complaint = next(event for event in iter(one.events.get, None) if event.event == "error")
    assert "hook" in complaint.text
    one.stop()
    said(one)
    assert drawn_by == {"watch"}


def test_closing_does_not_wait_for_a_webhook_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    import requests

    let_go = threading.Event()

    def hang(*_: Any, **__: Any) -> Any:
        let_go.wait(30)
        raise requests.ConnectionError

    monkeypatch.setattr(requests, "post", hang)
    complaints: queue.SimpleQueue[str] = queue.SimpleQueue()
    notifier = Notifier("m", [Webhook(name="slow", url="http://127.0.0.1:9/")], complaints.put)
    for number in range(400):  # more than its queue takes
        notifier.tell(Event(id=str(number), time=0, event="violated", text=""))
    began = time.monotonic()
    notifier.close(0.2)
    assert time.monotonic() - began < 5
    assert "too slow" in complaints.get_nowait()
    let_go.set()


def test_a_signal_at_any_moment_leaves_nothing_locked() -> None:
    """A signal whose handler raises may come while a queue that the main thread reads is locked: if it stayed
    so, watch could say nothing any more, and would never end."""
    told = watch(MadeUp(SimMesh(1)))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    rng = random.Random(1)
    try:
        end = time.monotonic() + 3
        while time.monotonic() < end:
            with contextlib.suppress(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 1e-4))
                while True:
                    with contextlib.suppress(queue.Empty):
                        told.events.get(timeout=1e-3)
                    told.views.empty()
            signal.setitimer(signal.ITIMER_REAL, 0)
            teller = threading.Thread(
                target=lambda: (told.events.put(None), told.views.put(None)), daemon=True
            )
            teller.start()
            teller.join(10)
            assert not teller.is_alive(), "nobody can say anything any more"
            told.events.get()
            told.views.get()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
