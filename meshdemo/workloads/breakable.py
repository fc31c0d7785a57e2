"""What makes a workload slow or faulty, as a bad release would be: LAT_MS and ERR_RATE of its environment.

LAT_MS adds latency to every answer, ERR_RATE makes that share of them an error. An injected error takes the
latency too: it stands for a dependency that fails after the work, not for one that refuses it.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from meshdemo.workloads.settings import Environment


@dataclass(frozen=True, slots=True)
class Breakage:
    """How slow and how faulty; nothing of both by default."""

    latency_s: float = 0.0
    error_share: float = 0.0

    @staticmethod
    def of(env: Environment) -> Breakage:
        """From LAT_MS (ms) and ERR_RATE (0 to 1). Raises BadSetting."""
        latency_ms = env.number("LAT_MS", 0.0, allowed="milliseconds, 0 or more", low=0.0)
        share = env.number("ERR_RATE", 0.0, allowed="a share from 0 to 1", low=0.0, high=1.0)
        return Breakage(latency_ms / 1000, share)

    def strike(self, sleep: Callable[[float], object]) -> bool:
        """Take the latency; whether this request fails."""
        if self.latency_s:
            sleep(self.latency_s)
        return random.random() < self.error_share  # noqa: S311 - no secret hangs on it
