"""The supervisor: one background process for each local mesh, parent of everything that runs in it.

It reads what must run (spec.json), starts all of it at once, restarts what dies, tells the control plane of
every change (instances.json, and a poke), rolls out new revisions, and ends faults when their time is up. It
does what LocalRuntime asks of it over a Unix socket: one JSON object in, one out, a connection each.

All of it runs on one asyncio loop; what would block (the control plane's client) is given to a thread.
Started as `python -m meshdemo.runtime.local.supervisor --state DIR`, in a session of its own; prints `ready`
once it can be spoken to, or an error as JSON if it cannot start.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from meshdemo.apps.model import Service
from meshdemo.control.client import ControlClient
from meshdemo.control.model import Instance, MeshState, WorkloadRevision
from meshdemo.errors import BadInput, Failed, MeshdemoError
from meshdemo.files import write_atomic
from meshdemo.runtime.local import prometheus
from meshdemo.runtime.local import spec as specs
from meshdemo.runtime.local.gateway import Gateway
from meshdemo.runtime.local.keeper import BoundedLog, Changes, Keeper, Plan, Reaper
from meshdemo.runtime.local.leftovers import MARK
from meshdemo.runtime.local.paths import HOME, MeshPaths
from meshdemo.runtime.local.ports import LOOPBACK, Port
from meshdemo.runtime.local.probe import answers
from meshdemo.runtime.local.sidecar import Sidecar
from meshdemo.runtime.local.spec import MeshSpec, WorkloadSpec
from meshdemo.runtime.local.unit import STOP_GRACE_S, Run, Unit

log = logging.getLogger(__name__)

_SHUTDOWN_GRACE_S = 1.0
_TAKEN_IN_S = 15.0  # how long a change waits for the control plane (which may be restarting) to take it in
_RETRY_S = 0.2
# Workloads that start at the same time: more would only take the processors from the control plane.
_AT_ONCE = max(4, 2 * (os.cpu_count() or 1))
_FILES = 65_536
_LIMIT = 16 * 1024 * 1024  # of one message


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


class Supervisor:
    """What runs, and the operations on it. Methods named `op_...` are what may be asked over the socket."""

    def __init__(self, paths: MeshPaths, spec: MeshSpec) -> None:
        from meshdemo.control.bootstrap import find_envoy

        self.paths = paths
        self.spec = spec
        self.changes = Changes()
        self.reaper = Reaper()
        self.gate = asyncio.Semaphore(_AT_ONCE)
        self.environ: Mapping[str, str] = {**os.environ, MARK: str(paths.state)}
        self.units: dict[str, Unit] = {}
        self._envoy = find_envoy()
        self._numbers = 0
        self._known: tuple[Instance, ...] = ()
        self.gateway = Gateway(self, spec.gateway_port)
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stopping = asyncio.Event()
        self._load_held, self._load_on = True, False
        self._guard: subprocess.Popen[bytes] | None = None
        self._grpc, self._http, self._prometheus_port = Port(), Port(), Port()
        self.publisher = Publisher(self._write_state, self._poke, self.changes)
        self.control = Keeper(
            "control plane",
            self._control_plan,
            output=BoundedLog(paths.logs / "control-plane.log"),
            reaper=self.reaper,
            probe=lambda: answers(self._http.number, "/healthz"),
            changed=self._control_changed,
            died=self.died,
            port_lost=self._control_port_lost,
        )
        self.prometheus = self._make_prometheus()

    # -- life ----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Start everything, serve until told to stop, stop everything."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._stopping.set)
        self._start_guard()
        self._write_identity()
        self.gateway.prepare()
        for workload in self.spec.workloads.values():
            self._add_units(workload)
        self._write_state()
        self.control.start()
        self._spawn(self.publisher.run())
        self._spawn(self._run_timers())
        self._spawn(self._start_sidecars())
        self._spawn(self._begin_load())
        if self.prometheus is not None:
            self.prometheus.start()
        self.paths.api.unlink(missing_ok=True)
        server = await asyncio.start_unix_server(self._serve, self.paths.api, limit=_LIMIT)
        self.paths.api.chmod(0o600)
        _say("ready")
        await self._stopping.wait()
        log.info("stopping")
        server.close()
        await self._stop_all()

    async def _stop_all(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        keepers = [self.control, *([self.prometheus] if self.prometheus else [])]
        await asyncio.gather(
            *(keeper.stop(_SHUTDOWN_GRACE_S) for keeper in keepers),
            *(unit.stop(_SHUTDOWN_GRACE_S) for unit in self.units.values()),
            self.gateway.stop(_SHUTDOWN_GRACE_S),
            return_exceptions=True,
        )
        self.paths.api.unlink(missing_ok=True)
        with suppress(OSError):
            self.paths.sockets.rmdir()  # `up` makes it again; the state is `down`'s to remove
        if self._guard is not None:
            # Not through the pipe's end, at which it would kill us too.
            self._guard.kill()
            self._guard.wait()

    def _start_guard(self) -> None:
        module = "meshdemo.runtime.local.guard"
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, str(os.getpgrp()), str(self.paths.state)],
            stdin=subprocess.PIPE, env=self.environ, cwd="/", start_new_session=True,
        )  # fmt: skip
        self._guard = process
        self.reaper.watch(process).add_done_callback(lambda _: self._guard_ended(process))

    def _guard_ended(self, process: subprocess.Popen[bytes]) -> None:
        if process.stdin is not None:
            process.stdin.close()
        if not self._stopping.is_set():
            log.warning("the guard ended; starting another one")
            self._start_guard()

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s", error, exc_info=error)

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
        self._journal("died", **where, reason=f"{name} ended: {how}")

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

    async def _begin_load(self) -> None:
        """Let the load begin once everybody is there, so that the first requests do not fail."""
        await self.changes.until(
            lambda: self.control.ready and all(unit.ready for unit in self.units.values())
        )
        with suppress(Failed):
            await self.publisher.taken(self.publisher.request())
        self._load_held = False
        rates = {unit: self._rate(unit.service, unit.env) for unit in self.units.values()}
        await asyncio.gather(*(unit.put_load(rate) for unit, rate in rates.items() if rate is not None))
        self._load_on = True
        self.changes.notify()

    def sidecar_command(self, of: Sidecar) -> list[str]:
        """Write what a sidecar is started with; its command line. Raises OSError."""
        from meshdemo.control.bootstrap import Placement, bootstrap_files, envoy_arguments

        placement = Placement(
            folder=of.folder,
            trust=self.paths.control / "trust.pem",
            admin=of.admin,
            control_host=LOOPBACK,
            control_port=self._grpc.number,
        )
        for name, content in bootstrap_files(of.instance(), placement).items():
            write_atomic(of.folder / name, content)
        return envoy_arguments(self._envoy, of.folder / "bootstrap.yaml")

    # -- state for others ----------------------------------------------------------------------------------

    def _instances(self) -> tuple[Instance, ...]:
        return tuple(unit.instance() for unit in self.units.values())

    def _sidecars(self) -> tuple[Instance, ...]:
        return (*self._instances(), self.gateway.instance())

    def _write_state(self) -> None:
        self._known = self._sidecars()
        *instances, edge = self._known
        state = MeshState(
            mesh=self.spec.mesh, app=self.spec.app, instances=tuple(instances), gateways=(edge,)
        )
        write_atomic(self.paths.instances, state.model_dump_json())
        if self.prometheus is not None:
            prometheus.write_targets(self.paths.prometheus, self.spec.app, self._known)

    def _write_identity(self) -> None:
        me = psutil.Process()
        identity = {
            "pid": me.pid, "create_time": me.create_time(), "http_port": self._http.number,
            "grpc_port": self._grpc.number,
            "prometheus_port": self._prometheus_port.number if self.prometheus else None,
        }  # fmt: skip
        write_atomic(self.paths.supervisor, json.dumps(identity))

    def _client(self, retry_s: float = 0) -> ControlClient:
        token = (self.paths.control / "api-token").read_text().strip()
        return ControlClient(f"http://{LOOPBACK}:{self._http.number}", token, retry_s=retry_s)

    async def _poke(self) -> bool | None:
        """Whether the control plane has taken it in; None: it does not run, and will read it when it does."""
        if not self.control.ready:
            return None
        try:
            await asyncio.to_thread(lambda: self._client().refresh_instances())
        except (MeshdemoError, OSError) as error:
            log.warning("the control plane did not take in what runs: %s", error)
            return False
        return True

    def _journal(self, event: str, **content: Any) -> None:
        """Have something noted in the mesh's journal; a control plane that does not run is waited for."""

        def post() -> None:
            with suppress(MeshdemoError, OSError):
                self._client(_TAKEN_IN_S).post_event({"event": event, "time": happened, **content})

        happened = time.time()
        # Not one of the loop's threads: nobody should wait for this when the supervisor ends.
        threading.Thread(target=post, daemon=True).start()

    # -- control plane and Prometheus ----------------------------------------------------------------------

    def _control_plan(self) -> Plan:
        command = [
            sys.executable, "-P", "-m", "meshdemo.control.server", "--state", str(self.paths.state),
            "--grpc-port", str(self._grpc.number), "--http-port", str(self._http.number),
            "--hand", json.dumps([sys.executable, "-P", "-m", "meshdemo", "--name", self.paths.name]),
        ]  # fmt: skip
        # That command is to find this mesh, and no other, whatever the environment of `up` was.
        return Plan(command=command, env={**self.environ, HOME: str(self.paths.state.parent)}, cwd="/")

    def _control_changed(self) -> None:
        if self.control.ready:
            self.publisher.request()
        self.changes.notify()

    def _control_port_lost(self) -> bool:
        lost = [port for port in (self._grpc, self._http) if port.lost()]
        for port in lost:
            port.renew()
        if lost:
            self._write_identity()
        if self._grpc in lost:
            for unit in self.units.values():
                if unit.sidecar.starts:
                    unit.sidecar.replace()  # its bootstrap names the old port
            if self.gateway.keeper.starts:
                self.gateway.keeper.replace()
        return bool(lost)

    async def _start_sidecars(self) -> None:
        """A sidecar needs the authority's certificate, which the control plane makes when it first starts."""
        trust = self.paths.control / "trust.pem"
        await self.changes.until(lambda: self.control.ready or trust.exists())
        for unit in list(self.units.values()):
            if not unit.sidecar.starts:
                unit.sidecar.start()
        self.gateway.keeper.start()

    def _make_prometheus(self) -> Keeper | None:
        binary = prometheus.find()
        if binary is None:
            return None
        folder = self.paths.prometheus

        def plan() -> Plan:
            config = prometheus.config(
                mesh=self.spec.mesh, targets=folder, credentials=self.paths.control / "api-token",
                control_plane=f"{LOOPBACK}:{self._http.number}",
            )  # fmt: skip
            write_atomic(folder / "prometheus.yml", config)
            return Plan(
                command=prometheus.command(binary, folder, self._prometheus_port.number),
                env=self.environ,
                cwd="/",
            )

        def port_lost() -> bool:
            if not self._prometheus_port.lost():
                return False
            self._prometheus_port.renew()
            self._write_identity()
            return True

        folder.mkdir(mode=0o700, exist_ok=True)
        return Keeper(
            "prometheus",
            plan,
            output=BoundedLog(self.paths.logs / "prometheus.log"),
            reaper=self.reaper,
            probe=lambda: answers(self._prometheus_port.number, "/-/ready"),
            changed=self.changes.notify,
            died=self.died,
            port_lost=port_lost,
        )

    # -- instances -----------------------------------------------------------------------------------------

    def _of(self, key: str) -> list[Unit]:
        return [unit for unit in self.units.values() if unit.key == key]

    def _unit(self, instance: str) -> Unit:
        self.spec.owner(instance)
        return self.units[instance]

    def _add_units(self, workload: WorkloadSpec) -> list[Unit]:
        """Start the instances of a workload that are not there yet."""
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

    async def _remove_units(self, units: Sequence[Unit], *, drain: bool = True) -> None:
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

    async def _wait_ready(self, units: Iterable[Unit], timeout_s: float) -> None:
        """Wait until instances take traffic. Raises Failed with what a failing one said."""
        units = list(units)
        await self.changes.until(lambda: _settled(units), timeout_s)
        slow = _failing(units) or next((_blocker(unit) for unit in units if not unit.ready), None)
        if slow is not None:
            raise slow.failure()
        await self.publisher.taken(self.publisher.request())

    async def _roll(
        self,
        key: str,
        change: Callable[[WorkloadSpec], WorkloadSpec],
        timeout_s: float,
    ) -> WorkloadSpec:
        """Bring a workload to another revision: start new processes beside the old, switch, end the old.

        If anything fails before the switch nothing has changed. Raises Failed, BadInput (from `change`).
        """
        async with self._locks[key]:
            before = self.spec.workloads[key]
            after = change(before)
            if after == before:
                return after
            program = self.spec.program(before.service, before.version)
            stale = [
                unit
                for unit in self._of(key)
                if unit.id in after.ids()
                and unit.run is not None
                and unit.run.revision != after.of(unit.id)[0]
            ]
            if not stale:
                self._store(self.spec.replacing(after))
                self.changes.notify()
                return after
            fresh = await _all_or_none(
                [unit.start_beside(program, *after.of(unit.id), timeout_s=timeout_s) for unit in stale]
            )
            try:
                self._store(self.spec.replacing(after))
            except Failed:
                await asyncio.gather(*(run.keeper.stop(0) for run in fresh))
                raise
            old = self._switch(stale, fresh)
            try:
                await self.publisher.taken(self.publisher.request())
            except Failed:
                self._switch(stale, old)
                with suppress(Failed):
                    self._store(self.spec.replacing(before))
                self.publisher.request()
                await asyncio.gather(*(run.keeper.stop(0) for run in fresh))
                raise
            for unit, run in zip(stale, old, strict=True):
                self._spawn(unit.retire(run))
            if after.current.revision != before.current.revision:
                self._journal(
                    "rolled_out", service=after.service, version=after.version,
                    revision=after.current.revision, reason=after.current.reason,
                )  # fmt: skip
            return after

    @staticmethod
    def _switch(units: Sequence[Unit], runs: Sequence[Run]) -> list[Run]:
        """Point units at other processes; the ones they had."""
        old = []
        for unit, run in zip(units, runs, strict=True):
            assert unit.run is not None
            old.append(unit.run)
            unit.run = run
        return old

    def _store(self, spec: MeshSpec) -> None:
        """Make `spec` what must run. Raises Failed (nothing has changed) if it cannot be written."""
        try:
            write_atomic(self.paths.spec, spec.model_dump_json())
        except OSError as error:
            raise Failed(
                f"cannot write {self.paths.spec}: {error.strerror}", "make room on the disk, then try again"
            ) from error
        self.spec = spec

    async def _run_timers(self) -> None:
        """End faults when their time is over."""
        while True:
            ends = self.spec.ends()
            fault_id = min(ends, key=ends.__getitem__, default=None)
            left = None if fault_id is None else ends[fault_id] - time.time()
            if fault_id is not None and left is not None and left <= 0:
                try:
                    await self._expire(fault_id)
                except MeshdemoError as error:
                    log.error("cannot end fault %s: %s", fault_id, error)
                    await asyncio.sleep(1)
                continue
            await self.changes.until(partial(self._other_ends_than, ends), left)

    def _other_ends_than(self, ends: Mapping[str, float]) -> bool:
        return self.spec.ends() != ends

    async def _expire(self, fault_id: str) -> None:
        await self.op_end_faults([fault_id], f"end of fault {fault_id}", 30)
        # The control plane ends the record of a fault by itself too; whoever is first has done it.
        with suppress(MeshdemoError, OSError):
            await asyncio.to_thread(lambda: self._client().clear_fault(fault_id))

    # -- what may be asked ---------------------------------------------------------------------------------

    async def op_describe(self) -> dict[str, Any]:
        """What must run, what runs, and every process."""
        identity = json.loads(self.paths.supervisor.read_text())
        keepers = [self.control, *([self.prometheus] if self.prometheus else [])]
        keepers += [keeper for unit in self.units.values() for keeper in unit.keepers()]
        keepers.append(self.gateway.keeper)
        return {
            **identity,
            "gateway_port": self.gateway.port.number,
            "gateway_ready": self.gateway.keeper.ready,
            "prometheus_ready": self.prometheus is not None and self.prometheus.ready,
            "control_ready": self.control.ready,
            "guard_pid": self._guard.pid if self._guard else None,
            "spec": self.spec.model_dump(mode="json"),
            "instances": [instance.model_dump(mode="json") for instance in self._instances()],
            "processes": [
                {"name": k.name, "pid": k.pid, "ready": k.ready, "starts": k.starts, "last_exit": k.last_exit}
                for k in keepers
            ],
        }

    async def op_wait(self, what: str, timeout_s: float) -> bool:
        """Whether `control`, `gateway`, `prometheus`, the `load` or a workload (`service/version`) is ready.

        Waits for it up to `timeout_s`. Raises Failed with what it said if it keeps failing.
        """
        if what in ("control", "gateway"):
            one = self.control if what == "control" else self.gateway.keeper
            await self.changes.until(lambda: one.ready or one.failed, timeout_s)
            if one.failed:
                raise one.failure()
            return one.ready
        if what == "load":
            return await self.changes.until(lambda: self._load_on, timeout_s)
        if what == "prometheus":
            keeper = self.prometheus
            if keeper is not None:
                await self.changes.until(lambda: keeper.ready or keeper.failed, timeout_s)
            return keeper is None or keeper.ready or keeper.failed
        units = self._of(what)
        await self.changes.until(lambda: _settled(units), timeout_s)
        if (failing := _failing(units)) is not None:
            raise failing.failure()
        return all(unit.ready for unit in units)

    async def op_apply(self, spec: dict[str, Any], timeout_s: float) -> None:
        """Bring the mesh to another spec: add, scale, roll out, remove. New instances are not waited for."""
        wanted = MeshSpec.model_validate(spec)
        before = self.spec
        self.gateway.move(wanted.gateway_port)
        for key in before.workloads.keys() - wanted.workloads.keys():
            await self._remove_units(self._of(key))
        kept = {key: old for key, old in before.workloads.items() if key in wanted.workloads}
        self._store(wanted.model_copy(update={"workloads": kept}))
        for key, workload in wanted.workloads.items():
            if key in kept:
                same_size = workload.model_copy(update={"instances": kept[key].instances})
                await self._roll(key, partial(_become, same_size), timeout_s)
                async with self._locks[key]:
                    await self._scale(workload, None)
            else:
                self._store(self.spec.replacing(workload))
                self._add_units(workload)
        if wanted.rps is not None and wanted.rps != before.rps:
            await self._ask_for_load(wanted.rps)
        self.publisher.request()

    async def op_set_env(
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
        if instance is not None:
            owner = self.spec.owner(instance)
            if owner.service != service or version not in {None, owner.version}:
                raise BadInput(f"'{instance}' is an instance of {owner.service} {owner.version}")
            version = owner.version
        versions = [version] if version is not None else self.spec.versions(service)
        workloads = [self.spec.workload(service, one) for one in versions]
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
            after = await self._roll(workload.key, change, timeout_s)
            if instance is None:
                revision = after.current
            else:
                number, its_env = after.of(instance)
                revision = after.current.model_copy(
                    update={"revision": number, "env": its_env, "created_at": time.time(), "reason": reason}
                )
        assert revision is not None
        return revision.model_dump(mode="json")

    async def op_end_faults(self, ids: list[str] | None, reason: str, timeout_s: float) -> list[str]:
        """Take faults (None: all) out of the workloads that carry them; which ones there were."""
        ended: list[str] = []
        for key, workload in self.spec.workloads.items():
            mine = [fault.id for fault in workload.faults if ids is None or fault.id in ids]
            if mine:
                await self._roll(
                    key, lambda w: specs.without_faults(w, ids, reason=reason, now=time.time()), timeout_s
                )
                ended += mine
        return list(dict.fromkeys(ended))

    async def op_rollback(
        self, service: str, version: str, revision: int, reason: str, timeout_s: float
    ) -> dict[str, Any]:
        """Roll out what a revision ran with; the new revision."""
        key = self.spec.workload(service, version).key
        after = await self._roll(
            key, lambda w: specs.rolled_back(w, revision, reason=reason, now=time.time()), timeout_s
        )
        return after.current.model_dump(mode="json")

    async def op_revisions(self, service: str, version: str) -> list[dict[str, Any]]:
        """The revisions of a workload, oldest first."""
        return [one.model_dump(mode="json") for one in self.spec.workload(service, version).revisions]

    async def op_restart(self, instance: str, reason: str, timeout_s: float) -> None:
        """Replace an instance's process: one that answers by another beside it, any other at once."""
        unit = self._unit(instance)
        async with self._locks[unit.key]:
            if not await unit.sidecar_answers(0.5):
                unit.sidecar.replace()
            if unit.run is not None and await unit.answers(0.5):
                revision, env = self.spec.workloads[unit.key].of(instance)
                program = self.spec.program(unit.service, unit.version)
                run = await unit.start_beside(program, revision, env, timeout_s=timeout_s)
                (old,) = self._switch([unit], [run])
                await self.publisher.taken(self.publisher.request())
                self._spawn(unit.retire(old))
            elif unit.run is not None:
                unit.run.keeper.replace()
            await self._wait_ready([unit], timeout_s)
            self._journal("restarted", service=unit.service, instance=instance, reason=reason)

    async def op_scale(
        self, service: str, version: str, instances: int, reason: str, timeout_s: float
    ) -> None:
        """Change the number of instances; returns when all are ready, or gone."""
        workload = self.spec.workload(service, version)
        async with self._locks[workload.key]:
            await self._scale(specs.scaled(self.spec.workloads[workload.key], instances), timeout_s)
            self._journal("scaled", service=service, version=version, instances=instances, reason=reason)

    async def _scale(self, workload: WorkloadSpec, timeout_s: float | None) -> None:
        """Add and remove instances until there are as many as `workload` says; None: do not wait."""
        before = self.spec.workloads[workload.key]
        self._store(self.spec.replacing(workload))
        added = self._add_units(workload)
        self.changed()
        surplus = [unit for unit in self._of(workload.key) if unit.id not in workload.ids()]
        if surplus:
            await self._remove_units(surplus)
        if added and timeout_s is not None:
            try:
                await self._wait_ready(added, timeout_s)
            except Failed:
                await self._remove_units(added, drain=False)
                self._store(self.spec.replacing(before))
                raise

    async def op_signal(self, instance: str, number: int) -> None:
        """Send a signal to an instance's workload."""
        unit = self._unit(instance)
        assert unit.run is not None
        unit.run.keeper.signal(signal.Signals(number))

    async def op_set_load(self, rps: float) -> None:
        """Set the rate of every instance that makes load."""
        specs.check_rps(self.spec.app, rps)
        self._store(self.spec.model_copy(update={"rps": rps}))
        await self._ask_for_load(rps)

    async def _ask_for_load(self, rps: float) -> None:
        """Have the control plane set the load, and keep it up. Raises MeshdemoError if it does not."""
        await asyncio.to_thread(lambda: self._client(_TAKEN_IN_S).set_load(rps))

    async def op_shutdown(self) -> None:
        """End everything, the supervisor too."""
        self._stopping.set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            request = json.loads(await reader.readline())
            answer = await self._answer(request.pop("op"), request)
            writer.write(json.dumps(answer).encode() + b"\n")
            await writer.drain()
        except (OSError, ValueError):
            pass  # the client has gone
        finally:
            writer.close()

    async def _answer(self, op: str, arguments: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"result": await getattr(self, f"op_{op}")(**arguments)}
        except MeshdemoError as error:
            return {"error": error.message, "remedy": error.remedy, "exit_status": error.exit_status}
        except Exception as error:
            log.exception("%s failed", op)
            return {
                "error": f"{type(error).__name__}: {error}",
                "remedy": "see `meshdemo logs`",
                "exit_status": 1,
            }


def _become(workload: WorkloadSpec, _: WorkloadSpec) -> WorkloadSpec:
    return workload


def _failing(units: Iterable[Unit]) -> Keeper | None:
    return next((keeper for unit in units for keeper in unit.keepers() if keeper.failed), None)


def _settled(units: Sequence[Unit]) -> bool:
    return _failing(units) is not None or all(unit.ready for unit in units)


def _blocker(unit: Unit) -> Keeper:
    return next((keeper for keeper in reversed(unit.keepers()) if not keeper.ready), unit.sidecar)


async def _all_or_none(starts: Sequence[Coroutine[Any, Any, Run]]) -> list[Run]:
    """What all of them give; if one raises the others are stopped again, and the first error is raised."""
    outcomes = await asyncio.gather(*starts, return_exceptions=True)
    errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    runs = [outcome for outcome in outcomes if isinstance(outcome, Run)]
    if errors:
        await asyncio.gather(*(run.keeper.stop(0) for run in runs))
        raise errors[0]
    return runs


def _say(line: str) -> None:
    """Tell whoever started us, if they are still there, and let go of them."""
    with suppress(OSError):
        os.write(1, line.encode() + b"\n")
    os.dup2(2, 1)


class _LogHandler(logging.Handler):
    """The supervisor's own log, bounded like those of its children."""

    def __init__(self, output: BoundedLog) -> None:
        super().__init__()
        self._output = output

    def emit(self, record: logging.LogRecord) -> None:
        self._output.write(self.format(record).encode() + b"\n")


def _raise_file_limit() -> None:
    """Each instance takes some file descriptors of ours, and common soft limits (256, 1024) are low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def main() -> None:
    """Run the supervisor of the mesh in `--state`."""
    parser = argparse.ArgumentParser(description="The supervisor of a local mesh; started by `meshdemo up`.")
    parser.add_argument("--state", type=Path, required=True)
    paths = MeshPaths(parser.parse_args().state)
    _raise_file_limit()
    handler = _LogHandler(BoundedLog(paths.logs / "supervisor.log"))
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO, handlers=[handler])
    spec = MeshSpec.model_validate_json(paths.spec.read_text())

    async def serve() -> None:
        await Supervisor(paths, spec).run()

    try:
        asyncio.run(serve())
    except MeshdemoError as error:
        _say(json.dumps({"error": error.message, "remedy": error.remedy, "exit_status": error.exit_status}))
    except OSError as error:
        message = f"{error.filename or paths.state}: {error.strerror or error}"
        _say(json.dumps({"error": message, "remedy": "see `meshdemo check`", "exit_status": 1}))


if __name__ == "__main__":
    main()
