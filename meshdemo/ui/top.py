"""The live table of `meshdemo top`: requests of a tap, summed up by who asked whom for what. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from meshdemo.ui import columns, tables
from meshdemo.ui import format as fmt

if TYPE_CHECKING:
    from rich.table import Table

    from meshdemo.control.client import TapEvent

MAX_ROWS = 1000
_Key = tuple[str, str, str, str, str]


@dataclass(slots=True)
class Line:
    """Requests that share caller, service, method, route and path."""

    count: int = 0
    failures: int = 0
    best_ms: float = float("inf")
    worst_ms: float = 0.0
    last_ms: float = 0.0
    seen_at: float = 0.0


class Top:
    """Sums up requests. Keeps at most `MAX_ROWS` lines, so that a path per request does no harm."""

    def __init__(self) -> None:
        self._lines: dict[_Key, Line] = {}

    def add(self, request: TapEvent) -> None:
        """Count one request."""
        path = request["path"].partition("?")[0]
        key = (request["caller"], request["service"], request["method"], request["route"], path)
        line = self._lines.get(key)
        if line is None:
            if len(self._lines) >= MAX_ROWS:
                del self._lines[min(self._lines, key=lambda one: self._lines[one].seen_at)]
            line = self._lines[key] = Line()
        line.count += 1
        line.failures += tables.failed(request)
        line.last_ms = request["latency_ms"]
        line.best_ms = min(line.best_ms, line.last_ms)
        line.worst_ms = max(line.worst_ms, line.last_ms)
        line.seen_at = request["time"]

    def rows(self) -> list[dict[str, Any]]:
        """The lines as JSON, the busiest first."""
        busiest = sorted(self._lines.items(), key=lambda item: (-item[1].count, item[0]))
        return [
            {
                "caller": caller, "service": service, "method": method, "route": route, "path": path,
                "requests": line.count, "success_rate": 1 - line.failures / line.count,
                "best_ms": line.best_ms, "worst_ms": line.worst_ms, "last_ms": line.last_ms,
            }
            for (caller, service, method, route, path), line in busiest
        ]  # fmt: skip

    def table(self, most: int | None = None) -> Table:
        """The lines as a table of at most `most` rows."""
        rows = self.rows()
        table = tables.plain(
            "CALLER",
            "SERVICE",
            "METHOD",
            "ROUTE",
            "PATH",
            ">REQUESTS",
            ">SUCCESS",
            ">BEST",
            ">WORST",
            ">LAST",
        )
        for row in rows[:most]:
            table.add_row(
                row["caller"] or "(unknown)", row["service"], row["method"], row["route"], row["path"],
                str(row["requests"]), columns.share(row["success_rate"]), fmt.latency(row["best_ms"]),
                fmt.latency(row["worst_ms"]), fmt.latency(row["last_ms"]),
            )  # fmt: skip
        return table
