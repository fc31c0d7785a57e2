"""Commands that break, see and shape, on a real mesh: real Envoys, real workloads."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from local_harness import Cli, read_url, wait_for

RPS = 40


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    with Cli(tmp_path_factory.mktemp("home")).up("--rps", str(RPS)) as cli:
        yield cli


@pytest.fixture
def mesh(running: Cli) -> Iterator[Cli]:
    yield running
    running.run("fault", "clear")
    wait_for("a mesh without faults", lambda: running.json("fault", "list") == [] and running.all_ready())


def row(mesh: Cli, *arguments: str, **wanted: str) -> dict[str, Any]:
    """The one row of `stat` over the last second in which these keys have these values."""
    rows = mesh.json("stat", "service-b", "--window", "1s", *arguments)
    (found,) = [one for one in rows if all(one.get(key) == value for key, value in wanted.items())]
    assert found["requests"] >= 5, "too few to say anything"
    return dict(found)


def succeeds(mesh: Cli, low: float, high: float, **instance: str) -> None:
    """Wait until the success rate of service-b (of one instance) lies in [low, high]."""
    by = ["--by", "instance"] if instance else []
    wait_for(
        f"success rate from {low} to {high}",
        lambda: low <= row(mesh, *by, **instance)["success_rate"] <= high,
    )


def env(mesh: Cli, workload: str = "service-b/v1") -> dict[str, str]:
    """What a workload runs with."""
    variables: dict[str, str] = mesh.describe()["spec"]["workloads"][workload]["revisions"][-1]["env"]
    return variables


# -- faults -----------------------------------------------------------------------------------------------


def test_a_fault_in_the_sidecars(mesh: Cli) -> None:
    made = mesh.json("fault", "--at", "mesh", "--err", "1", "--lat", "5", "--share", "0.5")
    assert made["at"] == "mesh"
    assert made["service"] == "service-b"
    assert (made["lat_ms"], made["err_rate"], made["share"]) == (5, 1, 0.5)
    assert made["sidecars"] == 2
    assert made["effective_ms"] > 0
    assert made["instances"] == ["service-b-v1-1", "service-b-v1-2"]
    succeeds(mesh, 0, 0)
    assert [one["id"] for one in mesh.json("fault", "list")] == [made["id"]]
    assert "100% errors" in mesh.run("fault", "list")
    cleared = mesh.json("fault", "clear", made["id"])
    assert [one["id"] for one in cleared["cleared"]] == [made["id"]]
    assert cleared["sidecars"] == 2
    succeeds(mesh, 1, 1)


def test_a_fault_of_one_instance_on_one_route_for_one_caller(mesh: Cli) -> None:
    made = mesh.json(
        "fault", "--at", "mesh", "--err", "1", "--instance", "service-b-v1-2", "--route", "/work", "--caller",
        "service-a",
    )  # fmt: skip
    assert made["instances"] == ["service-b-v1-2"]
    assert made["sidecars"] == 1
    succeeds(mesh, 0, 0, instance="service-b-v1-2")
    succeeds(mesh, 1, 1, instance="service-b-v1-1")


def test_latencies_of_several_faults_are_all_felt(mesh: Cli) -> None:
    mesh.run("fault", "--at", "mesh", "--lat", "40")
    mesh.run("fault", "--at", "mesh", "--lat", "200", "--share", "0.3")

    def felt() -> bool:
        seen = row(mesh)
        return bool(40 <= seen["p50_ms"] < 100 and seen["p95_ms"] >= 180)

    wait_for("both latencies", felt)


def test_a_fault_that_nobody_meets(mesh: Cli) -> None:
    mesh.run("fault", "--at", "mesh", "--err", "1", "--route", "/elsewhere")
    mesh.run("fault", "--at", "mesh", "--err", "1", "--service", "service-a")
    before = mesh.counts()["200"]
    wait_for("requests that succeed", lambda: mesh.counts()["200"] > before + RPS)
    succeeds(mesh, 1, 1)


def test_a_bad_release_and_its_end_lose_no_request(mesh: Cli) -> None:
    def break_and_mend(_: int) -> None:
        made = mesh.json("fault", "--lat", "60")
        assert made["at"] == "app"
        assert made["revision"] > 1
        assert env(mesh)["LAT_MS"] == "60"
        wait_for("latency", lambda: row(mesh)["p50_ms"] >= 50)
        cleared = mesh.json("fault", "clear")
        assert [one["id"] for one in cleared["cleared"]] == [made["id"]]
        assert "LAT_MS" not in env(mesh)

    mesh.loses_no_request(break_and_mend)


def test_faults_of_one_workload_end_one_by_one(mesh: Cli) -> None:
    slow = mesh.json("fault", "--lat", "20")
    mesh.run("fault", "--err", "0.5")
    assert (env(mesh)["LAT_MS"], env(mesh)["ERR_RATE"]) == ("20", "0.5")
    slower = mesh.json("fault", "--lat", "40")
    mesh.run("fault", "clear", slower["id"])
    assert (env(mesh)["LAT_MS"], env(mesh)["ERR_RATE"]) == ("20", "0.5")
    mesh.run("fault", "clear", slow["id"])
    assert "LAT_MS" not in env(mesh)
    assert env(mesh)["ERR_RATE"] == "0.5"
    mesh.run("fault", "clear")
    assert "ERR_RATE" not in env(mesh)
    mesh.run("fault", "--lat", "5", "--err", "0")
    mesh.run("fault", "clear")
    assert "ERR_RATE" not in env(mesh)


def test_a_fault_in_the_app_of_one_instance(mesh: Cli) -> None:
    made = mesh.json("fault", "--err", "1", "--instance", "service-b-v1-1")
    assert made["instances"] == ["service-b-v1-1"]
    succeeds(mesh, 0, 0, instance="service-b-v1-1")
    succeeds(mesh, 1, 1, instance="service-b-v1-2")
    mesh.run("fault", "clear", made["id"])
    succeeds(mesh, 1, 1, instance="service-b-v1-1")


def test_faults_end_by_themselves(mesh: Cli) -> None:
    made = mesh.json("fault", "--at", "mesh", "--lat", "5", "--for", "1s")
    assert made["expires_at"] == pytest.approx(made["started_at"] + 1)
    mesh.run("fault", "--err", "0.5", "--for", "3s")
    wait_for("the end of both faults", lambda: mesh.json("fault", "list") == [])
    wait_for("the environment from before", lambda: "ERR_RATE" not in env(mesh))


def test_faults_that_overlap_in_time_leave_nothing(mesh: Cli) -> None:
    mesh.run("fault", "--lat", "20", "--for", "2s")
    mesh.run("fault", "--lat", "40", "--for", "5s")
    wait_for("the end of both faults", lambda: mesh.json("fault", "list") == [])
    wait_for("the environment from before", lambda: "LAT_MS" not in env(mesh))
    assert "LAT_MS" not in mesh.process("service-b-v1-1").environ()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_fault_command_that_is_ended_leaves_no_fault(mesh: Cli, number: signal.Signals) -> None:
    before = env(mesh)
    command = mesh.start("fault", "--err", "0.5")
    wait_for("its record", lambda: command.poll() is not None or mesh.json("fault", "list"))
    command.send_signal(number)
    told, said = command.communicate(timeout=90)
    if said:
        assert said == "meshdemo: interrupted; undoing what was begun\n"
        assert (command.returncode, told) == (130, "")
        assert mesh.json("fault", "list") == []
        assert env(mesh) == before
    else:  # it was done already, and at most about to end
        assert command.returncode in (0, 130, -number)
        (fault,) = mesh.json("fault", "list")
        assert told.startswith(f"{fault['id']}: 50% errors on service-b in the app;")
        assert env(mesh)["ERR_RATE"] == "0.5"


def test_a_fault_command_says_what_is_in_force_whatever_ends_it_then(mesh: Cli) -> None:
    """Once nothing is undone any more, a Ctrl-C comes too late: here while it cannot print yet."""
    ours, theirs = os.pipe()
    with os.fdopen(ours, "rb") as out:
        filled = b" " * fcntl.fcntl(theirs, fcntl.F_GETPIPE_SZ)
        assert os.write(theirs, filled) == len(filled)
        command = mesh.start("fault", "--err", "0.5", "--at", "mesh", stdout=theirs)
        os.close(theirs)
        wait_for("the last moment", lambda: command.poll() is not None or ignores(command, signal.SIGINT))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            command.send_signal(number)
        told = out.read().removeprefix(filled).decode()
    assert (command.wait(90), command.communicate()[1]) == (0, "")
    (fault,) = mesh.json("fault", "list")
    assert told.startswith(f"{fault['id']}: 50% errors on service-b in the sidecars;")


def ignores(command: subprocess.Popen[str], number: signal.Signals) -> bool:
    """Whether a process ignores a signal (proc(5): SigIgn)."""
    status = Path(f"/proc/{command.pid}/status").read_text()
    (mask,) = [line.split()[1] for line in status.splitlines() if line.startswith("SigIgn:")]
    return bool(int(mask, 16) & 1 << (number - 1))


def test_a_hang_that_cannot_be_recorded_does_not_happen(mesh: Cli) -> None:
    control = mesh.process("control plane")
    control.suspend()
    try:
        mesh.run("fault", "--hang", "--instance", "service-b-v1-1", status=1)
        assert mesh.process("service-b-v1-1").status() != "stopped"
    finally:
        control.resume()


def test_a_rolled_back_fault_is_cleared_without_another_release(mesh: Cli) -> None:
    from meshdemo.runtime.local.client import SupervisorClient

    mesh.run("fault", "--err", "0.3")
    good = mesh.describe()["spec"]["workloads"]["service-b/v1"]["revisions"][-2]["revision"]
    SupervisorClient(mesh.paths).call(
        "rollback", service="service-b", version="v1", revision=good, reason="test", timeout_s=30, wait_s=60
    )
    revision = mesh.describe()["spec"]["workloads"]["service-b/v1"]["last_revision"]
    assert len(mesh.json("fault", "clear")["cleared"]) == 1
    assert mesh.describe()["spec"]["workloads"]["service-b/v1"]["last_revision"] == revision


def test_hang_and_crash(mesh: Cli) -> None:
    hung = mesh.json("fault", "--hang", "--instance", "service-b-v1-1")
    assert (hung["at"], hung["kind"], hung["instances"]) == ("process", "hang", ["service-b-v1-1"])
    wait_for("it to hang", lambda: mesh.process("service-b-v1-1").status() == "stopped")
    mesh.run("fault", "clear", hung["id"])
    assert mesh.process("service-b-v1-1").status() != "stopped"
    before = mesh.process("service-b-v1-2").pid
    crashed = mesh.json("fault", "--crash", "--instance", "service-b-v1-2")
    assert crashed["kind"] == "crash"
    wait_for("another process", lambda: mesh.process("service-b-v1-2").pid != before)
    wait_for("a ready mesh", mesh.all_ready)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--lat", "-1"], "0 to"),
        (["--err", "2"], "0 to 1"),
        (["--err", "0.1", "--service", "service-x"], "service-a, service-b"),
        (["--err", "0.1", "--version", "v2"], "v1"),
        (["--err", "0.1", "--instance", "service-b-v1-9"], "service-b-v1-1, service-b-v1-2"),
        (["--err", "0.1", "--at", "mesh", "--caller", "nobody"], "service-a, service-b"),
        (["--crash", "--service", "service-x"], "service-a, service-b"),
        (["--err", "1e-7", "--at", "mesh"], "one in a million"),
        (["--lat", "5", "--for", "999999999h"], "at most 365 days"),
        (["--lat", "5", "list"], "--lat: makes no sense with `fault list`"),
        (["--crash", "clear"], "--crash: makes no sense with `fault clear`"),
        (["--lat", "5", "--service", "service-a"], "--at mesh"),
        (["clear", "f-none"], "none"),
    ],
)
def test_what_makes_no_sense_changes_nothing(running: Cli, arguments: list[str], complaint: str) -> None:
    before = (running.json("status")["revision"], running.describe()["spec"])
    said = running.run("fault", *arguments, status=2)
    assert complaint in said
    assert len(said.splitlines()) == 1
    assert (running.json("status")["revision"], running.describe()["spec"]) == before


# -- seeing and shaping -------------------------------------------------------------------------------------


def test_stat_by_everything(mesh: Cli) -> None:
    wait_for("requests", lambda: row(mesh))
    for by in ("version", "instance", "route", "caller"):
        rows = mesh.json("stat", "service-b", "--by", by)
        assert all(one["service"] == "service-b" for one in rows)
        assert all(by in one for one in rows)
        least = {"rps", "success_rate", "effective_success_rate", "p50_ms", "p95_ms", "p99_ms", "requests"}
        assert all(least <= one.keys() for one in rows)
    assert {one["caller"] for one in rows} == {"service-a"}
    assert "service-a" in mesh.run("stat", "--by", "caller")


def test_edges_and_access(mesh: Cli) -> None:
    (edge,) = wait_for("an edge", lambda: mesh.json("edges"))
    assert (edge["caller"], edge["service"], edge["secured"]) == ("service-a", "service-b", True)
    assert edge["identity"].endswith("/sa/service-a")
    before = mesh.counts()["403"]
    denied = mesh.json("access", "deny", "service-a", "service-b")
    assert (denied["allowed"], denied["sidecars"]) == (False, 2)
    wait_for("refused requests", lambda: mesh.counts()["403"] > before)
    assert mesh.json("access", "show")[0]["allowed"] is False
    mesh.run("access", "allow", "service-a", "service-b")
    ok = mesh.counts()["200"]
    wait_for("requests that pass again", lambda: mesh.counts()["200"] > ok + RPS)


def test_tap_and_top(mesh: Cli) -> None:
    lines = mesh.run("tap", "service-b", "--route", "/work", "--status", "2xx", "--max", "5", "-o", "jsonl")
    requests = [json.loads(line) for line in lines.splitlines()]
    assert len(requests) == 5
    for request in requests:
        assert (request["caller"], request["service"], request["path"]) == ("service-a", "service-b", "/work")
        assert request["latency_ms"] > 0
    (busiest,) = wait_for("a route", lambda: mesh.json("top", "service-b", "--for", "2s"))
    assert (busiest["route"], busiest["method"]) == ("work", "GET")
    assert busiest["requests"] > 0


def test_traffic_and_load(mesh: Cli) -> None:
    made = mesh.json("traffic", "set", "service-b", "--timeout", "2s", "--retries", "1", "--outlier", "off")
    assert made["sidecars"] >= 1
    shown = mesh.json("traffic", "show", "service-b")["service-b"]
    assert (shown["timeout_ms"], shown["retries"], shown["outlier"]) == (2000, 1, False)
    fields = shown["fields"]
    assert (fields["timeout_ms"]["origin"], fields["max_pending"]["origin"]) == ("set", "default")
    assert fields["timeout_ms"]["since"] > 0
    assert "2000 ms" in mesh.run("traffic", "show")
    mesh.run("traffic", "reset", "service-b", "timeout")
    shown = mesh.json("traffic", "show", "service-b")["service-b"]
    assert (shown["timeout_ms"], shown["retries"]) == (15000, 1)
    mesh.run("traffic", "reset", "service-b")
    shown = mesh.json("traffic", "show", "service-b")["service-b"]
    assert {rule["origin"] for rule in shown["fields"].values()} == {"default"}
    assert "no traffic rule 'x'" in mesh.run("traffic", "reset", "service-b", "x", status=2)
    said = mesh.run("traffic", "set", "service-b", "--split", "v2=100", status=2)
    assert "v2" in said
    assert mesh.json("load", "--rps", "80") == {"rps": 80}
    wait_for("the new load", lambda: row(mesh)["rps"] > RPS * 1.4)
    mesh.run("load", "--rps", str(RPS))


def test_render_shows_what_runs(mesh: Cli) -> None:
    mesh.run("fault", "--at", "mesh", "--err", "0.25")
    rendered = mesh.json("render", "envoy", "--service", "service-b")
    port = next(one for one in mesh.describe()["instances"] if one["service"] == "service-b")["inbound_port"]
    assert str(port) in json.dumps(rendered["service-b"]["listeners"])
    assert "HTTPFault" in json.dumps(rendered["service-b"]["routes"])


# -- demo -------------------------------------------------------------------------------------------------


def test_the_demo_heals_and_leaves_nothing(tmp_path: Path) -> None:
    cli = Cli(tmp_path / "home")
    demo = cli.start("demo", "--rps", "60", "-o", "json")
    try:
        out, said = demo.communicate(timeout=600)
    finally:
        demo.terminate()  # it cleans up, if it still runs
        demo.wait(90)
    assert demo.returncode == 0, out + said
    told = json.loads(out)
    assert told["healed"] is True
    assert told["detect_s"] > 0
    assert told["recover_s"] > told["detect_s"]
    assert all(act["remedies"] for act in told["acts"])
    assert cli.leftovers() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    cli = Cli(tmp_path / "home")
    demo = cli.start("demo")
    wait_for("a mesh", cli.all_ready)
    demo.send_signal(number)
    demo.communicate(timeout=90)
    assert demo.returncode == 130
    assert cli.leftovers() == []


def test_a_demo_leaves_a_mesh_that_ran_before_as_it_was(mesh: Cli) -> None:
    own = mesh.json("fault", "--at", "mesh", "--err", "0.001")
    demo = mesh.start("demo", "--rps", "60")
    wait_for("its load", lambda: mesh.describe()["spec"]["rps"] == 60)
    wait_for("its fault", lambda: len(mesh.json("fault", "list")) > 1 or demo.poll() is not None, 180)
    demo.send_signal(signal.SIGINT)
    out, _ = demo.communicate(timeout=90)
    assert out == "", "progress is for terminals"
    assert [one["id"] for one in mesh.json("fault", "list")] == [own["id"]]
    assert mesh.describe()["spec"]["rps"] == RPS
    port = next(one["app_port"] for one in mesh.describe()["instances"] if one["service"] == "service-a")
    wait_for(
        "the load of before", lambda: json.loads(read_url(f"http://127.0.0.1:{port}/load"))["rps"] == RPS
    )
