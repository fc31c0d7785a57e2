"""Where do the bad requests come from: one instance, one version, one caller, or the whole service? Pure.

Exports come twice a second from each sidecar, at moments of their own. When the first one shows a fault, the
others have not yet spoken about the same moment, and an instance that merely reports first looks like the
only sick one. So each instance is asked about the time after the alarm: `certain` counts its requests that
surely fell into it. An instance is implicated when its own share is too high; it is cleared when it has so
few bad requests that it cannot have the share of the implicated ones. While one is neither, waiting for its
next export is better than guessing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from meshdemo.remediation import stats

# One alarm, a handful of instances: these need not be as strict as the alarm itself.
_IMPLICATED = 1e-4
_CLEARED = 1e-3

Where = Literal["instance", "version", "service", "caller", "dependency"]


@dataclass(frozen=True, slots=True)
class Part:
    """What one instance, or one caller, did around and after the alarm."""

    name: str
    requests: int
    bad: int
    certain: float = 0.0  # of the requests: how many surely came after the alarm
    version: str = ""
    revision: int = 0


@dataclass(frozen=True, slots=True)
class Location:
    """The place that the bad requests come from, and why it is thought so."""

    scope: Where
    target: str
    instances: tuple[str, ...] = ()  # the implicated ones
    versions: tuple[str, ...] = ()
    reason: str = ""
    shares: Mapping[str, float] = field(default_factory=dict)  # bad share by instance or caller


@dataclass(frozen=True, slots=True)
class _Judged:
    implicated: list[Part]
    cleared: list[Part]
    unclear: list[Part]


def _judge(parts: Sequence[Part], allowed: float, *, final: bool) -> _Judged:
    implicated = [part for part in parts if stats.exceeds(part.bad, part.requests, allowed, _IMPLICATED)]
    others = [part for part in parts if part not in implicated]
    requests = sum(part.requests for part in implicated)
    share = sum(part.bad for part in implicated) / requests if requests else 0.0
    cleared: list[Part] = []
    unclear: list[Part] = []
    for part in others:
        seen = round(part.certain)
        if not implicated or seen == 0:
            # Nothing to compare with, or nothing to compare: in the end, neither bad nor good.
            if not final:
                unclear.append(part)
        elif stats.head(min(part.bad, seen), seen, share) < _CLEARED:
            cleared.append(part)
        elif not final:
            unclear.append(part)
        elif _likelier_bad(part, seen, share, allowed):
            implicated.append(part)
        else:
            cleared.append(part)
    return _Judged(implicated, cleared, unclear)


def _likelier_bad(part: Part, seen: int, share: float, allowed: float) -> bool:
    bad = min(part.bad, seen)
    return stats.log_likelihood(bad, seen, share) > stats.log_likelihood(bad, seen, allowed)


def localise(
    service: str,
    allowed: float,
    instances: Sequence[Part],
    callers: Sequence[Part],
    *,
    unproven: Collection[tuple[str, int]] = (),
    final: bool = False,
) -> Location | None:
    """The place of the bad requests of a service; None while it cannot be told yet.

    Args:
        allowed: the share of bad requests that the objective allows.
        instances: those that take traffic and report; ejected and silent ones are left out.
        callers: the same requests by the service that made them.
        unproven: (version, revision) that has never met its objectives.
        final: decide now, by what is likelier, instead of waiting for more.
    """
    judged = _judge(instances, allowed, final=final)
    shares = {part.name: part.bad / part.requests for part in instances if part.requests}
    if judged.unclear:
        return None
    bad, good = judged.implicated, judged.cleared
    if not bad or not good:
        return _one_caller(allowed, callers, bad) or Location(
            "service",
            service,
            tuple(part.name for part in bad or instances),
            tuple(sorted({part.version for part in bad or instances})),
            "every instance that can be judged is bad" if bad else "no single instance stands out",
            shares,
        )
    names = tuple(part.name for part in bad)
    versions = {part.version for part in bad}
    if len(versions) == 1:
        version = next(iter(versions))
        revisions = {part.revision for part in bad}
        same = [part for part in good if part.version == version]
        if not same:
            return Location(
                "version", version, names, (version,), f"all of {version} is bad, the others are not", shares
            )
        if len(revisions) == 1 and (version, next(iter(revisions))) in unproven:
            revision = next(iter(revisions))
            if all(part.revision != revision for part in same):
                reason = f"only revision {revision} of {version} is bad, and it has never met its objectives"
                return Location("version", version, names, (version,), reason, shares)
    if len(bad) == 1 or len(bad) <= len(good):
        worst = max(bad, key=lambda part: (part.bad / part.requests if part.requests else 0.0, part.name))
        reason = "the others are not" if len(bad) == 1 else f"the worst of {len(bad)} bad ones"
        return Location(
            "instance", worst.name, (worst.name,), (worst.version,), f"it is bad, {reason}", shares
        )
    return Location(
        "service", service, names, tuple(sorted(versions)), f"{len(bad)} of {len(instances)} are bad", shares
    )


def _one_caller(allowed: float, callers: Sequence[Part], bad: Sequence[Part]) -> Location | None:
    """Exactly one caller whose requests are bad, while those of all others are not."""
    if len(callers) < 2:
        return None
    judged = _judge(callers, allowed, final=True)
    if len(judged.implicated) != 1 or not judged.cleared:
        return None
    caller = judged.implicated[0]
    return Location(
        "caller",
        caller.name,
        tuple(part.name for part in bad),
        tuple(sorted({part.version for part in bad})),
        f"requests of {caller.name} are bad, those of other callers are not",
        {part.name: part.bad / part.requests for part in callers if part.requests},
    )
