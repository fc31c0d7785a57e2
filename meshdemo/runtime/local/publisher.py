"""Brings what runs to those who must know: the control plane, and through it every sidecar."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial

from meshdemo.errors import Failed
from meshdemo.runtime.local.keeper import Changes

log = logging.getLogger(__name__)

_TAKEN_IN_S = 15.0  # how long a change waits for the control plane (which may be restarting) to take it in
_RETRY_S = 0.2


class Publisher:
    """Tells the control plane (and Prometheus) what runs, whenever it has changed."""

    def __init__(
        self, write: Callable[[], None], poke: Callable[[], Awaitable[bool | None]], changes: Changes
    ) -> None:
        self._write = write
        self._poke = poke
        self._changes = changes
        self._asked = 0
        self._taken = 0

    def request(self) -> int:
        """Have the present state published; the number to wait for with `taken`."""
        self._asked += 1
        self._changes.notify()
        return self._asked

    async def taken(self, number: int, timeout_s: float = _TAKEN_IN_S) -> None:
        """Wait until the control plane has brought the state of that number to the sidecars.

        Raises Failed if that takes too long.
        """
        if not await self._changes.until(lambda: self._taken >= number, timeout_s):
            raise Failed("the control plane does not take in the change", "see `meshdemo logs` for why")

    async def run(self) -> None:
        """Publish for ever."""
        while True:
            await self._changes.until(self._behind)
            number = self._asked
            try:
                self._write()
                taken = await self._poke()
            except OSError as error:
                log.error("cannot say what runs: %s", error)
                taken = False
            if taken:
                self._taken = number
                self._changes.notify()
            else:
                # Again when something changes (the control plane is back), or else in a moment.
                wait_s = None if taken is None else _RETRY_S
                await self._changes.until(partial(self._asked_after, number), wait_s)

    def _behind(self) -> bool:
        return self._asked > self._taken

    def _asked_after(self, number: int) -> bool:
        return self._asked > number
