"""An alternative to watch: Envoy's outlier detection, with Envoy's own defaults.

What they are, and by which runtime values they can be changed in a sidecar that runs:
https://www.envoyproxy.io/docs/envoy/latest/api-v3/config/cluster/v3/outlier_detection.proto
https://www.envoyproxy.io/docs/envoy/latest/configuration/upstream/cluster_manager/cluster_runtime

But for one: by default at most a tenth of a service may be left alone, which of two instances is none.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from urllib.parse import urlencode

from meshdemo.errors import Failed
from meshdemo.runtime.local import probe

_ANSWER_S = 10.0  # a sidecar under load on a busy machine
_DEFAULTS = {
    "consecutive_5xx": 5,
    "enforcing_consecutive_5xx": 100,
    "consecutive_gateway_failure": 5,
    "enforcing_consecutive_gateway_failure": 0,
    "interval_ms": 10_000,
    "base_ejection_time_ms": 30_000,
    "max_ejection_time_ms": 300_000,
    "max_ejection_percent": 50,
    "enforcing_success_rate": 100,
    "success_rate_minimum_hosts": 5,
    "success_rate_request_volume": 100,
    "success_rate_stdev_factor": 1900,
}


def as_in_envoy(admin: Path) -> None:
    """Have a sidecar detect outliers by these, not by what the mesh gives it. Raises Failed if it refuses."""
    values = {f"outlier_detection.{name}": value for name, value in _DEFAULTS.items()}
    path = f"/runtime_modify?{urlencode(values)}"
    answer = asyncio.run(probe.ask(admin, path, method="POST", timeout_s=_ANSWER_S))
    if answer.status != 200 or answer.body.strip() != b"OK":
        raise Failed(
            f"the sidecar at {admin} takes no runtime values: {answer.body.decode(errors='replace')}"
        )


def ejections(admin: Path) -> int:
    """How often a sidecar has left an instance alone. Raises Failed if it does not say."""
    path = "/stats?filter=outlier_detection.ejections_enforced_total&format=json"
    answer = asyncio.run(probe.ask(admin, path, timeout_s=_ANSWER_S))
    if answer.status != 200:
        raise Failed(f"the sidecar at {admin} tells no statistics")
    return sum(one.get("value", 0) for one in json.loads(answer.body)["stats"])
