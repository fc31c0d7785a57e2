"""The whole core on a simulated mesh: what happens, what watch does about it, and how soon it is well again."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simmesh import Caller, Run, SimMesh

from meshdemo.control.model import Fault
from meshdemo.control.signals import Cell, Histogram, Sample, bucket
from meshdemo.remediation.core import Core, Result
from meshdemo.remediation.policy import Policy
from meshdemo.remediation.policyfile import check, load
from meshdemo.resources import DEFAULT_POLICY

POLICY = load(DEFAULT_POLICY)
B1, B2 = "service-b-1", "service-b-2"


def start(
    policy: Policy = POLICY, warm_s: float = 10, seed: int = 1, dry_run: bool = False, **mesh: Any
) -> Run:
    """A healthy mesh that has been watched for a while."""
    run = Run(SimMesh(seed, background=0.001, **mesh), Core(policy, dry_run=dry_run))
    run.run(warm_s)
    assert not run.events
    return run


def replaced(old: str, new: str) -> Policy:
    text = DEFAULT_POLICY.read_text()
    assert old in text
    checked = check(text.replace(old, new))
    assert checked.policy is not None, checked.problems
    return checked.policy


def record(run: Run, at: str, **fields: Any) -> None:
    run.mesh.faults.append(Fault(id="f", at=at, service="service-b", started_at=run.mesh.now, **fields))  # type: ignore[arg-type]


# -- the five faults ----------------------------------------------------------------------------------------


def _errors(run: Run) -> None:
    run.mesh.release("v1", errors=0.3)
    record(run, "app")


def _latency(run: Run) -> None:
    run.mesh.release("v1", latency_ms=400)
    record(run, "app")


def _one_instance(run: Run) -> None:
    run.mesh.mesh_fault(instance=B2, err_rate=0.5)


def _hung(run: Run) -> None:
    run.mesh.hang(B1)
    record(run, "process", kind="hang", instance=B1)


def _killed(run: Run) -> None:
    run.mesh.kill(B1)
    record(run, "process", kind="crash", instance=B1)


def _killed_and_back_before_anybody_looks(run: Run) -> None:
    run.mesh.kill(B1, back_after_s=0.05)
    record(run, "process", kind="crash", instance=B1)


def _slower_than_two_exports(run: Run) -> None:
    run.mesh.release("v1", latency_ms=800)
    record(run, "app")


@pytest.mark.parametrize(
    ("break_it", "remedies", "detect_median_s", "detect_worst_s"),
    [
        (_errors, ["rollback"], 1.2, 2),
        (_latency, ["rollback"], 1.2, 2),
        (_one_instance, ["eject"], 1.2, 2),
        (_hung, ["restart"], 1.4, 1.8),
        (_killed, [], 1.2, 2),
        (_killed_and_back_before_anybody_looks, [], 1.2, 2),
        (_slower_than_two_exports, ["rollback"], 1.4, 2),
    ],
)
def test_the_five_faults(
    break_it: Callable[[Run], None], remedies: list[str], detect_median_s: float, detect_worst_s: float
) -> None:
    detected, recovered = [], []
    for seed in range(15):
        run = start(seed=seed)
        break_it(run)
        run.run(30, run.healed)
        assert run.kinds() == remedies
        assert run.names().count("violated") == run.names().count("healed") == 1
        detected.append(run.of("violated")[0].detect_s or 99)
        recovered.append(run.of("healed")[0].recover_s or 99)
    assert median(detected) <= detect_median_s
    assert max(detected) <= detect_worst_s
    assert max(recovered) <= 6


def test_the_events_tell_the_story_in_order() -> None:
    run = start()
    _errors(run)
    run.run(20, run.healed)
    assert run.names() == ["violated", "localised", "chosen", "acted", "verified", "healed"]
    violated, localised, chosen, _, verified, healed = run.events
    assert violated.evidence["surely_above"] > violated.evidence["allowed"]
    assert (localised.scope, localised.target) == ("service", "service-b")
    assert (chosen.rule, chosen.remedy) == ("bad-service", "rollback")
    assert verified.remedy == "rollback"
    assert healed.evidence["bad_requests"] > 0
    assert 0 < healed.evidence["budget_spent"] < 1
    assert len({event.id for event in run.events}) == len(run.events)
    assert len({event.incident for event in run.events}) == 1


# -- localising and choosing --------------------------------------------------------------------------------


def test_a_mesh_fault_on_the_whole_service_is_cleared_because_no_release_is_to_blame() -> None:
    run = start()
    run.mesh.mesh_fault(err_rate=0.2, lat_ms=200)
    run.run(20, run.healed)
    assert run.kinds() == ["clear-fault"]
    assert "not to blame" in str(run.of("chosen")[0].evidence["passed_over"])


def test_a_bad_version_loses_its_traffic() -> None:
    run = start(versions={"v1": 2, "v2": 1})
    run.mesh.split = {"v1": 90, "v2": 10}
    run.mesh.release("v2", errors=0.5)
    run.run(20, run.healed)
    assert run.kinds() == ["shift-away"]
    assert run.mesh.split == {"v1": 100, "v2": 0}


def test_a_version_without_a_share_of_the_traffic_is_not_waited_for() -> None:
    for seed in range(5):
        run = start(seed=seed, versions={"v1": 2, "v2": 1})
        run.mesh.split = {"v1": 100, "v2": 0}
        run.run(3)
        _one_instance(run)
        run.run(30, run.healed)
        assert run.kinds() == ["eject"]
        assert (run.of("healed")[0].recover_s or 99) <= 6


def test_a_bad_caller_is_told_from_a_bad_service() -> None:
    run = start(callers=[Caller("web", 100), Caller("batch", 100)])
    run.mesh.mesh_fault(caller="web", err_rate=0.4)
    run.run(20, run.healed)
    assert (run.of("localised")[0].scope, run.of("localised")[0].target) == ("caller", "web")
    assert run.kinds() == ["clear-fault"]


def test_a_revision_that_began_bad_on_one_instance_is_rolled_back() -> None:
    run = start()
    run.mesh.releases["v1", 2] = (0.6, 0)
    run.mesh.revisions["v1"] = 2
    run.mesh.instances[B1].revision = 2  # the rollout has reached only one
    run.run(20, run.healed)
    assert run.of("localised")[0].scope == "version"
    assert run.kinds() == ["rollback"]


def test_a_rollback_goes_to_the_last_revision_that_met_its_objectives() -> None:
    run = start()
    run.mesh.release("v1", errors=0.5)  # 2: bad
    run.run(1.0)
    run.mesh.release("v1", errors=0.6)  # 3: bad, too
    run.run(20, run.healed)
    assert run.actions[0].plan.rollbacks == {"v1": 1}


def test_a_service_that_suffers_from_one_that_it_calls_is_left_alone() -> None:
    run = start()
    for one in run.mesh.instances.values():
        run.mesh.broken[one.id] = 0.3
    tick = run.mesh.tick

    def tick_with_calls() -> list[Any]:
        for one in run.mesh.instances.values():
            for requests, failures, _ in one.counts.values():
                one.outbound["storage"] = [requests, failures]
        return tick()

    run.mesh.tick = tick_with_calls  # type: ignore[method-assign]
    run.run(10)
    assert (run.of("localised")[0].scope, run.of("localised")[0].target) == ("dependency", "storage")
    run.run(30)
    assert not run.actions
    assert "storage is to blame" in run.of("gave_up")[0].text


# -- the start of a mesh --------------------------------------------------------------------------------------


def test_who_is_missing_is_not_judged_until_the_mesh_is_up() -> None:
    run = Run(SimMesh(1, background=0.001), Core(POLICY))
    run.mesh.instances[B2].ready = False
    run.run(2)
    run.mesh.kill(B1, back_after_s=1)  # a start has its ups and downs
    run.run(5)
    assert not run.of("violated")
    run.mesh.instances[B2].ready = True
    run.run(2)
    run.mesh.kill(B1, back_after_s=30)
    run.run(5, lambda: bool(run.of("violated")))
    assert run.of("violated")[0].objective == "instances"


def test_one_that_never_comes_up_does_not_keep_the_others_from_being_judged_for_ever() -> None:
    run = Run(SimMesh(1, background=0.001), Core(POLICY))
    run.mesh.instances[B2].ready = False
    run.run(70)
    run.mesh.kill(B1, back_after_s=30)
    run.run(5, lambda: bool(run.of("violated")))
    assert run.of("violated")[0].objective == "instances"


# -- time, and what mends itself ------------------------------------------------------------------------------


def test_a_hiccup_is_an_incident_without_a_remedy() -> None:
    run = start()
    run.mesh.broken.update({B1: 0.9, B2: 0.9})
    run.mesh._later(0.3, run.mesh.broken.clear)
    run.run(20, run.healed)
    assert run.names() == ["violated", "healed"]
    assert "by itself" in run.of("healed")[0].text


def test_a_killed_instance_whose_death_is_noticed_late_causes_no_flapping() -> None:
    for seed in range(10):
        run = start(seed=seed)
        run.mesh.kill(B1, noticed_after_s=0.4, back_after_s=1.4)
        run.run(20)
        assert not run.actions
        assert run.healed()


def test_one_that_does_not_come_back_is_restarted() -> None:
    run = start()
    run.mesh.kill(B1, back_after_s=1000)
    run.run(30, run.healed)
    assert run.kinds() == ["restart"]
    assert run.of("escalated")[0].time - run.of("violated")[0].time == pytest.approx(5, abs=0.5)


def test_at_five_requests_a_second_it_takes_longer_and_ends_the_same() -> None:
    run = start(rps=5, warm_s=60)
    run.mesh.release("v1", errors=0.3)
    run.run(60, run.healed)
    assert run.kinds() == ["rollback"]


def test_a_slow_burn_does_not_pass_for_healed_after_a_few_lucky_seconds() -> None:
    run = start()
    run.mesh.broken.update({B1: 0.03, B2: 0.03})
    run.run(60, lambda: bool(run.of("gave_up")))
    assert not run.of("healed")
    assert run.of("gave_up")


def test_requests_that_were_in_flight_do_not_condemn_the_rollback() -> None:
    for seed in range(10):
        run = start(seed=seed)
        run.mesh.release("v1", latency_ms=800)
        run.run(30, run.healed)
        assert run.kinds() == ["rollback"]


# -- escalating ---------------------------------------------------------------------------------------------


def test_what_does_not_help_is_followed_by_the_next_remedy_and_in_the_end_by_a_loud_word() -> None:
    run = start()
    run.mesh.broken.update({B1: 0.3, B2: 0.3})
    run.run(40, lambda: bool(run.of("gave_up")))
    assert run.kinds() == ["restart"]
    assert run.names()[-2:] == ["escalated", "gave_up"]
    assert "a person is needed" in run.of("gave_up")[0].text
    # When a person has mended it, that is seen, too.
    run.mesh.broken.clear()
    run.run(20, run.healed)
    assert run.names()[-1] == "healed"


def test_a_remedy_that_fails_is_followed_by_the_next() -> None:
    run = start()
    run.fail = lambda action: action.plan.kind == "restart"
    run.mesh.hang(B1)
    run.run(10)
    assert run.kinds()[:2] == ["restart", "eject"]
    assert run.of("error")[0].remedy == "restart"


def test_an_instance_comes_back_on_probation_and_a_relapse_escalates() -> None:
    run = start()
    run.mesh.broken[B1] = 0.5
    run.mesh.restart_fixes = lambda one: run.mesh.broken.pop(one.id, None) and None
    run.run(60)
    assert run.kinds() == ["eject", "readmit", "restart"]
    assert run.of("blocked")[0].remedy == "eject"  # it was used on the same instance not long ago
    assert run.of("healed")[-1].evidence["remedies"] == [f"restart {B1}"]


def test_an_instance_with_a_known_fault_of_its_own_stays_out_until_that_has_ended() -> None:
    run = start()
    run.mesh.mesh_fault(instance=B2, err_rate=0.5)
    run.run(80)
    assert run.kinds() == ["eject"]
    assert "still in force" in run.of("blocked")[0].text
    assert len(run.of("blocked")) == 1
    run.mesh.faults.clear()
    run.run(15)
    assert run.kinds() == ["eject", "readmit"]
    assert not run.mesh.ejected and len(run.of("violated")) == 1


def test_a_watch_adopts_what_an_earlier_one_has_ejected() -> None:
    run = start()
    run.mesh.mesh_fault(instance=B2, err_rate=0.5)
    run.run(20, run.healed)
    run.mesh.faults.clear()
    later = Run(run.mesh, Core(POLICY, "second"))
    later.run(40)
    assert later.kinds() == ["readmit"]


# -- guardrails ---------------------------------------------------------------------------------------------


def test_enough_must_stay_in_service() -> None:
    run = start(replaced("min_in_service: 50%", "min_in_service: 60%"))
    run.mesh.broken[B1] = 0.5
    run.run(30)
    assert "eject" not in run.kinds()
    assert "1 of 2 instances" in run.of("blocked")[0].text


def test_the_last_instance_of_a_version_with_traffic_is_not_ejected() -> None:
    policy = replaced("remedies: [shift-away, rollback, clear-fault, restart]", "remedies: [notify]")
    run = start(policy, versions={"v1": 2, "v2": 1})
    run.mesh.split = {"v1": 50, "v2": 50}
    run.mesh.broken["service-b-3"] = 0.5
    run.run(20)
    assert not run.mesh.ejected


def test_no_more_actions_than_allowed() -> None:
    run = start(
        replaced("max_actions: {count: 10, per: 10m}", "max_actions: {count: 1, per: 1m}"), versions={"v1": 4}
    )
    run.mesh.broken.update({B1: 0.5})
    run.run(10, run.healed)
    run.mesh.broken.update({B2: 0.5})
    run.run(20)
    assert run.kinds() == ["eject"]
    assert "1 actions in 60 s" in run.of("blocked")[0].text
    run.run(60)  # the minute is over: now it may
    assert run.kinds().count("eject") == 2


def test_what_had_to_wait_is_used_when_nothing_else_has_helped() -> None:
    run = start()
    run.mesh.release("v1", errors=0.3)
    run.run(20, run.healed)
    again_at = run.mesh.now
    run.mesh.release("v1", errors=0.3)
    run.run(30)
    assert run.kinds() == ["rollback", "restart"]  # rolling back again has to wait, and restarting is no help
    assert "rollback was used" in run.of("blocked")[0].text and not run.of("gave_up")
    run.run(60, run.healed)
    assert run.kinds() == ["rollback", "restart", "rollback"]
    assert run.names()[-1] == "healed" and not run.of("gave_up")
    assert run.mesh.now < again_at + 70


def test_a_dry_run_says_and_touches_nothing() -> None:
    run = start(dry_run=True)
    run.mesh.mesh_fault(instance=B2, err_rate=0.5)
    run.run(20)
    assert run.names() == ["violated", "localised", "chosen"]
    assert run.of("chosen")[0].text == f"would eject {B2}"
    assert not run.actions and all(event.dry_run for event in run.events)
    run.mesh.faults.clear()
    run.run(20)
    assert run.names()[-1] == "healed"


def test_a_silent_sidecar_is_neither_healthy_nor_bad() -> None:
    run = start()
    run.mesh.instances[B1].silent = True
    run.run(20)
    assert not run.events
    # And its silence does not keep the other one's trouble from being localised.
    run.mesh.release("v1", errors=0.5)
    run.run(20, lambda: bool(run.of("chosen")))
    assert run.of("chosen")[0].remedy == "rollback"


def test_the_same_export_counts_once() -> None:
    run = start()
    judge = run.core.observer.judges_of("service-b")[0]
    before = judge.whole.longest.requests
    run.core.observe(run.mesh.now, list(run.core.observer.recent("service-b")), run.mesh.rows())
    assert judge.whole.longest.requests == before


def test_what_was_bad_before_watch_started_is_history() -> None:
    mesh = SimMesh(1)
    mesh.release("v1", errors=0.5)
    samples = [sample for _ in range(int(30 / 0.02)) for sample in mesh.tick()]
    mesh.release("v1")
    for _ in range(int(5 / 0.02)):
        samples += mesh.tick()
    core = Core(POLICY)
    core.observe(mesh.now, samples, mesh.rows())
    assert not core.step(mesh.now).events
    assert not core.situation.revisions.met("service-b", "v1", 2)
    assert core.situation.revisions.met("service-b", "v1", 3)


# -- whatever happens ---------------------------------------------------------------------------------------

_TROUBLES = st.sampled_from(
    ["errors", "latency", "instance", "hang", "kill", "mesh", "clear", "slow-burn", "silent", "fail"]
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 10**6),
    troubles=st.lists(st.tuples(_TROUBLES, st.floats(0.1, 15), st.integers(0, 3)), min_size=1, max_size=6),
)
def test_whatever_happens_the_guardrails_hold(seed: int, troubles: list[tuple[str, float, int]]) -> None:
    run = Run(SimMesh(seed, versions={"v1": 3, "v2": 1}, background=0.001, rps=100), Core(POLICY))
    run.run(6)
    names = list(run.mesh.instances)
    for trouble, after_s, which in troubles:
        _make(run, trouble, names[which])
        run.run(after_s)
        assert len(run.mesh.ejected) <= 2
    run.run(30)
    limit = POLICY.guardrails.max_actions
    times = [event.time for event in run.of("chosen") if event.remedy not in ("wait", "notify")]
    assert all(sum(at <= other < at + limit.per for other in times) <= limit.count for at in times)
    opened = [event.incident for event in run.of("violated")]
    closed = [event.incident for event in run.of("healed")]
    assert len(set(opened)) == len(opened) and set(closed) <= set(opened)
    assert {incident.id for incident in run.core.open.values()} == set(opened) - set(closed)


def _make(run: Run, trouble: str, name: str) -> None:
    mesh = run.mesh
    match trouble:
        case "errors":
            mesh.release("v1", errors=0.3)
        case "latency":
            mesh.release("v2", latency_ms=500)
        case "instance":
            mesh.broken[name] = 0.6
        case "hang":
            mesh.hang(name)
        case "kill":
            mesh.kill(name)
        case "mesh":
            mesh.mesh_fault(err_rate=0.4)
        case "slow-burn":
            mesh.broken[name] = 0.04
        case "silent":
            mesh.instances[name].silent = not mesh.instances[name].silent
        case "fail":
            run.fail = lambda action: action.plan.kind in ("restart", "rollback")
        case _:
            mesh.broken.clear()
            mesh.faults.clear()
            run.fail = lambda _: False


# -- a service and one that it calls ------------------------------------------------------------------------


class Chain:
    """web calls voting; both export once a second, voting first. Policy: the default one."""

    def __init__(self) -> None:
        self.core = Core(POLICY)
        self.now = 0.0
        self.stuck = 0
        self.events: list[Any] = []
        self.actions: list[Any] = []

    def second(self, *, failing: float = 0.0, hung: bool = False) -> None:
        """One second in which voting fails so often, or answers nothing, and web passes that on."""
        self.now += 1
        self.stuck = self.stuck + 60 if hung else 0
        answered = 0 if hung else 60
        bad = round(60 * failing)
        waiting = ((1.0, self.stuck - 60),) if self.stuck > 60 else ()
        for at, service, cells in (
            (0.0, "voting", [self.cell(True, "web", answered, bad)]),
            (0.3, "web", [self.cell(True, "bot", answered, bad), self.cell(False, "voting", answered, bad)]),
        ):
            end = self.now + at
            one = Sample(
                f"{service}-1", service, "v1", 1, end - 1, end, self.stuck, 60, waiting, cells=tuple(cells)
            )
            rows = [
                {"id": f"{name}-1", "service": name, "version": "v1", "revision": 1, "ready": True,
                 "silent": False, "ejected": False}
                for name in ("voting", "web")
            ]  # fmt: skip
            self.core.observe(end, [one], rows)
            step = self.core.step(end)
            self.events += step.events
            self.actions += step.actions

    @staticmethod
    def cell(inbound: bool, peer: str, requests: int, bad: int) -> Cell:
        return Cell(inbound, peer, "r", requests, bad, latency=Histogram({bucket(3.0): requests}))


@pytest.mark.parametrize("trouble", [{"failing": 0.9}, {"hung": True}])
def test_who_waits_for_a_sick_service_is_left_alone_until_that_is_well(trouble: dict[str, Any]) -> None:
    chain = Chain()
    for _ in range(10):
        chain.second()
    assert not chain.events
    for _ in range(8):
        chain.second(**trouble)
    assert {action.plan.service for action in chain.actions} == {"voting"}
    places = {
        event.service: (event.scope, event.target) for event in chain.events if event.event == "localised"
    }
    assert places["web"] == ("dependency", "voting")
    chain.core.done(Result(chain.actions[0].id, True, chain.now + 0.5))
    for _ in range(12):
        chain.second()
    assert not chain.core.open, [event.text for event in chain.events]
    assert sorted(event.service for event in chain.events if event.event == "healed") == ["voting", "web"]
    assert len(chain.actions) == 1
