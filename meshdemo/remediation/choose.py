"""From a rule's remedy and a place to a concrete plan, or to the reason why it makes no sense there. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from meshdemo.remediation import policy
from meshdemo.remediation.localise import Location
from meshdemo.remediation.policy import Remedy
from meshdemo.remediation.situation import Situation


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done, spelled out; which fields matter depends on `kind`."""

    kind: str
    service: str
    target: str  # what people call the thing that it is done to
    words: str  # "eject service-b-1"
    instances: tuple[str, ...] = ()  # eject, restart, readmit
    rollbacks: Mapping[str, int | None] = field(default_factory=dict)  # version -> revision; None: the last
    fault_ids: tuple[str, ...] = ()  # clear-fault
    rolls_out: bool = False  # clear-fault: one of them is in the app, and ends with a new revision
    split: Mapping[str, int] = field(default_factory=dict)  # shift-away
    scale: tuple[str, int] | None = None  # version, number of instances
    wait_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Senseless:
    """Why a remedy makes no sense here."""

    reason: str


def plan(remedy: Remedy, service: str, place: Location, situation: Situation) -> Plan | Senseless:
    """Spell a remedy out for a place."""
    match remedy:
        case policy.Eject():
            return _eject(service, place, situation)
        case policy.Restart():
            return _restart(service, place, situation)
        case policy.Rollback():
            return _rollback(service, place, situation)
        case policy.ClearFault():
            return _clear_fault(service, place, situation)
        case policy.ShiftAway():
            return _shift_away(service, place, situation)
        case policy.Scale():
            return _scale(remedy, service, place, situation)
        case policy.Wait():
            words = f"wait {remedy.for_:g} s for {place.target} to mend itself"
            return Plan("wait", service, place.target, words, wait_s=remedy.for_)
        case policy.NotifyRemedy():
            return Plan("notify", service, place.target, f"notify about {place.target}")


def readmit(service: str, instance: str) -> Plan:
    """Let an ejected instance back into load balancing."""
    return Plan("readmit", service, instance, f"readmit {instance}", instances=(instance,))


def _eject(service: str, place: Location, situation: Situation) -> Plan | Senseless:
    if place.scope != "instance":
        return Senseless(f"the cause is no single instance but {place.scope} {place.target}")
    one = situation.instances.get(place.target)
    if one is None:
        return Senseless(f"{place.target} is gone")
    if one.ejected:
        return Senseless(f"{place.target} is ejected already")
    return Plan("eject", service, one.id, f"eject {one.id}", instances=(one.id,))


def _restart(service: str, place: Location, situation: Situation) -> Plan | Senseless:
    there = [one.id for one in situation.of_service(service) if one.id in place.instances]
    if not there:
        return Senseless("its instances are gone")
    if len(there) == 1:
        return Plan("restart", service, there[0], f"restart {there[0]}", instances=(there[0],))
    words = f"restart the {len(there)} instances of {place.target}, one after the other"
    return Plan("restart", service, place.target, words, instances=tuple(there))


def _rollback(service: str, place: Location, situation: Situation) -> Plan | Senseless:
    revisions = situation.revisions
    targets: dict[str, int | None] = {}
    reasons: list[str] = []
    for version in place.versions:
        current = revisions.current(service, version, situation.instances.values())
        if revisions.met(service, version, current):
            reasons.append(f"revision {current} of {version} has met its objectives, so it is not to blame")
        elif current == 1:
            reasons.append(f"{version} has no earlier revision")
        else:
            targets[version] = revisions.last_good(service, version, current)
    if not targets:
        return Senseless("; ".join(reasons) or "no version to roll back")
    parts = [
        f"{version} to revision {revision}" if revision else f"{version} to the revision before"
        for version, revision in targets.items()
    ]
    return Plan("rollback", service, service, f"roll {service} back: {', '.join(parts)}", rollbacks=targets)


def _clear_fault(service: str, place: Location, situation: Situation) -> Plan | Senseless:
    faults = situation.faults_at(
        service,
        version=place.versions[0] if place.scope == "version" else None,
        instance=place.target if place.scope == "instance" else None,
        caller=place.target if place.scope == "caller" else None,
    )
    faults = [fault for fault in faults if fault.kind != "crash"]  # its supervisor has mended that
    if not faults:
        return Senseless(f"the mesh knows of no fault on {place.target}")
    ids = tuple(fault.id for fault in faults)
    rolls_out = any(fault.at == "app" for fault in faults)
    words = f"clear fault {', '.join(ids)}"
    return Plan("clear-fault", service, place.target, words, fault_ids=ids, rolls_out=rolls_out)


def _shift_away(service: str, place: Location, situation: Situation) -> Plan | Senseless:
    if place.scope != "version":
        return Senseless(f"the cause is no version but {place.scope} {place.target}")
    in_service = [
        one
        for one in situation.of_service(service)
        if one.in_service and situation.revisions.met(service, one.version, one.revision)
    ]
    others = sorted({one.version for one in in_service} - set(place.versions))
    if not others:
        return Senseless("there is no other version that is known to meet its objectives")
    rules = situation.intent.traffic.get(service)
    weights = {version: rules.split.get(version, 0) for version in others} if rules else {}
    if not any(weights.values()):
        weights = {version: sum(one.version == version for one in in_service) for version in others}
    split = {**shares(weights), **dict.fromkeys(place.versions, 0)}
    words = f"shift all traffic of {service} away from {', '.join(place.versions)}"
    return Plan("shift-away", service, place.target, words, split=split)


def shares(weights: Mapping[str, int], total: int = 100) -> dict[str, int]:
    """Whole numbers in proportion to the weights that sum to `total` (largest remainders)."""
    everything = sum(weights.values())
    exact = {name: weight * total / everything for name, weight in weights.items()}
    result = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (result[name] - exact[name], name))
    for name in by_remainder[: total - sum(result.values())]:
        result[name] += 1
    return result


def _scale(remedy: policy.Scale, service: str, place: Location, situation: Situation) -> Plan | Senseless:
    for version in place.versions:
        running = sum(one.version == version for one in situation.of_service(service))
        wanted = min(running + remedy.add, remedy.max)
        if wanted > running:
            words = f"scale {service} {version} from {running} to {wanted} instances"
            return Plan("scale", service, place.target, words, scale=(version, wanted))
    return Senseless(f"{service} has {remedy.max} instances already, the most that the rule allows")
