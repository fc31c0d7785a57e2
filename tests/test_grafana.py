"""Grafana's dashboards: sound as files, and every query gives data on a real mesh with a real Prometheus."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from local_harness import Cli, read_url, wait_for

from meshdemo.ui import grafana


@pytest.mark.parametrize("name", ["mesh", "service"])
def test_a_dashboard_is_laid_out_without_overlap(name: str) -> None:
    dashboard = grafana.dashboards()[name]
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = set(
            itertools.product(
                range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
            )
        )
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
        assert panel["title"]
        assert panel["targets"]
        assert all(target["datasource"]["uid"] == grafana.UID for target in panel["targets"])
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)


def test_the_files_are_a_provisioning_folder(tmp_path: Path) -> None:
    cli = Cli(tmp_path / "home")
    cli.run("render", "grafana", "--prometheus", "http://prometheus:9090", "--out", str(tmp_path / "out"))
    (source,) = yaml.safe_load((tmp_path / "out/datasources/meshdemo.yml").read_text())["datasources"]
    assert (source["url"], source["uid"]) == ("http://prometheus:9090", grafana.UID)
    (provider,) = yaml.safe_load((tmp_path / "out/dashboards/meshdemo.yml").read_text())["providers"]
    folder = Path(provider["options"]["path"])
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    assert [dashboard["uid"] for dashboard in found] == ["meshdemo-mesh", "meshdemo-service"]
    printed = list(yaml.safe_load_all(cli.run("render", "grafana")))
    assert len(printed) == 4
    assert cli.json("render", "grafana")["dashboards/mesh.json"] == found[0]


def test_prometheus_takes_what_is_rendered(tmp_path: Path) -> None:
    promtool = _required("promtool")
    Cli(tmp_path / "home").run("render", "prometheus", "--out", str(tmp_path))
    done = subprocess.run(
        [promtool, "check", "config", "--syntax-only", tmp_path / "prometheus.yml"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def _required(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        if os.environ.get("CI"):
            pytest.fail(f"{program} is missing: apt-get install prometheus")
        pytest.skip(f"needs {program}")
    return found


# -- a real mesh and a real Prometheus --------------------------------------------------------------------


class Prometheus:
    """The Prometheus of a mesh."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")

    def ask(self, path: str, **query: str) -> Any:
        """What its API answers."""
        answer = json.loads(read_url(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(query)}"))
        assert answer["status"] == "success"
        return answer["data"]

    def samples(self, expr: str) -> list[dict[str, Any]]:
        """The samples of an expression now; those that are no number do not count."""
        found: list[dict[str, Any]] = self.ask("query", query=expr)["result"]
        return [sample for sample in found if sample["value"][1] != "NaN"]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    _required("prometheus")
    with Cli(tmp_path_factory.mktemp("home")).up("--runtime", "local", "--rps", "40") as cli:
        yield cli


@pytest.fixture(scope="module")
def prometheus(mesh: Cli) -> Prometheus:
    return Prometheus(mesh.json("status")["endpoints"]["prometheus"])


def _filled_in(expr: str) -> str:
    """An expression as Grafana sends it."""
    expr = expr.removesuffix(" or vector(0)")  # which would be data without there being any
    for variable, value in (("$__rate_interval", "20s"), ("$__range", "15m"), ("$service", ".*")):
        expr = expr.replace(variable, value)
    assert "$" not in expr
    return expr


def test_every_panel_shows_data(mesh: Cli, prometheus: Prometheus) -> None:
    watch = mesh.start("watch", "--until-healed", "--for", "300s", "--plain")
    wait_for("a watch", lambda: "started" in (watch.stdout.readline() if watch.stdout else ""))
    mesh.run("fault", "--at", "mesh", "--err", "0.6")
    assert watch.wait(360) == 0, watch.communicate()  # a remedy
    mesh.run("fault", "--at", "mesh", "--err", "0.6")  # and, with nobody to heal it, an alert
    left = {(board, title, expr): _filled_in(expr) for board, title, expr in grafana.queries()}
    assert len(left) > 30

    def answered() -> bool:
        for key, expr in list(left.items()):
            if prometheus.samples(expr):
                del left[key]
        if left:
            raise AssertionError(f"no data for {sorted(left)}")
        return True

    try:
        wait_for("data for every query", answered, deadline_s=120)
    finally:
        mesh.run("fault", "clear")
        watch.communicate()


def test_the_variable_of_the_dashboard_has_values(prometheus: Prometheus) -> None:
    def services() -> list[str]:
        values: list[str] = prometheus.ask("label/service/values")
        return values

    wait_for("the services as values", lambda: {"service-a", "service-b"} <= set(services()))


def test_everything_is_scraped_and_the_rules_are_in_force(prometheus: Prometheus) -> None:
    def all_up() -> bool:
        targets = prometheus.ask("targets")["activeTargets"]
        states = {(target["labels"]["job"], target["health"]) for target in targets}
        assert states == {("workloads", "up"), ("sidecars", "up"), ("control-plane", "up")}, targets
        return True

    wait_for("every target up", all_up)
    rules = [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]
    assert {rule["health"] for rule in rules} <= {"ok", "unknown"}
    assert {"MeshdemoErrorBudgetBurn", "MeshdemoInstancesMissing"} <= {rule["name"] for rule in rules}


def test_a_watch_that_runs_gives_the_error_budgets(mesh: Cli, prometheus: Prometheus) -> None:
    watch = mesh.start("watch", "--plain")
    try:
        budget = 'meshdemo_objective_error_budget{service="service-b", objective="success"}'
        wait_for("the error budget", lambda: prometheus.samples(budget))
    finally:
        watch.terminate()
        watch.communicate()


def test_an_alert_fires_while_a_service_fails(mesh: Cli, prometheus: Prometheus) -> None:
    mesh.run("fault", "--at", "mesh", "--err", "0.6")
    firing = 'ALERTS{alertname="MeshdemoErrorBudgetBurn", alertstate="firing", service="service-b"}'
    wait_for("an alert about the error budget", lambda: prometheus.samples(firing), deadline_s=120)
    mesh.run("fault", "clear")


def test_names_and_types_are_as_prometheus_wants_them(mesh: Cli) -> None:
    url = mesh.json("status")["endpoints"]["dashboard"].split("#")[0].rstrip("/")
    done = subprocess.run(
        [_required("promtool"), "check", "metrics"],
        input=read_url(f"{url}/metrics"), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
