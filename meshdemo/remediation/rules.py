"""A policy's objectives as Prometheus rules: what watch heals within seconds, Prometheus tells people about.

An alert fires when a service burns its error budget too fast, over a long window (it matters) and over a
short one (it still goes on): multi-window, multi-burn-rate alerts, "Alerting on SLOs", chapter 5 of
https://sre.google/workbook/alerting-on-slos/. A burn rate of 1 spends the budget exactly in its period.

The workbook's long windows follow from how much of the budget may be spent before somebody is told: 2 % and
5 % for a page, 10 % for a ticket, since factor x window / period is the share spent. So they are for any
period. Left out are burn rates that nobody could measure, for their long window holds fewer than six scrapes
(of the 1 h that policies have unless they say otherwise, 2 % are gone in 5 s at 14.4 times too fast), and
those that the objective leaves no room for: where 25 % may be bad, nothing can burn more than four times too
fast. The fastest that is left pages. Short windows are a twelfth of the long ones, and never less than four
scrapes, which is what a rate needs to survive one that is missed.

Objectives about latency count what is above the very bucket bound that watch judges them by.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jinja2

from meshdemo.control.goals import Objective
from meshdemo.control.metrics import le_of
from meshdemo.control.signals import effective_bound_ms
from meshdemo.remediation.policy import Policy
from meshdemo.resources import TEMPLATES

# Burn rate, share of the budget that it may spend before it is told, and what becomes of the alert.
_BURNS: tuple[tuple[float, float, str], ...] = (
    (14.4, 0.02, "page"),
    (6.0, 0.05, "page"),
    (3.0, 0.10, "ticket"),
    (1.0, 0.10, "ticket"),
)
_SHORT = 1 / 12  # of the long window
_LEAST_LONG, _LEAST_SHORT = 6, 4  # scrapes
_REACHABLE = 0.9  # a burn rate that needs a larger share of bad events than this is out of reach
SCRAPE_S = 5  # as templates/prometheus and templates/kubernetes have it
_INTERVAL_S = 5


@dataclass(frozen=True, slots=True)
class Burn:
    """How fast is too fast, over which windows (seconds); `spent`: share of the budget gone by then, 0..1."""

    factor: float
    long_s: int
    short_s: int
    severity: str
    spent: float


def burns(allowed: float, period_s: float, scrape_s: float = SCRAPE_S) -> list[Burn]:
    """The alerts of an objective that allows this share of bad events in this period, fastest first."""
    least_long, least_short = math.ceil(_LEAST_LONG * scrape_s), math.ceil(_LEAST_SHORT * scrape_s)
    found: list[Burn] = []
    for factor, spent, severity in _BURNS:
        long = round(spent * period_s / factor)
        last = factor == _BURNS[-1][0]
        if last and not found:
            long = max(long, least_long)  # a period so short that even this one is stretched
        if last or (long >= least_long and factor * allowed < _REACHABLE):
            short = min(max(round(long * _SHORT), least_short), long - 1)
            share = factor * long / period_s
            found.append(Burn(factor, long, short, severity if found else "page", share))
    return found


def render(policy: Policy, scrape_s: float = SCRAPE_S) -> str:
    """The rules of a policy, as a Prometheus rule file.

    Args:
        scrape_s: how often Prometheus scrapes the control plane; it bounds the windows from below.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES / "prometheus"),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # noqa: S701 (YAML; values go through tojson)
    )
    requests = [objective for objective in policy.objectives if objective.in_service is None]
    instances = [objective for objective in policy.objectives if objective.in_service is not None]
    return environment.get_template("rules.yml.j2").render(
        interval=_duration(_INTERVAL_S),
        objectives=[_about_requests(objective, scrape_s) for objective in requests],
        in_service=[_about_instances(objective) for objective in instances],
    )


