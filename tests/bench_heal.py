"""How fast watch heals, on a real local mesh: five kinds of fault, ten runs each, median and worst.

Run it with `python tests/bench_heal.py [--runs N] [--only KIND] [-o FILE]`; it is no test and is not collected. What
watch says of itself (`detect_s`) is taken from its events. When the service was healthy again is measured
beside it, from the sidecars' own exports: the first second from which the objectives hold (at most 1 % failed,
at most 5 % slower than 300 ms or overdue, second by second, for five seconds).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from meshdemo.control.client import ControlClient
from meshdemo.control.signals import Sample
from meshdemo.errors import MeshdemoError
from meshdemo.remediation.judge import measure_of
from meshdemo.remediation.policy import Objective, load
from meshdemo.resources import DEFAULT_POLICY
from meshdemo.runtime.select import control

SERVICE = "service-b"
CALM_S = 6.0
HOLD_S = 5.0
FAULTS = {
    "errors": ["--err", "0.3"],
    "latency": ["--lat", "400"],
    "one instance": ["--err", "0.5", "--instance", "service-b-v1-2", "--at", "mesh"],
    "hung": ["--hang", "--instance", "service-b-v1-1"],
    "killed": ["--crash", "--instance", "service-b-v1-1"],
}


@dataclass
class Run:
    """One fault and what came of it, in seconds from its start."""

    detect_s: float | None
    healthy_s: float | None
    said_s: float | None  # what watch says of the same
    failed_share: float  # of service-a's requests of the next 10 s, after retries
    remedies: list[str]


class Mesh:
    """A local mesh of its own, and the command line on it."""

    def __init__(self, home: str) -> None:
        self.name = "bench"
        os.environ["MESHDEMO_HOME"] = home
        self.samples: list[Sample] = []
        self._stop = threading.Event()

    def cli(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "meshdemo", "--name", self.name, *arguments]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)

    def run(self, *arguments: str) -> Any:
        process = self.cli(*arguments, "-o", "json")
        out, err = process.communicate()
        if process.returncode:
            raise SystemExit(f"{arguments}: {err}")
        return json.loads(out)

    @property
    def client(self) -> ControlClient:
        return control(self.name)

    @contextmanager
    def up(self, rps: float) -> Iterator[None]:
        try:
            self.run("up", "--runtime", "local", "--app", "pair", "--rps", f"{rps:g}")
            listener = threading.Thread(target=self._listen, daemon=True)
            listener.start()
            yield
            self._stop.set()
            listener.join()
        finally:
            self.run("down")

    def _listen(self) -> None:
        seq = -1
        while not self._stop.is_set():
            try:
                batch = self.client.samples(seq, wait_s=0.5)
            except MeshdemoError:
                continue
            seq = batch.seq
            self.samples = [*self.samples[-4000:], *batch.samples]


def second_by_second(samples: list[Sample], start: float, objective: Objective) -> dict[int, float]:
    """Bad share of the service in each second since the fault's start."""
    measure = measure_of(objective)
    requests: dict[int, int] = {}
    bad: dict[int, int] = {}
    for sample in samples:
        if sample.service == SERVICE and sample.end > start:
            one, second = measure(sample), int(sample.end - start)
            requests[second] = requests.get(second, 0) + one.requests + one.overdue
            bad[second] = bad.get(second, 0) + one.bad + one.overdue
    return {second: bad[second] / requests[second] for second in requests if requests[second]}


def healthy_again(samples: list[Sample], start: float) -> float | None:
    """Seconds until the first second from which all objectives hold; None if they do not."""
    worst = -1
    last = 0
    for objective in load(DEFAULT_POLICY).objectives_of(SERVICE):
        if objective.in_service is not None:
            continue
        shares = second_by_second(samples, start, objective)
        last = max(shares, default=0)
        worst = max([worst, *(second for second, share in shares.items() if share > objective.allowed)])
    return None if last - worst < HOLD_S else float(worst + 1)


def failed_share(samples: list[Sample], start: float, seconds: float = 10) -> float:
    """What callers saw fail, after retries."""
    cells = [
        cell
        for sample in samples
        if sample.service == "service-a" and start < sample.end <= start + seconds + 1
        for cell in sample.cells
        if not cell.inbound and cell.peer == SERVICE
    ]
    requests = sum(cell.requests for cell in cells)
    return sum(cell.failures for cell in cells) / requests if requests else 0.0


def one_run(mesh: Mesh, kind: str) -> Run:
    watch = mesh.cli("watch", "--for", "25s", "--until-healed", "-o", "jsonl")
    time.sleep(CALM_S + random.random())  # exports come once a second: at any moment between two
    start = mesh.run("fault", *FAULTS[kind])["started_at"]
    out, _ = watch.communicate()
    events = [json.loads(line) for line in out.splitlines()]
    while time.time() < start + 11 or (mesh.samples and mesh.samples[-1].end < start + 11):
        time.sleep(0.1)
    give_up = time.monotonic() + 15
    while (healthy := healthy_again(mesh.samples, start)) is None and time.monotonic() < give_up:
        time.sleep(0.2)
    restore(mesh)
    return Run(
        detect_s=next((one["detect_s"] for one in events if "detect_s" in one), None),
        healthy_s=healthy,
        said_s=next((one["recover_s"] for one in events if "recover_s" in one), None),
        failed_share=failed_share(mesh.samples, start),
        remedies=[one["remedy"] for one in events if one["event"] == "acted"],
    )


def restore(mesh: Mesh) -> None:
    """As it was before the fault."""
    mesh.run("fault", "clear")
    for ejection in mesh.client.intent().ejections:
        mesh.client.readmit(ejection.instance)
    while not all(row["ready"] for row in mesh.client.status()["instances"]):
        time.sleep(0.1)
    time.sleep(1)


def figures(values: list[float | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    return {
        "median": round(median(known), 2) if known else None,
        "worst": round(max(known), 2) if known else None,
        "missed": len(values) - len(known),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--only", choices=sorted(FAULTS), action="append")
    parser.add_argument("--rps", type=float, default=200)
    parser.add_argument("-o", "--output", type=Path, help="write the figures as JSON, too")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as home:
        mesh = Mesh(home)
        with mesh.up(options.rps):
            for kind in options.only or FAULTS:
                runs = [one_run(mesh, kind) for _ in range(options.runs)]
                results[kind] = {
                    "detect_s": figures([run.detect_s for run in runs]),
                    "healthy_s": figures([run.healthy_s for run in runs]),
                    "said_s": figures([run.said_s for run in runs]),
                    "failed_share_worst": round(max(run.failed_share for run in runs), 4),
                    "remedies": sorted({", ".join(run.remedies) or "none" for run in runs}),
                }
                print(kind, json.dumps(results[kind]), flush=True)
    load_average = os.getloadavg()[0]
    print(f"{options.runs} runs each at {options.rps:g} requests/s on {os.cpu_count()} cores "
          f"({platform.machine()}), load average {load_average:.1f}")  # fmt: skip
    if options.output:
        options.output.write_text(json.dumps({"runs": options.runs, "results": results}, indent=2))


if __name__ == "__main__":
    main()
