"""The parts around the core: plans, guardrails, remedies, recordings, the board, webhooks."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from simmesh import Run, SimMesh

from meshdemo.apps.model import App
from meshdemo.cli.main import run as run_command
from meshdemo.control.model import Effect, Fault, Instance, Intent, Traffic, WorkloadRevision
from meshdemo.control.signals import Sample
from meshdemo.errors import BadInput, Failed
from meshdemo.remediation import choose, policytest, recording
from meshdemo.remediation.board import Board
from meshdemo.remediation.choose import Plan, Senseless
from meshdemo.remediation.core import Action, Core
from meshdemo.remediation.events import Event
from meshdemo.remediation.guardrails import Guard
from meshdemo.remediation.judge import Measure, ObjectiveJudge
from meshdemo.remediation.localise import Location
from meshdemo.remediation.notify import Notifier, wants
from meshdemo.remediation.policy import (
    ClearFault,
    Eject,
    Guardrails,
    Policy,
    Restart,
    Rollback,
    Scale,
    ShiftAway,
    Webhook,
)
from meshdemo.remediation.policyfile import load
from meshdemo.remediation.recording import Look, Recorder
from meshdemo.remediation.remedies import Remedies
from meshdemo.remediation.situation import Seen, Situation
from meshdemo.resources import DEFAULT_POLICY

POLICY: Policy = load(DEFAULT_POLICY)


def situation(*rows: tuple[str, str, bool, bool], **intent: Any) -> Situation:
    """Instances as (id, version, ready, ejected)."""
    return Situation(
        instances={
            name: Seen(name, "b", version, 1, ready, ejected=ejected)
            for name, version, ready, ejected in rows
        },
        intent=Intent(**intent),
    )


def plan(remedy: Any, place: Location, known: Situation) -> Plan:
    found = choose.plan(remedy, "b", place, known)
    assert isinstance(found, Plan), found
    return found


def reason(remedy: Any, place: Location, known: Situation) -> str:
    found = choose.plan(remedy, "b", place, known)
    assert isinstance(found, Senseless), found
    return found.reason


TWO = (("b-1", "v1", True, False), ("b-2", "v1", True, False))
ONE = Location("instance", "b-1", ("b-1",), ("v1",))
ALL = Location("service", "b", ("b-1", "b-2"), ("v1",))


# -- plans --------------------------------------------------------------------------------------------------


def test_remedies_that_make_no_sense_are_passed_over_with_a_reason() -> None:
    known = situation(*TWO)
    assert "no single instance" in reason(Eject(), ALL, known)
    assert "no earlier revision" in reason(Rollback(), ALL, known)
    assert "no version" in reason(ShiftAway(), ALL, known)
    assert "ejected already" in reason(Eject(), ONE, situation(("b-1", "v1", True, True)))
    assert "gone" in reason(Eject(), ONE, situation(("b-2", "v1", True, False)))
    assert "the most" in reason(Scale(add=1, max=2), ALL, known)


def proven(known: Situation, *versions: str) -> Situation:
    """Their first revisions have met their objectives."""
    judge = ObjectiveJudge(POLICY.objectives[0], "b")
    for version in versions:
        for second in range(5):
            sample = Sample(f"x-{version}", "b", version, 1, second, second + 1)
            known.revisions.add(sample, [(judge, Measure(100, 0))])
    return known


def test_a_shift_keeps_the_proportions_of_the_others() -> None:
    rows = [*TWO, ("b-3", "v2", True, False), ("b-4", "v3", True, False)]
    place = Location("version", "v3", ("b-4",), ("v3",))
    split = {"b": Traffic(split={"v1": 30, "v2": 10, "v3": 60})}
    known = proven(situation(*rows, traffic=split), "v1", "v2")
    assert plan(ShiftAway(), place, known).split == {"v1": 75, "v2": 25, "v3": 0}
    known = proven(situation(*rows), "v1", "v2")
    assert plan(ShiftAway(), place, known).split == {"v1": 67, "v2": 33, "v3": 0}


def test_no_shift_to_a_version_that_nobody_has_seen_work() -> None:
    rows = [*TWO, ("b-3", "v2", True, False)]
    place = Location("version", "v1", ("b-1",), ("v1",))
    assert "known to meet" in reason(ShiftAway(), place, situation(*rows))


def test_no_shift_to_too_few_instances() -> None:
    known = proven(situation(*TWO, ("b-3", "v2", True, False)), "v1", "v2")
    to_one = plan(ShiftAway(), Location("version", "v1", ("b-1", "b-2"), ("v1",)), known)
    blocked = guard().check(to_one, known, 0)
    assert blocked is not None and "1 of 3" in blocked.reason
    to_two = plan(ShiftAway(), Location("version", "v2", ("b-3",), ("v2",)), known)
    assert guard().check(to_two, known, 0) is None


def test_scaling_stops_at_its_limit() -> None:
    assert plan(Scale(add=5, max=4), ALL, situation(*TWO)).scale == ("v1", 4)


# -- guardrails -----------------------------------------------------------------------------------------------


def guard(**limits: Any) -> Guard:
    return Guard(Guardrails.model_validate(limits))


def test_the_cooldown_is_by_remedy_and_target() -> None:
    watched, known = guard(cooldown="30s"), situation(*TWO)
    eject = plan(Eject(), ONE, known)
    watched.record(eject, 100)
    blocked = watched.check(eject, known, 110)
    assert blocked is not None and blocked.until == 130
    assert watched.check(plan(Restart(), ONE, known), known, 110) is None
    assert watched.check(eject, known, 130) is None


def test_capacity_counts_what_is_in_service_already() -> None:
    watched = guard(min_in_service="50%")
    assert watched.check(plan(Eject(), ONE, situation(*TWO)), situation(*TWO), 0) is None
    known = situation(TWO[0], ("b-2", "v1", False, False))
    blocked = watched.check(plan(Eject(), ONE, known), known, 0)
    assert blocked is not None and blocked.until is None
    # One that does not serve costs nothing, and a service of one may be restarted, but not ejected.
    down = situation(("b-1", "v1", False, False), TWO[1])
    assert watched.check(plan(Restart(), ONE, down), down, 0) is None
    alone = situation(TWO[0])
    assert watched.check(plan(Restart(), ONE, alone), alone, 0) is None
    assert watched.check(plan(Eject(), ONE, alone), alone, 0) is not None


def test_the_last_of_a_version_with_traffic_stays() -> None:
    rows = [*TWO, ("b-3", "v2", True, False)]
    place = Location("instance", "b-3", ("b-3",), ("v2",))
    split = situation(*rows, traffic={"b": Traffic(split={"v1": 90, "v2": 10})})
    assert guard().check(plan(Eject(), place, split), split, 0) is not None
    plain = situation(*rows)
    assert guard().check(plan(Eject(), place, plain), plain, 0) is None


# -- remedies -------------------------------------------------------------------------------------------------


class FakeControl:
    """Records what a control plane is asked; the pure test double of a boundary that has e2e tests too."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.known: list[Fault] = []
        self.ejected: set[str] = set()

    def eject(self, instance: str, *, reason: str, by: str) -> Effect:
        self.calls.append(("eject", instance))
        self.ejected.add(instance)
        return Effect(revision=2, effective_ms=3, sidecars=3)

    def readmit(self, instance: str) -> Effect:
        if instance not in self.ejected:
            raise BadInput(f"instance '{instance}' is not ejected")
        self.calls.append(("readmit", instance))
        self.ejected.discard(instance)
        return Effect(revision=3, effective_ms=3, sidecars=3)

    def faults(self) -> list[Fault]:
        return self.known

    def clear_fault(self, fault_id: str) -> Any:
        self.calls.append(("clear_fault", fault_id))
        return type("Cleared", (), {"effect": Effect(revision=4, effective_ms=2, sidecars=3)})()


