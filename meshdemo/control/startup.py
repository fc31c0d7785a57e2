"""What the control plane's process is started with, wherever it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

ENVIRONMENT: Final[Mapping[str, str]] = {
    # grpc reads this as it is imported. Its newer way to wait for connections hands each message from thread
    # to thread: with a thousand sidecars, a third more processor time for each of them and change.
    "GRPC_EXPERIMENTS": "-event_engine_listener",
}
"""Environment variables; what the user has set comes first."""
