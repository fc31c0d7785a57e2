"""The benchmark as its users run it: a quick real run, and that nothing of it is left, however it ends."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from local_harness import wait_for

from meshdemo.bench.guard import MARK
from meshdemo.bench.loops import OpenLoop
from meshdemo.bench.stage import Stage, listens

DEADLINE_S = 240.0


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """A benchmark with a folder for temporary files of its own, so that what it leaves is seen."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "meshdemo", "bench", *arguments],
        env={**os.environ, "TMPDIR": str(folder), "MESHDEMO_HOME": str(folder / "home")},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def marked(folder: Path) -> list[psutil.Process]:
    """What runs of the benchmarks of this folder."""
    found = []
    for process in psutil.process_iter():
        try:
            environ = process.environ()
            alive = process.status() != psutil.STATUS_ZOMBIE
        except (psutil.Error, OSError):
            continue
        if alive and MARK in environ and environ.get("TMPDIR") == str(folder):
            found.append(process)
    return found


@pytest.fixture
def folder() -> Path:
    """A short path: Unix sockets lie below it."""
    return Path(tempfile.mkdtemp(prefix="tb"))


def test_a_quick_run_measures_and_leaves_nothing(folder: Path) -> None:
    page = folder / "bench.html"
    out, err = start(
        folder, "fault", "--quick", "--runs", "1", "--html", str(page), "-o", "json"
    ).communicate(timeout=DEADLINE_S)
    report = json.loads(out)
    (suite,) = report["suites"]
    assert suite["error"] is None, (suite, err)
    figures = {figure["key"]: figure for figure in suite["figures"]}
    assert figures.keys() == {"fault.effective", "fault.first", "fault.all", "fault.over"}, (
        suite["notes"],
        err,
    )
    for figure in figures.values():
        for row in figure["alternatives"]:
            assert row["rounds"] == 1
            assert row["values"][0] is not None, figure
            assert row["values"][0] >= 0, figure
    assert {"meshdemo", "Envoy"} <= report["machine"]["versions"].keys()
    assert "<svg" in page.read_text()
    page.unlink()
    wait_for("everything to be gone", lambda: not marked(folder))
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_ended_leaves_nothing(folder: Path, number: signal.Signals) -> None:
    bench = start(folder, "fault", "--quick")
    # the guard, the supervisor, and something of the mesh
    wait_for("a mesh to run", lambda: len(marked(folder)) > 5)
    bench.send_signal(number)
    out, err = bench.communicate(timeout=DEADLINE_S)
    assert bench.returncode == {signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}[number], (out, err)
    wait_for("everything to be gone", lambda: not marked(folder))
    wait_for("no file to be left", lambda: not list(folder.iterdir()))


def test_what_was_measured_before_an_interruption_is_not_lost(folder: Path) -> None:
    page = folder / "bench.html"
    page.write_text("an older report")
    bench = start(folder, "fault", "load", "--quick", "--runs", "1", "--html", str(page), "-o", "json")
    assert page.read_text() == "an older report"
    wait_for("the first suite's page", lambda: "<svg" in page.read_text(), 180.0)
    bench.send_signal(signal.SIGINT)
    out, err = bench.communicate(timeout=DEADLINE_S)
    assert bench.returncode in (130, -signal.SIGINT), err
    assert [suite["suite"] for suite in json.loads(out)["suites"]] == ["fault"]
    assert "<svg" in page.read_text()


def test_a_wrong_name_says_what_there_is(folder: Path) -> None:
    bench = start(folder, "speed")
    _, err = bench.communicate(timeout=DEADLINE_S)
    assert bench.returncode == 2
    assert "no suite 'speed'; there are: overhead, fault, heal" in err


def test_the_open_loop_sees_each_request_when_it_was_due() -> None:
    with Stage() as stage:
        port = stage.port()
        server = [sys.executable, "-P", "-m", "meshdemo.workloads.service_b"]
        with stage.running("service-b", server, env={"PORT": str(port)}, port=port):
            began = time.monotonic()
            with OpenLoop(stage, port, 100, seconds=2.0) as load:
                requests = load.join(60)
        assert not listens(port)
    requests = sorted(requests, key=lambda one: one.due)
    assert requests[0].due >= began
    # What follows is the schedule, whatever the machine did; but its last requests may find no time to be
    # answered in, and when one was due is told from two looks at the clock, between which others may run.
    assert len(requests) >= 50
    assert {one.status for one in requests[: len(requests) // 2]} == {200}
    gaps = [b.due - a.due for a, b in itertools.pairwise(requests)]
    assert sum(abs(gap - 0.01) >= 0.001 for gap in gaps) <= len(gaps) // 20
    assert requests[-1].due - requests[0].due == pytest.approx(len(gaps) * 0.01, abs=0.1)
