"""How many instances this machine carries: more are refused before anything is begun.

All of them start at once, and a machine that is short of memory or of cores for that answers nobody any more,
the supervisor and the user's own shell included.
"""

from __future__ import annotations

import os

import psutil

from meshdemo.errors import BadInput

INSTANCES_A_CORE = 32  # a start costs about half a second of a core: so many take a quarter of a minute
MB_AN_INSTANCE = 100  # an Envoy of 40 MB and a program of 35 MB, and some room


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
