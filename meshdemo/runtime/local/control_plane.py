"""The control plane's process: kept running, told what runs, asked to note what happened."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from meshdemo.control.client import ControlClient
from meshdemo.errors import MeshdemoError
from meshdemo.runtime.local.keeper import BoundedLog, Keeper, Plan, Reaper
from meshdemo.runtime.local.paths import HOME, MeshPaths
from meshdemo.runtime.local.ports import LOOPBACK, Port, renew_lost
from meshdemo.runtime.local.probe import answers

log = logging.getLogger(__name__)

_PATIENCE_S = 15.0  # it may be restarting


class ControlPlane:
    """The control plane of one mesh.

    Args:
        changed: called whenever it became ready, or ended.
        died: told its name and how it ended, if it was not told to.
        moved: told of the ports for which others were chosen, since somebody else took them meanwhile.
    """

    def __init__(
        self,
        paths: MeshPaths,
        *,
        environ: Mapping[str, str],
        reaper: Reaper,
        changed: Callable[[], None],
        died: Callable[[str, str], None],
        moved: Callable[[Collection[Port]], None],
    ) -> None:
        self.grpc, self.http = Port(), Port()
        self._paths = paths
        self._environ = environ
        self._moved = moved
        self.keeper = Keeper(
            "control plane",
            self._plan,
            output=BoundedLog(paths.logs / "control-plane.log"),
            reaper=reaper,
            probe=lambda: answers(self.http.number, "/healthz"),
            changed=changed,
            died=died,
            port_lost=self._port_lost,
        )

    @property
    def ready(self) -> bool:
        """Whether it answers."""
        return self.keeper.ready

    @property
    def trust(self) -> Path:
        """The certificate of its authority, which it makes when it first starts."""
        return self._paths.control / "trust.pem"

    @property
    def token(self) -> Path:
        """The token of its API."""
        return self._paths.control / "api-token"

    @property
    def address(self) -> str:
        """Of its API, host:port."""
        return f"{LOOPBACK}:{self.http.number}"

    def client(self, retry_s: float = 0) -> ControlClient:
        """Speaks to its API; blocking, so for threads. Raises OSError if it has made no token yet."""
        return ControlClient(f"http://{self.address}", self.token.read_text().strip(), retry_s=retry_s)

    async def look(self) -> bool | None:
        """Have it read what runs and bring that to the sidecars.

        Returns whether it has; None: it does not run, and will read it when it does.
        """
        if not self.ready:
            return None
        try:
            await asyncio.to_thread(lambda: self.client().refresh_instances())
        except (MeshdemoError, OSError) as error:
            log.warning("the control plane did not take in what runs: %s", error)
            return False
        return True

    async def set_load(self, rps: float) -> None:
        """Have it set the load, and keep it up. Raises MeshdemoError if it does not."""
        await asyncio.to_thread(lambda: self.client(_PATIENCE_S).set_load(rps))

    async def forget_fault(self, fault_id: str) -> None:
        """Have it end the record of a fault. It does so by itself too; whoever is first has done it."""
        with suppress(MeshdemoError, OSError):
            await asyncio.to_thread(lambda: self.client().clear_fault(fault_id))

    def journal(self, event: str, **content: Any) -> None:
        """Have something noted in the mesh's journal; a control plane that does not run is waited for."""

        def post() -> None:
            with suppress(MeshdemoError, OSError):
                self.client(_PATIENCE_S).post_event({"event": event, "time": happened, **content})

        happened = time.time()
        # Not one of the loop's threads: nobody should wait for this when the supervisor ends.
        threading.Thread(target=post, daemon=True).start()

    def _plan(self) -> Plan:
        command = [
            sys.executable, "-P", "-m", "meshdemo.control.server", "--state", str(self._paths.state),
            "--grpc-port", str(self.grpc.number), "--http-port", str(self.http.number),
            "--hand", json.dumps([sys.executable, "-P", "-m", "meshdemo", "--name", self._paths.name]),
        ]  # fmt: skip
        # That command is to find this mesh, and no other, whatever the environment of `up` was.
        return Plan(command=command, env={**self._environ, HOME: str(self._paths.state.parent)}, cwd="/")

    def _port_lost(self) -> bool:
        if lost := renew_lost((self.grpc, self.http)):
            self._moved(lost)
        return bool(lost)
