"""Until when splits are held (`model.SplitLease`): on the monotonic clock, and in memory alone.

A restart of the control plane lets the time run anew, so that whoever holds a split can go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from meshdemo.control.model import Intent


class Leases:
    """What is known of the leases besides what the intent says of them."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: seconds that only rise."""
        self._clock = clock
        self._ends: dict[str, tuple[str, float]] = {}  # service -> owner, end
        self._ran_out: dict[str, str] = {}  # service -> the last owner whose time ran out

    def renew(self, intent: Intent, service: str, owner: str) -> bool:
        """Go on holding the split of a service; False: it is not theirs any more."""
        lease = intent.leases.get(service)
        if lease is None or lease.owner != owner:
            return False
        self._ends[service] = (owner, self._clock() + lease.lasts_s)
        self._ran_out.pop(service, None)  # it was to be taken back, and that failed
        return True

    def over(self, intent: Intent) -> tuple[list[str], float | None]:
        """The services whose leases are over, and the seconds until the next may be."""
        now, over, waits = self._clock(), [], []
        ends: dict[str, tuple[str, float]] = {}
        for service, lease in intent.leases.items():
            owner, end = self._ends.get(service, ("", 0.0))
            if owner != lease.owner:
                end = now + lease.lasts_s
            ends[service] = (lease.owner, end)
            if end <= now:
                over.append(service)
            else:
                waits.append(end - now)
        self._ends = ends
        return over, min(waits, default=None)

    def ended(self, service: str, owner: str) -> None:
        """Remember that a split was taken back from its owner, who was not heard of in time."""
        self._ran_out[service] = owner

    def ran_out(self, service: str, owner: str) -> bool:
        """Was the split last taken back for want of renewal from this owner? (Else somebody else set it.)"""
        return self._ran_out.get(service) == owner
