"""The loop of watch as a pure state machine: signals, intent and a clock in; events and actions out.

    judge -> localise -> choose -> act -> verify -> healed, or escalate, or give up loudly

A service has at most one open incident. Nothing here waits or does: `step` is called whenever something was
observed, says what to do (`Action`), and `done` is told what came of it. So a day of it runs in a test in
seconds.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from meshdemo.control.model import Fault, Intent
from meshdemo.control.signals import Sample
from meshdemo.remediation import choose, evidence
from meshdemo.remediation.choose import Plan, Senseless
from meshdemo.remediation.events import Event, EventName
from meshdemo.remediation.guardrails import Guard
from meshdemo.remediation.incident import Incident, Recovery
from meshdemo.remediation.judge import SHORT_S, ObjectiveJudge, Verdict
from meshdemo.remediation.localise import Location, localise
from meshdemo.remediation.policy import Objective, Policy
from meshdemo.remediation.situation import Seen, Situation

_RECENT_S = 30.0  # exports kept to localise with
_HISTORY_S = 2.0  # an export that was older when watch started is history: it is counted, not judged
_LOCALISE_S = 2.5  # how long to wait for exports that make it clear where; longer at low rates
_LOCALISE_MAX_S = 15.0
_TELLING = 3.0  # bad requests that an instance must have had the chance to show
_STILL_ALPHA = 1e-6  # a remedy is on trial, for seconds: fewer looks than a day has
_WAS_DOWN_S = 3.0
_PATIENCE = 6.0  # a remedy may take so many times the verify time to show, if nothing is clear before
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


@dataclass(slots=True)
class Step:
    """What a step decided."""

    events: list[Event] = field(default_factory=list)
    actions: list[Action] = field(default_factory=list)


@dataclass(slots=True)
class _Probation:
    """An instance that watch has ejected, and when it may come back."""

    service: str
    until: float
    action: str | None = None  # readmission under way


class Core:
    """Everything watch knows and decides.

    Args:
        run: a word that is unique to this run; identifiers of events, incidents and actions begin with it.
        dry_run: decide and say, and ask for nothing to be done.
    """

    def __init__(self, policy: Policy, run: str = "w", *, dry_run: bool = False) -> None:
        self.policy = policy
        self.dry_run = dry_run
        self.situation = Situation()
        self.guard = Guard(policy.guardrails)
        self.now = 0.0
        self.open: dict[str, Incident] = {}
        self.past: deque[Incident] = deque(maxlen=_KEPT_INCIDENTS)
        self._run = run
        self._numbers: dict[str, int] = {}
        self._judges: dict[str, list[ObjectiveJudge]] = {}
        self._instance_objectives: dict[str, Objective | None] = {}
        self._any_effective = any(objective.effective for objective in policy.objectives)
        self._live_from = -math.inf
        self._last_end: dict[str, float] = {}
        self._recent: dict[str, deque[Sample]] = {}
        self._alarms: dict[str, Verdict] = {}
        self._rows: list[Mapping[str, Any]] = []
        self._ever_ready: set[str] = set()
        self._down_since: dict[str, float] = {}
        self._was_down: dict[str, float] = {}
        self._probation: dict[str, _Probation] = {}
        self._ejections: dict[str, int] = {}
        self._out = Step()

    # -- observing ----------------------------------------------------------------------------------------

    def observe(self, now: float, samples: Sequence[Sample], rows: Sequence[Mapping[str, Any]]) -> None:
        """Take in a batch of exports, and the instances as the control plane sees them."""
        if self._live_from == -math.inf:
            self._live_from = now - _HISTORY_S
        self.now = max(self.now, now)
        if rows != self._rows or self._down_since:
            self._rows = list(rows)
            self._see(rows)
        for sample in samples:
            self._take(sample)

    def set_intent(self, intent: Intent) -> None:
        """The desired state as it is now: faults, splits, ejections."""
        self.situation.intent = intent
        there = {ejection.instance for ejection in intent.ejections}
        for ejection in intent.ejections:
            one = self.situation.instances.get(ejection.instance)
            # Also those of a watch that ran before: somebody has to let them back in.
            if ejection.by == "watch" and ejection.instance not in self._probation and one is not None:
                times = self._ejections[ejection.instance] = self._ejections.get(ejection.instance, 0) + 1
                until = ejection.at + self.policy.guardrails.probation * 2 ** min(times - 1, 5)
                self._probation[ejection.instance] = _Probation(one.service, until)
        for instance in [name for name in self._probation if name not in there]:
            del self._probation[instance]

    @property
    def alarmed(self) -> bool:
        """Will the next step open an incident? Then the intent had better be fresh."""
        return any(service not in self.open for service in self._alarms) or any(
            service not in self.open for service in self._services_down()
        )

    def judges_of(self, service: str) -> list[ObjectiveJudge]:
        """The judges of a service's objectives about requests, in the order of the policy."""
        judges = self._judges.get(service)
        if judges is None:
            judges = self._judges[service] = [
                ObjectiveJudge(objective, service)
                for objective in self.policy.objectives_of(service)
                if objective.in_service is None
            ]
        return judges

    def in_service_objective(self, service: str) -> Objective | None:
        """The objective about a service's instances, if there is one."""
        if service not in self._instance_objectives:
            self._instance_objectives[service] = next(
                (one for one in self.policy.objectives_of(service) if one.in_service is not None), None
            )
        return self._instance_objectives[service]

    def down_in(self, service: str) -> list[str]:
        """Instances that have served, should serve, and do not."""
        return [name for name in self._down_since if self.situation.instances[name].service == service]

    def recent(self, service: str) -> Sequence[Sample]:
        """The exports of the last seconds, oldest first."""
        return self._recent.get(service, ())

    def _see(self, rows: Iterable[Mapping[str, Any]]) -> None:
        before = self.situation.instances
        seen = self.situation.instances = {row["id"]: Seen.of(row) for row in rows}
        for name, one in before.items():
            if name not in seen or (seen[name].silent and not one.silent):
                for judge in self._judges.get(one.service, ()):
                    judge.forget(name)
        newest: dict[tuple[str, str], int] = {}
        for one in seen.values():
            if one.ready:
                key = (one.service, one.version)
                newest[key] = max(newest.get(key, 0), one.revision)
        restarting = {
            name
            for incident in self.open.values()
            if incident.state == "acting" and incident.plan is not None
            for name in incident.plan.instances
        }
        down: dict[str, float] = {}
        for name, one in seen.items():
            if one.ready:
                self._ever_ready.add(name)
            elif (
                name in self._ever_ready
                and name not in restarting
                and not one.ejected
                and one.revision >= newest.get((one.service, one.version), 0)
            ):
                down[name] = self._down_since.get(name, self.now)
                self._was_down[name] = self.now
        self._down_since = down
        self._ever_ready &= seen.keys()

    def _take(self, sample: Sample) -> None:
        """Count one export; a violation that it shows is acted upon in the next step."""
        if sample.end <= self._last_end.get(sample.instance, -math.inf):
            return
        self._last_end[sample.instance] = sample.end
        service, old = sample.service, sample.end < self._live_from
        judges = self.judges_of(service)
        incident = self.open.get(service)
        if judges:
            recent = self._recent.get(service)
            if recent is None:
                recent = self._recent[service] = deque()
            recent.append(sample)
            while recent[0].end < sample.end - _RECENT_S:
                recent.popleft()
            own = [judge for judge in judges if not judge.objective.effective]
            measures = [(judge, judge.count(sample) if old else judge.add(sample)) for judge in own]
            self.situation.revisions.add(sample, measures)
            if incident is not None:
                for judge, measure in measures:
                    incident.recovery.add(sample.end, sample.start, sample.instance, judge, measure)
            if not old:
                self._look(service, sample, own, incident)
        if self._any_effective and not old:
            self._take_outbound(sample)

    def _take_outbound(self, sample: Sample) -> None:
        for service in {cell.peer for cell in sample.cells if not cell.inbound and cell.peer}:
            judges = [judge for judge in self.judges_of(service) if judge.objective.effective]
            incident = self.open.get(service)
            for judge in judges:
                measure = judge.add(sample)
                if incident is not None:
                    incident.recovery.add(sample.end, sample.start, sample.instance, judge, measure)
            self._look(service, sample, judges, incident)

    def _look(
        self, service: str, sample: Sample, judges: Sequence[ObjectiveJudge], incident: Incident | None
    ) -> None:
        if incident is None:
            for judge in judges:
                verdict = judge.verdict(sample.instance, sample.end)
                if verdict is not None:
                    self._alarms.setdefault(service, verdict)
        elif incident.again is None and incident.state in ("verifying", "waiting"):
            for judge in judges:
                incident.again = incident.again or judge.verdict(sample.instance, sample.end, _STILL_ALPHA)

    # -- deciding -----------------------------------------------------------------------------------------

    def step(self, now: float) -> Step:
        """Decide on what has been observed. `now`: seconds by the control plane's clock."""
        self.now = max(self.now, now)
        for service, verdict in self._alarms.items():
            if service not in self.open:
                self._open(service, verdict)
        self._alarms.clear()
        for service in self._services_down():
            if service not in self.open:
                self._open(service, None)
        for incident in list(self.open.values()):
            self._advance(incident)
        self._end_probations()
        out, self._out = self._out, Step()
        return out

    def done(self, result: Result) -> None:
        """An action was carried out, or failed. What follows from it comes out of the next step."""
        for instance, probation in self._probation.items():
            if probation.action == result.action:
                probation.action = None
                if not result.ok:
                    probation.until = self.now + _POSTPONE_S
                self._say_acted(None, choose.readmit(probation.service, instance), result)
                return
        for incident in self.open.values():
            if incident.action == result.action:
                self._conclude(incident, result)
                return

    def _services_down(self) -> list[str]:
        """Services of which more instances are down than their objective allows."""
        if not self._down_since:
            return []
        services = {self.situation.instances[name].service for name in self._down_since}
        return sorted(service for service in services if self._short_of(service))

    def _short_of(self, service: str) -> bool:
        objective = self.in_service_objective(service)
        if objective is None or objective.in_service is None:
            return False
        down = len(self.down_in(service))
        expected = down + sum(one.ready for one in self.situation.of_service(service))
        return down > 0 and (expected - down) / expected < objective.in_service

    def _open(self, service: str, verdict: Verdict | None) -> None:
        objective = self.in_service_objective(service)
        name = verdict.objective if verdict else objective.name if objective else ""
        incident = self.open[service] = Incident(
            id=self._new_id("i"),
            service=service,
            objective=name,
            opened_at=self.now,
            recovery=Recovery(self.judges_of(service), verdict.end if verdict else self.now),
            verdict=verdict,
            alarm_at=verdict.end if verdict else self.now,
            window_s=verdict.window_s if verdict else SHORT_S,
            deadline=self.now + _LOCALISE_S,
        )
        incident.fault_at = self._fault_start(service, verdict is None)
        if incident.fault_at is not None:
            incident.detect_s = max(0.0, self.now - incident.fault_at)
        if verdict is not None:
            incident.recovery.count(verdict.objective, verdict.requests, verdict.bad)
            incident.why = self._words(verdict)
        else:
            down = self.down_in(service)
            incident.why = f"{', '.join(down)} {'is' if len(down) == 1 else 'are'} not in service"
        self._say(
            "violated",
            f"{service} violates {name}: {incident.why}",
            incident,
            evidence=evidence.figures(verdict) if verdict else {"down": self.down_in(service)},
            detect_s=incident.detect_s,
        )

    def _words(self, verdict: Verdict) -> str:
        objective = next(one for one in self.policy.objectives if one.name == verdict.objective)
        return evidence.words(verdict, objective)

    def _fault_start(self, service: str, down: bool) -> float | None:
        """When the fault began that this is about: the newest known on the service since it last healed."""
        healed = max((one.closed_at or 0.0 for one in self.past if one.service == service), default=0.0)
        starts = [
            fault.started_at
            for fault in self.situation.faults_at(service)
            if healed < fault.started_at <= self.now and (not down or fault.at == "process")
        ]
        return max(starts, default=None)

    def _advance(self, incident: Incident) -> None:
        """Move an incident on as far as what is known now allows."""
        if self._short_of(incident.service):
            incident.recovery.mark_bad(self.now)
        elif not self.judges_of(incident.service):
            incident.recovery.newest = self.now
        if incident.state == "acting":
            return
        if self._recovered(incident):
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

    def _recovered(self, incident: Incident) -> bool:
        return incident.recovery.healthy(self.policy.guardrails.verify, idle_is_fine=incident.verdict is None)

    # -- localise -----------------------------------------------------------------------------------------

    def _localise(self, incident: Incident) -> None:
        place = self._where(incident)
        if place is None:
            return
        same = incident.place is not None and (incident.place.scope, incident.place.target) == (
            place.scope,
            place.target,
        )
        incident.place = place
        if place.scope == "dependency":
            incident.symptom = "dependency"
            self._say_localised(incident)
            self._set_waiting(incident, "dependency", self.now + _LOCALISE_MAX_S)
            return
        symptom = self._symptom(incident, place)
        if not same or symptom != incident.symptom:
            incident.symptom = symptom
            incident.rule = self.policy.rule_for(
                scope=place.scope, service=incident.service, objective=incident.objective, symptom=symptom
            )
            incident.position = 0
            self._say_localised(incident)
        self._choose(incident)

    def _where(self, incident: Incident) -> Location | None:
        """The place of the trouble; None while it is not clear yet, or when it is over."""
        service = incident.service
        down = self.down_in(service)
        recently = [
            name
            for name, at in self._was_down.items()
            if at > self.now - _WAS_DOWN_S and name in self.situation.instances
        ]
        if incident.verdict is None:
            if down:
                return self._down_place(service, down)
            if incident.again is None:
                self._set_waiting(incident, "itself", math.inf)
                return None
        judge = self._judge_of(incident)
        after = evidence.after(
            self.recent(service), judge, incident.alarm_at, incident.window_s, incident.recovery.base
        )
        final = self.now >= incident.deadline and (
            after.telling(_TELLING) or self.now >= incident.deadline + _LOCALISE_MAX_S - _LOCALISE_S
        )
        parts = after.instances(self._judged_instances(service, after))
        unproven = self._unproven(service)
        place = localise(service, judge.allowed, parts, after.callers(), unproven=unproven, final=final)
        if place is None:
            return None
        blamed = [name for name in place.instances if name in down or name in recently]
        if blamed and len(blamed) == len(place.instances):
            if down:
                return self._down_place(service, blamed)
            self._set_waiting(incident, "itself", math.inf)
            return None
        if (elsewhere := self._dependency(incident, judge)) is not None:
            return elsewhere
        revisions = {(part.version, part.revision) for part in parts if part.name in place.instances}
        if revisions and revisions <= unproven:
            return place  # a release that never worked: what went before it is the better guess, at once
        still = after.still_bad(place.instances, judge.allowed, final=final)
        if still is None:
            return None
        if not still:
            self._set_waiting(incident, "itself", math.inf)
            return None
        return place

    def _judge_of(self, incident: Incident) -> ObjectiveJudge:
        judges = self.judges_of(incident.service)
        verdict = incident.again or incident.verdict
        name = verdict.objective if verdict is not None else incident.objective
        return next((judge for judge in judges if judge.objective.name == name), judges[0])

    def _judged_instances(self, service: str, after: evidence.After) -> list[Seen]:
        """Those that can be asked: they report, and take traffic or still owe answers."""
        return [
            one
            for one in self.situation.of_service(service)
            if not one.silent and (one.in_service or after.owes(one.id) or after.was_bad(one.id))
        ]

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

    def _dependency(self, incident: Incident, judge: ObjectiveJudge) -> Location | None:
        """A service that this one calls, if most of what is bad here was bad there."""
        name = evidence.guilty_callee(
            self.recent(incident.service), judge, incident.alarm_at - max(incident.window_s, SHORT_S)
        )
        if name is None:
            return None
        return Location("dependency", name, reason=f"its own calls to {name} are as bad")

    def _symptom(self, incident: Incident, place: Location) -> str:
        down = set(self.down_in(incident.service))
        if place.instances and down.issuperset(place.instances):
            return "down"
        return evidence.symptom(
            self.recent(incident.service),
            place.instances,
            incident.alarm_at - incident.window_s,
            self._judge_of(incident).objective,
        )

    # -- choose -------------------------------------------------------------------------------------------

    def _choose(self, incident: Incident) -> None:
        """Start the next remedy that makes sense and is allowed; say so if there is none."""
        rule, place = incident.rule, incident.place
        if place is None or rule is None:
            self._give_up(incident, f"no rule fits {place.scope if place else 'this'} and {incident.symptom}")
            return
        passed_over: list[dict[str, str]] = []
        blocked_until = math.inf
        blocked: str = ""
        for position in range(incident.position, len(rule.remedies)):
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
                blocked = blocked or f"{plan.words}: {block.reason}"
                blocked_until = min(blocked_until, block.until if block.until is not None else math.inf)
                continue
            if blocked:
                self._say_blocked(incident, blocked)
            incident.position = position + 1
            self._start(incident, plan, passed_over)
            return
        if blocked:
            self._say_blocked(incident, blocked)
        if blocked_until < math.inf:
            incident.state, incident.deadline = "blocked", blocked_until
            return
        self._give_up(incident, "no remedy is left", passed_over)

    def _start(self, incident: Incident, plan: Plan, passed_over: list[dict[str, str]]) -> None:
        incident.plan = plan
        incident.tried.append((plan.kind, plan.target))
        incident.blocked = ""
        figures: dict[str, Any] = {"why": incident.place.reason if incident.place else "", "plan": plan.words}
        if passed_over:
            figures["passed_over"] = passed_over
        verb = "would " if self.dry_run and plan.kind != "wait" else ""
        self._say("chosen", f"{verb}{plan.words}", incident, remedy=plan.kind, evidence=figures)
        if plan.kind == "wait":
            self._set_waiting(incident, "itself", self.now + plan.wait_s)
            return
        if self.dry_run:
            incident.remedies.append(f"{plan.words} (dry run)")
            self._set_waiting(incident, "nobody", math.inf)
            return
        self.guard.record(plan, self.now)
        incident.remedies.append(plan.words)
        incident.state = "acting"
        incident.action = self._new_id("a")
        reason = f"{incident.objective} violated: {incident.why}"
        self._out.actions.append(Action(incident.action, plan, reason, incident.id))

    def _conclude(self, incident: Incident, result: Result) -> None:
        """An action of the incident has ended."""
        plan = incident.plan
        assert plan is not None
        incident.action = None
        if not result.ok:
            self._say("error", f"{plan.words} failed: {result.detail}", incident, remedy=plan.kind)
            self._say_escalated(incident, f"{plan.words} failed")
            self._choose(incident)
            return
        self._say_acted(incident, plan, result)
        if plan.kind == "notify":
            self._choose(incident)
            return
        incident.state = "verifying"
        incident.effective_at = result.effective_at
        incident.again = None
        incident.deadline = result.effective_at + _PATIENCE * self.policy.guardrails.verify
        incident.recovery.rebase(result.effective_at)
        for judge in self.judges_of(incident.service):
            judge.reset(result.effective_at)

    # -- verify -------------------------------------------------------------------------------------------

    def _verify(self, incident: Incident) -> None:
        assert incident.effective_at is not None
        verify_s = self.policy.guardrails.verify
        if incident.again is not None:
            self._escalate(incident, self._words(incident.again))
        elif self._short_of(incident.service) and self.now > incident.effective_at + verify_s:
            down = self.down_in(incident.service)
            self._escalate(incident, f"{', '.join(down)} still not in service")
        elif self.now > incident.deadline and incident.recovery.last_bad > incident.effective_at:
            self._escalate(incident, f"not clearly better {self.now - incident.effective_at:.0f} s later")

    def _escalate(self, incident: Incident, reason: str) -> None:
        """The remedy did not help: find out where the trouble is now, and try the next one."""
        self._say_escalated(incident, reason)
        verdict = incident.again
        if verdict is None and incident.symptom != "down":
            self._choose(incident)
            return
        if verdict is not None:
            incident.alarm_at, incident.window_s = verdict.end, verdict.window_s
        incident.state = "localising"
        incident.deadline = self.now + _LOCALISE_S
        self._localise(incident)

    def _wait(self, incident: Incident) -> None:
        if incident.waiting_for == "nobody":
            return
        if incident.again is not None and incident.symptom not in ("down", "dependency"):
            # It seemed to be over, and is not.
            incident.alarm_at, incident.window_s = incident.again.end, incident.again.window_s
            incident.state = "localising"
            incident.deadline = self.now + _LOCALISE_S
            self._localise(incident)
        elif self.now >= incident.deadline:
            if incident.waiting_for == "dependency":
                self._set_waiting(incident, "dependency", self.now + _LOCALISE_MAX_S)
                if incident.place is not None and incident.place.target not in self.open:
                    self._give_up(incident, f"{incident.place.target} is to blame, and is not being healed")
                return
            self._escalate(incident, "it has not mended itself")

    def _set_waiting(self, incident: Incident, what: str, deadline: float) -> None:
        incident.state, incident.waiting_for, incident.deadline = "waiting", what, deadline
        incident.again = None
        if what == "itself":
            # The seconds that raised the alarm must not raise it again.
            for judge in self.judges_of(incident.service):
                judge.reset(incident.alarm_at)

    def _heal(self, incident: Incident) -> None:
        recovery = incident.recovery
        began = incident.fault_at if incident.fault_at is not None else incident.opened_at
        incident.recover_s = max(0.0, recovery.last_bad - began)
        incident.closed_at = self.now
        counted = {
            name: {"requests": requests, "bad": bad} for name, (requests, bad) in recovery.counted().items()
        }
        acted = incident.state == "verifying" and incident.plan is not None
        if acted and incident.plan is not None:
            text = f"{incident.plan.words} worked"
            self._say("verified", text, incident, remedy=incident.plan.kind, evidence={"since": counted})
        spent = recovery.spent.get(incident.objective)
        incident.bad = spent.bad if spent else 0
        judge = next(
            (one for one in self.judges_of(incident.service) if one.objective.name == incident.objective),
            None,
        )
        allowance = judge.budget.allowance(self.now) if judge else 0.0
        incident.budget_spent = incident.bad / allowance if allowance else 0.0
        incident.state = "healed"
        how = "" if acted else " by itself"
        self._say(
            "healed",
            f"{incident.service} meets {incident.objective} again{how}, {incident.recover_s:.1f} s after "
            f"{'the fault' if incident.fault_at is not None else 'the alarm'}",
            incident,
            remedy=incident.plan.kind if acted and incident.plan else None,
            evidence={
                "since": counted,
                "recovered_at": round(recovery.last_bad, 3),
                "remedies": list(incident.remedies),
                "bad_requests": incident.bad,
                "budget_spent": round(incident.budget_spent, 4),
            },
            recover_s=incident.recover_s,
        )
        del self.open[incident.service]
        self.past.append(incident)

    def _give_up(
        self, incident: Incident, reason: str, passed_over: Sequence[Mapping[str, str]] = ()
    ) -> None:
        incident.state, incident.gave_up = "gave_up", True
        tried = ", ".join(incident.remedies) or "nothing"
        figures: dict[str, Any] = {"reason": reason, "tried": list(incident.remedies)}
        if passed_over:
            figures["passed_over"] = list(passed_over)
        text = f"giving up on {incident.service}: {reason} (tried: {tried}); a person is needed"
        self._say("gave_up", text, incident, evidence=figures)

    # -- probation ----------------------------------------------------------------------------------------

    def _end_probations(self) -> None:
        """Let ejected instances back in when their time is over."""
        if self.dry_run:
            return
        for name, probation in self._probation.items():
            if probation.action is not None or self.now < probation.until:
                continue
            one = self.situation.instances.get(name)
            if one is None or one.silent or not one.ready or probation.service in self.open:
                probation.until = self.now + _POSTPONE_S
                continue
            faults = [fault.id for fault in self._own_faults(one)]
            if faults:
                # It would fail again at once, and callers would pay for finding that out.
                probation.until = self.now + self.policy.guardrails.probation
                self._out.events.append(
                    self._event(
                        "blocked",
                        f"{name} stays ejected: fault {', '.join(faults)} is still in force on it",
                        service=one.service,
                        scope="instance",
                        target=name,
                        remedy="readmit",
                        evidence={"faults": faults},
                    )
                )
                continue
            plan = choose.readmit(one.service, name)
            probation.action = self._new_id("a")
            self._out.actions.append(Action(probation.action, plan, "its probation is over"))

    def _own_faults(self, one: Seen) -> list[Fault]:
        return [
            fault
            for fault in self.situation.faults_at(one.service, version=one.version, instance=one.id)
            if fault.instance == one.id and fault.at != "process"
        ]

    # -- saying -------------------------------------------------------------------------------------------

    def _new_id(self, kind: str) -> str:
        number = self._numbers[kind] = self._numbers.get(kind, 0) + 1
        return f"{self._run}-{kind}{number}"

    def _event(self, event: EventName, text: str, **fields: Any) -> Event:
        return Event(
            id=self._new_id("e"), time=self.now, event=event, text=text, dry_run=self.dry_run, **fields
        )

    def _say(self, event: EventName, text: str, incident: Incident, **fields: Any) -> None:
        place = incident.place
        self._out.events.append(
            self._event(
                event,
                text,
                service=incident.service,
                objective=incident.objective,
                scope=place.scope if place else None,
                target=place.target if place else None,
                rule=incident.rule.name if incident.rule else None,
                incident=incident.id,
                **fields,
            )
        )

    def _say_localised(self, incident: Incident) -> None:
        place = incident.place
        assert place is not None
        shares = {name: round(share, 4) for name, share in place.shares.items()}
        figures = {
            "reason": place.reason, "symptom": incident.symptom, "shares": shares,
            "instances": list(place.instances), "versions": list(place.versions),
        }  # fmt: skip
        text = f"{incident.symptom} at {place.scope} {place.target}: {place.reason}"
        self._say("localised", text, incident, evidence=figures)

    def _say_acted(self, incident: Incident | None, plan: Plan, result: Result) -> None:
        detail = f" ({result.detail})" if result.detail else ""
        figures = {"effective_at": round(result.effective_at, 3), "detail": result.detail}
        if incident is not None:
            self._say("acted", f"{plan.words}: done{detail}", incident, remedy=plan.kind, evidence=figures)
            return
        self._out.events.append(
            self._event(
                "acted" if result.ok else "error",
                f"{plan.words}: {'done' if result.ok else 'failed'}{detail}",
                service=plan.service,
                scope="instance",
                target=plan.target,
                remedy=plan.kind,
                evidence=figures,
            )
        )

    def _say_escalated(self, incident: Incident, reason: str) -> None:
        kind = incident.plan.kind if incident.plan else None
        text = f"{incident.plan.words if incident.plan else 'waiting'} did not help: {reason}"
        self._say("escalated", text, incident, remedy=kind, evidence={"reason": reason})

    def _say_blocked(self, incident: Incident, blocked: str) -> None:
        if blocked.split(":", maxsplit=1)[0] != incident.blocked.split(":")[0]:
            self._say("blocked", f"not allowed to {blocked}", incident, evidence={"reason": blocked})
        incident.blocked = blocked
