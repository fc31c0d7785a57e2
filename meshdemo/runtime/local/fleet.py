"""What runs in one mesh, and what must run: the instances, the gateway, the control plane, Prometheus.

It gives instances what they need of their surroundings (`sidecar.Surroundings`), starts and removes them, and
has every change told to whom it concerns. How a workload is brought to another revision or size: rollout.py.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress

import psutil

from meshdemo.apps.model import Service
from meshdemo.control.bootstrap import Placement, bootstrap_files, envoy_arguments, find_envoy
from meshdemo.control.model import Instance, MeshState
from meshdemo.errors import Failed
from meshdemo.files import write_atomic
from meshdemo.runtime.local import prometheus
from meshdemo.runtime.local.control_plane import ControlPlane
from meshdemo.runtime.local.gateway import Gateway
from meshdemo.runtime.local.keeper import Changes, Keeper, Reaper
from meshdemo.runtime.local.leftovers import MARK
from meshdemo.runtime.local.paths import MeshPaths
from meshdemo.runtime.local.ports import LOOPBACK, Port
from meshdemo.runtime.local.prometheus import Prometheus
from meshdemo.runtime.local.publisher import Publisher
from meshdemo.runtime.local.sidecar import Sidecar
from meshdemo.runtime.local.spec import MeshSpec, WorkloadSpec
from meshdemo.runtime.local.unit import STOP_GRACE_S, Unit

log = logging.getLogger(__name__)

# Workloads that start at the same time: more would only take the processors from the control plane.
_AT_ONCE = max(4, 2 * (os.cpu_count() or 1))


class Fleet:
    """Everything that runs in one mesh. Made on the loop that it runs on.

    Raises:
        Missing: there is no Envoy.
        BadInput: the gateway's port cannot be had.
    """

    def __init__(self, paths: MeshPaths, spec: MeshSpec) -> None:
        self.paths = paths
        self.spec = spec
        self.changes = Changes()
        self.reaper = Reaper()
        self.gate = asyncio.Semaphore(_AT_ONCE)
        self.environ: Mapping[str, str] = {**os.environ, MARK: str(paths.state)}
        self.units: dict[str, Unit] = {}
        self.load_on = False
        self._load_held = True
        self._envoy = find_envoy()
        self._numbers = 0
        self._known: tuple[Instance, ...] = ()
        self.gateway = Gateway(self, spec.gateway_port)
        self.control = ControlPlane(
            paths,
            environ=self.environ,
            reaper=self.reaper,
            changed=self._control_changed,
            died=self.died,
            moved=self._control_moved,
        )
        self.publisher = Publisher(self.write_state, self.control.look, self.changes)
        self.prometheus = self._find_prometheus()

    def start(self) -> None:
        """Start everything but the sidecars; those wait for `start_sidecars`. Raises OSError."""
        self._write_identity()
        self.gateway.prepare()
        for workload in self.spec.workloads.values():
            self.add(workload)
        self.write_state()
        self.control.keeper.start()
        if self.prometheus is not None:
            self.prometheus.keeper.start()

    async def start_sidecars(self) -> None:
        """A sidecar needs the authority's certificate, which the control plane makes when it first starts."""
        await self.changes.until(lambda: self.control.ready or self.control.trust.exists())
        for unit in list(self.units.values()):
            if not unit.sidecar.starts:
                unit.sidecar.start()
        self.gateway.keeper.start()

    async def begin_load(self) -> None:
        """Let the load begin once everybody is there, so that the first requests do not fail."""
        await self.changes.until(
            lambda: self.control.ready and all(unit.ready for unit in self.units.values())
        )
        with suppress(Failed):
            await self.publisher.taken(self.publisher.request())
        self._load_held = False
        rates = {unit: self._rate(unit.service, unit.env) for unit in self.units.values()}
        await asyncio.gather(*(unit.put_load(rate) for unit, rate in rates.items() if rate is not None))
        self.load_on = True
        self.changes.notify()

    async def stop(self, grace_s: float) -> None:
        """End everything."""
        await asyncio.gather(
            *(keeper.stop(grace_s) for keeper in self._servers()),
            *(unit.stop(grace_s) for unit in self.units.values()),
            self.gateway.stop(grace_s),
            return_exceptions=True,
        )

    def keepers(self) -> list[Keeper]:
        """Every process."""
        of_units = (keeper for unit in self.units.values() for keeper in unit.keepers())
        return [*self._servers(), *of_units, self.gateway.keeper]

    def _servers(self) -> list[Keeper]:
        return [self.control.keeper, *([self.prometheus.keeper] if self.prometheus else [])]

    # -- what instances need (sidecar.Surroundings) ----------------------------------------------------------

    def changed(self) -> None:
        """An instance became ready, died, or got another port."""
        if self._sidecars() != self._known:
            self.publisher.request()
        self.changes.notify()

    def died(self, name: str, how: str) -> None:
        """A process has ended without having been told to."""
        log.warning("%s ended: %s", name, how)
        unit = self.units.get(name.removeprefix("sidecar of "))
        where = {"service": unit.service, "instance": unit.id} if unit else {}
        self.control.journal("died", **where, reason=f"{name} ended: {how}")

    def service(self, name: str) -> Service:
        """What the app file says of a service."""
        return self.spec.app.services[name]

    def extra_env(self, service: str, env: Mapping[str, str]) -> Mapping[str, str]:
        """The load that was asked for; none while the mesh is coming up."""
        rate = self._rate(service, env)
        if rate is None:
            return {}
        return {"RPS": "0" if self._load_held else f"{rate:g}"}

    def _rate(self, service: str, env: Mapping[str, str]) -> float | None:
        """Requests per second that an instance should make; None: that is its own business."""
        if not self.service(service).load:
            return None
        try:
            return float(env["RPS"]) if self.spec.rps is None else self.spec.rps
        except (KeyError, ValueError):
            return None

    def cwd(self) -> str:
        """Where commands run."""
        return self.spec.cwd

    def sidecar_command(self, of: Sidecar) -> list[str]:
        """Write what a sidecar is started with; its command line. Raises OSError."""
        placement = Placement(
            folder=of.folder,
            trust=self.control.trust,
            admin=of.admin,
            control_host=LOOPBACK,
            control_port=self.control.grpc.number,
        )
        for name, content in bootstrap_files(of.instance(), placement).items():
            write_atomic(of.folder / name, content)
        return envoy_arguments(self._envoy, of.folder / "bootstrap.yaml")

    # -- state for others ----------------------------------------------------------------------------------

    def instances(self) -> tuple[Instance, ...]:
        """The instances as they are now."""
        return tuple(unit.instance() for unit in self.units.values())

    def _sidecars(self) -> tuple[Instance, ...]:
        return (*self.instances(), self.gateway.instance())

    def store(self, spec: MeshSpec) -> None:
        """Make `spec` what must run. Raises Failed (nothing has changed) if it cannot be written."""
        try:
            write_atomic(self.paths.spec, spec.model_dump_json())
        except OSError as error:
            raise Failed(
                f"cannot write {self.paths.spec}: {error.strerror}", "make room on the disk, then try again"
            ) from error
        self.spec = spec

    def write_state(self) -> None:
        """Write what runs, for the control plane and Prometheus to read. Raises OSError."""
        self._known = self._sidecars()
        *instances, edge = self._known
        state = MeshState(
            mesh=self.spec.mesh, app=self.spec.app, instances=tuple(instances), gateways=(edge,)
        )
        write_atomic(self.paths.instances, state.model_dump_json())
        if self.prometheus is not None:
            self.prometheus.tell(self.spec.app, self._known)

    def _write_identity(self) -> None:
        me = psutil.Process()
        identity = {
            "pid": me.pid, "create_time": me.create_time(), "http_port": self.control.http.number,
            "grpc_port": self.control.grpc.number,
            "prometheus_port": self.prometheus.port.number if self.prometheus else None,
        }  # fmt: skip
        write_atomic(self.paths.supervisor, json.dumps(identity))

    # -- control plane and Prometheus ----------------------------------------------------------------------

    def _control_changed(self) -> None:
        if self.control.ready:
            self.publisher.request()
        self.changes.notify()

    def _control_moved(self, ports: Collection[Port]) -> None:
        self._write_identity()
        if self.control.grpc in ports:
            for sidecar in [*(unit.sidecar for unit in self.units.values()), self.gateway.keeper]:
                if sidecar.starts:
                    sidecar.replace()  # its bootstrap names the old port

    def _find_prometheus(self) -> Prometheus | None:
        binary = prometheus.find()
        if binary is None:
            return None
        return Prometheus(
            binary,
            mesh=self.spec.mesh,
            paths=self.paths,
            control=self.control,
            environ=self.environ,
            reaper=self.reaper,
            changed=self.changes.notify,
            died=self.died,
            moved=self._write_identity,
        )

    # -- instances -----------------------------------------------------------------------------------------

    def of(self, key: str) -> list[Unit]:
        """The instances of a workload (`service/version`)."""
        return [unit for unit in self.units.values() if unit.key == key]

    def unit(self, instance: str) -> Unit:
        """One instance. Raises BadInput if there is none of this id."""
        self.spec.owner(instance)
        return self.units[instance]

    def add(self, workload: WorkloadSpec) -> list[Unit]:
        """Start the instances of a workload that are not there yet. Raises OSError."""
        added = []
        program = self.spec.program(workload.service, workload.version)
        for instance in workload.ids():
            if instance in self.units:
                continue
            self._numbers += 1
            unit = Unit(
                self,
                instance=instance,
                service=workload.service,
                version=workload.version,
                number=self._numbers,
            )
            unit.prepare()
            unit.start(program, *workload.of(instance))
            self.units[instance] = unit
            added.append(unit)
        if added and self.control.ready:
            for unit in added:
                unit.sidecar.start()
        return added

    async def remove(self, units: Sequence[Unit], *, drain: bool = True) -> None:
        """Take instances out of service, let them finish, stop them."""
        for unit in units:
            unit.draining = True
        if units and drain:
            number = self.publisher.request()
            with suppress(Failed):  # without a control plane they go all the same; callers retry
                await self.publisher.taken(number)
            await asyncio.gather(*(unit.drain() for unit in units))
        for unit in units:
            self.units.pop(unit.id, None)
        self.changed()
        await asyncio.gather(*(unit.stop(STOP_GRACE_S if drain else 0) for unit in units))

    async def settled(self, units: Sequence[Unit], timeout_s: float) -> bool:
        """Whether all of these are ready; waits for it. Raises Failed with what a failing one said."""
        await self.changes.until(lambda: _settled(units), timeout_s)
        if (failing := _failing(units)) is not None:
            raise failing.failure()
        return all(unit.ready for unit in units)

    async def in_service(self, units: Sequence[Unit], timeout_s: float) -> None:
        """Wait until instances take traffic. Raises Failed with what one that does not said."""
        if not await self.settled(units, timeout_s):
            raise next(_blocker(unit) for unit in units if not unit.ready).failure()
        await self.publisher.taken(self.publisher.request())


def _failing(units: Iterable[Unit]) -> Keeper | None:
    return next((keeper for unit in units for keeper in unit.keepers() if keeper.failed), None)


def _settled(units: Iterable[Unit]) -> bool:
    return _failing(units) is not None or all(unit.ready for unit in units)


def _blocker(unit: Unit) -> Keeper:
    return next((keeper for keeper in reversed(unit.keepers()) if not keeper.ready), unit.sidecar)
