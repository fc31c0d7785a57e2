"""Tables and lines that commands print. Data in, rich renderables out.

Rows of signals are made of the same columns as those of watch's dashboard (columns.py).

Every state is a symbol and a word; colour only repeats it. Tables have no frame, so that they read well and
can be cut with awk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from meshdemo.ui import columns
from meshdemo.ui import format as fmt

if TYPE_CHECKING:
    from meshdemo.control.client import AccessRow, EdgeRow, RuleRow, SignalRow, TapEvent
    from meshdemo.control.model import Fault, Traffic


def plain(*headings: str) -> Table:
    """A table without a frame; a heading that starts with '>' is for figures, aligned to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for heading in headings:
        justify: Any = "right" if heading.startswith(">") else "left"
        # A name is never cut: a row that does not fit is folded, and the terminal can be made wider.
        figures = heading.startswith(">")
        table.add_column(heading.removeprefix(">"), justify=justify, no_wrap=figures, overflow="fold")
    return table


def signals(rows: Sequence[SignalRow], by: str) -> Table:
    """`stat`: one row for each scope. Columns that would be the same for all rows are left out."""
    keys = ["service"] if by == "service" else ["service", by]
    if by == "instance":
        keys = ["service", "version", "instance"]
    effective = any(row["effective_success_rate"] is not None for row in rows)
    tcp = any(row.get("connections") or row.get("received_bytes") for row in rows)
    notes = [_note(row) for row in rows]
    table = plain(
        *(key.upper() for key in keys),
        *(f">{column.heading}" for column in columns.RATES),
        *([">EFFECTIVE"] if effective else []),
        *(f">{column.heading}" for column in columns.LATENCIES),
        *([">CONN", ">IN", ">OUT"] if tcp else []),
        *(["STATE"] if any(notes) else []),
    )
    for row, note in zip(rows, notes, strict=True):
        labels: Mapping[str, Any] = row
        cells: list[str | Text] = [str(labels.get(key) or fmt.NOTHING) for key in keys]
        figures = columns.Figures.of_row(row)
        cells += [column.cell(figures) for column in columns.RATES]
        cells += [columns.share(row["effective_success_rate"])] if effective else []
        cells += [column.cell(figures) for column in columns.LATENCIES]
        if tcp:
            cells.append(str(row.get("connections") or fmt.NOTHING))
            cells += [fmt.size(row.get("received_bytes")), fmt.size(row.get("sent_bytes"))]
        table.add_row(*cells, *([note] if any(notes) else []))
    return table


def _note(row: SignalRow) -> Text:
    if row["silent"]:
        return Text("? silent", "yellow")
    if row["ejected"]:
        return Text("⏏ ejected", "magenta")
    note = columns.note(columns.Figures.of_row(row))
    if row["outlier_ejected"]:
        count = "" if row.get("instance") else f"{row['outlier_ejected']} "
        note.append(f"{'  ' if note else ''}! {count}ejected by Envoy", "yellow")
    if row["mirrored"]:
        failed = f" ({row['mirrored_failures']} failed)" if row["mirrored_failures"] else ""
        note.append(f"{'  ' if note else ''}+ {row['mirrored']} mirrored{failed}", "cyan")
    return note


def edges(rows: Sequence[EdgeRow]) -> Table:
    """`edges`: who calls whom."""
    table = plain("CALLER", "SERVICE", "SECURED", ">RPS", ">SUCCESS", ">P50", ">P99", ">DENIED", "IDENTITIES")
    for row in rows:
        secured = Text("✓ mTLS", "green") if row["secured"] else Text("✗ no", "red")
        table.add_row(
            row["caller"] or "(unknown)", row["service"], secured, fmt.rate(row["rps"]),
            columns.share(row["success_rate"]), fmt.latency(row["p50_ms"]), fmt.latency(row["p99_ms"]),
            str(row["denied"] or fmt.NOTHING),
            f"{row['identity'] or fmt.NOTHING} → {row['service_identity'] or fmt.NOTHING}",
        )  # fmt: skip
    return table


def access(rows: Sequence[AccessRow]) -> Table:
    """`access show`: who may call whom."""
    table = plain("CALLER", "SERVICE", "ACCESS", "SAID BY")
    for row in rows:
        allowed = Text("✓ allowed", "green") if row["allowed"] else Text("✗ denied", "red")
        said_by = "meshdemo access" if row["explicit"] else "app file"
        table.add_row(row["caller"], row["service"], allowed, said_by)
    return table


def failed(request: TapEvent) -> bool:
    """Whether a single request failed: 5xx, no answer at all (status 0), or a gRPC error status."""
    return request["status"] >= 500 or request["status"] == 0 or bool(request["grpc_status"])


