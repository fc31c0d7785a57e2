"""Stands by while a canary runs: if whoever runs it is killed, the stable version gets all traffic back.

`python -m meshdemo.remediation.canary_guard MESH SERVICE SPLIT` (SPLIT as JSON) waits on its stdin. A line
`done` means that the canary has ended in order. An end without it means that the canary's process is gone,
however it went, for the kernel closes the pipe in any case; the split is then set, again and again until the
control plane takes it.
"""

from __future__ import annotations

import json
import sys
import time

from meshdemo.errors import BadInput, MeshdemoError
from meshdemo.runtime.select import control

_PATIENCE_S = 120.0
_PAUSE_S = 0.2


def main() -> None:
    """Wait, and restore the split if it comes to that."""
    mesh, service, split = sys.argv[1:4]
    if any(line.strip() == "done" for line in sys.stdin):
        return
    give_up = time.monotonic() + _PATIENCE_S
    while time.monotonic() < give_up:
        try:
            client = control(mesh)
            client.set_traffic(service, {"split": json.loads(split)})
            client.post_event(
                {
                    "event": "canary",
                    "by": "canary",
                    "service": service,
                    "text": "the canary was killed; the stable version has all traffic again",
                }
            )
            return
        except BadInput:
            return  # the service or a version is gone: there is nothing left to restore
        except (MeshdemoError, OSError):
            time.sleep(_PAUSE_S)


if __name__ == "__main__":
    main()
