"""The incidents so far, put together from the journal. Pure: events in, incidents out.

The journal is the only source, so a report can be made after watch has ended and of a mesh that several
watches have healed. An event that was posted twice (after a broken connection) counts once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Literal

Row = Mapping[str, Any]
State = Literal["healed", "open", "gave_up"]

_JUST_S = 30.0  # a crash or a hang is over as soon as it is mended, whatever its record says
_LATE_S = 2.0  # what ended so shortly before the alarm may have raised it


@dataclass(slots=True)
class Tried:
    """One remedy, and what came of it: worked, did not help, failed, no verdict (yet)."""

    remedy: str
    words: str
    at: float
    outcome: str = "no verdict"


@dataclass(slots=True)
class Incident:
    """One incident. Times are seconds since the epoch; durations are in seconds."""

    id: str
    service: str
    objective: str
    opened_at: float
    state: State = "open"
    closed_at: float | None = None
    scope: str | None = None
    target: str | None = None
    symptom: str | None = None
    cause: str = "not localised"
    faults: list[str] = field(default_factory=list)  # ids of faults on the service that may be the cause
    why: str = ""
    evidence: dict[str, Any] = field(default_factory=dict)
    remedies: list[Tried] = field(default_factory=list)
    detect_s: float | None = None
    recover_s: float | None = None
    bad_requests: int | None = None
    budget_spent: float | None = None  # share of the objective's budget period, 0..1
    timeline: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Report:
    """All incidents, oldest first, and figures over all of them."""

    mesh: str
    incidents: Sequence[Incident]

    def totals(self) -> dict[str, Any]:
        """Figures over all incidents; None where there is nothing to count."""
        detect = [one.detect_s for one in self.incidents if one.detect_s is not None]
        recover = [one.recover_s for one in self.incidents if one.recover_s is not None]
        budget: dict[str, float] = {}
        for one in self.incidents:
            if one.budget_spent is not None:
                key = f"{one.service}/{one.objective}"
                budget[key] = budget.get(key, 0.0) + one.budget_spent
        return {
            "incidents": len(self.incidents),
            "healed": sum(one.state == "healed" for one in self.incidents),
            "gave_up": sum(one.state == "gave_up" for one in self.incidents),
            "open": sum(one.state == "open" for one in self.incidents),
            "detect_s": {"median": median(detect), "worst": max(detect)} if detect else None,
            "recover_s": {"median": median(recover), "worst": max(recover)} if recover else None,
            "budget_spent": {name: round(spent, 4) for name, spent in budget.items()},
        }

    def to_json(self) -> dict[str, Any]:
        """As `meshdemo report -o json` prints it."""
        return {
            "mesh": self.mesh,
            "incidents": [asdict(one) for one in self.incidents],
            "totals": self.totals(),
        }


def make(mesh: str, events: Iterable[Row]) -> Report:
    """The report of a journal."""
    incidents: dict[str, Incident] = {}
    faults: list[Row] = []
    ended: dict[str, float] = {}
    seen: set[str] = set()
    for event in events:
        if event.get("event") == "fault":
            faults.append(event)
        elif event.get("event") in ("fault_cleared", "fault_expired"):
            ended[str(event.get("fault"))] = float(event["time"])
        if event.get("by") != "watch" or event.get("dry_run") or not event.get("incident"):
            continue
        identity = str(event.get("id"))
        if identity in seen:
            continue
        seen.add(identity)
        name = str(event["incident"])
        if name not in incidents:
            incidents[name] = Incident(
                name, str(event.get("service")), str(event.get("objective")), float(event["time"])
            )
        _add(incidents[name], event)
    for incident in incidents.values():
        incident.faults = [str(fault["fault"]) for fault in faults if _hit(fault, incident, ended)]
    return Report(mesh, sorted(incidents.values(), key=lambda one: one.opened_at))


def _add(incident: Incident, event: Row) -> None:
    """Take in one event of an incident."""
    name, evidence = event["event"], event.get("evidence") or {}
    text = str(event.get("text", ""))
    incident.timeline.append({"time": event["time"], "event": name, "text": text})
    match name:
        case "violated":
            incident.why = text
            incident.evidence = dict(evidence)
            incident.detect_s = event.get("detect_s")
        case "localised":
            incident.scope, incident.target = event.get("scope"), event.get("target")
            incident.symptom = evidence.get("symptom")
            incident.cause = text
        case "acted":
            words = str(evidence.get("plan") or text)
            incident.remedies.append(Tried(str(event.get("remedy")), words, float(event["time"])))
        case "verified":
            _conclude(incident, "worked")
        case "escalated":
            _conclude(incident, "did not help")
        case "error" if event.get("remedy"):
            words = str(evidence.get("plan") or text)
            incident.remedies.append(
                Tried(str(event["remedy"]), words, float(event["time"]), f"failed: {evidence.get('error')}")
            )
        case "healed":
            incident.state, incident.closed_at = "healed", float(event["time"])
            incident.recover_s = event.get("recover_s")
            incident.bad_requests = evidence.get("bad_requests")
            incident.budget_spent = evidence.get("budget_spent")
        case "gave_up":
            incident.state = "gave_up"
        case _:
            pass


def _conclude(incident: Incident, outcome: str) -> None:
    if incident.remedies and incident.remedies[-1].outcome == "no verdict":
        incident.remedies[-1].outcome = outcome


def _hit(fault: Row, incident: Incident, ended: Mapping[str, float]) -> bool:
    """Was this fault in force on the service when the alarm was raised?"""
    started_at = float(fault.get("started_at") or fault["time"])
    until = ended.get(str(fault.get("fault")), float("inf"))
    if fault.get("at") == "process":
        until = min(until, started_at + _JUST_S)
    return fault.get("service") == incident.service and started_at <= incident.opened_at <= until + _LATE_S
