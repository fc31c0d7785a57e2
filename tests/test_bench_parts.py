"""The parts of the benchmark that can be looked at one by one: what is simulated, what is read, what is rendered."""

from __future__ import annotations

import asyncio
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import psutil
import pytest
import yaml

from meshdemo.apps import loader
from meshdemo.bench import controlplane, heal, load, machine, outlier, prometheus, see, steer, trial, up
from meshdemo.bench.heal_kind import rolled_out
from meshdemo.bench.loops import OpenLoop
from meshdemo.bench.scale import Scale
from meshdemo.bench.sidecars import _Export
from meshdemo.bench.stage import Stage, attempt, until
from meshdemo.bench.stats import Request
from meshdemo.control.model import Fault
from meshdemo.control.otlp import decode
from meshdemo.control.signals import Histogram
from meshdemo.errors import Failed
from meshdemo.runtime import faults
from meshdemo.runtime.local import probe

# -- simulated sidecars -----------------------------------------------------------------------------------


def test_a_simulated_sidecar_reports_as_a_real_one_does() -> None:
    now = time.time()
    export = decode(_Export("m", "s1").encoded(5.0))
    assert export.stamp == pytest.approx(now, abs=5)
    assert export.stamp - export.start == pytest.approx(5.0)
    assert [(one.inbound, one.peer, one.requests, one.failures) for one in export.cells] == [
        (True, "s1", 500, 0),
        (False, "s1", 500, 0),
    ]
    assert all(isinstance(one.latency, Histogram) and one.latency.total == 500 for one in export.cells)


def test_a_few_simulated_sidecars_on_a_real_control_plane(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controlplane, "SIZES", (3, 6))
    with Stage() as stage:
        findings = controlplane.run(stage, Scale(quick=True, runs=1), lambda line: None)
    figures = {one.key: one for one in findings.figures}
    assert list(figures) == [
        f"controlplane.{key}"
        for key in ("route", "cluster", "endpoint", "cpu", "each", "storm", "rest", "memory")
    ], findings.notes
    for figure in figures.values():
        assert list(figure.values) == ["3 sidecars", "6 sidecars"], (figure, findings.notes)
        assert all(math.isfinite(value) for values in figure.values.values() for value in values), figure
    assert all(value > 0 for values in figures["controlplane.storm"].values.values() for value in values)
    assert any("to the power of" in note for note in findings.notes)


# -- processor time ---------------------------------------------------------------------------------------


def test_the_processor_time_of_a_process() -> None:
    # It counts its own to the end: nobody else's clock can be mistaken for it.
    code = "import sys, time\nwhile time.process_time() < 0.2: pass\nprint(time.process_time(), flush=True)\nsys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        said = float(process.stdout.readline())
        of_it = psutil.Process(process.pid)
        used = machine.cpu_s([of_it])
        process.stdin.close()
    assert used == pytest.approx(said, abs=0.1)
    assert used >= 0.2
    with pytest.raises(psutil.NoSuchProcess):
        machine.cpu_s([of_it])


# -- healing ----------------------------------------------------------------------------------------------


def steady(until_s: float, **bad: Any) -> list[Request]:
    """200 requests/s until then; `bad` from..to: (from, to, took, status)."""
    made = []
    for number in range(round(until_s * trial.RPS)):
        due = number / trial.RPS
        took, status = 0.002, 200
        for begin, end, slow, code in bad.values():
            if begin <= due < end:
                took, status = slow, code
        made.append(Request(due, took, status))
    return made


def test_it_is_settled_after_good_seconds_only() -> None:
    assert trial.settled(steady(10), 10.0, 4.0)
    assert not trial.settled(steady(10, errors=(7, 8, 0.002, 500)), 10.0, 4.0)
    assert trial.settled(steady(10, errors=(2, 5, 0.002, 500)), 10.0, 4.0)
    assert not trial.settled(steady(10, slow=(7, 9, 0.5, 200)), 10.0, 4.0)


def test_it_is_not_settled_while_requests_hang_or_the_load_is_young() -> None:
    hanging = [one for one in steady(10) if not (7 <= one.due < 8 and round(one.due * trial.RPS) % 2)]
    assert not trial.settled(hanging, 10.0, 4.0)
    assert not trial.settled(steady(2), 2.0, 4.0)


