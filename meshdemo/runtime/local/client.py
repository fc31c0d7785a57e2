"""Speaks to a supervisor over its Unix socket: one JSON object out, one in, a connection each."""

from __future__ import annotations

import json
import socket
from typing import TYPE_CHECKING, Any

from meshdemo.errors import BadInput, Failed, MeshdemoError, Missing

if TYPE_CHECKING:
    from meshdemo.runtime.local.paths import MeshPaths

_ERRORS: dict[int, type[MeshdemoError]] = {1: Failed, 2: BadInput, 3: Missing}


def told(answer: dict[str, Any]) -> MeshdemoError:
    """The error that a supervisor has put into words."""
    return _ERRORS.get(answer["exit_status"], Failed)(answer["error"], answer["remedy"])


class SupervisorClient:
    """Calls the operations of one mesh's supervisor (the methods of `operations.Operations`)."""

    def __init__(self, paths: MeshPaths) -> None:
        self._paths = paths

    def call(self, op: str, *, wait_s: float = 10.0, **arguments: Any) -> Any:
        """Do one operation; its result.

        Args:
            wait_s: how long to wait for the answer.

        Raises:
            MeshdemoError: what the supervisor refused or failed to do; Missing if it does not run, Failed if
                it does not answer in time.
        """
        name = self._paths.name
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(wait_s)
            try:
                connection.connect(str(self._paths.api))
                connection.sendall(json.dumps({"op": op, **arguments}).encode() + b"\n")
                with connection.makefile("rb") as file:
                    line = file.readline()
            except TimeoutError as error:
                raise Failed(
                    f"the supervisor of mesh '{name}' does not answer",
                    f"`meshdemo down --name {name}` ends it whatever its state",
                ) from error
            except OSError as error:
                raise self._not_there() from error
        if not line:
            raise self._not_there()
        answer = json.loads(line)
        if "error" in answer:
            raise told(answer)
        return answer["result"]

    def _not_there(self) -> Missing:
        name = self._paths.name
        if self._paths.spec.exists():
            return Missing(
                f"mesh '{name}' is not running any more: its supervisor is gone",
                f"`meshdemo up --name {name}` starts it again, `meshdemo down --name {name}` removes it",
            )
        return Missing(f"no mesh '{name}' is running", f"run `meshdemo up --name {name}`")