class FakeRuntime:
    """Records what a runtime is asked."""

    def __init__(self, control: FakeControl) -> None:
        self._control = control
        self.fails = False
        self.carried: list[str] = []

    def control(self) -> FakeControl:
        return self._control

    def app(self) -> App:
        service = {"port": 5000, "versions": {"v1": {"program": "service_b"}}}
        return App.model_validate({"name": "x", "front": "b", "services": {"b": service}})

    def unhang(self, instance: str) -> None:
        self._control.calls.append(("unhang", instance))

    def end_faults(self, ids: list[str], *, reason: str) -> list[str]:
        self._control.calls.append(("end_faults", ids))
        return ids

    def instances(self) -> list[Instance]:
        return [
            Instance(
                id=name, service="b", version="v1", inbound_port=1, outbound_port=2, metrics_port=3, app_port=4,
                ready=True,
            )
            for name in ("b-1", "b-2")
        ]  # fmt: skip

    def restart(self, instance: str, *, reason: str) -> None:
        if self.fails:
            raise Failed("it does not start")
        self._control.calls.append(("restart", instance))

    def revisions(self, service: str, version: str) -> list[WorkloadRevision]:
        return [
            WorkloadRevision(
                service=service, version=version, revision=n, created_at=n, env={"LAT_MS": "200"}
            )
            for n in (1, 2, 3)
        ]

    def faults(self) -> list[str]:
        return self.carried

    def rollback(self, service: str, version: str, revision: int, *, reason: str) -> WorkloadRevision:
        self._control.calls.append(("rollback", (version, revision)))
        return WorkloadRevision(service=service, version=version, revision=4, created_at=4)