def test_the_rules_of_prometheus_are_sound() -> None:
    with Stage() as stage:
        (group,) = yaml.safe_load(stage.render("rules.yml.j2").read_text())["groups"]
        settings = yaml.safe_load(stage.render("alertmanager.yml.j2", webhook=1234).read_text())
    names = [rule["alert"] for rule in group["rules"]]
    assert names == [
        *(
            f"{scope}{what}"
            for what in ("Errors", "Failures", "Slow", "Late")
            for scope in ("Instance", "Service")
        ),
        "InstanceDown",
    ]
    assert all(rule["expr"].count("(") == rule["expr"].count(")") for rule in group["rules"])
    assert settings["receivers"][0]["webhook_configs"][0]["url"] == "http://127.0.0.1:1234/"
    assert {"InstanceDown"} | {f"Service{what}" for what in ("Errors", "Slow")} <= set(names)


_MESH_FAULT = Fault(id="f1", service="service-b", at="mesh", err_rate=0.3, started_at=1.0)


class FakeRuntime:
    """What the webhook asks of a runtime to choose a remedy."""

    def __init__(self, revisions: int = 1, ejected: int = 0, faults: Sequence[Fault] = ()) -> None:
        self._revisions, self._ejected, self.faults = revisions, ejected, faults

    def revisions(self, service: str, version: str) -> list[int]:
        return list(range(self._revisions))

    def control(self) -> FakeRuntime:
        return self

    def intent(self) -> FakeRuntime:
        return self

    @property
    def ejections(self) -> list[int]:
        return list(range(self._ejected))


@pytest.mark.parametrize(
    ("alert", "runtime", "kind"),
    [
        ("InstanceDown", FakeRuntime(), "restart"),
        ("InstanceErrors", FakeRuntime(), "eject"),
        ("InstanceFailures", FakeRuntime(ejected=1), None),  # at least half stays in service
        ("ServiceSlow", FakeRuntime(revisions=2), "rollback"),
        ("ServiceErrors", FakeRuntime(revisions=1), None),  # nothing to go back to
        ("ServiceFailures", FakeRuntime(faults=[_MESH_FAULT]), "clear-fault"),
    ],
)
def test_the_webhook_does_what_watch_would(alert: str, runtime: Any, kind: str | None) -> None:
    webhook = prometheus.Webhook(runtime, heals=False)
    try:
        plan = webhook._plan({"alertname": alert, "instance": "service-b-v1-1", "service": "service-b"})
        assert (plan.kind if plan else None) == kind
        webhook.take(12.5, {"alertname": alert})
        assert webhook.times() == [12.5]
    finally:
        webhook.close()


def test_a_sidecar_detects_outliers_as_envoy_does_by_default() -> None:
    with Stage() as stage, stage.mesh(loader.load("pair"), rps=0) as runtime:
        admin = heal._caller(runtime)
        outlier.as_in_envoy(admin)
        said = asyncio.run(probe.ask(admin, "/runtime?format=json", timeout_s=30))
        values = {name: one["final_value"] for name, one in json.loads(said.body)["entries"].items()}
        assert values["outlier_detection.consecutive_5xx"] == "5"
        assert values["outlier_detection.base_ejection_time_ms"] == "30000"
        assert outlier.ejections(admin) == 0
        # It takes effect: of two instances the one that fails is left alone, where the mesh alone waits for
        # 20 errors in a row, which half of the requests failing never brings about.
        fault = faults.request(err_rate=0.6, at="mesh", instance="service-b-v1-1", service="service-b")
        faults.inject(runtime, fault)
        with OpenLoop(stage, heal._port(runtime), 100.0):
            until("the instance to be left alone", lambda: outlier.ejections(admin) == 1)
    with pytest.raises(Failed, match="takes no runtime values"):
        outlier.as_in_envoy(admin)


# -- what programs say ------------------------------------------------------------------------------------


def test_percentiles_are_found_in_what_the_clients_say() -> None:
    said = {
        "closed loop": '{"requests": 5, "us": {"0.5": 900.1, "0.99": 1250.5, "1": 2000}}',
        "wrk": '  2 threads\n{"requests": 5, "seconds": 1.0, "errors": 0, "us": {"0.5": 62, "0.99": 1250, "1": 0}}',
        "hey": "Latency distribution:\n  95% in 0.0009 secs\n  99% in 0.0012 secs\n",
    }
    found = {}
    for client in load.CLIENTS:
        match = re.search(client.p99, said[client.name])
        assert match
        found[client.name] = float(match[1]) * client.ms
    assert found == pytest.approx({"closed loop": 1.2505, "wrk": 1.25, "hey": 1.2})


def test_a_deployment_is_rolled_out_when_all_pods_are_of_its_newest_revision() -> None:
    counts = {"replicas": 2, "updatedReplicas": 2, "readyReplicas": 2}
    done = {
        "metadata": {"generation": 3}, "spec": {"replicas": 2},
        "status": {**counts, "observedGeneration": 3},
    }  # fmt: skip
    assert rolled_out(done)
    assert not rolled_out({**done, "metadata": {"generation": 4}})
    for name, count in (("replicas", 3), ("updatedReplicas", 1), ("readyReplicas", 1)):
        assert not rolled_out({**done, "status": {**counts, "observedGeneration": 3, name: count}})
    assert not rolled_out({})


