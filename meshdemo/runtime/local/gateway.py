"""The gateway on this machine: an Envoy at the edge, on a port that people know.

To the control plane it is a sidecar like the others, of the service `gateway`, with a token of its own; there
is just no program behind it.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from meshdemo.apps.model import GATEWAY
from meshdemo.control.model import Instance
from meshdemo.runtime.local import sidecar
from meshdemo.runtime.local.ports import LOOPBACK, Port, gateway_port
from meshdemo.runtime.local.sidecar import Surroundings

_ADMIN = 0  # instances' sidecars count from 1


class Gateway:
    """The edge of one mesh.

    Args:
        asked: the port that the user named; None: whichever can be had. Raises BadInput if it cannot be had.
    """

    def __init__(self, around: Surroundings, asked: int | None) -> None:
        self._around = around
        self._asked = asked
        self.port = gateway_port(asked)
        self._metrics = Port()
        self.token = secrets.token_urlsafe(32)
        self.folder = around.paths.instance(GATEWAY)
        self.keeper = sidecar.keep(
            around, self, name=GATEWAY, log=GATEWAY,
            ports=self._ports, fixed=lambda port: port is self.port and self._asked is not None,
        )  # fmt: skip

    @property
    def admin(self) -> Path:
        """Its admin endpoint."""
        return self._around.paths.admin(_ADMIN)

    def instance(self) -> Instance:
        """What the control plane is told of it."""
        return Instance(
            id=GATEWAY, service=GATEWAY, version="v1", host=LOOPBACK, inbound_port=0, app_port=0,
            outbound_port=self.port.number, metrics_port=self._metrics.number, ready=self.keeper.ready,
            token_sha256=sha256(self.token.encode()).hexdigest(),
        )  # fmt: skip

    def prepare(self) -> None:
        """Write the token. Raises OSError."""
        sidecar.prepare(self)

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
        await sidecar.remove(self, self.keeper, self._ports(), grace_s)

    def _ports(self) -> Sequence[Port]:
        return (self.port, self._metrics)