def carry_out(
    what: Plan, *, fails: bool = False, faults: Sequence[Fault] = ()
) -> tuple[Any, list[tuple[str, Any]]]:
    control = FakeControl()
    control.known = list(faults)
    runtime = FakeRuntime(control)
    runtime.fails = fails
    remedies = Remedies(lambda: control, runtime, lambda: 42.0)  # type: ignore[arg-type, return-value]
    return remedies.carry_out(Action("a1", what, "because")), control.calls


def test_clear_fault_ends_faults_wherever_they_are() -> None:
    harm = {"service": "b", "started_at": 1.0, "lat_ms": 200}
    faults = [
        Fault(id="f1", at="mesh", **harm),  # type: ignore[arg-type]
        Fault(id="f2", at="app", **harm),  # type: ignore[arg-type]
        Fault(id="f3", at="process", kind="hang", service="b", instance="b-1", started_at=1),
        Fault(id="f4", at="process", kind="crash", service="b", instance="b-2", started_at=1),
        Fault(id="f5", at="mesh", service="c", started_at=1, lat_ms=5),
    ]
    known = situation(*TWO)
    known.intent = known.intent.model_copy(update={"faults": tuple(faults)})
    chosen = plan(ClearFault(), ALL, known)
    assert chosen.fault_ids == ("f1", "f2", "f3") and chosen.rolls_out
    result, calls = carry_out(chosen, faults=faults)
    assert result.ok, result.detail
    assert calls == [
        ("clear_fault", "f1"), ("end_faults", ["f2"]), ("clear_fault", "f2"),
        ("unhang", "b-1"), ("clear_fault", "f3"),
    ]  # fmt: skip
    only_a_crash = situation(*TWO)
    only_a_crash.intent = only_a_crash.intent.model_copy(update={"faults": (faults[3],)})
    assert "no fault" in reason(ClearFault(), ALL, only_a_crash)


def test_a_restart_takes_the_instance_out_first_and_lets_it_back_in() -> None:
    hang = Fault(id="f1", at="process", kind="hang", service="b", instance="b-1", started_at=1)
    other = Fault(id="f2", at="process", kind="hang", service="b", instance="b-2", started_at=1)
    result, calls = carry_out(plan(Restart(), ONE, situation(*TWO)), faults=[hang, other])
    assert result.ok and result.effective_at == 42
    assert calls == [("eject", "b-1"), ("restart", "b-1"), ("readmit", "b-1"), ("clear_fault", "f1")]


