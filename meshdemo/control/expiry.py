"""Ends what is in force for a time alone: faults, and splits that somebody holds (`leases`)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping

from meshdemo.control.discovery import Journal
from meshdemo.control.intent import Change, expire_faults, expire_leases
from meshdemo.control.leases import Leases
from meshdemo.control.model import Effect, Intent, MeshState, SplitLease
from meshdemo.errors import Failed

log = logging.getLogger(__name__)


class Expiry:
    """Two tasks of the loop that the intent is changed on.

    Args:
        intent: what is in force.
        change: changes that; raises Failed.
        clock: seconds since the epoch.
    """

    def __init__(
        self,
        intent: Callable[[], Intent],
        change: Callable[[Change], Awaitable[Effect]],
        journal: Journal,
        clock: Callable[[], float],
    ) -> None:
        self.leases = Leases()
        self._intent, self._change, self._journal, self._clock = intent, change, journal, clock
        self._changed = asyncio.Event()

    def look_again(self) -> None:
        """The intent has changed."""
        self._changed.set()

    async def end_faults(self) -> None:
        """End faults when their time is over."""
        while True:
            self._changed.clear()
            ends = [fault.expires_at for fault in self._intent().faults if fault.expires_at is not None]
            wait_s = max(0.0, min(ends) - self._clock()) if ends else None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._changed.wait()
                continue
            over = [
                f for f in self._intent().faults if f.expires_at is not None and f.expires_at <= self._clock()
            ]
            try:
                effect = await self._change(lambda intent, _: expire_faults(intent, self._clock()))
            except Failed as error:
                log.error("faults that are over could not be cleared: %s", error)
                await asyncio.sleep(1)
                continue
            for fault in over:
                self._journal(
                    {
                        "event": "fault_expired",
                        "fault": fault.id,
                        "service": fault.service,
                        "effective_ms": effect.effective_ms,
                    }
                )

    async def end_splits(self) -> None:
        """Give traffic back that somebody was shifting of whom nothing is heard any more."""
        while True:
            over, wait_s = self.leases.over(self._intent())
            if not over:
                # Looked at twice a second while there is any; a change of the intent is seen so, too.
                await asyncio.sleep(min(wait_s or 0.5, 0.5))
                continue
            before = self._intent()
            leases = {service: before.leases[service] for service in over}

            def expire(intent: Intent, _: MeshState, leases: Mapping[str, SplitLease] = leases) -> Intent:
                still = [name for name, lease in leases.items() if intent.leases.get(name) == lease]
                for name in still:  # before anybody can see that it is not held any more
                    self.leases.ended(name, leases[name].owner)
                return expire_leases(intent, still, self._clock())

            try:
                effect = await self._change(expire)
            except Failed as error:
                log.error("a split that nobody holds any more could not be set back: %s", error)
                await asyncio.sleep(1)
                continue
            for service, lease in leases.items():
                self._journal(
                    {
                        "event": "canary",
                        "by": "control-plane",
                        "what": "interrupted",
                        "service": service,
                        "split": lease.fallback,
                        "effective_ms": effect.effective_ms,
                        "text": f"nothing is heard of {lease.by} any more; the split that it began is undone",
                    }
                )
