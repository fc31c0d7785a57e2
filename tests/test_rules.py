"""Prometheus rules of a policy, put to promtool: are they sound, and do they fire when they should?"""

from __future__ import annotations

import itertools
import math
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from meshdemo.control import metrics
from meshdemo.control.metrics import Totals
from meshdemo.control.signals import BOUNDS_MS, Cell, Histogram, Sample
from meshdemo.remediation import rules
from meshdemo.remediation.judge import bad_of
from meshdemo.remediation.policy import Policy
from meshdemo.remediation.policyfile import load
from meshdemo.resources import DEFAULT_POLICY


@pytest.fixture(scope="module")
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("promtool is missing: apt-get install prometheus")
        pytest.skip("needs promtool")
    return found


def policy(**objective: Any) -> Policy:
    return Policy.model_validate({"objectives": [{"name": "good", **objective}]})


def check(promtool: str, folder: Path, text: str) -> None:
    (folder / "rules.yml").write_text(text)
    done = subprocess.run(
        [promtool, "check", "rules", folder / "rules.yml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "objective",
    [
        {"success": "99.9%", "budget": "30d"},
        {"success": "75%", "budget": "1m"},
        {"success": "50%"},
        {"success": "99%", "effective": True},
        {"latency": {"below": "300ms", "share": "95%"}},
        {"latency": {"below": "50ms", "share": "99%"}, "effective": True, "budget": "7d"},
        {"in_service": "100%"},
        {"in_service": "50%", "services": ["a"]},
        {"success": "99%", "services": ["web-*", "a?c", "x[12]", "y[!34]"], "except": ["web-9"]},
    ],
)
def test_rules_of_any_objective_are_sound(promtool: str, tmp_path: Path, objective: dict[str, Any]) -> None:
    check(promtool, tmp_path, rules.render(policy(**objective)))


def test_rules_of_the_default_policy_are_sound(promtool: str, tmp_path: Path) -> None:
    check(promtool, tmp_path, rules.render(load(DEFAULT_POLICY)))


@given(st.floats(0.0001, 0.99), st.floats(60, 30 * 86_400), st.floats(1, 60))
def test_what_is_spent_when_an_alert_fires_is_what_the_workbook_allows(
    allowed: float, period_s: float, scrape_s: float
) -> None:
    found = rules.burns(allowed, period_s, scrape_s)
    assert found[0].severity == "page"
    assert len(found) == 1 or all(burn.factor * allowed < 0.9 for burn in found[:-1])
    assert all(a.long_s < b.long_s and a.factor > b.factor for a, b in itertools.pairwise(found))
    wanted = {14.4: 0.02, 6: 0.05, 3: 0.1, 1: 0.1}
    for burn in found:
        assert burn.spent == pytest.approx(burn.factor * burn.long_s / period_s)
        stretched = len(found) == 1 and burn.long_s == math.ceil(6 * scrape_s)
        if not stretched:
            assert burn.spent == pytest.approx(wanted[burn.factor], rel=0.1)
        assert 2 * scrape_s <= burn.short_s < burn.long_s
        assert burn.long_s >= 6 * scrape_s or burn.factor == 1


def test_thirty_days_have_the_windows_of_the_workbook() -> None:
    found = rules.burns(0.001, 30 * 86_400)
    assert [(b.factor, b.long_s, b.short_s, b.severity) for b in found] == [
        (14.4, 3600, 300, "page"),
        (6, 21_600, 1800, "page"),
        (3, 86_400, 7200, "ticket"),
        (1, 259_200, 21_600, "ticket"),
    ]


def test_an_hour_has_what_can_be_measured() -> None:
    found = rules.burns(0.01, 3600)
    assert [(b.factor, b.long_s, b.short_s, b.severity, round(b.spent, 3)) for b in found] == [
        (6, 30, 20, "page", 0.05),
        (3, 120, 20, "ticket", 0.1),
        (1, 360, 30, "ticket", 0.1),
    ]
    # Scraped twice a minute, the short windows have to be longer, and only the slow ones are left.
    assert [(b.factor, b.long_s, b.short_s) for b in rules.burns(0.01, 3600, 30)] == [(1, 360, 120)]
    assert "[20s]" not in rules.render(policy(success="99%"), 30)


@pytest.mark.parametrize("threshold_ms", [0.5, 1, 250, 300, 305, 440, 750, 1000, 20_000, 60_000])
def test_prometheus_counts_what_watch_counts(threshold_ms: float) -> None:
    """Whatever the threshold: the rule's bucket holds exactly what watch does not call too slow."""
    objective = policy(latency={"below": f"{threshold_ms}ms", "share": "95%"}).objectives[0]
    [le] = re.findall(r'le="([^"]+)"', rules._bad_share(objective, "1m"))
    one_each = Histogram(dict.fromkeys(range(len(BOUNDS_MS) + 1), 1))
    cell = Cell(True, "a", "work", requests=one_each.total, latency=one_each)
    totals = Totals()
    totals.sample(Sample("b-1", "b", "v1", 1, 0, 1, cells=(cell,)))
    page = metrics.page(totals, [], revision=1, faults=0, trouble=False).decode()
    [fast] = re.findall(
        rf'^meshdemo_request_duration_seconds_bucket{{le="{re.escape(le)}".*}} (\S+)$', page, re.MULTILINE
    )
    slow = bad_of(objective)(cell)
    assert float(fast) == one_each.total - slow
    assert slow == one_each.above(threshold_ms)


# -- do they fire -----------------------------------------------------------------------------------------


def series(name: str, labels: str, values: str) -> dict[str, str]:
    return {"series": f"{name}{{{labels}}}", "values": values}


def traffic(service: str, failures: str, requests: str = "0+50x200") -> list[dict[str, str]]:
    """50 requests every 5 s, of which so many fail."""
    labels = f'service="{service}", version="v1", route="work", caller="a"'
    return [
        series("meshdemo_requests_total", f'{labels}, code="200"', requests),
        series("meshdemo_request_failures_total", labels, failures),
    ]


def fires(
    promtool: str, folder: Path, wanted: Policy, data: list[dict[str, str]], at: dict[str, list[dict[str, str]]],
    values: dict[str, list[tuple[str, float]]] | None = None, alert: str = "MeshdemoErrorBudgetBurn",
) -> None:  # fmt: skip
    """Have promtool check which alerts fire when (by service and severity), and what expressions are."""
    text = rules.render(wanted)
    check(promtool, folder, text)
    firing = f'ALERTS{{alertname="{alert}", alertstate="firing"}}'

    def labelled(labels: dict[str, str]) -> str:
        return "{" + ", ".join(f'{name}="{value}"' for name, value in labels.items()) + "}"

    tests = {
        "rule_files": ["rules.yml"],
        "evaluation_interval": "5s",
        "tests": [
            {
                "interval": "5s",
                "input_series": data,
                "promql_expr_test": [
                    {
                        "expr": f"count by (service, severity) ({firing}) > bool 0",
                        "eval_time": time,
                        "exp_samples": [
                            {"labels": labelled(labels), "value": 1}
                            for labels in expected
                        ],
                    }
                    for time, expected in at.items()
                ]
                + [
                    {"expr": f"round({expression}, 0.001)", "eval_time": time,
                     "exp_samples": [{"labels": "{}", "value": value}]}
                    for expression, pairs in (values or {}).items()
                    for time, value in pairs
                ],
            }
        ],
    }  # fmt: skip
    (folder / "tests.yml").write_text(yaml.safe_dump(tests))
    done = subprocess.run(
        [promtool, "test", "rules", "tests.yml"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


PAGE = {"service": "b", "severity": "page"}
TICKET = {"service": "b", "severity": "ticket"}


def test_a_service_that_fails_is_paged_about_and_a_healthy_one_is_not(promtool: str, tmp_path: Path) -> None:
    """30 % of the requests fail from 5 minutes on, until 8; service c is healthy, d has no failure at all."""
    data = [
        *traffic("b", "0+0x60 15+15x36 540+0x100"),
        *traffic("c", "0+0x200"),
        *traffic("d", "0+0x200")[:1],
    ]
    fires(
        promtool, tmp_path, policy(success="99%"), data,
        {"4m": [], "6m": [PAGE, TICKET], "7m55s": [PAGE, TICKET], "10m": []},
        {'max(service:meshdemo_objective_bad:ratio_rate20s{service="b"})': [("7m", 0.3)],
         'max(service:meshdemo_objective_error_budget:ratio{service="c"})': [("7m", 1.0)]},
    )  # fmt: skip


def test_a_slow_burn_is_a_ticket(promtool: str, tmp_path: Path) -> None:
    """2 % fail where 1 % may: twice as fast as the budget allows, too slow for anybody to be woken."""
    fires(
        promtool, tmp_path, policy(success="99%"), traffic("b", "0+1x240", "0+50x240"),
        {"15m": [TICKET]},
        {"max(service:meshdemo_objective_error_budget:ratio)": [("15m", -1.0)]},
    )  # fmt: skip


def test_an_objective_with_much_room_still_pages(promtool: str, tmp_path: Path) -> None:
    """90 % fail where 25 % may: 3.6 times too fast, which is as fast as can be."""
    fires(
        promtool, tmp_path, policy(success="75%"), traffic("b", "0+45x240", "0+50x240"),
        {"5m": [PAGE, TICKET]},
    )  # fmt: skip


def test_services_that_the_objective_leaves_out_are_left_out(promtool: str, tmp_path: Path) -> None:
    wanted = policy(success="99%", services=["b*"], **{"except": ["b-9"]})
    data = [*traffic("b", "0+25x200"), *traffic("b-9", "0+25x200"), *traffic("c", "0+25x200")]
    fires(promtool, tmp_path, wanted, data, {"5m": [PAGE, TICKET]})


def test_slow_requests_burn_the_budget_of_latency(promtool: str, tmp_path: Path) -> None:
    wanted = policy(latency={"below": "300ms", "share": "95%"})
    labels = 'service="b", version="v1"'
    data = [
        series("meshdemo_request_duration_seconds_count", labels, "0+50x200"),
        series("meshdemo_request_duration_seconds_bucket", f'{labels}, le="0.3"', "0+10x200"),
        series("meshdemo_request_duration_seconds_bucket", f'{labels}, le="+Inf"', "0+50x200"),
    ]
    fires(
        promtool, tmp_path, wanted, data, {"5m": [PAGE, TICKET]},
        {"max(service:meshdemo_objective_bad:ratio_rate30s)": [("5m", 0.8)],
         "max(service:meshdemo_objective_burn:ratio_rate)": [("5m", 16)]},
    )  # fmt: skip


def test_what_callers_got_is_judged_where_the_objective_says_so(promtool: str, tmp_path: Path) -> None:
    labels = 'service="b", caller="a"'
    data = [
        *traffic("b", "0+25x200"),  # the service fails, and retries hide it
        series("meshdemo_client_requests_total", labels, "0+50x200"),
        series("meshdemo_client_request_failures_total", labels, "0+0x200"),
    ]
    fires(promtool, tmp_path, policy(success="99%", effective=True), data, {"5m": []})


def test_missing_instances_are_paged_about(promtool: str, tmp_path: Path) -> None:
    def instances(state: str, values: str) -> dict[str, str]:
        return series("meshdemo_instances", f'service="b", version="v1", state="{state}"', values)

    data = [instances("not_ready", "0x20 1x40 0x40"), instances("ready", "3x20 2x40 3x40")]
    fires(
        promtool, tmp_path, policy(in_service="100%"), data,
        {"1m": [], "1m45s": [], "2m10s": [PAGE], "5m30s": []},
        alert="MeshdemoInstancesMissing",
    )  # fmt: skip
