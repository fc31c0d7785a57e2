"""How many instances this machine carries: more are refused before anything is begun.

All of them start at once, and a machine that is short of memory or of cores for that answers nobody any more,
the supervisor and the user's own shell included.
"""

from __future__ import annotations

import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import psutil

from meshdemo.errors import BadInput, Missing

INSTANCES_A_CORE = 32  # a start costs about half a second of a core: so many take a quarter of a minute
MB_AN_INSTANCE = 100  # an Envoy of 40 MB and a program of 35 MB, and some room
INOTIFY_AN_ENVOY = 4  # counted, of Envoy 1.40 with one worker; where it gets fewer it aborts
_INOTIFY_OF_PROMETHEUS = 2
_FILES_OF_OURS = 64  # that this process has open, and then some
_INOTIFY = "fs.inotify.max_user_instances"


def most(cores: int, memory_bytes: int) -> int:
    """How many instances a machine with so many cores and so much memory carries."""
    return max(1, min(cores * INSTANCES_A_CORE, memory_bytes // (MB_AN_INSTANCE * 1_000_000)))


def check(instances: int, before: int) -> None:
    """Raise BadInput if `instances` (of the whole mesh) are more than this machine carries, and than run now.

    Args:
        before: how many run now.
    """
    cores, memory = os.cpu_count() or 1, psutil.virtual_memory().total
    limit = most(cores, memory)
    if instances > max(before, limit):
        raise BadInput(
            f"{instances} instances in all: this machine ({cores} cores, {memory / 1e9:.0f} GB) "
            f"carries {limit}",
            "give fewer --replicas, or use a cluster: --runtime kind or kubernetes",
        )


# -- inotify: on Linux the programs of one user have so many instances in all to watch files, often 128 -----


def inotify_needed(instances: int, *, fresh: bool) -> int:
    """The inotify instances that so many more instances need; `fresh`: and the rest of the mesh."""
    rest = INOTIFY_AN_ENVOY + _INOTIFY_OF_PROMETHEUS * (shutil.which("prometheus") is not None)
    return INOTIFY_AN_ENVOY * max(0, instances) + rest * fresh


def check_inotify(instances: int, running: int) -> None:
    """Raise Missing if this user may not have the inotify instances that the Envoys need.

    Args:
        instances: of the whole mesh.
        running: how many run now; 0: nothing of the mesh does.
    """
    needed = inotify_needed(instances - running, fresh=not running)
    free = inotify_free(needed)
    if free < needed:
        raise Missing(
            f"{instances} instances in all: their Envoys need {needed} more inotify instances, and you may "
            f"have {free}",
            f"{inotify_remedy(needed - free)}, give fewer --replicas, or end other programs that watch files",
        )


def inotify_free(wanted: int) -> int:
    """How many of so many inotify instances this user may have besides those that he has.

    It is tried, for the kernel does not say how many there are. (inotify(7): EMFILE.) Where there is no such
    limit, and beyond what this process may open, all.
    """
    if sys.platform != "linux":
        return wanted
    import ctypes
    import resource

    most_here = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _FILES_OF_OURS
    libc = ctypes.CDLL(None, use_errno=True)
    opened: list[int] = []
    try:
        while len(opened) < min(wanted, most_here):
            if (fd := libc.inotify_init1(os.O_CLOEXEC)) < 0:
                return len(opened)
            opened.append(fd)
    finally:
        for fd in opened:
            os.close(fd)
    return wanted


def inotify_remedy(more: int) -> str:
    """What lets this user have so many more."""
    limit = inotify_limit()
    return f"`sudo sysctl {_INOTIFY}={max(512, 2 * (limit + more))}` allows more than {limit or 'now'}"


def inotify_limit() -> int:
    """The inotify instances that all programs of one user may have; 0: not known."""
    with suppress(OSError, ValueError):
        return int(Path("/proc/sys", *_INOTIFY.split(".")).read_text())
    return 0
