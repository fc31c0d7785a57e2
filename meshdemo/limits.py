"""How much may be asked for: the command line refuses more before anything is begun, the control plane too.

They stand apart so that the command line need not load a control plane for them.
"""

from __future__ import annotations

MAX_LATENCY_MS = 3_600_000.0  # of a fault
MAX_FAULT_S = 365 * 86_400.0
MAX_RPS = 100_000.0  # of one that makes load
