"""Grafana for a mesh: a provisioned data source and two dashboards, made by code.

A dashboard is a list of panels, laid out from left to right; what Grafana wants besides is filled in here.
The queries are over what the control plane exports (`control/metrics.py`) and over the rules that are made
from the policy (`remediation/rules.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

UID = "meshdemo"
_INTERVAL_S = 5
_WIDTH = 24  # of Grafana's grid
_SOURCE = {"type": "prometheus", "uid": UID}

Kind = Literal["stat", "timeseries", "heatmap", "table", "bargauge"]


@dataclass(frozen=True, slots=True)
class Query:
    """A PromQL expression and how its series are called. `instant`: only the newest value."""

    expr: str
    legend: str = ""
    instant: bool = False
    heatmap: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel; `unit` as Grafana names it, `steps` are (value, colour) from low to high."""

    title: str
    queries: tuple[Query, ...]
    kind: Kind = "timeseries"
    unit: str = "short"
    width: int = 8
    height: int = 8
    description: str = ""
    steps: tuple[tuple[float | None, str], ...] = ()
    maximum: float | None = None


def _rate(metric: str, by: str = "", where: str = "") -> str:
    chosen = f"{{{where}}}" if where else ""
    return f"sum{f' by ({by})' if by else ''} (rate({metric}{chosen}[$__rate_interval]))"


def _success(by: str = "", where: str = "", *, client: bool = False) -> str:
    kind = "meshdemo_client_" if client else "meshdemo_"
    failures = _rate(f"{kind}request_failures_total", by, where)
    return f"1 - {failures} / ({_rate(f'{kind}requests_total', by, where)} > 0)"


def _quantile(q: float, by: str = "", where: str = "") -> str:
    labels = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, {_rate('meshdemo_request_duration_seconds_bucket', labels, where)})"


# Symbols and words are Grafana's; the bounds are those of the default objective.
_GOOD: tuple[tuple[float | None, str], ...] = ((None, "red"), (0.95, "orange"), (0.99, "green"))
_BUDGET: tuple[tuple[float | None, str], ...] = ((None, "red"), (0.0, "orange"), (0.5, "green"))
_NOUGHT: tuple[tuple[float | None, str], ...] = ((None, "green"), (1, "orange"))

MESH: tuple[Panel, ...] = (
    Panel("Requests/s", (Query(_rate("meshdemo_requests_total")),), "stat", "reqps", 4, 4),
    Panel("Success", (Query(_success()),), "stat", "percentunit", 4, 4, steps=_GOOD, maximum=1),
    Panel("p99", (Query(_quantile(0.99)),), "stat", "s", 4, 4),
    Panel(
        "Instances in service",
        (Query('sum(meshdemo_instances{state="ready"}) / sum(meshdemo_instances)'),),
        "stat",
        "percentunit",
        4,
        4,
        steps=((None, "red"), (0.99, "green")),
        maximum=1,
    ),
    Panel("Faults in force", (Query("sum(meshdemo_faults)"),), "stat", "short", 4, 4, steps=_NOUGHT),
    Panel(
        "Remedies",
        (Query("sum(increase(meshdemo_remedies_total[$__range])) or vector(0)"),),
        "stat",
        "short",
        4,
        4,
        "What watch did in the time shown.",
        _NOUGHT,
    ),
    Panel(
        "Requests/s by service",
        (Query(_rate("meshdemo_requests_total", "service"), "{{service}}"),),
        unit="reqps",
    ),
    Panel(
        "Success by service",
        (Query(_success("service"), "{{service}}"),),
        unit="percentunit",
        maximum=1,
        description="What the services themselves answered.",
    ),
    Panel(
        "Success for callers",
        (Query(_success("service", client=True), "{{service}}"),),
        unit="percentunit",
        maximum=1,
        description="What callers got after retries.",
    ),
    Panel("p99 by service", (Query(_quantile(0.99, "service"), "{{service}}"),), unit="s"),
    Panel(
        "Error budget left",
        (Query("service:meshdemo_objective_error_budget:ratio", "{{service}}, {{objective}}"),),
        "bargauge",
        "percentunit",
        steps=_BUDGET,
        maximum=1,
    ),
    Panel(
        "Instances",
        (Query("sum by (service, state) (meshdemo_instances)", "{{service}} {{state}}"),),
    ),
    Panel(
        "Who calls whom",
        (Query(_rate("meshdemo_requests_total", "caller, service"), "{{caller}} to {{service}}", True),),
        "table",
        "reqps",
    ),
    Panel(
        "Sidecars",
        (
            Query("sum by (state) (meshdemo_sidecars)", "{{state}}"),
            Query("sum(meshdemo_instances_silent)", "silent"),
        ),
        description="Whether they run what they should; silent: in whatever state, they report nothing.",
    ),
    Panel(
        "Scraped", (Query("sum by (job) (up)", "{{job}}"),), description="Targets that Prometheus reaches."
    ),
)

