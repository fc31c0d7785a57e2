"""One instance on this machine: a workload's process, its sidecar, and how the one is replaced at the other.

The sidecar and its ports stay for the life of the instance. A new revision of the workload is started beside
the old one on a port of its own; once it is ready the sidecar is pointed at it, and the old one ends
when it has answered what it was asked.
"""

from __future__ import annotations

import asyncio
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import psutil

from meshdemo.apps.model import Workload
from meshdemo.control.model import Instance
from meshdemo.runtime.local import sidecar
from meshdemo.runtime.local.keeper import BoundedLog, Keeper, Plan
from meshdemo.runtime.local.ports import LOOPBACK, Port
from meshdemo.runtime.local.probe import ask, serves
from meshdemo.runtime.local.sidecar import Surroundings

STOP_GRACE_S = 10.0  # a workload told to end may take so long to answer what it was asked
_DRAIN_S = 10.0
_SETTLE_S = 0.1  # sidecars confirm a change a little before their workers act on it


@dataclass(slots=True)
class Run:
    """One process of a workload, kept running with this environment, on this port."""

    keeper: Keeper
    port: Port
    revision: int
    env: Mapping[str, str]


class Unit:
    """One instance: its ports, its token, its sidecar and the workload's process behind it."""

    def __init__(
        self, around: Surroundings, instance: str, *, service: str, version: str, number: int
    ) -> None:
        self.id = instance
        self.service = service
        self.version = version
        self.number = number
        self.draining = False
        self.inbound, self.outbound, self.metrics = Port(), Port(), Port()
        self.token = secrets.token_urlsafe(32)
        self.run: Run | None = None
        self._around = around
        self.folder = around.paths.instance(instance)
        self.sidecar = sidecar.keep(
            around, self, name=f"sidecar of {instance}", log=f"{instance}.sidecar",
            ports=self._ports, renewed=self._renewed,
        )  # fmt: skip

    @property
    def key(self) -> str:
        """`service/version`, as in the spec."""
        return f"{self.service}/{self.version}"

    @property
    def revision(self) -> int:
        """The revision that it runs."""
        return self.run.revision if self.run is not None else 0

    @property
    def env(self) -> Mapping[str, str]:
        """The environment of that revision."""
        return self.run.env if self.run is not None else {}

    @property
    def ready(self) -> bool:
        """Whether it takes traffic."""
        return not self.draining and self.sidecar.ready and self.run is not None and self.run.keeper.ready

    @property
    def admin(self) -> Path:
        """The admin endpoint of its sidecar."""
        return self._around.paths.admin(self.number)

    def keepers(self) -> list[Keeper]:
        """What is kept running for it."""
        return [self.sidecar, *([self.run.keeper] if self.run else [])]

    def instance(self) -> Instance:
        """What the control plane is told of it."""
        run = self.run
        return Instance(
            id=self.id, service=self.service, version=self.version, revision=self.revision,
            host=LOOPBACK, inbound_port=self.inbound.number, outbound_port=self.outbound.number,
            metrics_port=self.metrics.number, app_host=LOOPBACK, app_port=run.port.number if run else 0,
            ready=self.ready, restarts=sum(one.deaths for one in self.keepers()),
            token_sha256=sha256(self.token.encode()).hexdigest(),
        )  # fmt: skip

    # -- life ----------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Write the token. Raises OSError."""
        sidecar.prepare(self)

    def start(self, program: Workload, revision: int, env: Mapping[str, str]) -> None:
        """Start the workload; the sidecar is started on its own, once the control plane can be spoken to."""
        self.run = self._new_run(program, revision, env)
        self.run.keeper.start()

    async def stop(self, grace_s: float) -> None:
        """End both processes, the workload first, and remove the instance's files."""
        if self.run is not None:
            await self.run.keeper.stop(grace_s)
            self.run.port.release()
        await sidecar.remove(self, self.sidecar, self._ports(), grace_s)

    async def drain(self) -> None:
        """Wait until the sidecar has answered what it was asked; callers have been told to stay away."""
        await asyncio.sleep(_SETTLE_S * 3)
        give_up = time.monotonic() + _DRAIN_S
        while await self._in_flight() and time.monotonic() < give_up:  # noqa: ASYNC110 - Envoy has no event
            await asyncio.sleep(0.05)

    async def _in_flight(self) -> int:
        name = "http.inbound.downstream_rq_active"
        answer = await ask(self.admin, f"/stats?filter=^{name}$")
        _, _, value = answer.body.decode().partition(":")
        return int(value) if value.strip().isdigit() else 0

    # -- the workload --------------------------------------------------------------------------------------

    async def start_beside(
        self, program: Workload, revision: int, env: Mapping[str, str], *, timeout_s: float
    ) -> Run:
        """Start another process beside the present one; returns it when it is ready.

        Raises Failed with what it said last if it does not come up; it is then gone again.
        """
        run = self._new_run(program, revision, env)
        run.keeper.start()
        try:
            up = await self._around.changes.until(lambda: run.keeper.ready or run.keeper.failed, timeout_s)
            if not (up and run.keeper.ready):
                raise run.keeper.failure()
        except BaseException:
            await run.keeper.stop(0)
            run.port.release()
            raise
        return run

    async def retire(self, run: Run) -> None:
        """End a process that the sidecar no longer points at, once it has answered what it was asked."""
        if not run.keeper.hung():
            await asyncio.sleep(_SETTLE_S)
            give_up = time.monotonic() + _DRAIN_S
            while _connected(run) and time.monotonic() < give_up:  # noqa: ASYNC110 - nor has the kernel
                await asyncio.sleep(0.05)
        await run.keeper.stop(STOP_GRACE_S)
        run.port.release()

    async def answers(self, timeout_s: float) -> bool:
        """Whether the workload answers its health check just now."""
        if self.run is None or not self.run.keeper.ready or self.run.keeper.hung():
            return False
        return await serves(self.run.port.number, self._around.service(self.service), timeout_s)

    async def put_load(self, rps: float) -> bool:
        """Set the rate of a workload that makes load; whether it took it."""
        if self.run is None:
            return False
        answer = await ask(self.run.port.number, "/load", method="PUT", body={"rps": rps})
        return answer.status == 200

    async def sidecar_answers(self, timeout_s: float) -> bool:
        """Whether the sidecar says anything at all just now."""
        return (await ask(self.admin, "/ready", timeout_s=timeout_s)).status != 0

    def _new_run(self, program: Workload, revision: int, env: Mapping[str, str]) -> Run:
        # A program of the user's may not set SO_REUSEADDR, and could then not bind a port that is held.
        port = Port(hold=program.program is not None)
        around = self._around
        service = around.service(self.service)

        def plan() -> Plan:
            command = program.command or [sys.executable, "-P", "-m", f"meshdemo.workloads.{program.program}"]
            own = program.program is not None
            cwd = "/" if own else around.cwd()
            return Plan(command=command, env=self._env(port.number, env), cwd=cwd, tree=not own)

        def port_lost() -> bool:
            if not port.lost():
                return False
            port.renew()
            around.changed()
            return True

        keeper = Keeper(
            self.id,
            plan,
            output=BoundedLog(around.paths.logs / f"{self.id}.log"),
            reaper=around.reaper,
            probe=lambda: serves(port.number, service),
            changed=around.changed,
            died=around.died,
            gate=around.gate,
            port_lost=port_lost,
        )
        return Run(keeper, port, revision, env)

    def _env(self, port: int, env: Mapping[str, str]) -> dict[str, str]:
        proxy = f"http://{LOOPBACK}:{self.outbound.number}"
        direct = f"{LOOPBACK},localhost"
        return {
            **self._around.environ,
            # Both spellings: which one a client reads, and which one wins, differs.
            "HTTP_PROXY": proxy, "http_proxy": proxy, "NO_PROXY": direct, "no_proxy": direct,
            **env,
            **self._around.extra_env(self.service, env),
            "HOST": LOOPBACK, "PORT": str(port),
            "SERVICE": self.service, "VERSION": self.version, "INSTANCE": self.id,
            "STATE_DIR": str(self.folder),  # outlives the process, not the instance
        }  # fmt: skip

    # -- the sidecar ---------------------------------------------------------------------------------------

    def _ports(self) -> Sequence[Port]:
        """Where its sidecar listens."""
        return (self.inbound, self.outbound, self.metrics)

    def _renewed(self, ports: Sequence[Port]) -> None:
        if self.outbound in ports and self.run is not None:
            self.run.keeper.replace()  # it was told the old number


def _connected(run: Run) -> bool:
    """Whether somebody is still connected to the process: the sidecar, while it waits for an answer."""
    if run.keeper.pid is None:
        return False
    try:
        connections = psutil.Process(run.keeper.pid).net_connections("tcp")
    except psutil.Error:
        return False
    return any(
        one.status == psutil.CONN_ESTABLISHED and one.laddr and one.laddr.port == run.port.number
        for one in connections
    )
