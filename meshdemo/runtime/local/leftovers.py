"""Finds and kills what a mesh left running.

Every process of a mesh carries a mark in its environment, which names the mesh's state folder. That needs
no file with process ids, which could be stale (a reused id) or not yet written (an `up` killed halfway).
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

import psutil

MARK = "MESHDEMO_STATE"
_PATIENCE_S = 5.0


def find(state: Path) -> list[psutil.Process]:
    """The living processes of the mesh in this folder, our own and its ancestors left out."""
    ours = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter():
        # A process of another user refuses to be read, one that just ended is not there any more.
        with suppress(psutil.Error, OSError):
            if process.pid in ours or process.environ().get(MARK) != str(state):
                continue
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def kill_all(state: Path) -> int:
    """Kill them (SIGKILL) until there is none; how many there were. Gives up after 5 s."""
    killed: set[int] = set()
    give_up = time.monotonic() + _PATIENCE_S
    while (found := find(state)) and time.monotonic() < give_up:
        for process in found:
            killed.add(process.pid)
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(found, timeout=0.5)
    return len(killed)


def alive(pid: int, create_time: float) -> bool:
    """Whether this very process lives; a later one with the same id does not count."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - create_time) < 0.1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
