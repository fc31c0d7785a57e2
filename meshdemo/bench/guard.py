"""Removes whatever a run of the benchmark has started, once that run has ended, however it ended.

It reads a pipe whose only writer is the benchmark. The end of the file is the end of the run: closed when all
is done, or because the benchmark was killed. Either way everything that carries the run's mark in its
environment is ended and the run's folder is removed; one way for both keeps the rarer one working.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

MARK = "MESHDEMO_BENCH"
_PATIENCE_S = 10.0


def main() -> None:
    """Wait on stdin for its end; `argv`: the run's mark and its folder."""
    mark, folder = sys.argv[1], Path(sys.argv[2])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while os.read(0, 1):
        pass
    remove(mark, folder)


def remove(mark: str, folder: Path) -> None:
    """End the run's meshes and processes, and remove its files."""
    from meshdemo.errors import MeshdemoError
    from meshdemo.runtime.select import everything

    for runtime in everything():  # MESHDEMO_HOME is a folder of the run
        with suppress(MeshdemoError, OSError):
            runtime.down()
    _kill_all(mark)
    shutil.rmtree(folder, ignore_errors=True)


def _kill_all(mark: str) -> None:
    import psutil

    give_up = time.monotonic() + _PATIENCE_S
    while time.monotonic() < give_up:
        found = []
        for process in psutil.process_iter():
            # A process of another user refuses to be read, one that just ended is not there any more.
            with suppress(psutil.Error, OSError):
                if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                    continue
                if process.environ().get(MARK) == mark:
                    found.append(process)
        if not found:
            return
        for process in found:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, timeout=0.5)


if __name__ == "__main__":
    main()
