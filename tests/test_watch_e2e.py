"""watch, report and canary on a real local mesh, through the command line.

The policy here has a patient latency objective: what is tested is that watch does the right thing, and a loaded
machine is slow without anything being broken. How fast watch is, `meshdemo bench heal` says.
"""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from local_harness import DEADLINE_S, Cli, kill, wait_for

from meshdemo.control.client import ControlClient
from meshdemo.runtime.local.runtime import LocalRuntime

B1, B2 = "service-b-v1-1", "service-b-v1-2"
POLICY = """\
objectives:
  - {name: success, success: 97%}
  - {name: latency, latency: {below: 5s, share: 80%}}
  - {name: instances, in_service: 100%}
rules:
  - {name: down, scope: [instance, version, service], symptom: down, remedies: [{wait: {for: 60s}}]}
  - {name: hung, scope: [instance, version, service], symptom: hung, remedies: [restart]}
  - {name: instance, scope: instance, remedies: [eject, restart]}
  - {name: version, scope: version, remedies: [shift-away, rollback]}
  - {name: service, scope: service, remedies: [rollback, clear-fault]}
guardrails: {cooldown: 1s, probation: 1h, max_actions: {count: 100, per: 10s}}
"""


class Watching:
    """A watch of a mesh, and what it has said."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.events: list[dict[str, Any]] = []
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def until(self, name: str, **fields: Any) -> dict[str, Any]:
        """The next event of this name."""
        give_up = time.monotonic() + DEADLINE_S
        while time.monotonic() < give_up:
            line = self._lines.get(timeout=DEADLINE_S)
            assert line is not None, (name, self.texts(), self.process.stderr and self.process.stderr.read())
            self.events.append(json.loads(line))
            event = self.events[-1]
            if event["event"] == name and all(event[key] == value for key, value in fields.items()):
                return event
        raise AssertionError(f"no {name}: {self.texts()}")

    def texts(self) -> list[str]:
        return [f"{event['event']}: {event['text']}" for event in self.events if event["event"] != "signals"]

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.process.wait(DEADLINE_S)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    home = tmp_path_factory.mktemp("home")
    (home / "policy.yaml").write_text(POLICY)
    with Cli(home).up("--rps", "60", "--version", "service-b=v2") as cli:
        yield cli


@pytest.fixture
def calm(mesh: Cli) -> Iterator[Cli]:
    """The mesh with nothing broken, before and after."""
    _mend(mesh)
    yield mesh
    _mend(mesh)


def _mend(mesh: Cli) -> None:
    mesh.run("fault", "clear")
    for ejection in client(mesh).intent().ejections:
        client(mesh).readmit(ejection.instance)
    client(mesh).set_traffic("service-b", {"split": None})
    wait_for("a ready mesh", mesh.all_ready)

    def well() -> bool:
        row = client(mesh).signals(service="service-b", window_s=2)[0]
        return row["success_rate"] == 1 and not row["overdue"]

    wait_for("requests to be answered well", well)


def client(mesh: Cli) -> ControlClient:
    return runtime(mesh).control()


def runtime(mesh: Cli) -> LocalRuntime:
    found = LocalRuntime(mesh.name)
    found.paths = mesh.paths
    return found


@contextmanager
def watching(mesh: Cli, *options: str, calm_first: bool = True) -> Iterator[Watching]:
    """A watch that has seen the mesh run well for a few seconds."""
    process = mesh.start("watch", "--policy", str(mesh.home / "policy.yaml"), "-o", "jsonl", *options)
    watch = Watching(process)
    try:
        watch.until("started")
        if calm_first:
            watch.until("signals", service="service-b")
            watch.until("signals", service="service-b")
        yield watch
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def env_of(mesh: Cli, instance: str) -> dict[str, str]:
    pid = mesh.process(instance).pid
    raw = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return dict(one.decode().split("=", 1) for one in raw if b"=" in one)


def test_a_bad_release_is_rolled_back(calm: Cli) -> None:
    with watching(calm, "--until-healed") as watch:
        fault = calm.json("fault", "--err", "0.5", "--version", "v1")
        healed = watch.until("healed")
        names = [event["event"] for event in watch.events if event["event"] != "signals"]
        assert names == ["started", "violated", "localised", "chosen", "acted", "verified", "healed"], (
            watch.texts()
        )
        assert watch.process.wait(DEADLINE_S) == 0
    assert healed["remedy"] == "rollback"
    assert healed["recover_s"] >= watch.events[-1].get("detect_s", 0)
    violated = next(event for event in watch.events if event["event"] == "violated")
    if fault["started_at"] < violated["time"]:  # else it was seen before whoever made it could say so
        assert violated["detect_s"] > 0
    assert violated["evidence"]["surely_above"] > violated["evidence"]["allowed"]
    assert env_of(calm, B1).get("ERR_RATE") in (None, "0", "0.0")
    assert fault["id"] not in [one["id"] for one in calm.json("fault", "list")]
    report = calm.json("report")
    incident = report["incidents"][-1]
    assert incident["id"] == healed["incident"]
    assert incident["state"] == "healed"
    assert [one["outcome"] for one in incident["remedies"]] == ["worked"]
    assert fault["id"] in incident["faults"]
    assert "rollback" in calm.run("report") or "roll service-b back" in calm.run("report")


def test_a_bad_instance_is_ejected_and_stays_out_when_watch_ends(calm: Cli) -> None:
    with watching(calm) as watch:
        calm.run("fault", "--err", "0.7", "--instance", B2, "--at", "mesh")
        watch.until("healed")
        assert [one.instance for one in client(calm).intent().ejections] == [B2]
        assert watch.stop() == 0
    with watching(
        calm,
        calm_first=False,
    ) as later:
        # The next watch knows what the first one has ejected.
        assert later.stop() == 0
        assert B2 in later.until("stopped")["text"]


def test_a_hung_instance_is_restarted(calm: Cli) -> None:
    before = calm.process(B1).pid
    with watching(calm) as watch:
        calm.run("fault", "--hang", "--instance", B1)
        healed = watch.until("healed")
    assert healed["remedy"] == "restart", watch.texts()
    assert calm.process(B1).pid != before
    assert not client(calm).intent().ejections
    assert calm.json("fault", "list") == []


def test_a_killed_instance_mends_itself(calm: Cli) -> None:
    with watching(calm) as watch:
        calm.run("fault", "--crash", "--instance", B1)
        # It may be back before watch has looked.
        watch.until("signals", service="service-b")
        watch.until("signals", service="service-b")
    assert "acted" not in [event["event"] for event in watch.events], watch.texts()


def test_a_dry_run_touches_nothing(calm: Cli) -> None:
    intent = client(calm).intent()
    with watching(calm, "--dry-run") as watch, watching(calm, "--dry-run", calm_first=False):
        fault = calm.json("fault", "--err", "0.7", "--instance", B2, "--at", "mesh")
        chosen = watch.until("chosen")
        assert chosen["dry_run"] is True
        assert chosen["text"] == f"would eject {B2}"
        watch.until("signals", service="service-b")
    after = client(calm).intent()
    assert [one.id for one in after.faults] == [fault["id"]]
    assert (after.ejections, after.traffic) == (intent.ejections, intent.traffic)
    assert not any(event.get("dry_run") for event in client(calm).events().events)


def test_a_second_watch_says_that_one_is_running(calm: Cli) -> None:
    with watching(calm, calm_first=False):
        error = calm.run("watch", "--for", "1s", status=1)
    assert "`meshdemo watch`" in error and "is at work on it" in error


def test_watch_goes_on_when_the_control_plane_is_killed(calm: Cli) -> None:
    with watching(calm) as watch:
        kill(calm.process("control plane"))
        watch.until("error")
        watch.until("started")
        watch.until("signals", service="service-b")
        calm.run("fault", "--err", "0.7", "--instance", B2, "--at", "mesh")
        healed = watch.until("healed")
        assert watch.stop() == 0
    assert healed["remedy"] == "eject"
    journal = [event.get("id") for event in client(calm).events().events]
    said = [event for event in watch.events if event["event"] != "signals"]
    assert [(one["event"], one["text"]) for one in said if one["id"] not in journal] == []


def test_ctrl_c_in_the_middle_of_a_remedy_leaves_the_mesh_consistent(calm: Cli) -> None:
    with watching(calm) as watch:
        calm.run("fault", "--hang", "--instance", B1)
        watch.until("chosen", remedy="restart")
        assert watch.stop() == 0
        watch.until("stopped")
    assert not client(calm).intent().ejections
    wait_for("every instance in service", calm.all_ready)


def test_signals_are_recorded_and_policies_tested_on_them(calm: Cli, tmp_path: Path) -> None:
    signals = tmp_path / "signals.jsonl"
    with watching(calm, "--dry-run", "--record", str(signals)) as watch:
        calm.run("fault", "--err", "0.7", "--instance", B2, "--at", "mesh")
        chosen = watch.until("chosen")
        watch.until("signals", service="service-b")
        assert watch.stop() == 0
    decided = calm.json("policy", "test", str(calm.home / "policy.yaml"), "--signals", str(signals))
    first = next(one for one in decided if one["event"] == "chosen")
    assert (first["target"], first["remedy"]) == (chosen["target"], chosen["remedy"])


def test_watch_needs_a_mesh(tmp_path: Path) -> None:
    assert "meshdemo up" in Cli(tmp_path).run("watch", "--for", "1s", status=3)


def test_a_watch_ends_with_its_mesh(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "policy.yaml").write_text(POLICY)
    cli = Cli(home)
    try:
        with cli.up("--rps", "20"), watching(cli, calm_first=False) as watch:
            cli.run("down")
            assert watch.process.wait(DEADLINE_S) == 3
            assert watch.process.stderr is not None
            assert "mesh 'mesh-demo' is gone" in watch.process.stderr.read()
            assert not cli.paths.watch_lock.exists()
        with cli.up("--rps", "20"), watching(cli, calm_first=False) as watch:
            # The lock is not in the folder that `down` removes, so what holds it is seen whatever happens.
            assert not cli.paths.watch_lock.is_relative_to(cli.paths.state)
            assert "is at work on it" in cli.run("watch", "--for", "1s", status=1)
            assert watch.stop() == 0
    finally:
        cli.run("down")
    assert not list(home.glob("*lock*"))


# -- canary -------------------------------------------------------------------------------------------------


def split(mesh: Cli) -> dict[str, int]:
    rules = client(mesh).traffic().get("service-b")
    return dict(rules.split) if rules else {}


def test_a_good_canary_is_promoted(calm: Cli) -> None:
    outcome = calm.json(
        "canary", "service-b", "--to", "v2", "--steps", "20,100", "--hold", "2s",
        "--policy", str(calm.home / "policy.yaml"),
    )  # fmt: skip
    assert outcome["promoted"] is True
    assert [step["weight"] for step in outcome["steps"]] == [20, 100]
    assert outcome["steps"][0]["objectives"]["success"]["canary"]["requests"] > 0
    assert split(calm)["v2"] == 100


def test_a_bad_canary_goes_back_to_zero_and_says_why(calm: Cli) -> None:
    calm.run("fault", "--err", "0.5", "--version", "v2", "--at", "mesh")
    process = calm.start(
        "canary", "service-b", "--to", "v2", "--policy", str(calm.home / "policy.yaml"), "-o", "json"
    )
    out, _ = process.communicate(timeout=DEADLINE_S)
    outcome = json.loads(out)
    assert process.returncode == 1
    assert outcome["promoted"] is False
    assert "requests to v2 failed" in outcome["reason"]
    assert 0 < outcome["back_s"] < 30  # how fast it is, `bench steer` measures
    assert split(calm) == {"v1": 100, "v2": 0}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_canary_leaves_stable_with_all_traffic(calm: Cli, number: signal.Signals) -> None:
    process = calm.start("canary", "service-b", "--to", "v2", "--steps", "30,100", "--hold", "60s")
    wait_for("the shift", lambda: split(calm).get("v2") == 30)
    process.send_signal(number)
    process.wait(DEADLINE_S)
    wait_for("stable with all traffic", lambda: split(calm) == {"v1": 100, "v2": 0})
    process.communicate()


def test_a_canary_that_was_starved_says_that_its_lease_ran_out(calm: Cli) -> None:
    process = calm.start(
        "canary", "service-b", "--to", "v2", "--steps", "30,100", "--hold", "60s", "-o", "json"
    )
    wait_for("the shift", lambda: split(calm).get("v2") == 30)
    process.send_signal(signal.SIGSTOP)
    wait_for("stable with all traffic", lambda: split(calm) == {"v1": 100, "v2": 0})
    process.send_signal(signal.SIGCONT)
    out, _ = process.communicate(timeout=DEADLINE_S)
    outcome = json.loads(out)
    assert (process.returncode, outcome["promoted"]) == (1, False)
    assert "ran out" in outcome["reason"]
    assert "somebody else" not in outcome["reason"]
    assert split(calm) == {"v1": 100, "v2": 0}


def test_a_split_that_somebody_else_changes_is_theirs(calm: Cli) -> None:
    process = calm.start(
        "canary", "service-b", "--to", "v2", "--steps", "30,100", "--hold", "60s", "-o", "json"
    )
    wait_for("the shift", lambda: split(calm).get("v2") == 30)
    calm.run("traffic", "set", "service-b", "--split", "v1=50,v2=50")
    out, _ = process.communicate(timeout=DEADLINE_S)
    assert "somebody else" in json.loads(out)["reason"]
    assert split(calm) == {"v1": 50, "v2": 50}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "--to", "v2"], "no service 'nowhere'"),
        (["service-b", "--to", "v9"], "no version 'v9'"),
        (["service-b", "--to", "v2", "--steps", "50,20"], "does not rise"),
        (["service-b", "--to", "v2", "--steps", "a"], "whole percentages"),
        (["service-a", "--to", "v1"], "no other version"),
    ],
)
def test_a_canary_that_makes_no_sense(mesh: Cli, arguments: list[str], words: str) -> None:
    assert words in mesh.run("canary", *arguments, status=2)
