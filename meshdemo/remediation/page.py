"""The report as one HTML page that needs nothing else: no script, nothing from outside, light and dark."""

from __future__ import annotations

import time
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from meshdemo.remediation.report import Incident, Report
from meshdemo.resources import TEMPLATES

_STATES = {"healed": "✓ healed", "gave_up": "✗ gave up", "open": "↻ open"}
_WIDTH, _MARGIN = 1000, 12


def render(report: Report) -> str:
    """The page."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES / "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(time=_time, seconds=_seconds, percent=_percent, marks=_marks)
    return environment.get_template("report.html.j2").render(
        mesh=report.mesh, incidents=report.incidents, totals=report.totals(), states=_STATES
    )


def _time(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share * 100:.2f} %"


def _marks(incident: Incident) -> list[dict[str, Any]]:
    """The events of an incident, placed on its time line."""
    length = (
        max((line["time"] for line in incident.timeline), default=incident.opened_at) - incident.opened_at
    )
    return [
        {
            "x": round(
                _MARGIN + (line["time"] - incident.opened_at) / (length or 1) * (_WIDTH - 2 * _MARGIN)
            ),
            "after": line["time"] - incident.opened_at,
            **line,
        }
        for line in incident.timeline
    ]
