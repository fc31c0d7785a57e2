"""What is known of the mesh at the moment of a decision: instances, intent, and revisions by their record.

Values and counters that the core keeps up to date and that choosing and the guardrails read. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from meshdemo.control.model import Fault, Intent
from meshdemo.control.signals import Sample
from meshdemo.remediation import stats
from meshdemo.remediation.judge import Measure, ObjectiveJudge

_PROVEN_EXPORTS = 3
_PROVEN_ALPHA = 1e-3


@dataclass(frozen=True, slots=True)
class Seen:
    """One instance, as the control plane sees it."""

    id: str
    service: str
    version: str
    revision: int
    ready: bool
    silent: bool = False
    ejected: bool = False
    restarts: int = 0  # how often it died and was started again by its runtime

    @staticmethod
    def of(row: Mapping[str, Any]) -> Seen:
        """From a row of the control plane's API."""
        return Seen(
            id=row["id"],
            service=row["service"],
            version=row["version"],
            revision=row["revision"],
            ready=row["ready"],
            silent=row["silent"],
            ejected=row["ejected"],
            restarts=row.get("restarts", 0),  # recordings of older versions do not say
        )

    @property
    def in_service(self) -> bool:
        """Does it take traffic?"""
        return self.ready and not self.ejected


@dataclass(slots=True)
class _Record:
    """How one revision of a workload has done."""

    started_at: float  # start of the first export in which it answered requests
    exports: int = 0
    counts: dict[str, list[int]] = field(default_factory=dict)  # objective -> [requests, bad]
    met: bool = False


class Revisions:
    """Which revisions of which workloads have met their objectives, from their signals."""

    def __init__(self) -> None:
        self._records: dict[tuple[str, str], dict[int, _Record]] = {}
        self._running: dict[str, int] = {}  # instance -> revision of its last export

    def add(self, sample: Sample, measures: Sequence[tuple[ObjectiveJudge, Measure]]) -> None:
        """Count an export. A revision has met its objectives once enough requests say so; that stays."""
        before = self._running.get(sample.instance)
        if before != sample.revision:
            self._running[sample.instance] = sample.revision
            if before is not None:
                return  # part of it is still about the revision before
        records = self._records.setdefault((sample.service, sample.version), {})
        record = records.get(sample.revision)
        if record is not None and record.met:
            return
        if not any(measure.requests for _, measure in measures):
            return
        if record is None:
            record = records[sample.revision] = _Record(sample.start)
        record.exports += 1
        good = record.exports >= _PROVEN_EXPORTS
        for judge, measure in measures:
            count = record.counts.setdefault(judge.objective.name, [0, 0])
            count[0] += measure.requests + measure.overdue
            count[1] += measure.bad + measure.overdue
            requests, bad = count
            good = (
                good
                and requests >= judge.objective.min_requests
                and (bad <= judge.allowed * requests or bad < 3)
                and not stats.exceeds(bad, requests, judge.allowed, _PROVEN_ALPHA)
            )
        record.met = good

    def current(self, service: str, version: str, seen: Iterable[Seen] = ()) -> int:
        """The newest revision of a workload, as far as is known (1 if nothing is)."""
        reported = self._records.get((service, version), {})
        running = (one.revision for one in seen if one.service == service and one.version == version)
        return max([1, *reported, *running])

    def met(self, service: str, version: str, revision: int) -> bool:
        """Has this revision met its objectives?"""
        record = self._records.get((service, version), {}).get(revision)
        return record is not None and record.met

    def started_at(self, service: str, version: str, revision: int) -> float | None:
        """When this revision was first seen to answer requests."""
        record = self._records.get((service, version), {}).get(revision)
        return None if record is None else record.started_at

    def last_good(self, service: str, version: str, before: int) -> int | None:
        """The newest revision below `before` that met its objectives; None if none is known to have."""
        records = self._records.get((service, version), {})
        return max((r for r, record in records.items() if record.met and r < before), default=None)


@dataclass(slots=True)
class Situation:
    """All that is known besides the counts."""

    instances: dict[str, Seen] = field(default_factory=dict)
    intent: Intent = field(default_factory=Intent)
    revisions: Revisions = field(default_factory=Revisions)

    def of_service(self, service: str) -> list[Seen]:
        """The instances of a service, by id."""
        return sorted((one for one in self.instances.values() if one.service == service), key=_by_id)

    def faults_at(
        self,
        service: str,
        *,
        version: str | None = None,
        instance: str | None = None,
        caller: str | None = None,
    ) -> list[Fault]:
        """The faults in force that hit this place; None means: whichever."""
        return [
            fault
            for fault in self.intent.faults
            if fault.service == service
            and not fault.starting
            and (version is None or fault.version in (None, version))
            and (instance is None or fault.instance in (None, instance))
            and (caller is None or fault.caller in (None, caller))
        ]


def _by_id(one: Seen) -> tuple[str, str]:
    return one.version, one.id