def test_a_restart_that_fails_leaves_the_instance_as_it_was() -> None:
    result, calls = carry_out(plan(Restart(), ONE, situation(*TWO)), fails=True)
    assert not result.ok and "does not start" in result.detail
    assert calls == [("eject", "b-1"), ("readmit", "b-1")]


def test_a_rollback_without_a_known_good_revision_goes_to_the_one_before() -> None:
    app = Fault(id="f1", at="app", service="b", started_at=1, revision=3)
    what = Plan("rollback", "b", "b", "roll back", rollbacks={"v1": None})
    result, calls = carry_out(what, faults=[app])
    assert result.ok
    assert calls == [("rollback", ("v1", 2)), ("clear_fault", "f1")]


def test_a_remedy_that_breaks_is_a_failed_remedy() -> None:
    result, _ = carry_out(Plan("scale", "b", "b", "scale"))
    assert not result.ok and "AssertionError" in result.detail


# -- recordings and policy test -------------------------------------------------------------------------------


def _record(path: Path, seconds: float = 30, break_at: float = 12) -> None:
    mesh = SimMesh(1, background=0.001)
    with Recorder(path) as recorder:
        while mesh.now < 1_000_000 + seconds:
            if abs(mesh.now - 1_000_000 - break_at) < 0.01:
                mesh.mesh_fault(instance="service-b-2", err_rate=0.5)
            if samples := mesh.tick():
                recorder.write(Look(mesh.now, samples, mesh.rows(), mesh.intent()))


def test_a_recording_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "signals.jsonl"
    _record(path, 5)
    looks = list(recording.read(path))
    assert len(looks) >= 8
    assert looks[0].intent == Intent() and looks[1].intent is None
    again = tmp_path / "again.jsonl"
    with Recorder(again) as recorder:
        for look in looks:
            recorder.write(look)
    assert again.read_text() == path.read_text()


def test_policy_test_says_what_the_policy_would_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "signals.jsonl"
    _record(path)
    events = list(policytest.decisions(POLICY, recording.read(path)))
    assert next(event.remedy for event in events if event.event == "chosen") == "eject"
    with pytest.raises(SystemExit) as caught:
        run_command(["policy", "test", str(DEFAULT_POLICY), "--signals", str(path), "-o", "json"])
    assert caught.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    assert [one["event"] for one in printed][:3] == ["violated", "localised", "chosen"]
    assert printed[1]["target"] == "service-b-2"


def test_policy_test_takes_apps_that_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, policy, shop = tmp_path / "signals.jsonl", tmp_path / "policy.yaml", tmp_path / "shop.yaml"
    _record(path, 2)
    policy.write_text(DEFAULT_POLICY.read_text().replace('services: ["*"]', 'services: ["*", mine/web]', 1))
    shop.write_text((resources.files("meshdemo.apps") / "pair.yaml").read_text())

    def status(app: str) -> Any:
        with pytest.raises(SystemExit) as caught:
            run_command(["policy", "test", str(policy), "--signals", str(path), "--app", app])
        return caught.value.code

    assert [status(app) for app in ("pair", "mine", str(shop))] == [0, 0, 0]
    capsys.readouterr()
    assert status("nowhere") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--app nowhere: no such app" in line
    assert "emojivoto, mine, pair" in line


@pytest.mark.parametrize("line", ["nonsense", "[]", '{"now": 1}', '{"now": 1, "samples": [{}]}', "1"])
def test_signals_that_make_no_sense_name_their_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "signals.jsonl"
    _record(path, 2)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, *lines[1:]]))
    with pytest.raises(BadInput, match=r"signals.jsonl:2"):
        list(recording.read(path))
    with pytest.raises(BadInput, match="cannot read"):
        list(recording.read(tmp_path / "nowhere"))


# -- the board ------------------------------------------------------------------------------------------------


def test_without_requests_no_objective_is_said_to_hold() -> None:
    core = Core(POLICY)
    run = Run(SimMesh(1, rps=0.0), core)
    board = Board("m", "local", "policy.yaml", core, lambda fault: fault.id)
    run.run(3)
    board.add(run.mesh.tick())
    view = board.view(run.mesh.now, connected=True)
    assert [one.health for one in view.services] == ["unknown"]
    assert view.doing == "nothing to judge yet"


