"""What runs an Envoy beside an instance, or at the edge: it is started, looked at, and removed here alone."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from meshdemo.apps.model import Service
from meshdemo.control.model import Instance
from meshdemo.files import write_atomic
from meshdemo.runtime.local.keeper import BoundedLog, Changes, Keeper, Plan, Reaper
from meshdemo.runtime.local.paths import MeshPaths
from meshdemo.runtime.local.ports import Port, renew_lost
from meshdemo.runtime.local.probe import listening

# Looks before a sidecar that is live without its listeners is thought to lack a port.
_LISTENERS_PATIENCE = 20


class Sidecar(Protocol):
    """What is to be known of a sidecar to start it."""

    folder: Path
    token: str

    @property
    def admin(self) -> Path:
        """Its admin endpoint."""

    def instance(self) -> Instance:
        """What the control plane is told of it."""


class Surroundings(Protocol):
    """What an instance needs of its supervisor."""

    paths: MeshPaths
    reaper: Reaper
    changes: Changes
    gate: asyncio.Semaphore
    environ: Mapping[str, str]

    def changed(self) -> None:
        """Something about an instance has changed."""

    def died(self, name: str, how: str) -> None:
        """A process has ended without having been told to."""

    def sidecar_command(self, of: Sidecar) -> list[str]:
        """Write the files that a sidecar is started with; its command line. Raises OSError."""

    def service(self, name: str) -> Service:
        """What the app file says of a service."""

    def extra_env(self, service: str, env: Mapping[str, str]) -> Mapping[str, str]:
        """Variables that are no part of a revision (the load that was asked for), on top of its `env`."""

    def cwd(self) -> str:
        """Where commands run."""


def keep(
    around: Surroundings,
    of: Sidecar,
    *,
    name: str,
    log: str,
    ports: Callable[[], Sequence[Port]],
    fixed: Callable[[Port], bool] = lambda _: False,
    renewed: Callable[[Sequence[Port]], None] = lambda _: None,
) -> Keeper:
    """What keeps a sidecar running. It is ready when it is configured and listens.

    Args:
        name: of the process, for people.
        log: the name of its log file, without the ending.
        ports: those that it is to listen on.
        fixed: whether a port must stay, even if somebody else has it.
        renewed: told of the ports for which others were chosen, since somebody else took them meanwhile.
    """
    blind = 0  # times that it was seen live without its listeners

    def plan() -> Plan:
        nonlocal blind
        blind = 0
        # Envoy does not take over a socket that one killed before it has left.
        of.admin.unlink(missing_ok=True)
        return Plan(command=around.sidecar_command(of), env=around.environ, cwd="/")

    async def ready() -> bool:
        nonlocal blind
        heard = await listening(of.admin)
        if heard is None:
            return False
        missing = [port for port in ports() if port.number not in heard]
        if missing:
            blind += 1
            if blind % _LISTENERS_PATIENCE == 0 and (
                lost := renew_lost(port for port in missing if not fixed(port))
            ):
                renewed(lost)
                around.changed()
        return not missing

    return Keeper(
        name,
        plan,
        output=BoundedLog(around.paths.logs / f"{log}.log"),
        reaper=around.reaper,
        probe=ready,
        changed=around.changed,
        died=around.died,
    )


def prepare(of: Sidecar) -> None:
    """Write the token that it proves itself with. Raises OSError."""
    of.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomic(of.folder / "token", of.token)


async def remove(of: Sidecar, keeper: Keeper, ports: Sequence[Port], grace_s: float) -> None:
    """End it, let go of its ports, and remove its files."""
    await keeper.stop(min(grace_s, 1.0))
    for port in ports:
        port.release()
    of.admin.unlink(missing_ok=True)
    shutil.rmtree(of.folder, ignore_errors=True)
