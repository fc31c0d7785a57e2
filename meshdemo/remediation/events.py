"""What watch says: one value per decision, the same for the screen, `-o jsonl`, the journal and webhooks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

EventName = Literal[
    "started",
    "signals",
    "violated",
    "localised",
    "chosen",
    "acted",
    "verified",
    "escalated",
    "healed",
    "blocked",
    "gave_up",
    "error",
    "stopped",
]


@dataclass(frozen=True, slots=True)
class Event:
    """One decision, or one thing seen, with its evidence. `text` is the same in one line for people."""

    id: str  # unique, so that an event that is posted again after a broken connection counts once
    time: float  # seconds since the epoch, by the control plane's clock
    event: EventName
    text: str
    service: str | None = None
    objective: str | None = None
    scope: str | None = None
    target: str | None = None
    rule: str | None = None
    remedy: str | None = None
    incident: str | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)
    detect_s: float | None = None  # from the fault's start, where that is known
    recover_s: float | None = None  # from the fault's start (else from the alarm) until the objective held
    dry_run: bool = False

    def to_json(self) -> dict[str, Any]:
        """The event as the command line contract has it; seconds are rounded to the millisecond."""
        row: dict[str, Any] = {
            "time": round(self.time, 3),
            "event": self.event,
            "service": self.service,
            "objective": self.objective,
            "scope": self.scope,
            "target": self.target,
            "rule": self.rule,
            "remedy": self.remedy,
            "evidence": dict(self.evidence),
            "incident": self.incident,
            "id": self.id,
            "text": self.text,
        }
        for key, value in (("detect_s", self.detect_s), ("recover_s", self.recover_s)):
            if value is not None:
                row[key] = round(value, 3)
        if self.dry_run:
            row["dry_run"] = True
        return row
