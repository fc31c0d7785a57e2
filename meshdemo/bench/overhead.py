"""What a request costs on its way through two sidecars, next to bare proxies with mutual TLS.

All ways lead to the same server, which answers at once, and every proxy has one worker:

direct    no proxy at all
mesh      a real mesh: two sidecars as the control plane configures them (mutual TLS, access rules, faults
          ready, retries, statistics, telemetry every second)
envoy     two static Envoys with mutual TLS and nothing else
haproxy   two HAProxys with mutual TLS
nginx     two nginx with mutual TLS
"""

from __future__ import annotations

import getpass
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from meshdemo.apps.model import App
from meshdemo.bench import machine
from meshdemo.bench.loops import OpenLoop, closed_loop, closed_loop_tool
from meshdemo.bench.model import Bar, Curves, Figure, Findings, LeftOut
from meshdemo.bench.scale import Scale
from meshdemo.bench.stage import Process, Stage, Tell, process_ids
from meshdemo.bench.stats import quantile
from meshdemo.control.bootstrap import envoy_arguments, find_envoy
from meshdemo.control.identity import Authority
from meshdemo.errors import Failed
from meshdemo.runtime.local.runtime import LocalRuntime

TITLE = "What a request through two sidecars costs"

MESH, DIRECT, BARE = "mesh", "direct", "envoy"
RATES = (200.0, 1000.0)  # requests/s, both well below what a small machine carries
CONNECTIONS = 32

_NAME = "localhost"
_SETTLE_S = 1.0
_CURVE = (*(n / 100 for n in range(0, 99, 2)), 0.99, 0.995, 0.999)


@dataclass(frozen=True, slots=True)
class Way:
    """One way to the server: the port that requests are sent to, and the proxies on it."""

    name: str
    port: int
    proxies: Sequence[psutil.Process]

    def cpu_s(self) -> float:
        """Processor time that the proxies have used (s)."""
        return machine.cpu_s(self.proxies)

    def memory_mb(self) -> float:
        """Memory of the proxies (MB)."""
        return machine.memory_mb(self.proxies)


@dataclass(frozen=True, slots=True)
class _Round:
    """What one round saw of one way."""

    one_us: Mapping[str, float]  # quantiles at one connection
    rps: float
    cpu_ms: float  # per 1,000 requests
    memory_mb: float
    open_s: Mapping[float, Sequence[float]]  # rate -> latencies
    failed: int  # requests


def run(stage: Stage, scale: Scale, tell: Tell) -> Findings:
    """Measure. Raises MeshdemoError."""
    rounds: dict[str, list[_Round]] = {}
    with _ways(stage) as (ways, left_out):
        for way in ways:  # connections, sessions, caches: none of them is what is measured
            closed_loop(way.port, CONNECTIONS, 1)
        time.sleep(_SETTLE_S)
        for number in range(scale.rounds(5, quick=2)):
            first = number % len(ways)  # so that none always begins, or ends
            for way in (*ways[first:], *ways[:first]):
                tell(f"round {number + 1}, {way.name}")
                rounds.setdefault(way.name, []).append(_measure(stage, way, scale))
    if not machine.tool("wrk"):
        left_out.append(LeftOut("wrk", f"{machine.missing('wrk')}; the benchmark's own client stood in"))
    return Findings(
        figures=_figures(rounds),
        curves=_curves(rounds),
        left_out=left_out,
        notes=[
            f"Closed loops by {closed_loop_tool()}; open loops by the project's own load engine, "
            "whose own delay is in every latency, direct too. wrk 4 adds latencies for requests that it did "
            "not send in time, so its high percentiles are those of a steady load.",
            "Processor time and memory are those of the two proxies; what they share with each other counts "
            "once. The mesh's control plane runs beside all ways, and is in no figure here: `bench up` has "
            "what an idle mesh uses as a whole, `bench controlplane` what grows with it.",
        ],
    )


