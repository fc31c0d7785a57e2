"""Decisions into events: the words and the figures that go with each. No decisions are made here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from meshdemo.remediation.choose import Plan
from meshdemo.remediation.events import Event, EventName
from meshdemo.remediation.incident import Incident
from meshdemo.remediation.situation import Seen


class Teller:
    """Collects events until somebody takes them.

    Args:
        run: a word that is unique to this run of watch; all identifiers begin with it.
    """

    def __init__(self, run: str, *, dry_run: bool) -> None:
        self.dry_run = dry_run
        self.now = 0.0
        self._run = run
        self._numbers: dict[str, int] = {}
        self._events: list[Event] = []

    def new_id(self, kind: str) -> str:
        """An identifier that nothing else has."""
        number = self._numbers[kind] = self._numbers.get(kind, 0) + 1
        return f"{self._run}-{kind}{number}"

    def take(self) -> list[Event]:
        """The events since the last call."""
        events, self._events = self._events, []
        return events

    def say(self, event: EventName, text: str, **fields: Any) -> None:
        """An event that belongs to no incident."""
        self._events.append(
            Event(id=self.new_id("e"), time=self.now, event=event, text=text, dry_run=self.dry_run, **fields)
        )

    def _of(self, incident: Incident, event: EventName, text: str, **fields: Any) -> None:
        place = incident.place
        self.say(
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

    def violated(self, incident: Incident, figures: Mapping[str, Any]) -> None:
        """An objective is violated, beyond doubt."""
        text = f"{incident.service} violates {incident.objective}: {incident.why}"
        self._of(incident, "violated", text, evidence=figures, detect_s=incident.detect_s)

    def localised(self, incident: Incident) -> None:
        """It is known where the trouble is."""
        place = incident.place
        assert place is not None
        figures = {
            "reason": place.reason,
            "symptom": incident.symptom,
            "shares": {name: round(share, 4) for name, share in place.shares.items()},
            "instances": list(place.instances),
            "versions": list(place.versions),
        }
        text = f"{incident.symptom} at {place.scope} {place.target}: {place.reason}"
        self._of(incident, "localised", text, evidence=figures)

    def chosen(self, incident: Incident, plan: Plan, passed_over: Sequence[Mapping[str, str]]) -> None:
        """A remedy was chosen."""
        why = incident.place.reason if incident.place else ""
        figures: dict[str, Any] = {"plan": plan.words, "target": plan.target, "why": why}
        if passed_over:
            figures["passed_over"] = list(passed_over)
        text = f"would {plan.words}" if self.dry_run else plan.words
        self._of(incident, "chosen", text, remedy=plan.kind, evidence=figures)

    def acted(self, incident: Incident, plan: Plan, effective_at: float, detail: str) -> None:
        """A remedy is in force."""
        effective_at = round(effective_at, 3)
        figures = {
            "plan": plan.words, "target": plan.target, "effective_at": effective_at, "detail": detail,
        }  # fmt: skip
        text = f"{plan.words}: done{f' ({detail})' if detail else ''}"
        self._of(incident, "acted", text, remedy=plan.kind, evidence=figures)

    def failed(self, incident: Incident, plan: Plan, detail: str) -> None:
        """A remedy could not be carried out."""
        text = f"{plan.words} failed: {detail}"
        self._of(incident, "error", text, remedy=plan.kind, evidence={"plan": plan.words, "error": detail})

    def escalated(self, incident: Incident, reason: str) -> None:
        """What was tried did not help."""
        plan = incident.plan
        text = f"{plan.words if plan else 'waiting'} did not help: {reason}"
        remedy = plan.kind if plan else None
        self._of(incident, "escalated", text, remedy=remedy, evidence={"reason": reason})

    def blocked(self, incident: Incident, plan: Plan, reason: str) -> None:
        """A guardrail forbids a remedy."""
        text = f"not allowed to {plan.words}: {reason}"
        figures = {"plan": plan.words, "reason": reason}
        self._of(incident, "blocked", text, remedy=plan.kind, evidence=figures)

    def gave_up(self, incident: Incident, reason: str, passed_over: Sequence[Mapping[str, str]]) -> None:
        """Nothing is left to try."""
        tried = ", ".join(incident.remedies) or "nothing"
        figures: dict[str, Any] = {"reason": reason, "tried": list(incident.remedies)}
        if passed_over:
            figures["passed_over"] = list(passed_over)
        text = f"giving up on {incident.service}: {reason} (tried: {tried}); a person is needed"
        self._of(incident, "gave_up", text, evidence=figures)

    def healed(self, incident: Incident, plan: Plan | None) -> None:
        """All objectives hold again; `plan`: the remedy that did it, if one did."""
        since = {
            name: {"requests": requests, "bad": bad}
            for name, (requests, bad) in incident.recovery.counted().items()
        }
        if plan is not None:
            text = f"{plan.words} worked"
            self._of(incident, "verified", text, remedy=plan.kind, evidence={"since": since})
        how = "" if plan is not None else " by itself"
        after = f"{incident.recover_s or 0:.1f} s after the {'fault' if incident.fault_at else 'alarm'}"
        self._of(
            incident,
            "healed",
            f"{incident.service} meets {incident.objective} again{how}, {after}",
            remedy=plan.kind if plan else None,
            evidence={
                "since": since,
                "recovered_at": round(incident.recovery.last_bad, 3),
                "remedies": list(incident.remedies),
                "bad_requests": incident.bad,
                "budget_spent": round(incident.budget_spent, 4),
            },
            recover_s=incident.recover_s,
        )

    def stays_ejected(self, one: Seen, faults: Sequence[str]) -> None:
        """An instance whose probation is over is known to be broken still."""
        self.say(
            "blocked",
            f"{one.id} stays ejected: fault {', '.join(faults)} is still in force on it",
            service=one.service,
            scope="instance",
            target=one.id,
            remedy="readmit",
            evidence={"faults": list(faults)},
        )

    def readmitted(self, plan: Plan, ok: bool, detail: str) -> None:
        """An ejected instance was let back in, or that failed."""
        text = f"{plan.words}: {'its probation is over' if ok else f'failed: {detail}'}"
        self.say(
            "acted" if ok else "error",
            text,
            service=plan.service,
            scope="instance",
            target=plan.target,
            remedy=plan.kind,
            evidence={"plan": plan.words, "detail": detail},
        )