_THIS = 'service=~"$service"'
SERVICE: tuple[Panel, ...] = (
    Panel("Requests/s", (Query(_rate("meshdemo_requests_total", where=_THIS)),), "stat", "reqps", 4, 4),
    Panel("Success", (Query(_success(where=_THIS)),), "stat", "percentunit", 4, 4, steps=_GOOD, maximum=1),
    Panel(
        "Success for callers",
        (Query(_success(where=_THIS, client=True)),),
        "stat",
        "percentunit",
        4,
        4,
        steps=_GOOD,
        maximum=1,
    ),
    Panel("p50", (Query(_quantile(0.5, where=_THIS)),), "stat", "s", 4, 4),
    Panel("p99", (Query(_quantile(0.99, where=_THIS)),), "stat", "s", 4, 4),
    Panel(
        "Alerts firing",
        (Query(f'count(ALERTS{{alertstate="firing", {_THIS}}}) or vector(0)'),),
        "stat",
        "short",
        4,
        4,
        steps=_NOUGHT,
    ),
    Panel(
        "Requests/s by version",
        (Query(_rate("meshdemo_requests_total", "service, version", _THIS), "{{service}} {{version}}"),),
        unit="reqps",
    ),
    Panel(
        "Success by version",
        (Query(_success("service, version", _THIS), "{{service}} {{version}}"),),
        unit="percentunit",
        maximum=1,
    ),
    Panel(
        "Latency",
        tuple(
            Query(_quantile(q, where=_THIS), name) for q, name in ((0.5, "p50"), (0.95, "p95"), (0.99, "p99"))
        ),
        unit="s",
    ),
    Panel(
        "Requests/s by route",
        (Query(_rate("meshdemo_requests_total", "route", _THIS), "{{route}}"),),
        unit="reqps",
    ),
    Panel(
        "Requests/s by response code",
        (Query(_rate("meshdemo_requests_total", "code", _THIS), "{{code}}"),),
        unit="reqps",
    ),
    Panel(
        "Requests/s by caller",
        (Query(_rate("meshdemo_requests_total", "caller", _THIS), "{{caller}}"),),
        unit="reqps",
    ),
    Panel(
        "Refused and denied",
        (
            Query(
                _rate("meshdemo_client_request_refused_total", "caller", _THIS),
                "{{caller}}: refused by a breaker",
            ),
            Query(
                _rate("meshdemo_request_denied_total", "caller", _THIS), "{{caller}}: denied by access rules"
            ),
        ),
        unit="reqps",
        description="Kept apart from errors of the app.",
    ),
    Panel(
        "How fast the error budget burns",
        (Query(f"service:meshdemo_objective_burn:ratio_rate{{{_THIS}}}", "{{service}}, {{objective}}"),),
        unit="short",
        description="How many times faster than the objective allows; at 1 it lasts exactly its period.",
    ),
    Panel(
        "Latency heatmap",
        (Query(_rate("meshdemo_request_duration_seconds_bucket", "le", _THIS), "{{le}}", heatmap=True),),
        "heatmap",
        "s",
    ),
)


def dashboards(shown: str | None = None) -> dict[str, dict[str, Any]]:
    """The dashboards by name, as Grafana's JSON model; `shown`: the service that is chosen at first."""
    service = {
        "name": "service",
        "label": "Service",
        "type": "query",
        "datasource": _SOURCE,
        "query": {"query": "label_values(meshdemo_requests_total, service)", "refId": "service"},
        "refresh": 2,
        "sort": 1,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": shown or "All", "value": shown or "$__all"},
    }
    return {
        "mesh": _dashboard("mesh", "Mesh", MESH, []),
        "service": _dashboard("service", "Service", SERVICE, [service]),
    }