def _measure(stage: Stage, way: Way, scale: Scale) -> _Round:
    one = closed_loop(way.port, 1, scale.seconds(2, quick=1))
    used = way.cpu_s()
    many = closed_loop(way.port, CONNECTIONS, scale.seconds(2, quick=1))
    cpu_ms = (way.cpu_s() - used) * 1000 / many.requests * 1000
    memory_mb = way.memory_mb()
    open_s = {rate: _open(stage, way, rate, scale.seconds(3, quick=2)) for rate in RATES}
    failed = one.errors + many.errors + sum(map(math.isinf, itertools.chain(*open_s.values())))
    return _Round(one.us, many.rps, cpu_ms, memory_mb, open_s, failed)


def _open(stage: Stage, way: Way, rate: float, seconds: float) -> list[float]:
    """Latencies (s, infinity: failed) at a fixed rate, without the half second of new connections."""
    with OpenLoop(stage, way.port, rate, seconds=seconds + 0.5) as load:
        requests = load.join(seconds + 30)
    begin = min(one.due for one in requests) + 0.5
    return [one.took_s if one.status == 200 else math.inf for one in requests if one.due >= begin]


# -- the ways ---------------------------------------------------------------------------------------------


@contextmanager
def _ways(stage: Stage) -> Iterator[tuple[list[Way], list[LeftOut]]]:
    """All ways that can be set up here, and what had to be left out."""
    left_out = []
    with ExitStack() as stack:
        runtime = stack.enter_context(stage.mesh(instant_app(stage)))
        mesh, server = _mesh(runtime)
        ways = [Way(DIRECT, server, ()), mesh]
        keys = _keys(stage)
        for name, program, make in (
            (BARE, str(find_envoy()), _envoy),
            ("haproxy", machine.tool("haproxy"), _haproxy),
            ("nginx", machine.tool("nginx"), _nginx),
        ):
            if program is None:
                left_out.append(LeftOut(name, machine.missing(name)))
                continue
            try:
                ways.append(stack.enter_context(_pair(stage, name, Path(program), make, keys, server)))
            except Failed as error:
                left_out.append(LeftOut(name, error.message))
        yield ways, left_out


Make = Callable[[Stage, Path, Mapping[str, object]], list[str]]
"""Writes a proxy's configuration with these values; its command line."""


@contextmanager
def _pair(
    stage: Stage, name: str, program: Path, make: Make, keys: Mapping[str, object], server: int
) -> Iterator[Way]:
    """The way through two proxies of one kind. Raises Failed if one does not start."""
    with ExitStack() as stack:
        to, proxies = server, []
        for caller in (False, True):
            port = stage.port()
            command = make(stage, program, {**keys, "port": port, "to": to, "caller": caller})
            # As the sidecars of a mesh, both are in one session; the server is in one of its own.
            running = stage.running(name, command, port=port, together=True)
            proxies.append(stack.enter_context(running))
            to = port
        yield Way(name, to, _family(proxies))


def instant_app(stage: Stage) -> App:
    """service-a calls service-b, as in the pair; both are the server that answers at once."""
    program = {
        "command": [sys.executable, "-P", "-m", "meshdemo.bench.upstream"],
        "env": {"FOLDER": str(stage.folder)},
    }
    return App.model_validate(
        {
            "name": "bench",
            "front": "service-b",
            "services": {
                "service-a": {
                    "port": 5000, "calls": ["service-b"], "metrics": None, "versions": {"v1": program},
                },
                "service-b": {
                    "port": 5000, "metrics": None, "routes": [{"name": "work", "path": "/work"}],
                    "versions": {"v1": program},
                },
            },
        }
    )  # fmt: skip


def _mesh(runtime: LocalRuntime) -> tuple[Way, int]:
    """The way through the mesh, and the port of the server behind it."""
    by_service = {one.service: one for one in runtime.instances()}
    caller, callee = by_service["service-a"], by_service["service-b"]
    pids = process_ids(runtime)
    proxies = [psutil.Process(pids[f"sidecar of {one.id}"]) for one in (caller, callee)]
    return Way(MESH, caller.outbound_port, proxies), callee.app_port


