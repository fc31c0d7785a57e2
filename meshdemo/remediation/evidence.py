"""What the exports around an alarm say: by instance, by caller, by callee, and of what kind. Pure.

Made anew from the last seconds' exports when there is an incident, so that healthy seconds cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from meshdemo.control.goals import Objective
from meshdemo.control.signals import Sample
from meshdemo.remediation import stats
from meshdemo.remediation.judge import SHORT_S, ObjectiveJudge, Verdict
from meshdemo.remediation.localise import Part
from meshdemo.remediation.situation import Seen

_LATEST_S = 30.0
_ABOUT_S = 0.05  # the stamps of one sidecar's exports, moved onto our clock, differ by less
_ABOUT_AS_BAD = 0.9
_TIMED_OUT = ("0", "408", "504")  # no response at all, or given up waiting for one
_HANGS_S = 0.9  # an app out of which nothing has come for so long hangs (with room for an early export)
_TURN = 5  # who got no request while others got so many each, is not in their rotation
_EXPLAINS = 0.5  # a callee whose bad answers are at least this share of ours is to blame


@dataclass(slots=True)
class _Sums:
    requests: int = 0
    bad: int = 0
    overdue: int = 0
    certain: float = 0.0
    end: float = 0.0
    worst_before: float = 0.0  # bad share of the worst export that began before the alarm
    fresh: list[tuple[int, int]] = field(default_factory=list)  # (requests, bad) of each that began after

    @property
    def share(self) -> float:
        """Bad share of all of it."""
        return (self.bad + self.overdue) / max(1, self.requests + self.overdue)


@dataclass(slots=True)
class After:
    """Counts by instance and caller, over the window of the alarm and since."""

    alarm_at: float
    by_instance: dict[str, _Sums] = field(default_factory=dict)
    by_caller: dict[str, _Sums] = field(default_factory=dict)

    def involves(self, instance: str) -> bool:
        """Was anything of it bad, or does it still owe answers?"""
        sums = self.by_instance.get(instance)
        return sums is not None and (sums.bad > 0 or sums.overdue > 0)

    def takes_turns(self, instance: str) -> bool:
        """Does it get requests, as far as can be told? One of a version without a share of traffic does not.

        One that had bad ones and gets none since is another matter: its callers avoid it.
        """
        sums = self.by_instance.get(instance, _Sums())
        if sums.end <= self.alarm_at or sums.certain or sums.bad or sums.overdue:
            return True
        others = [one.certain for one in self.by_instance.values() if one.certain]
        return not others or sum(others) < _TURN * len(others)

    def instances(self, seen: Iterable[Seen]) -> list[Part]:
        """The counts of these instances, overdue requests among the bad ones."""
        parts = []
        for one in seen:
            sums = self.by_instance.get(one.id, _Sums())
            heard = sums.end > self.alarm_at
            parts.append(
                Part(
                    one.id,
                    requests=sums.requests + sums.overdue,
                    bad=sums.bad + sums.overdue,
                    certain=sums.certain + (sums.overdue if heard else 0),
                    version=one.version,
                    revision=one.revision,
                )
            )
        return parts

    def callers(self) -> list[Part]:
        """The counts by caller, for those that proved who they are."""
        return [
            Part(name, sums.requests, sums.bad, certain=sums.requests)
            for name, sums in self.by_caller.items()
            if name
        ]

    def telling(self, expected_bad: float) -> bool:
        """Has every instance had the chance to show so many bad requests, were it as bad as all together?"""
        requests = sum(sums.requests + sums.overdue for sums in self.by_instance.values())
        bad = sum(sums.bad + sums.overdue for sums in self.by_instance.values())
        share = bad / requests if requests else 0.0
        return all(
            sums.certain * share >= expected_bad
            for name, sums in self.by_instance.items()
            if self.takes_turns(name)
        )

    def still_bad(self, instances: Sequence[str], allowed: float, *, final: bool) -> bool | None:
        """Are these still bad? Told by exports that began after the alarm. None: not clear yet.

        What goes on is at least as bad in a full second as in the one that raised the alarm, of which it had
        only a part. What is over may leave a tail in the second after; then it takes another one to tell.
        Instances that got no requests since (their callers avoid them) are taken to be as they were.
        """
        known = [self.by_instance[name] for name in instances if name in self.by_instance]
        fresh = [sums for sums in known if sums.fresh]
        if not fresh:
            return True if final else None
        if not any(requests for sums in fresh for requests, _ in sums.fresh):
            return True
        for sums in fresh:
            requests, bad = sums.fresh[-1]
            grew = requests > 0 and bad >= _ABOUT_AS_BAD * sums.worst_before * requests
            if (grew or len(sums.fresh) > 1) and _likely_bad(requests, bad, sums.share, allowed):
                return True
        return False if final or all(len(sums.fresh) > 1 for sums in known) else None


def _likely_bad(requests: int, bad: int, share: float, allowed: float) -> bool:
    """Are these counts likelier at this share than at the allowed one?"""
    return stats.log_likelihood(bad, requests, max(share, allowed)) > stats.log_likelihood(
        bad, requests, allowed
    )


def after(
    samples: Iterable[Sample], judge: ObjectiveJudge, alarm_at: float, window_s: float, base: float
) -> After:
    """Sum up the exports around an alarm.

    Args:
        base: exports that began before this (a remedy's effect) are left out, unless the alarm is older.
    """
    result = After(alarm_at)
    since = alarm_at - min(window_s, _LATEST_S)
    from_start = base if base < alarm_at else -1.0
    short = window_s <= SHORT_S
    for sample in samples:
        if sample.end <= since or sample.start < from_start:
            continue
        measure = judge.measure(sample) if not judge.objective.effective else None
        if measure is None:
            continue
        sums = result.by_instance.setdefault(sample.instance, _Sums())
        sums.requests += measure.requests
        sums.bad += measure.bad
        sums.overdue = measure.overdue
        sums.end = sample.end
        if sample.end > alarm_at:
            length = sample.end - sample.start
            share = min(1.0, (sample.end - alarm_at) / length) if length > 0 else 1.0
            sums.certain += measure.requests * (share if short else 1.0)
        requests, bad = measure.requests + measure.overdue, measure.bad + measure.overdue
        if sample.start >= alarm_at - _ABOUT_S:
            sums.fresh.append((requests, bad))
        else:
            sums.worst_before = max(sums.worst_before, bad / max(1, requests))
        for cell in sample.cells:
            if cell.inbound:
                by = result.by_caller.setdefault(cell.peer, _Sums())
                by.requests += cell.requests
                by.bad += judge.bad_of(cell)
    return result


def guilty_callee(samples: Iterable[Sample], judge: ObjectiveJudge, since: float) -> str | None:
    """The service whose bad answers make up most of this one's, if there is one."""
    bad_here = 0
    there: dict[str, list[int]] = {}
    for sample in samples:
        if sample.end <= since:
            continue
        for cell in sample.cells:
            bad = judge.bad_of(cell)
            if cell.inbound:
                bad_here += bad
            elif cell.peer not in ("", sample.service):
                count = there.setdefault(cell.peer, [0, 0])
                count[0] += cell.requests
                count[1] += bad
    guilty = [
        (bad, name)
        for name, (requests, bad) in there.items()
        if bad_here and bad >= _EXPLAINS * bad_here and stats.exceeds(bad, requests, judge.allowed, 1e-4)
    ]
    return max(guilty)[1] if guilty else None


def callees(samples: Iterable[Sample]) -> set[str]:
    """The services that the instances with these exports have called."""
    return {
        cell.peer
        for sample in samples
        for cell in sample.cells
        if not cell.inbound and cell.peer not in ("", sample.service)
    }


def symptom(
    samples: Iterable[Sample],
    instances: Sequence[str],
    since: float,
    objective: Objective,
    *,
    final: bool = True,
) -> str | None:
    """errors, slow, or hung: of what kind the bad requests of these instances are.

    None: nothing has come out for less than a second. It may hang, or take its time; soon it will be known,
    unless this is `final`.
    """
    failures = timed_out = answered = 0
    newest: dict[str, Sample] = {}
    for sample in samples:
        if sample.end <= since or sample.instance not in instances:
            continue
        newest[sample.instance] = sample
        failures += sum(cell.failures for cell in sample.cells if cell.inbound)
        answered += _answered(sample)
        timed_out += _timed_out(sample)
    waiting = sum(sample.waiting_for(0) for sample in newest.values())
    stuck = waiting + timed_out
    if stuck and stuck >= failures - timed_out and (stuck > answered or waiting * 2 > stuck):
        if timed_out >= waiting:
            return "hung"
        if sum(_answered(sample) for sample in newest.values()) < waiting:
            long = any(sample.waiting_for(_HANGS_S) for sample in newest.values())
            return "hung" if long or final else None
    return "errors" if objective.latency is None else "slow"


def _answered(sample: Sample) -> int:
    """Requests that its instance answered well, at whatever speed."""
    return sum(cell.requests - cell.failures for cell in sample.cells if cell.inbound)


def _timed_out(sample: Sample) -> int:
    return sum(cell.codes.get(code, 0) for cell in sample.cells if cell.inbound for code in _TIMED_OUT)


def figures(verdict: Verdict) -> dict[str, Any]:
    """A verdict as the evidence of an event."""
    return {
        "instance": verdict.instance,
        "window_s": round(verdict.window_s, 2),
        "requests": verdict.requests,
        "bad": verdict.bad,
        "overdue": verdict.overdue,
        "bad_share": round(verdict.share, 4),
        "surely_above": round(verdict.surely, 4),
        "allowed": round(verdict.allowed, 4),
    }


def words(verdict: Verdict, objective: Objective) -> str:
    """A verdict in one line."""
    what = "too slow" if objective.latency is not None else "failed"
    where = f" at {verdict.instance}" if verdict.instance else ""
    waiting = f" ({verdict.overdue} still waiting)" if verdict.overdue else ""
    return (
        f"{verdict.bad} of {verdict.requests} {what}{where}{waiting}, surely above "
        f"{verdict.surely * 100:.1f}%, allowed {verdict.allowed * 100:g}%"
    )