def files(url: str, folder: str, service: str | None = None) -> dict[str, str]:
    """All files of a Grafana provisioning folder, by path.

    Args:
        url: of Prometheus, as Grafana reaches it.
        folder: where `dashboards/` will lie, as Grafana sees it.
        service: what the dashboard of services shows at first; None: all.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from meshdemo.resources import TEMPLATES

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES / "grafana"),
        undefined=StrictUndefined,
        autoescape=False,  # noqa: S701 (YAML; values go through tojson)
    )
    source = environment.get_template("datasource.yml.j2")
    provider = environment.get_template("provider.yml.j2")
    return {
        "datasources/meshdemo.yml": source.render(uid=UID, url=url, interval_s=_INTERVAL_S) + "\n",
        "dashboards/meshdemo.yml": provider.render(folder=folder) + "\n",
        **{
            f"dashboards/{name}.json": json.dumps(model, indent=2) + "\n"
            for name, model in dashboards(service).items()
        },
    }


def queries() -> Iterable[tuple[str, str, str]]:
    """(dashboard, panel, expression) of every query."""
    for name, panels in (("mesh", MESH), ("service", SERVICE)):
        for panel in panels:
            for query in panel.queries:
                yield name, panel.title, query.expr


def _dashboard(name: str, title: str, panels: tuple[Panel, ...], variables: list[Any]) -> dict[str, Any]:
    return {
        "uid": f"meshdemo-{name}",
        "title": f"meshdemo: {title}",
        "tags": ["meshdemo"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "5s",
        "time": {"from": "now-15m", "to": "now"},
        "timezone": "browser",
        "templating": {"list": variables},
        "annotations": {
            "list": [
                {
                    "name": "Faults in force",
                    "datasource": _SOURCE,
                    "enable": True,
                    "expr": "meshdemo_faults > 0",
                    "iconColor": "orange",
                    "titleFormat": "A fault is in force",
                    "step": "10s",
                }
            ]
        },
        "links": [
            {"type": "dashboards", "tags": ["meshdemo"], "asDropdown": False, "keepTime": True, "title": ""}
        ],
        "panels": list(_laid_out(panels)),
    }


def _laid_out(panels: tuple[Panel, ...]) -> Iterable[dict[str, Any]]:
    x = y = tallest = 0
    for number, panel in enumerate(panels, 1):
        if x + panel.width > _WIDTH:
            x, y, tallest = 0, y + tallest, 0
        yield _panel(number, panel, {"x": x, "y": y, "w": panel.width, "h": panel.height})
        x, tallest = x + panel.width, max(tallest, panel.height)


def _panel(number: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit}
    if panel.kind == "timeseries":
        defaults["min"] = 0
        defaults["custom"] = {"lineWidth": 2, "fillOpacity": 8, "showPoints": "never"}
    if panel.maximum is not None:
        defaults["max"] = panel.maximum
        defaults.pop("min", None)
    if panel.steps:
        steps = [{"value": value, "color": colour} for value, colour in panel.steps]
        defaults["thresholds"] = {"mode": "absolute", "steps": steps}
        defaults["color"] = {"mode": "thresholds"}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "gridPos": place,
        "datasource": _SOURCE,
        "targets": [
            {
                "refId": chr(ord("A") + position),
                "datasource": _SOURCE,
                "expr": query.expr,
                "legendFormat": query.legend or "__auto",
                "instant": query.instant,
                "range": not query.instant,
                "format": "heatmap" if query.heatmap else "table" if panel.kind == "table" else "time_series",
            }
            for position, query in enumerate(panel.queries)
        ],
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": _OPTIONS[panel.kind],
    }


_LAST = {"calcs": ["lastNotNull"], "fields": "", "values": False}
_OPTIONS: dict[Kind, dict[str, Any]] = {
    "stat": {"reduceOptions": _LAST, "colorMode": "value", "graphMode": "area", "textMode": "auto"},
    "timeseries": {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "heatmap": {"calculate": False, "yAxis": {"unit": "s"}, "color": {"mode": "scheme", "scheme": "Oranges"}},
    "table": {"showHeader": True},
    "bargauge": {"reduceOptions": _LAST, "orientation": "horizontal", "displayMode": "gradient"},
}
