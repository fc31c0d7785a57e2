"""The live table of `meshdemo top`: requests of a tap, summed up by who asked whom for what. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.text import Text

from meshdemo.ui import columns, tables
from meshdemo.ui import format as fmt

if TYPE_CHECKING:
    from rich.table import Table

    from meshdemo.control.client import TapEvent

MAX_ROWS = 1000
# What Envoy's access log says of requests that never reached the service: the breaker was full (UO), no
# instance is healthy (UH), none can be reached (UF), there is no way to any (NR, NC).
_NOT_SENT = frozenset(("UO", "UH", "UF", "NR", "NC"))
_Key = tuple[str, str, str, str, str]


@dataclass(slots=True)
class Line:
    """Requests that share caller, service, method, route and path."""

    count: int = 0  # those that the service saw
    failures: int = 0
    not_sent: int = 0  # those that the caller's sidecar answered itself
    best_ms: float = float("inf")
    worst_ms: float = 0.0
    last_ms: float = 0.0
    seen_at: float = 0.0


class Top:
    """Sums up requests. Keeps at most `MAX_ROWS` lines, so that a path per request does no harm."""

    def __init__(self) -> None:
        self._lines: dict[_Key, Line] = {}

    def add(self, request: TapEvent) -> None:
        """Count one request. What the caller's sidecar answered itself counts if the service never saw it; of
        what was timed out or cut off on the way the service's own sidecar tells.
        """
        not_sent = request["at"] == "caller"
        if not_sent and not _NOT_SENT.intersection(request["flags"].split(",")):
            return
        path = request["path"].partition("?")[0]
        key = (request["caller"], request["service"], request["method"], request["route"], path)
        line = self._lines.get(key)
        if line is None:
            if len(self._lines) >= MAX_ROWS:
                del self._lines[min(self._lines, key=lambda one: self._lines[one].seen_at)]
            line = self._lines[key] = Line()
        line.seen_at = request["time"]
        if not_sent:
            line.not_sent += 1
            return
        line.count += 1
        line.failures += tables.failed(request)
        line.last_ms = request["latency_ms"]
        line.best_ms = min(line.best_ms, line.last_ms)
        line.worst_ms = max(line.worst_ms, line.last_ms)

    def rows(self) -> list[dict[str, Any]]:
        """The lines as JSON, the busiest first."""
        busiest = sorted(self._lines.items(), key=lambda item: (-item[1].count - item[1].not_sent, item[0]))
        return [
            {
                "caller": caller, "service": service, "method": method, "route": route, "path": path,
                "requests": line.count, "not_sent": line.not_sent,
                "success_rate": 1 - line.failures / line.count if line.count else None,
                "best_ms": line.best_ms if line.count else None,
                "worst_ms": line.worst_ms if line.count else None,
                "last_ms": line.last_ms if line.count else None,
            }
            for (caller, service, method, route, path), line in busiest
        ]  # fmt: skip

    def table(self, most: int | None = None) -> Table:
        """The lines as a table of at most `most` rows."""
        rows = self.rows()
        # There is little room for what is seldom there.
        unsent = [">NOT SENT"] if any(row["not_sent"] for row in rows) else []
        table = tables.plain(
            "CALLER", "SERVICE", "METHOD", "ROUTE", "PATH", ">REQUESTS", *unsent, ">SUCCESS", ">BEST",
            ">WORST", ">LAST",
        )  # fmt: skip
        for row in rows[:most]:
            table.add_row(
                row["caller"] or "(unknown)", row["service"], row["method"], row["route"], row["path"],
                str(row["requests"]), *(Text(str(row["not_sent"]), "yellow") for _ in unsent),
                columns.share(row["success_rate"]), fmt.latency(row["best_ms"]),
                fmt.latency(row["worst_ms"]), fmt.latency(row["last_ms"]),
            )  # fmt: skip
        return table
