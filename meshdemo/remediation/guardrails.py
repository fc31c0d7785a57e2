"""What watch must not do, whatever the rules say: too much, too often, or to too many instances. Pure."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from meshdemo.remediation.choose import Plan
from meshdemo.remediation.policy import Guardrails
from meshdemo.remediation.situation import Seen, Situation

_HARMLESS = frozenset({"wait", "notify", "readmit"})


@dataclass(frozen=True, slots=True)
class Blocked:
    """Why an action is not allowed now. `until` None: time alone will not change it."""

    reason: str
    until: float | None = None


class Guard:
    """Remembers what was done, and says what may be done."""

    def __init__(self, limits: Guardrails) -> None:
        self._limits = limits
        self._acted: deque[float] = deque()
        self._last: dict[tuple[str, str, str], float] = {}

    def record(self, plan: Plan, now: float) -> None:
        """An action was started."""
        if plan.kind not in _HARMLESS:
            self._acted.append(now)
            self._last[plan.service, plan.kind, plan.target] = now

    def recall(self, service: str, kind: str, target: str, at: float) -> None:
        """An action that an earlier watch started at `at`. Called in the order of time, before `record`."""
        if kind not in _HARMLESS:
            self._acted.append(at)
            self._last[service, kind, target] = at

    def used(self, now: float) -> int:
        """Actions within the period of `max_actions`."""
        while self._acted and self._acted[0] <= now - self._limits.max_actions.per:
            self._acted.popleft()
        return len(self._acted)

    def check(self, plan: Plan, situation: Situation, now: float) -> Blocked | None:
        """Why the plan may not be carried out now; None if it may."""
        if plan.kind in _HARMLESS:
            return None
        last = self._last.get((plan.service, plan.kind, plan.target))
        if last is not None and now < last + self._limits.cooldown:
            return Blocked(
                f"{plan.kind} was used on {plan.target} {now - last:.0f} s ago, and the cooldown is "
                f"{self._limits.cooldown:g} s",
                last + self._limits.cooldown,
            )
        limit = self._limits.max_actions
        if self.used(now) >= limit.count:
            return Blocked(
                f"{limit.count} actions in {limit.per:g} s are all that is allowed",
                self._acted[0] + limit.per,
            )
        return self._capacity(plan, situation)

    def _capacity(self, plan: Plan, situation: Situation) -> Blocked | None:
        """Would too few instances stay in load balancing?"""
        if plan.kind not in ("eject", "restart", "shift-away"):
            return None
        all_of_it = situation.of_service(plan.service)
        serving = [one for one in all_of_it if one.in_service]
        if plan.kind == "shift-away":
            return self._capacity_of_others(plan, serving)
        # Several are restarted one after the other; one that does not serve costs nothing.
        leaving = [one for one in serving if one.id in plan.instances][:1]
        if not leaving:
            return None
        needed = math.ceil(self._limits.min_in_service * len(all_of_it) - 1e-9)
        if plan.kind == "restart":
            # It is away for a moment only; a service of one instance could never be restarted otherwise.
            needed = min(needed, len(all_of_it) - 1)
        stay = len(serving) - 1
        if stay < needed:
            return Blocked(
                f"{stay} of {len(all_of_it)} instances of {plan.service} would stay in service, and "
                f"{needed} must"
            )
        version = leaving[0].version
        if plan.kind == "eject" and sum(one.version == version for one in serving) == 1:
            split = situation.intent.traffic.get(plan.service)
            if split is not None and split.split.get(version, 0) > 0:
                return Blocked(f"{leaving[0].id} is the last of {version}, which has a share of the traffic")
        return None

    def _capacity_of_others(self, plan: Plan, serving: Sequence[Seen]) -> Blocked | None:
        """Could those that get the traffic carry it?"""
        stay = sum(plan.split.get(one.version, 0) > 0 for one in serving)
        needed = math.ceil(self._limits.min_in_service * len(serving) - 1e-9)
        if stay >= needed:
            return None
        return Blocked(
            f"{stay} of {len(serving)} instances of {plan.service} would have to carry all its traffic, and "
            f"{needed} must"
        )
