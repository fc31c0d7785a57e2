"""The loop of watch as a pure state machine: signals, intent and a clock in; events and actions out.

    judge -> localise -> choose -> act -> verify -> healed, or escalate, or give up loudly

A service has at most one open incident. Nothing here waits or does: `step` is called whenever something was
observed and says what to do (`Action`), and `done` is told what came of it. So a day of it runs in a test in
seconds.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from meshdemo.control.model import Intent
from meshdemo.control.signals import Sample
from meshdemo.remediation import choose, evidence
from meshdemo.remediation.choose import Plan, Senseless
from meshdemo.remediation.events import Event
from meshdemo.remediation.guardrails import Guard
from meshdemo.remediation.incident import Incident, Recovery, Waiting
from meshdemo.remediation.judge import SHORT_S, ObjectiveJudge, Verdict
from meshdemo.remediation.localise import Location, localise
from meshdemo.remediation.observer import Observer
from meshdemo.remediation.policy import Policy
from meshdemo.remediation.situation import Seen, Situation
from meshdemo.remediation.telling import Teller

_LOCALISE_S = 2.5  # how long to wait for exports that make it clear where; longer at low rates
_LOCALISE_MAX_S = 15.0
_TELLING = 3.0  # bad requests that an instance must have had the chance to show
_PATIENCE = 6.0  # a remedy may take so many times the verify time to show, if nothing is clear before
_SETTLE_S = 1.0  # the first second of a process may be slow, and must not condemn the remedy
_STARTS_PROCESSES = frozenset({"restart", "rollback", "scale"})
_POSTPONE_S = 5.0
_KEPT_INCIDENTS = 200


@dataclass(frozen=True, slots=True)
class Action:
    """Something to be carried out: a plan, and the words to leave with it."""

    id: str
    plan: Plan
    reason: str
    incident: str | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """What came of an action. `effective_at`: from then on it was in force (control plane's clock)."""

    action: str
    ok: bool
    effective_at: float
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """What was decided since the last step."""

    events: list[Event]
    actions: list[Action]


@dataclass(slots=True)
class _Probation:
    """An instance that watch has ejected, and when it may come back."""

    service: str
    until: float
    times: int  # that it was ejected
    action: str | None = None  # readmission under way
    told: bool = False


class Core:
    """Everything that watch knows and decides.

    Args:
        run: a word that is unique to this run; identifiers of events, incidents and actions begin with it.
        dry_run: decide and say, and ask for nothing to be done.
    """

    def __init__(self, policy: Policy, run: str = "w", *, dry_run: bool = False) -> None:
        self.policy = policy
        self.dry_run = dry_run
        self.open: dict[str, Incident] = {}
        self.past: deque[Incident] = deque(maxlen=_KEPT_INCIDENTS)
        self.guard = Guard(policy.guardrails)
        self.observer = Observer(policy, self.open)
        self._tell = Teller(run, dry_run=dry_run)
        self._actions: list[Action] = []
        self._probation: dict[str, _Probation] = {}
        self._times_ejected: dict[str, int] = {}
        self._ending = False

    @property
    def now(self) -> float:
        """The control plane's clock, as last heard."""
        return self.observer.now

    @property
    def situation(self) -> Situation:
        """What is known of the mesh besides the counts."""
        return self.observer.situation

    @property
    def alarmed(self) -> bool:
        """Will the next step open an incident? Then the intent had better be fresh."""
        services = [*self.observer.alarms, *self.observer.short_services()]
        return any(service not in self.open for service in services)

    # -- in -----------------------------------------------------------------------------------------------

    def observe(self, now: float, samples: Sequence[Sample], rows: Sequence[Mapping[str, Any]]) -> None:
        """Take in a batch of exports, and the instances as the control plane sees them."""
        self.observer.observe(now, samples, rows)

    def set_intent(self, intent: Intent) -> None:
        """The desired state as it is now: faults, splits, ejections."""
        self.situation.intent = intent
        for ejection in intent.ejections:
            name = ejection.instance
            one = self.situation.instances.get(name)
            # Also those of a watch that ran before: somebody has to let them back in.
            if ejection.by == "watch" and name not in self._probation and one is not None:
                times = self._times_ejected[name] = self._times_ejected.get(name, 0) + 1
                until = ejection.at + self.policy.guardrails.probation * 2 ** min(times - 1, 5)
                self._probation[name] = _Probation(one.service, until, times)
        there = intent.ejected
        for name in [name for name in self._probation if name not in there]:
            del self._probation[name]

    def recall(self, journal: Iterable[Mapping[str, Any]]) -> None:
        """Learn from the journal what earlier watches did: the guardrails hold for all of them together."""
        found: dict[tuple[Any, ...], tuple[float, str, str, str]] = {}
        for row in journal:
            # What was chosen was begun, also if its watch did not live to say what came of it.
            if row.get("event") not in ("chosen", "acted") or row.get("dry_run") or not row.get("remedy"):
                continue
            service, kind = str(row.get("service")), str(row["remedy"])
            target = str((row.get("evidence") or {}).get("target") or row.get("target"))
            # In one incident nothing is done to the same target twice.
            found.setdefault(
                (row.get("incident") or row.get("id"), kind, target),
                (float(row["time"]), service, kind, target),
            )
        for at, service, kind, target in sorted(found.values()):
            self.guard.recall(service, kind, target, at)

    def done(self, result: Result) -> None:
        """An action was carried out, or failed. What follows from it comes out of the next step."""
        for name, probation in self._probation.items():
            if probation.action == result.action:
                probation.action = None
                probation.until = self.now + _POSTPONE_S  # until the intent says that it is back
                plan = choose.readmit(probation.service, name)
                self._tell.readmitted(plan, result.ok, result.detail)
                return
        for incident in self.open.values():
            if incident.action == result.action:
                self._conclude(incident, result)
                return

    def finish(self, now: float, results: Sequence[Result]) -> list[Event]:
        """Watch ends: what came of the last actions. Nothing more is decided."""
        self.observer.now = self._tell.now = max(self.now, now)
        self._ending = True
        for result in results:
            self.done(result)
        return self._tell.take()

    def step(self, now: float) -> Step:
        """Decide on what has been observed. `now`: seconds by the control plane's clock."""
        self.observer.now = self._tell.now = max(self.now, now)
        alarms = self.observer.alarms
        for service in [*alarms, *self.observer.short_services()]:
            if service not in self.open:
                self._open(service, alarms.get(service))
        alarms.clear()
        for incident in list(self.open.values()):
            self._advance(incident)
        if not self.dry_run:
            self._end_probations()
        actions, self._actions = self._actions, []
        return Step(self._tell.take(), actions)

    # -- judge --------------------------------------------------------------------------------------------

    def _open(self, service: str, verdict: Verdict | None) -> None:
        """An objective is violated; without a verdict it is the one about instances."""
        observer = self.observer
        alarm_at = verdict.end if verdict else self.now
        objective = observer.in_service_objective(service)
        incident = self.open[service] = Incident(
            id=self._tell.new_id("i"),
            service=service,
            objective=verdict.objective if verdict else objective.name if objective else "",
            opened_at=self.now,
            recovery=Recovery(observer.judges_of(service), alarm_at, verdict),
            verdict=verdict,
            alarm_at=alarm_at,
            window_s=verdict.window_s if verdict else SHORT_S,
            deadline=self.now + _LOCALISE_S,
        )
        self._learn_fault(incident)
        if verdict is not None:
            incident.recovery.count(verdict.objective, verdict.requests, verdict.bad)
            incident.why = self._words(verdict)
            self._tell.violated(incident, evidence.figures(verdict))
        else:
            down, died = observer.down_in(service), observer.died_in(service)
            one, many = (
                ("has died", "have died") if died == down else ("is not in service", "are not in service")
            )
            incident.why = f"{', '.join(down)} {one if len(down) == 1 else many}"
            self._tell.violated(incident, {"down": down, "died": died})

    def _words(self, verdict: Verdict) -> str:
        objective = next(one for one in self.policy.objectives if one.name == verdict.objective)
        return evidence.words(verdict, objective)

    def _learn_fault(self, incident: Incident) -> None:
        """When did the fault begin that this is about? The newest one known on the service is taken.

        It may be recorded after its harm was seen: whoever kills a process says so afterwards.
        """
        service = incident.service
        healed = max((one.closed_at or 0.0 for one in self.past if one.service == service), default=0.0)
        starts = [
            fault.started_at
            for fault in self.situation.faults_at(service)
            if healed < fault.started_at <= incident.opened_at
            and (incident.verdict is not None or fault.at == "process")
        ]
        if starts:
            incident.fault_at = max(starts)
            incident.detect_s = incident.opened_at - incident.fault_at

    def _advance(self, incident: Incident) -> None:
        """Move an incident on as far as what is known now allows."""
        if incident.fault_at is None:
            self._learn_fault(incident)
        if self.observer.short_of(incident.service):
            incident.recovery.mark_bad(self.now)
        elif not self.observer.judges_of(incident.service):
            incident.recovery.newest = self.now
        if incident.state == "acting":
            return
        verify_s = self.policy.guardrails.verify
        if incident.recovery.healthy(verify_s, idle_is_fine=incident.verdict is None):
            self._heal(incident)
            return
        match incident.state:
            case "localising":
                self._localise(incident)
            case "blocked":
                if self.now >= incident.deadline:
                    self._choose(incident)
            case "verifying":
                self._verify(incident)
            case "waiting":
                self._wait(incident)
            case _:  # gave up: only the service itself, or a person, can end it
                pass

    # -- localise -----------------------------------------------------------------------------------------

    def _localise(self, incident: Incident) -> None:
        place = self._where(incident)
        if place is None:
            return
        symptom = self._symptom(incident, place)
        if symptom is None:
            return
        before = incident.place
        known = before is not None and (before.scope, before.target) == (place.scope, place.target)
        incident.place = place
        if not known or symptom != incident.symptom:
            incident.symptom, incident.position = symptom, 0
            incident.postponed.clear()
            incident.rule = self.policy.rule_for(
                scope=place.scope, service=incident.service, objective=incident.objective, symptom=symptom
            )
            self._tell.localised(incident)
        if place.scope != "dependency":
            self._choose(incident)
        elif known and place.target not in self.open:
            self._give_up(incident, f"{place.target} is to blame, and nothing heals it")
        else:
            self._set_waiting(incident, "dependency", self.now + _LOCALISE_MAX_S)

    def _where(self, incident: Incident) -> Location | None:
        """The place of the trouble; None while it is not clear yet, or when it is over."""
        service, observer = incident.service, self.observer
        down = observer.down_in(service)
        if incident.verdict is None and incident.again is None:
            if down:
                return self._down_place(service, down)
            self._set_waiting(incident, "itself", math.inf)
            return None
        judge = self._judge_of(incident)
        after = evidence.after(
            observer.recent(service), judge, incident.alarm_at, incident.window_s, incident.recovery.base
        )
        late = self.now - incident.deadline
        final = late >= 0 and (after.telling(_TELLING) or late >= _LOCALISE_MAX_S - _LOCALISE_S)
        parts = after.instances(
            # Those that can be asked: they report, and take traffic or still owe answers.
            one
            for one in self.situation.of_service(service)
            if not one.silent and (one.in_service or after.involves(one.id)) and after.takes_turns(one.id)
        )
        unproven = self._unproven(service)
        place = localise(service, judge.allowed, parts, after.callers(), unproven=unproven, final=final)
        if place is None:
            return None
        if place.instances and all(observer.lately_down(name) for name in place.instances):
            if down:
                return self._down_place(service, down)
            self._set_waiting(incident, "itself", math.inf)
            return None
        if (elsewhere := self._dependency(incident, judge)) is not None:
            return elsewhere
        revisions = {(part.version, part.revision) for part in parts if part.name in place.instances}
        if revisions and revisions <= unproven:
            return place  # a release that never worked: going back is a safe guess, so no time is lost
        still = after.still_bad(place.instances, judge.allowed, final=final)
        if still is False:
            self._set_waiting(incident, "itself", math.inf)
        return place if still else None

    def _dependency(self, incident: Incident, judge: ObjectiveJudge) -> Location | None:
        """A service that this one calls, if what is bad here comes from there."""
        recent = self.observer.recent(incident.service)
        callee = evidence.guilty_callee(recent, judge, incident.alarm_at - max(incident.window_s, SHORT_S))
        if callee is not None:
            return Location("dependency", callee, reason=f"its own calls to {callee} are as bad")
        verdict = incident.again or incident.verdict
        if verdict is not None and verdict.overdue * 2 >= verdict.bad:
            # What waits here may wait for somebody there: calls without an answer are in no count yet.
            for callee in sorted(evidence.callees(recent) & self.open.keys()):
                return Location(
                    "dependency", callee, reason=f"it waits, and so does {callee}, which it calls"
                )
        return None

    def _judge_of(self, incident: Incident) -> ObjectiveJudge:
        judges = self.observer.judges_of(incident.service)
        verdict = incident.again or incident.verdict
        name = verdict.objective if verdict is not None else incident.objective
        return next((judge for judge in judges if judge.objective.name == name), judges[0])

    def _unproven(self, service: str) -> set[tuple[str, int]]:
        """Revisions that have never met their objectives, of workloads that had one before."""
        revisions = self.situation.revisions
        running = {(one.version, one.revision) for one in self.situation.of_service(service)}
        return {
            (version, revision)
            for version, revision in running
            if revision > 1 and not revisions.met(service, version, revision)
        }

    def _down_place(self, service: str, down: Sequence[str]) -> Location:
        versions = tuple(sorted({self.situation.instances[name].version for name in down}))
        if len(down) == 1:
            return Location("instance", down[0], tuple(down), versions, "it is not in service")
        return Location("service", service, tuple(down), versions, f"{len(down)} are not in service")

    def _symptom(self, incident: Incident, place: Location) -> str | None:
        """Of what kind the trouble is; None while that is not clear yet."""
        if place.scope == "dependency":
            return "errors"
        if place.instances and set(place.instances) <= set(self.observer.down_in(incident.service)):
            return "down"
        return evidence.symptom(
            self.observer.recent(incident.service),
            place.instances,
            incident.alarm_at - incident.window_s,
            self._judge_of(incident).objective,
            final=self.now >= incident.deadline,
        )

    # -- choose -------------------------------------------------------------------------------------------

    def _choose(self, incident: Incident) -> None:
        """Start the next remedy that makes sense and is allowed; say so if there is none."""
        if self._ending:
            return
        rule, place = incident.rule, incident.place
        if place is None or rule is None:
            scope = place.scope if place else "unknown"
            self._give_up(incident, f"no rule of the policy fits scope {scope}, symptom {incident.symptom}")
            return
        passed_over: list[dict[str, str]] = []
        until = math.inf
        # What had to wait is not forgotten: its turn comes again when nothing else is left.
        waited = sorted(position for position in incident.postponed if position < incident.position)
        for position in (*range(incident.position, len(rule.remedies)), *waited):
            remedy = rule.remedies[position]
            plan = choose.plan(remedy, incident.service, place, self.situation)
            if isinstance(plan, Senseless):
                passed_over.append({"remedy": remedy.kind, "reason": plan.reason})
                continue
            if (plan.kind, plan.target) in incident.tried:
                passed_over.append({"remedy": remedy.kind, "reason": "tried already in this incident"})
                continue
            block = self.guard.check(plan, self.situation, self.now)
            if block is not None:
                passed_over.append({"remedy": remedy.kind, "reason": block.reason})
                if block.until is not None:
                    incident.postponed.add(position)
                    until = min(until, block.until)
                if plan.words not in incident.blocked:
                    incident.blocked.append(plan.words)
                    self._tell.blocked(incident, plan, block.reason)
                continue
            incident.position = max(incident.position, position + 1)
            incident.postponed.discard(position)
            self._start(incident, plan, passed_over)
            return
        if until < math.inf:
            incident.state, incident.deadline = "blocked", until
        else:
            self._give_up(incident, "no remedy is left", passed_over)

    # -- act ----------------------------------------------------------------------------------------------

    def _start(self, incident: Incident, plan: Plan, passed_over: list[dict[str, str]]) -> None:
        incident.plan = plan
        incident.tried.append((plan.kind, plan.target))
        self._tell.chosen(incident, plan, passed_over)
        if plan.kind == "wait":
            self._set_waiting(incident, "itself", self.now + plan.wait_s)
            return
        incident.remedies.append(plan.words)
        if self.dry_run:
            self._set_waiting(incident, "nobody", math.inf)
            return
        self.guard.record(plan, self.now)
        incident.state = "acting"
        incident.action = self._tell.new_id("a")
        reason = f"{incident.objective} violated: {incident.why}"
        self._actions.append(Action(incident.action, plan, reason, incident.id))

    def _conclude(self, incident: Incident, result: Result) -> None:
        """An action of the incident has ended."""
        plan = incident.plan
        assert plan is not None
        incident.action = None
        if not result.ok:
            self._tell.failed(incident, plan, result.detail)
            self._choose(incident)
            return
        self._tell.acted(incident, plan, result.effective_at, result.detail)
        if plan.kind == "notify":
            self._choose(incident)
            return
        incident.state, incident.again = "verifying", None
        incident.effective_at = result.effective_at
        incident.deadline = result.effective_at + _PATIENCE * self.policy.guardrails.verify
        incident.recovery.rebase(result.effective_at)
        starts_processes = plan.kind in _STARTS_PROCESSES or plan.rolls_out
        settled_at = result.effective_at + (_SETTLE_S if starts_processes else 0.0)
        for judge in self.observer.judges_of(incident.service):
            judge.reset(settled_at)

    # -- verify -------------------------------------------------------------------------------------------

    def _verify(self, incident: Incident) -> None:
        effective_at = incident.effective_at or self.now
        if incident.again is not None:
            self._escalate(incident, self._words(incident.again))
        elif (
            self.observer.short_of(incident.service)
            and self.now > effective_at + self.policy.guardrails.verify
        ):
            down = self.observer.down_in(incident.service)
            self._escalate(incident, f"{', '.join(down)} still not in service")
        elif self.now > incident.deadline and incident.recovery.last_bad > effective_at:
            self._escalate(incident, f"not clearly better after {self.now - effective_at:.0f} s")

    def _escalate(self, incident: Incident, reason: str) -> None:
        """What was tried did not help: see where the trouble is now, and try the next thing."""
        self._tell.escalated(incident, reason)
        if incident.again is None and incident.symptom != "down":
            self._choose(incident)
        else:
            self._localise_again(incident)

    def _localise_again(self, incident: Incident) -> None:
        if incident.again is not None:
            incident.alarm_at, incident.window_s = incident.again.end, incident.again.window_s
        incident.state = "localising"
        incident.deadline = self.now + _LOCALISE_S
        self._localise(incident)

    def _wait(self, incident: Incident) -> None:
        if incident.waiting_for == "nobody":
            return
        if incident.waiting_for == "dependency":
            if incident.place is not None and incident.place.target in self.open:
                # What is bad until the other one is healed says nothing about this one.
                self._set_waiting(incident, "dependency", self.now + _LOCALISE_MAX_S)
            elif self.now >= incident.deadline and incident.again is not None:
                self._localise_again(incident)
        elif incident.again is not None and incident.symptom != "down":
            self._localise_again(incident)  # it seemed to be over, and is not
        elif self.now >= incident.deadline:
            self._escalate(incident, "it has not mended itself")

    def _set_waiting(self, incident: Incident, what: Waiting, deadline: float) -> None:
        incident.state, incident.waiting_for, incident.deadline = "waiting", what, deadline
        incident.again = None
        if what != "nobody":
            # The seconds that raised the alarm must not raise it again.
            for judge in self.observer.judges_of(incident.service):
                judge.reset(incident.alarm_at if what == "itself" else self.now)

    # -- the end ------------------------------------------------------------------------------------------

    def _heal(self, incident: Incident) -> None:
        recovery = incident.recovery
        began = incident.fault_at if incident.fault_at is not None else incident.opened_at
        incident.recover_s = max(0.0, recovery.last_bad - began)
        incident.closed_at = self.now
        incident.bad = recovery.bad(incident.objective)
        for judge in self.observer.judges_of(incident.service):
            if judge.objective.name == incident.objective and (allowance := judge.budget.allowance(self.now)):
                incident.budget_spent = incident.bad / allowance
        worked = incident.plan if incident.state == "verifying" else None
        incident.state = "healed"
        self._tell.healed(incident, worked)
        del self.open[incident.service]
        self.past.append(incident)

    def _give_up(
        self, incident: Incident, reason: str, passed_over: Sequence[Mapping[str, str]] = ()
    ) -> None:
        incident.state, incident.gave_up = "gave_up", True
        self._tell.gave_up(incident, reason, passed_over)

    # -- probation ----------------------------------------------------------------------------------------

    def _end_probations(self) -> None:
        """Let ejected instances back in when their time is over."""
        for name, probation in self._probation.items():
            if probation.action is not None or self.now < probation.until:
                continue
            one = self.situation.instances.get(name)
            if one is None or one.silent or not one.ready or probation.service in self.open:
                probation.until = self.now + _POSTPONE_S
            elif faults := self._own_faults(one):
                # It would fail again at once, and callers would pay for finding that out.
                probation.until = self.now + _POSTPONE_S
                if not probation.told:
                    probation.told = True
                    self._tell.stays_ejected(one, faults)
            else:
                plan = choose.readmit(one.service, name)
                probation.action = self._tell.new_id("a")
                self._actions.append(Action(probation.action, plan, "its probation is over"))

    def _own_faults(self, one: Seen) -> list[str]:
        """Faults that are known to hit this very instance."""
        return [
            fault.id
            for fault in self.situation.faults_at(one.service, version=one.version, instance=one.id)
            if fault.instance == one.id and fault.at != "process"
        ]