def _about_requests(objective: Objective, scrape_s: float) -> dict[str, object]:
    alerts = burns(objective.allowed, objective.budget, scrape_s)
    windows = sorted({window for burn in alerts for window in (burn.long_s, burn.short_s)})
    label = f'objective="{objective.name}"'
    bad = partial(_bad_share, objective)

    def above(window_s: int, factor: float) -> str:
        bound = round(factor * objective.allowed, 6)
        return f"service:meshdemo_objective_bad:ratio_rate{_duration(window_s)}{{{label}}} > {bound:g}"

    return {
        "name": objective.name,
        "text": objective.text,
        "period": _duration(objective.budget),
        "windows": [_duration(window) for window in windows],
        "bad": bad,
        "budget_left": f"1 - {bad(_duration(objective.budget))} / {objective.allowed:.6g}",
        "burn": f"{bad(_duration(alerts[0].long_s))} / {objective.allowed:.6g}",
        "alerts": [
            {
                "spent": f"{burn.spent * 100:.3g} %",
                "factor": f"{burn.factor:g}",
                "severity": burn.severity,
                "long": _duration(burn.long_s),
                "short": _duration(burn.short_s),
                "spent_in": _duration(math.ceil(objective.budget / burn.factor)),
                "expr": f"{above(burn.long_s, burn.factor)} and {above(burn.short_s, burn.factor)}",
            }
            for burn in alerts
        ],
    }


def _bad_share(objective: Objective, window: str) -> str:
    """The share of bad requests over a window, by service; 0..1."""
    where = _selector(objective)

    def total(metric: str, *labels: str) -> str:
        chosen = ", ".join((*where, *labels))
        return f"sum by (service) (rate({metric}{{{chosen}}}[{window}]))"

    if objective.latency is not None:
        prefix = "meshdemo_client_request" if objective.effective else "meshdemo_request"
        fast = total(f"{prefix}_duration_seconds_bucket", f'le="{_bound(objective.latency.below)}"')
        return f"(1 - {fast} / ({total(f'{prefix}_duration_seconds_count')} > 0))"
    prefix = "meshdemo_client_" if objective.effective else "meshdemo_"
    failures = total(f"{prefix}request_failures_total")
    return f"({failures} / ({total(f'{prefix}requests_total')} > 0))"


def _about_instances(objective: Objective) -> dict[str, str]:
    where = ", ".join(_selector(objective))
    ready = f'sum by (service) (meshdemo_instances{{{where}{", " if where else ""}state="ready"}})'
    expected = f"sum by (service) (meshdemo_instances{{{where}}})"
    return {
        "name": objective.name,
        "text": objective.text,
        "ratio": f"{ready} / ({expected} > 0)",
        "expr": f'service:meshdemo_instances_in_service:ratio{{objective="{objective.name}"}} '
        f"< {objective.in_service:g}",
    }


def _selector(objective: Objective) -> tuple[str, ...]:
    """The services that an objective speaks of, as label matchers."""
    matchers = []
    if "*" not in objective.services:
        matchers.append(f'service=~"{_regex(objective.services)}"')
    if objective.except_:
        matchers.append(f'service!~"{_regex(objective.except_)}"')
    return tuple(matchers)


def _regex(patterns: Sequence[str]) -> str:
    """Patterns of a policy as one regular expression; Prometheus anchors it at both ends."""
    return "|".join(_one_regex(pattern) for pattern in patterns)


def _one_regex(pattern: str) -> str:
    parts = re.findall(r"\[!?[^\]]+\]|.", pattern)
    words = {"*": ".*", "?": "."}
    return "".join(
        part.replace("[!", "[^") if len(part) > 1 else words.get(part, re.escape(part).replace("\\-", "-"))
        for part in parts
    )


def _bound(threshold_s: float) -> str:
    """The bucket bound that watch judges a threshold by, as it stands in the label `le`."""
    return le_of(effective_bound_ms(threshold_s * 1000))


def _duration(seconds: float) -> str:
    """As Prometheus writes durations: `30s`, `5m`, `1h`."""
    whole = max(1, round(seconds))
    for unit, length in (("d", 86_400), ("h", 3600), ("m", 60)):
        if whole % length == 0:
            return f"{whole // length}{unit}"
    return f"{whole}s"
