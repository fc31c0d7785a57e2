"""How a workload is brought to another revision or another size without a request lost."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any

from meshdemo.errors import Failed
from meshdemo.runtime.local.fleet import Fleet
from meshdemo.runtime.local.spec import WorkloadSpec, scaled
from meshdemo.runtime.local.unit import Run, Unit

Background = Callable[[Coroutine[Any, Any, None]], None]
"""Has something done for which nobody waits."""


class Rollouts:
    """Changes the workloads of a fleet, each of them one change after the other."""

    def __init__(self, fleet: Fleet, background: Background) -> None:
        self._fleet = fleet
        self._background = background
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def change(
        self, key: str, change: Callable[[WorkloadSpec], WorkloadSpec], timeout_s: float
    ) -> WorkloadSpec:
        """Bring a workload to another revision: start new processes beside the old, switch, end the old.

        If anything fails before the switch nothing has changed. Raises Failed, BadInput (from `change`).
        """
        async with self._locks[key]:
            fleet = self._fleet
            before = fleet.spec.workloads[key]
            after = change(before)
            if after == before:
                return after
            program = fleet.spec.program(before.service, before.version)
            stale = [
                unit
                for unit in fleet.of(key)
                if unit.id in after.ids()
                and unit.run is not None
                and unit.run.revision != after.of(unit.id)[0]
            ]
            if not stale:
                fleet.store(fleet.spec.replacing(after))
                fleet.changes.notify()
                return after
            fresh = await _all_or_none(
                [unit.start_beside(program, *after.of(unit.id), timeout_s=timeout_s) for unit in stale]
            )
            try:
                fleet.store(fleet.spec.replacing(after))
            except Failed:
                await asyncio.gather(*(run.keeper.stop(0) for run in fresh))
                raise
            old = _switch(stale, fresh)
            try:
                await fleet.publisher.taken(fleet.publisher.request())
            except Failed:
                _switch(stale, old)
                with suppress(Failed):
                    fleet.store(fleet.spec.replacing(before))
                fleet.publisher.request()
                await asyncio.gather(*(run.keeper.stop(0) for run in fresh))
                raise
            for unit, run in zip(stale, old, strict=True):
                self._background(unit.retire(run))
            if after.current.revision != before.current.revision:
                fleet.control.journal(
                    "rolled_out", service=after.service, version=after.version,
                    revision=after.current.revision, reason=after.current.reason,
                )  # fmt: skip
            return after

    async def restart(self, instance: str, reason: str, timeout_s: float) -> None:
        """Replace an instance's process: one that answers by another beside it, any other at once.

        Raises BadInput (there is no such instance), Failed (it does not come up).
        """
        fleet = self._fleet
        unit = fleet.unit(instance)
        async with self._locks[unit.key]:
            if not await unit.sidecar_answers(0.5):
                unit.sidecar.replace()
            if unit.run is not None and await unit.answers(0.5):
                revision, env = fleet.spec.workloads[unit.key].of(instance)
                program = fleet.spec.program(unit.service, unit.version)
                run = await unit.start_beside(program, revision, env, timeout_s=timeout_s)
                (old,) = _switch([unit], [run])
                await fleet.publisher.taken(fleet.publisher.request())
                self._background(unit.retire(old))
            elif unit.run is not None:
                unit.run.keeper.replace()
            await fleet.in_service([unit], timeout_s)
            fleet.control.journal("restarted", service=unit.service, instance=instance, reason=reason)

    async def scale(self, key: str, instances: int, timeout_s: float | None) -> None:
        """Add and remove instances until there are so many; None: do not wait for new ones.

        Raises BadInput (it makes no sense), Failed (a new one does not come up; all of those are gone again).
        """
        fleet = self._fleet
        async with self._locks[key]:
            before = fleet.spec.workloads[key]
            workload = scaled(before, instances)
            fleet.store(fleet.spec.replacing(workload))
            added = fleet.add(workload)
            fleet.changed()
            surplus = [unit for unit in fleet.of(key) if unit.id not in workload.ids()]
            if surplus:
                await fleet.remove(surplus)
            if added and timeout_s is not None:
                try:
                    await fleet.in_service(added, timeout_s)
                except Failed:
                    await fleet.remove(added, drain=False)
                    fleet.store(fleet.spec.replacing(before))
                    raise


def _switch(units: Sequence[Unit], runs: Sequence[Run]) -> list[Run]:
    """Point units at other processes; the ones they had."""
    old = []
    for unit, run in zip(units, runs, strict=True):
        assert unit.run is not None
        old.append(unit.run)
        unit.run = run
    return old


async def _all_or_none(starts: Sequence[Coroutine[Any, Any, Run]]) -> list[Run]:
    """What all of them give; if one raises the others are stopped again, and the first error is raised."""
    outcomes = await asyncio.gather(*starts, return_exceptions=True)
    errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    runs = [outcome for outcome in outcomes if isinstance(outcome, Run)]
    if errors:
        await asyncio.gather(*(run.keeper.stop(0) for run in runs))
        raise errors[0]
    return runs
