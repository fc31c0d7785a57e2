"""How long `up` takes, step by step, and what an idle mesh uses.

On the local runtime there is nothing to compare with. On kind (where Docker and kind are installed) it is
next to the same steps by hand, one after another (`up_kind`).
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from meshdemo.bench import machine, up_kind
from meshdemo.bench.model import Bar, Figure, Findings, LeftOut
from meshdemo.bench.scale import Scale
from meshdemo.bench.stage import Stage, Tell, attempt
from meshdemo.errors import Failed
from meshdemo.runtime.local import leftovers
from meshdemo.runtime.local.runtime import LocalRuntime

TITLE = "How long `up` takes, what an idle mesh uses, and how long `inject` takes"

LOCAL = "local"
_SETTLE_S = 2.0
_MOST_S = 120.0
_DOCUMENTS = 1000

# Run by a small process: what a child has had at most includes the memory of the process that made it, as
# it was until it ran another program.
_MEASURED = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss)
"""


def run(stage: Stage, scale: Scale, tell: Tell) -> Findings:
    """Measure. Raises MeshdemoError."""
    up, down, stat = list[float](), list[float](), list[float]()
    cpu, memory = list[float](), list[float]()
    inject_s, inject_mb = list[float](), list[float]()
    steps: dict[str, list[float]] = {}
    failures: list[str] = []
    for number in range(scale.rounds(5, quick=1)):
        tell(f"round {number + 1}")
        runtime = LocalRuntime(f"bench-up-{number}")
        with attempt(f"round {number + 1}", failures):
            try:
                seconds, taken = _command(runtime, "up", "--runtime", "local", "--verbose")
                up.append(seconds)
                for title, step_s in _steps(taken).items():
                    steps.setdefault(title, []).append(step_s)
                stat.append(_command(runtime, "stat")[0])
                runtime.set_load(0)
                tell(f"round {number + 1}, idle")
                time.sleep(_SETTLE_S)
                busy, used = _idle(runtime, scale.seconds(10, quick=3))
                cpu.append(busy * 100)
                memory.append(used)
                down.append(_command(runtime, "down")[0])
            finally:
                runtime.down()
    manifests = stage.render("many.yaml.j2", count=_DOCUMENTS)
    for number in range(scale.rounds(5, quick=1)):
        tell(f"round {number + 1}, inject")
        with attempt(f"round {number + 1}, inject", failures):
            seconds, used = _inject(manifests)
            inject_s.append(seconds)
            inject_mb.append(used)
    figures, left_out = list[Figure](), list[LeftOut]()
    if scale.quick:
        left_out.append(LeftOut(up_kind.KIND, "it takes minutes, and this is a quick run"))
    elif (why := up_kind.missing()) is not None:
        left_out.append(why)
    else:
        with attempt("kind", failures):
            figures += up_kind.measure(scale.rounds(2, quick=1), tell)
    if up:
        figures = [
            Figure("up.local", "`meshdemo up`", "s", "lower", {LOCAL: up}, LOCAL, [Bar(5)]),
            Figure("up.steps", "... of this, by step", "s", "lower", steps),
            Figure("up.down", "`meshdemo down`", "s", "lower", {LOCAL: down}, LOCAL),
            Figure("up.stat", "`meshdemo stat`", "s", "lower", {LOCAL: stat}, LOCAL),
            Figure("up.cpu", "Idle mesh: processor, of one", "%", "lower", {LOCAL: cpu}, LOCAL, [Bar(20)]),
            Figure("up.memory", "Idle mesh: memory", "MB", "lower", {LOCAL: memory}, LOCAL, [Bar(700)]),
            *figures,
        ]
    if inject_s:
        what = f"`meshdemo inject`, {_DOCUMENTS:,} documents"
        figures += [
            Figure("up.inject", f"{what}: processor time", "s", "lower", {LOCAL: inject_s}, LOCAL, [Bar(2)]),
            Figure(
                "up.inject.memory", f"{what}: memory", "MB", "lower", {LOCAL: inject_mb}, LOCAL, [Bar(200)]
            ),
        ]
    return Findings(
        figures=figures,
        left_out=left_out,
        notes=[
            *failures,
            "Steps run side by side where they can. Memory is that of all processes, what they share counted "
            "once where the system says so.",
        ],
    )


def _command(runtime: LocalRuntime, *arguments: str) -> tuple[float, str]:
    """How long a command of the product takes (s), and what it says on stderr. Raises Failed if it fails."""
    command = [sys.executable, "-P", "-m", "meshdemo", "--name", runtime.name, *arguments]
    began = time.monotonic()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_MOST_S, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"`meshdemo {arguments[0]}` did not end within {_MOST_S:g} s") from None
    if done.returncode:
        raise Failed(f"`meshdemo {arguments[0]}` failed: {' '.join(done.stderr.split())}")
    return time.monotonic() - began, done.stderr


def _inject(manifests: Path) -> tuple[float, float]:
    """Processor time (s) and most memory (MB) of a whole process of `meshdemo inject`. Raises Failed."""
    command = [sys.executable, "-c", _MEASURED, sys.executable, "-P", "-m", "meshdemo", "inject"]
    done = subprocess.run(
        [*command, str(manifests)], capture_output=True, text=True, check=False, timeout=_MOST_S,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if done.returncode:
        raise Failed(f"`meshdemo inject` failed: {' '.join(done.stderr.split())[:300]}")
    seconds, most = map(float, done.stdout.split())
    return seconds, most / (1e6 if sys.platform == "darwin" else 1e3)


def _steps(said: str) -> Mapping[str, float]:
    """The steps of `up --verbose` and how long each took (s)."""
    lines = re.findall(r"^ *([0-9.]+) s  (.+)$", said, re.MULTILINE)
    return {title: float(seconds) for seconds, title in lines}


def _idle(runtime: LocalRuntime, seconds: float) -> tuple[float, float]:
    """What share of one processor all processes of a mesh use, and their memory (MB)."""
    processes = leftovers.find(runtime.paths.state)
    before = machine.cpu_s(processes)
    began = time.monotonic()
    time.sleep(seconds)
    busy = (machine.cpu_s(processes) - before) / (time.monotonic() - began)
    return busy, machine.memory_mb(processes)