def test_inject_is_measured_by_the_whole_process_of_a_thousand_documents() -> None:
    with Stage() as stage:
        manifests = stage.render("many.yaml.j2", count=3)
        seconds, megabytes = up._inject(manifests)
        assert 0.05 < seconds < 60
        assert 20 < megabytes < 500
        (stage.folder / "bad.yaml").write_text("a: [")
        with pytest.raises(Failed, match="inject"):
            up._inject(stage.folder / "bad.yaml")


def test_the_steps_of_up_are_read() -> None:
    said = "Mesh 'x' on the local runtime\n  0.03 s  Preparing the state folder\n 12.50 s  Starting service-b v1\n"
    assert up._steps(said) == {"Preparing the state folder": 0.03, "Starting service-b v1": 12.5}


# -- the stage --------------------------------------------------------------------------------------------


def test_a_measurement_that_fails_is_told_and_the_rest_goes_on() -> None:
    failures: list[str] = []
    with attempt("round 1", failures):
        raise Failed("no answer")
    with attempt("round 2", failures):
        raise ConnectionResetError("reset by peer")
    assert failures == ["not measured: round 1: no answer", "not measured: round 2: reset by peer"]
    with pytest.raises(ZeroDivisionError), attempt("round 3", failures):
        raise ZeroDivisionError


def test_waiting_ends() -> None:
    assert until("a number", iter([0, 0, 3]).__next__) == 3
    with pytest.raises(Failed, match=r"waited 0\.05 s in vain for rain"):
        until("rain", lambda: False, 0.05)


@pytest.mark.parametrize("caller", [True, False])
def test_bare_proxies_verify_each_other(caller: bool) -> None:
    keys = {"certificate": "c.pem", "key": "k.pem", "both": "b.pem", "trust": "t.pem", "name": "localhost"}
    with Stage() as stage:
        envoy = yaml.safe_load(stage.render("envoy.yaml.j2", port=1, to=2, caller=caller, **keys).read_text())
        haproxy = stage.render("haproxy.cfg.j2", port=1, to=2, caller=caller, **keys).read_text()
        nginx = stage.render(
            "nginx.conf.j2", port=1, to=2, caller=caller, folder="/f", user="", **keys
        ).read_text()
    resources = envoy["static_resources"]
    chain, cluster = resources["listeners"][0]["filter_chains"][0], resources["clusters"][0]
    tls = (cluster if caller else chain)["transport_socket"]["typed_config"]
    assert ("transport_socket" in chain) is not caller
    assert ("transport_socket" in cluster) is caller
    assert tls["common_tls_context"]["validation_context"]["trusted_ca"] == {"filename": "t.pem"}
    assert tls.get("require_client_certificate", False) is not caller
    assert "verify required" in haproxy
    assert "ssl-min-ver TLSv1.3" in haproxy
    assert ("proxy_ssl_verify on" if caller else "ssl_verify_client on") in nginx


# -- looking and steering ---------------------------------------------------------------------------------


def test_what_looking_costs_is_measured_on_a_real_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(see, "RPS", 40.0)
    with Stage() as stage:
        findings = see.run(stage, Scale(quick=True, runs=1), lambda line: None)
    figures = {one.key: one for one in findings.figures}
    assert list(figures) == [
        *(f"see.tap.{key}" for key in ("p50", "p99", "cpu", "failed", "seen")),
        "see.page",
    ], findings.notes
    for key in ("p50", "p99", "cpu", "failed"):
        assert {name: len(values) for name, values in figures[f"see.tap.{key}"].values.items()} == {
            see.TAPPED: 2,
            see.NOT_TAPPED: 2,
        }
    assert all(seen > 0 for seen in figures["see.tap.seen"].values[see.TAPPED])
    assert all(0 < late < math.inf for late in figures["see.page"].values["page"])


def test_a_split_and_a_bad_canary_are_measured_on_a_real_mesh() -> None:
    with Stage() as stage:
        findings = steer.run(stage, Scale(quick=True, runs=1), lambda line: None)
    figures = {one.key: one for one in findings.figures}
    assert list(figures) == [f"steer.{key}" for key in ("split", "call", "failed", "canary", "restore")], (
        findings.notes
    )
    for key in ("split", "call", "canary", "restore"):
        (value,) = figures[f"steer.{key}"].values[steer.MESH]
        assert 0 < value < math.inf