# Why Envoy answered a request by itself, or what it did to it; as in web/words.js.
_FLAG_WORDS = {
    "UO": "refused by a breaker", "UH": "no healthy instance", "UF": "no connection",
    "UC": "connection broke", "UR": "reset by the service", "URX": "retries used up", "UT": "timed out",
    "UMSDR": "timed out", "DT": "timed out", "DC": "caller gave up", "DR": "caller gave up",
    "FI": "fault: error", "DI": "fault: delay", "NR": "no route", "NC": "no such version", "UAEX": "denied",
}  # fmt: skip


def tap_line(request: TapEvent) -> Text:
    """`tap`: one request on one line."""
    status = str(request["status"])
    if request["grpc_status"] is not None:
        status += f" grpc {request['grpc_status']}"
    line = Text(f"{fmt.clock(request['time'])}  ")
    line.append(f"{request['caller'] or '(unknown)'} → {request['instance'] or request['service']}  ")
    line.append(f"{request['method']} {request['path']}  ")
    line.append(status, "red" if failed(request) else "green")
    line.append(f"  {fmt.latency(request['latency_ms'])}")
    if request["flags"] not in {"", "-"}:
        flags = request["flags"].split(",")
        words = ", ".join(_FLAG_WORDS[flag] for flag in flags if flag in _FLAG_WORDS)
        line.append(f"  {request['flags']}{f' ({words})' if words else ''}", "yellow")
    return line


def faults(rows: Iterable[Fault]) -> Table:
    """`fault list`: the faults in force."""
    table = plain("ID", "AT", "WHERE", "WHAT", "SINCE", "UNTIL")
    for fault in rows:
        until = fmt.clock(fault.expires_at) if fault.expires_at else "cleared"
        where, what = _fault_place(fault), _fault_harm(fault)
        since = "starting" if fault.starting else fmt.clock(fault.started_at)
        table.add_row(fault.id, fault.at, where, what, since, until)
    return table


def fault_words(fault: Fault) -> str:
    """A fault as a phrase: `200 ms and 20% errors on service-b v2 at the mesh`."""
    at = {"app": " in the app", "mesh": " in the sidecars", "process": ""}[fault.at]
    return f"{_fault_harm(fault)} on {_fault_place(fault)}{at}"


def _fault_harm(fault: Fault) -> str:
    if fault.kind != "degrade":
        return {"crash": "crash", "hang": "hang"}[fault.kind]
    parts = []
    if fault.lat_ms:
        partly = f" for {fmt.percent(fault.share, 0)}" if fault.share < 1 else ""
        parts.append(f"{fault.lat_ms:.7g} ms{partly}")
    if fault.err_rate:
        parts.append(f"{fault.err_rate * 100:g}% errors")
    return " and ".join(parts)


def _fault_place(fault: Fault) -> str:
    place = fault.instance or " ".join(filter(None, (fault.service, fault.version)))
    if fault.route:
        place += f" {fault.route}"
    return f"{place} for {fault.caller}" if fault.caller else place


def traffic(rules: Mapping[str, Mapping[str, RuleRow]]) -> Table:
    """`traffic show`: what is in force, a row for each rule of a service."""
    table = plain("SERVICE", "RULE", "VALUE", "ORIGIN", "SINCE")
    for service, fields in rules.items():
        for name, rule in fields.items():
            since = fmt.clock(rule["since"]) if rule["since"] else fmt.NOTHING
            origin = Text(rule["origin"], "" if rule["origin"] == "set" else "dim")
            table.add_row(service, _RULES.get(name, name.replace("_", " ")), _rule(name, rule), origin, since)
    return table


_RULES = {"timeout_ms": "timeout", "outlier": "outlier detection"}


def _rule(name: str, rule: RuleRow) -> str:
    value = rule["value"]
    match name:
        case "split":
            return ", ".join(f"{version} {weight}%" for version, weight in value.items()) or fmt.NOTHING
        case "mirror":
            return ", ".join(f"{v} {fmt.percent(s, 0)}" for v, s in value.items()) or fmt.NOTHING
        case "timeout_ms":
            return f"{value} ms"
        case "retries" if rule["origin"] == "default":
            return f"{value}, of what no app has answered"
        case "outlier":
            return "on" if value else "off"
    return str(value)


def traffic_words(rule: Traffic) -> str:
    """Traffic rules as a phrase, those that are not set left out."""
    parts = []
    if rule.split:
        parts.append("split " + ", ".join(f"{version} {weight}%" for version, weight in rule.split.items()))
    if rule.mirror:
        parts.append("mirror " + ", ".join(f"{v} {fmt.percent(s, 0)}" for v, s in rule.mirror.items()))
    if rule.timeout_ms is not None:
        parts.append(f"timeout {rule.timeout_ms} ms")
    for name in ("retries", "max_connections", "max_pending", "max_requests"):
        if (value := getattr(rule, name)) is not None:
            parts.append(f"{name.replace('_', ' ')} {value}")
    if rule.outlier is not None:
        parts.append(f"outlier detection {'on' if rule.outlier else 'off'}")
    return "; ".join(parts) or "defaults"
