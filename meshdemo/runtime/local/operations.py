"""What may be asked of a supervisor: each method of `Operations` is one operation, its parameters as JSON."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from typing import Any

from meshdemo.control.model import WorkloadRevision
from meshdemo.errors import BadInput
from meshdemo.runtime.local import spec as specs
from meshdemo.runtime.local.fleet import Fleet
from meshdemo.runtime.local.rollout import Rollouts
from meshdemo.runtime.local.spec import MeshSpec, WorkloadSpec


class Operations:
    """The operations on one mesh.

    Args:
        end: ends the supervisor.
        guard_pid: the guard's process id.
    """

    def __init__(
        self,
        fleet: Fleet,
        rollouts: Rollouts,
        *,
        end: Callable[[], None],
        guard_pid: Callable[[], int | None],
    ) -> None:
        self._fleet = fleet
        self._rollouts = rollouts
        self._end = end
        self._guard_pid = guard_pid

    async def describe(self) -> dict[str, Any]:
        """What must run, what runs, and every process."""
        fleet = self._fleet
        identity = json.loads(fleet.paths.supervisor.read_text())
        return {
            **identity,
            "gateway_port": fleet.gateway.port.number,
            "gateway_ready": fleet.gateway.keeper.ready,
            "prometheus_ready": fleet.prometheus is not None and fleet.prometheus.keeper.ready,
            "control_ready": fleet.control.ready,
            "guard_pid": self._guard_pid(),
            "spec": fleet.spec.model_dump(mode="json"),
            "instances": [instance.model_dump(mode="json") for instance in fleet.instances()],
            "processes": [
                {"name": k.name, "pid": k.pid, "ready": k.ready, "starts": k.starts, "last_exit": k.last_exit}
                for k in fleet.keepers()
            ],
        }

    async def wait(self, what: str, timeout_s: float) -> bool:
        """Whether `control`, `gateway`, `prometheus`, the `load` or a workload (`service/version`) is ready.

        Waits for it up to `timeout_s`. Raises Failed with what it said if it keeps failing.
        """
        fleet = self._fleet
        if what in ("control", "gateway"):
            one = fleet.control.keeper if what == "control" else fleet.gateway.keeper
            await fleet.changes.until(lambda: one.ready or one.failed, timeout_s)
            if one.failed:
                raise one.failure()
            return one.ready
        if what == "load":
            return await fleet.changes.until(lambda: fleet.load_on, timeout_s)
        if what == "prometheus":
            if fleet.prometheus is None:
                return True
            keeper = fleet.prometheus.keeper
            return await fleet.changes.until(lambda: keeper.ready or keeper.failed, timeout_s)
        return await fleet.settled(fleet.of(what), timeout_s)

    async def apply(self, spec: dict[str, Any], timeout_s: float) -> None:
        """Bring the mesh to another spec: add, scale, roll out, remove. New instances are not waited for."""
        fleet = self._fleet
        wanted = MeshSpec.model_validate(spec)
        before = fleet.spec
        fleet.gateway.move(wanted.gateway_port)
        for key in before.workloads.keys() - wanted.workloads.keys():
            await fleet.remove(fleet.of(key))
        kept = {key: old for key, old in before.workloads.items() if key in wanted.workloads}
        fleet.store(wanted.model_copy(update={"workloads": kept}))
        for key, workload in wanted.workloads.items():
            if key in kept:
                same_size = workload.model_copy(update={"instances": kept[key].instances})
                await self._rollouts.change(key, _to(same_size), timeout_s)
                await self._rollouts.scale(key, workload.instances, None)
            else:
                fleet.store(fleet.spec.replacing(workload))
                fleet.add(workload)
        if wanted.rps is not None and wanted.rps != before.rps:
            await fleet.control.set_load(wanted.rps)
        fleet.publisher.request()

    async def set_env(
        self,
        service: str,
        version: str | None,
        env: dict[str, str | None],
        reason: str,
        instance: str | None,
        expires_at: float | None,
        fault_id: str | None,
        timeout_s: float,
    ) -> dict[str, Any]:
        """Roll out variables, as a fault or for good; the revision that carries them."""
        spec = self._fleet.spec
        if instance is not None:
            owner = spec.owner(instance)
            if owner.service != service or version not in {None, owner.version}:
                raise BadInput(f"'{instance}' is an instance of {owner.service} {owner.version}")
            version = owner.version
        versions = [version] if version is not None else spec.versions(service)
        workloads = [spec.workload(service, one) for one in versions]
        if not workloads:
            raise BadInput(f"{service} runs no version")
        if fault_id is None:

            def change(workload: WorkloadSpec) -> WorkloadSpec:
                return specs.with_env(workload, env, instance=instance, reason=reason, now=time.time())

        else:
            variables = {name: value for name, value in env.items() if value is not None}
            fault = specs.AppFault(id=fault_id, instance=instance, env=variables, expires_at=expires_at)

            def change(workload: WorkloadSpec) -> WorkloadSpec:
                return specs.with_fault(workload, fault, reason=reason, now=time.time())

        revision: WorkloadRevision | None = None
        for workload in workloads:
            after = await self._rollouts.change(workload.key, change, timeout_s)
            if instance is None:
                revision = after.current
            else:
                number, its_env = after.of(instance)
                revision = after.current.model_copy(
                    update={"revision": number, "env": its_env, "created_at": time.time(), "reason": reason}
                )
        assert revision is not None
        return revision.model_dump(mode="json")

    async def end_faults(self, ids: list[str] | None, reason: str, timeout_s: float) -> list[str]:
        """Take faults (None: all) out of the workloads that carry them; which ones there were."""
        ended: list[str] = []
        for key, workload in self._fleet.spec.workloads.items():
            mine = [fault.id for fault in workload.faults if ids is None or fault.id in ids]
            if mine:
                await self._rollouts.change(
                    key, lambda w: specs.without_faults(w, ids, reason=reason, now=time.time()), timeout_s
                )
                ended += mine
        return list(dict.fromkeys(ended))

    async def rollback(
        self, service: str, version: str, revision: int, reason: str, timeout_s: float
    ) -> dict[str, Any]:
        """Roll out what a revision ran with; the new revision."""
        key = self._fleet.spec.workload(service, version).key
        after = await self._rollouts.change(
            key, lambda w: specs.rolled_back(w, revision, reason=reason, now=time.time()), timeout_s
        )
        return after.current.model_dump(mode="json")

    async def revisions(self, service: str, version: str) -> list[dict[str, Any]]:
        """The revisions of a workload, oldest first."""
        return [one.model_dump(mode="json") for one in self._fleet.spec.workload(service, version).revisions]

    async def restart(self, instance: str, reason: str, timeout_s: float) -> None:
        """Replace an instance's process: one that answers by another beside it, any other at once."""
        await self._rollouts.restart(instance, reason, timeout_s)

    async def scale(self, service: str, version: str, instances: int, reason: str, timeout_s: float) -> None:
        """Change the number of instances; returns when all are ready, or gone."""
        fleet = self._fleet
        await self._rollouts.scale(fleet.spec.workload(service, version).key, instances, timeout_s)
        fleet.control.journal("scaled", service=service, version=version, instances=instances, reason=reason)

    async def signal(self, instance: str, number: int) -> None:
        """Send a signal to an instance's workload."""
        unit = self._fleet.unit(instance)
        assert unit.run is not None
        unit.run.keeper.signal(signal.Signals(number))

    async def set_load(self, rps: float) -> None:
        """Set the rate of every instance that makes load."""
        fleet = self._fleet
        specs.check_rps(fleet.spec.app, rps)
        fleet.store(fleet.spec.model_copy(update={"rps": rps}))
        await fleet.control.set_load(rps)

    async def shutdown(self) -> None:
        """End everything, the supervisor too."""
        self._end()


def _to(workload: WorkloadSpec) -> Callable[[WorkloadSpec], WorkloadSpec]:
    """The change that makes a workload this one."""
    return lambda _: workload
