"""The report as one HTML page that needs nothing else: no script, nothing from outside, light and dark."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from meshdemo.remediation.report import Incident, Report
from meshdemo.resources import TEMPLATES

_STATES = {"healed": "✓ healed", "gave_up": "✗ gave up", "open": "↻ open"}
_SYMBOLS = {"violated": "✗", "gave_up": "✗", "error": "✗", "acted": "◆", "verified": "✓", "healed": "✓"}
_MARGIN = 1.5  # percent of the time line's length, on both sides
_CLOSE = 4.0  # marks that are nearer to each other than this (percent) are one
_ROWS = 3  # of labels below the line, in turn
_SHARES = ("bad_share", "allowed", "surely_above")


def render(report: Report) -> str:
    """The page."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES / "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(time=_time, seconds=_seconds, percent=_percent, marks=_marks, words=_words)
    return environment.get_template("report.html.j2").render(
        mesh=report.mesh, incidents=report.incidents, totals=report.totals(), states=_STATES
    )


def _time(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share * 100:.2f} %"


def _words(evidence: Mapping[str, Any]) -> str:
    """Evidence as it reads: shares in percent, and nothing of what says nothing."""
    parts = []
    for key, value in evidence.items():
        if value is None or (key == "overdue" and not value):
            continue
        name, shown = key.replace("_", " "), value
        if key in _SHARES:
            shown = f"{value * 100:.4g} %"
        elif key.endswith(("_s", "_ms")):
            name, _, unit = key.rpartition("_")
            shown = f"{value:.4g} {unit}"
        parts.append(f"{name.replace('_', ' ')} {shown}")
    return ", ".join(parts)


def _marks(incident: Incident) -> list[dict[str, Any]]:
    """The events of an incident on its time line: where (percent of its length), in words, and in which row
    these are. Those that lie close together are one mark, which looks like the last of them.
    """
    begin = incident.opened_at
    length = max((line["time"] for line in incident.timeline), default=begin) - begin
    marks: list[dict[str, Any]] = []
    for line in incident.timeline:
        after = line["time"] - begin
        x = _MARGIN + after / (length or 1) * (100 - 2 * _MARGIN)
        name = line["event"].replace("_", " ")
        if marks and x - marks[-1]["x"] < _CLOSE:
            mark = marks[-1]
            mark["names"].append(name)
        else:
            mark = {"x": x, "after": after, "names": [name], "texts": [], "row": len(marks) % _ROWS}
            marks.append(mark)
        mark["texts"].append(f"{_seconds(after)}: {line['text']}")
        mark["event"], mark["symbol"] = line["event"], _SYMBOLS.get(line["event"], "·")
    for mark in marks:
        mark["anchor"] = "start" if mark["x"] < 30 else "end" if mark["x"] > 70 else "middle"
        mark["label"] = f"{mark['symbol']} {', '.join(mark['names'])} {_seconds(mark['after'])}"
    return marks
