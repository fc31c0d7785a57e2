"""The guard: kills everything that the supervisor started if the supervisor itself is killed.

It reads a pipe whose only writer is the supervisor, so the end of the file is the supervisor's death, however
it came. All children are in the supervisor's process group; the guard is in one of its own. While it waits
it has nothing imported but this.

(PR_SET_PDEATHSIG would be no better: it is Linux only, is not inherited by grandchildren, and needs code
between fork and exec.)
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path


def main() -> None:
    """Wait on stdin for its end; `argv`: the process group to kill, the mesh's state folder."""
    group, state = int(sys.argv[1]), Path(sys.argv[2])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while os.read(0, 1):
        pass
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    # What left the group (a program of the user's that made a session of its own) is known by its mark.
    from meshdemo.runtime.local.leftovers import kill_all

    kill_all(state)


if __name__ == "__main__":
    main()