def _keys(stage: Stage) -> dict[str, object]:
    """Key and certificate for both ends, of an authority made for this; as the mesh's own: EC P-256."""
    folder = stage.path("keys")
    folder.mkdir()
    now = time.time()
    authority = Authority(folder, "bench", now)
    certificate = authority.issue_control_plane(now, 86_400)  # it names localhost, as some proxies want it
    files = {
        "certificate": certificate.chain,
        "key": certificate.key,
        "both": certificate.chain + certificate.key,
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    paths: dict[str, object] = {name: str(folder / name) for name in files}
    return {**paths, "trust": str(authority.trust_path), "name": _NAME}


def _envoy(stage: Stage, program: Path, values: Mapping[str, object]) -> list[str]:
    return envoy_arguments(program, stage.render("envoy.yaml.j2", **values))


def _haproxy(stage: Stage, program: Path, values: Mapping[str, object]) -> list[str]:
    return [str(program), "-db", "-f", str(stage.render("haproxy.cfg.j2", **values))]


def _nginx(stage: Stage, program: Path, values: Mapping[str, object]) -> list[str]:
    folder = stage.path("nginx")
    folder.mkdir()
    # Started by root, the worker would be somebody else, who may not read our files.
    user = getpass.getuser() if os.geteuid() == 0 else ""
    path = stage.render("nginx.conf.j2", folder=str(folder), user=user, **values)
    return [str(program), "-e", "stderr", "-p", str(folder), "-c", str(path)]


def _family(processes: Sequence[Process]) -> list[psutil.Process]:
    """Processes with their children (nginx's work is done by one)."""
    found = []
    for process in processes:
        parent = psutil.Process(process.pid)
        found += [parent, *parent.children(recursive=True)]
    return found


# -- figures ----------------------------------------------------------------------------------------------


def _figures(rounds: Mapping[str, Sequence[_Round]]) -> list[Figure]:
    def values(of: Callable[[_Round], float], *, proxies: bool = False) -> dict[str, list[float]]:
        ways = [name for name in rounds if not (proxies and name == DIRECT)]
        return {name: [of(one) for one in rounds[name]] for name in ways}

    figures = [
        Figure(
            "overhead.one.p50", "Median latency, one connection", "µs", "lower",
            values(lambda one: one.one_us["0.5"]), MESH, [Bar(1.15, against=BARE)],
        ),
        Figure(
            "overhead.one.p99", "99th percentile, one connection", "µs", "lower",
            values(lambda one: one.one_us["0.99"]), MESH,
        ),
        Figure(
            "overhead.rps", f"Requests/s, {CONNECTIONS} connections", "requests/s", "higher",
            values(lambda one: one.rps), MESH, [Bar(0.87, against=BARE)],
        ),
        Figure(
            "overhead.cpu", "Processor time of both proxies per 1,000 requests", "ms", "lower",
            values(lambda one: one.cpu_ms, proxies=True), MESH, note=f"at {CONNECTIONS} connections",
        ),
        Figure(
            "overhead.memory", "Memory of both proxies", "MB", "lower",
            values(lambda one: one.memory_mb, proxies=True), MESH,
        ),
    ]  # fmt: skip
    if any(one.failed for found in rounds.values() for one in found):
        failed = values(lambda one: one.failed)
        figures.append(Figure("overhead.failed", "Requests that failed", "requests", "lower", failed, MESH))
    for rate in RATES:
        for q, words in ((0.5, "Median latency"), (0.99, "99th percentile")):
            figures.append(
                Figure(
                    f"overhead.open{rate:g}.p{q * 100:g}", f"{words} at {rate:g} requests/s, open loop", "µs",
                    "lower", values(_open_us(rate, q)), MESH,
                )
            )  # fmt: skip
    return figures


def _open_us(rate: float, q: float) -> Callable[[_Round], float]:
    return lambda one: quantile(one.open_s[rate], q) * 1e6


def _curves(rounds: Mapping[str, Sequence[_Round]]) -> list[Curves]:
    """Latency by quantile, of all rounds together."""
    curves = []
    for rate in RATES:
        series = {}
        for name, found in rounds.items():
            latencies = [value for one in found for value in one.open_s[rate]]
            series[name] = [(q * 100, quantile(latencies, q) * 1e6) for q in _CURVE]
        title = f"Latency at {rate:g} requests/s, open loop"
        curves.append(Curves(f"overhead.open{rate:g}", title, "percentile", "µs", series, log_y=True))
    return curves
