"""The traffic rules as they are in force: what was set, and where nothing was, the defaults. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from meshdemo.control.model import Intent, MeshState, Traffic
from meshdemo.control.render.split import effective_split

if TYPE_CHECKING:
    from meshdemo.control.client import RuleRow

DEFAULTS: Mapping[str, Any] = {
    "split": {}, "timeout_ms": 15_000, "retries": 2, "max_connections": 4096, "max_pending": 4096,
    "max_requests": 4096, "mirror": {}, "outlier": True,
}  # fmt: skip
"""What templates/envoy does where nothing is set (a test compares); retries: of what reached no app."""

_OF_TCP = ("split", "max_connections", "max_pending", "outlier")


def in_force(mesh: MeshState, intent: Intent) -> dict[str, dict[str, RuleRow]]:
    """By service and field: the value, whether it was set or is the default, and since when it was set."""
    rows: dict[str, dict[str, RuleRow]] = {}
    for name, service in mesh.app.services.items():
        traffic = intent.traffic.get(name, Traffic())
        rows[name] = {}
        for field in _OF_TCP if service.without_requests else DEFAULTS:
            value = getattr(traffic, field)
            is_set = value not in (None, {})
            rows[name][field] = {
                "value": value if is_set else DEFAULTS[field],
                "origin": "set" if is_set else "default",
                "since": traffic.field_since.get(field),
            }
        if ready := mesh.ready_by_version(name, intent.ejected):
            split = effective_split(service, traffic, ready)
            whole = sum(split.values())
            rows[name]["split"]["value"] = {
                version: round(weight * 100 / whole) for version, weight in split.items()
            }
    return rows