def test_the_board_shows_what_goes_on() -> None:
    core = Core(POLICY)
    run = Run(SimMesh(1, background=0.001), core)
    board = Board("m", "local", "policy.yaml", core, lambda fault: fault.id)
    assert board.view(run.mesh.now, connected=True).doing == "waiting for the first signals"
    tick = run.mesh.tick

    def tick_and_show() -> Any:
        samples = tick()
        board.add(samples)
        return samples

    run.mesh.tick = tick_and_show  # type: ignore[method-assign]
    run.run(12)
    view = board.view(run.mesh.now, connected=True)
    assert view.doing == "all objectives hold"
    service = view.services[0]
    assert service.health == "ok"
    assert [one.name for one in service.objectives] == ["success", "latency", "instances"]
    assert 180 < service.numbers.rps < 220
    assert len(service.trend.rps) >= 10
    assert all(objective.budget_left > 0.9 for objective in service.objectives)

    run.mesh.mesh_fault(instance="service-b-2", err_rate=0.5)
    run.run(10, lambda: bool(run.of("localised")))
    view = board.view(run.mesh.now, connected=True)
    states = {one.id: one.state for one in view.services[0].instances}
    assert states["service-b-2"] == "bad"
    assert view.incidents[0].target == "service-b-2"
    assert view.services[0].health in ("violated", "healing")
    assert view.why and view.faults == ("f1",)
    run.run(10, run.healed)
    board.log(run.events)
    view = board.view(run.mesh.now, connected=True)
    assert {one.id: one.state for one in view.services[0].instances}["service-b-2"] == "ejected"
    assert view.incidents[0].state == "healed"
    assert [line.event for line in view.log][-1] == "healed"
    assert dataclasses.is_dataclass(view) and hash(view.incidents[0])


# -- webhooks -------------------------------------------------------------------------------------------------


@contextmanager
def receiver(status: int = 200, hold: threading.Event | None = None) -> Iterator[tuple[str, list[Any]]]:
    got: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if hold is not None:
                hold.wait(10)
            got.append((self.headers["Authorization"], body))
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/hook", got
    finally:
        server.shutdown()
        server.server_close()


def _event(name: str = "healed", remedy: str | None = None) -> Event:
    return Event("e1", 1.0, name, "well again", service="b", remedy=remedy)  # type: ignore[arg-type]


def _webhook(url: str, **fields: Any) -> Webhook:
    return Webhook.model_validate(
        {"name": "chat", "url": url, "headers": {"Authorization": "Bearer x"}, **fields}
    )


def test_a_webhook_is_told_what_it_asked_for() -> None:
    with receiver() as (url, got):
        notifier = Notifier("m", [_webhook(url, timeout="30s")], pytest.fail)
        notifier.tell(_event("healed"))
        notifier.tell(_event("chosen"))
        notifier.close(60)
    assert [(token, body["mesh"], body["event"]) for token, body in got] == [("Bearer x", "m", "healed")]


def test_a_webhook_that_hangs_holds_up_nobody_and_one_that_fails_is_complained_about() -> None:
    complaints: list[str] = []
    hold = threading.Event()
    with receiver(hold=hold) as (slow, _), receiver(status=500) as (broken, _):
        webhooks = [
            _webhook(slow, timeout="100ms"), _webhook(broken, timeout="30s"), _webhook("http://127.0.0.1:1/secret"),
        ]  # fmt: skip
        notifier = Notifier("m", webhooks, complaints.append)
        notifier.tell(_event())
        notifier.close(60)
        hold.set()
    assert len(complaints) == 3
    assert any("answered 500" in complaint for complaint in complaints)
    assert not any("secret" in complaint for complaint in complaints)


def test_the_remedy_notify_reaches_those_who_asked_for_it() -> None:
    webhook = _webhook("http://x", events=["notify"])
    assert wants(webhook, _event("acted", "notify"))
    assert not wants(webhook, _event("acted", "eject"))
