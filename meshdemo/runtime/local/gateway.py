"""The gateway on this machine: an Envoy at the edge, on a port that people know.

To the control plane it is a sidecar like the others, of the service `gateway`, with a token of its own; there
is just no program behind it.
"""

from __future__ import annotations

import secrets
import shutil
from hashlib import sha256
from pathlib import Path

from meshdemo.apps.model import GATEWAY
from meshdemo.control.model import Instance
from meshdemo.files import write_atomic
from meshdemo.runtime.local.keeper import BoundedLog, Keeper, Plan
from meshdemo.runtime.local.ports import LOOPBACK, Port, gateway_port
from meshdemo.runtime.local.probe import listening
from meshdemo.runtime.local.unit import LISTENERS_PATIENCE, Surroundings

_ADMIN = 0  # instances' sidecars count from 1


class Gateway:
    """The edge of one mesh.

    Args:
        asked: the port that the user named; None: whichever can be had. Raises BadInput if it cannot be had.
    """

    def __init__(self, around: Surroundings, asked: int | None) -> None:
        self._around = around
        self._asked = asked
        self._blind = 0
        self.port = gateway_port(asked)
        self._metrics = Port()
        self._token = secrets.token_urlsafe(32)
        self.folder = around.paths.instance(GATEWAY)
        self.keeper = Keeper(
            GATEWAY,
            self._plan,
            output=BoundedLog(around.paths.logs / f"{GATEWAY}.log"),
            reaper=around.reaper,
            probe=self._ready,
            changed=around.changed,
            died=around.died,
        )

    @property
    def admin(self) -> Path:
        """Its admin endpoint."""
        return self._around.paths.admin(_ADMIN)

    def instance(self) -> Instance:
        """What the control plane is told of it."""
        return Instance(
            id=GATEWAY, service=GATEWAY, version="v1", host=LOOPBACK, inbound_port=0, app_port=0,
            outbound_port=self.port.number, metrics_port=self._metrics.number, ready=self.keeper.ready,
            token_sha256=sha256(self._token.encode()).hexdigest(),
        )  # fmt: skip

    def prepare(self) -> None:
        """Write the token. Raises OSError."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomic(self.folder / "token", self._token)

    def move(self, asked: int | None) -> None:
        """Take another port, and let go of the present one. Raises BadInput if that cannot be had."""
        if asked is None or asked == self.port.number:
            self._asked = asked
            return
        port = gateway_port(asked)
        self._asked, self.port, old = asked, port, self.port
        old.release()
        if self.keeper.starts:
            self.keeper.replace()
        self._around.changed()

    async def stop(self, grace_s: float) -> None:
        """End it, and remove its files."""
        await self.keeper.stop(min(grace_s, 1.0))
        for port in (self.port, self._metrics):
            port.release()
        self.admin.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _plan(self) -> Plan:
        self._blind = 0
        self.admin.unlink(missing_ok=True)  # one that was killed has left it
        return Plan(command=self._around.sidecar_command(self), env=self._around.environ, cwd="/")

    async def _ready(self) -> bool:
        ports = await listening(self.admin)
        if ports is None:
            return False
        missing = [port for port in (self.port, self._metrics) if port.number not in ports]
        if missing:
            self._blind += 1
            if self._blind % LISTENERS_PATIENCE == 0:
                self._renew_lost(missing)
        return not missing

    def _renew_lost(self, missing: list[Port]) -> None:
        """Choose others for ports that somebody else took meanwhile; not for one that the user named."""
        lost = [p for p in missing if p.lost() and not (p is self.port and self._asked is not None)]
        for port in lost:
            port.renew()
        if lost:
            self._around.changed()
