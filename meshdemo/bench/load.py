"""Whether the load is what was asked for, and what a stalled server looks like to it.

A client that waits for its answers asks a server that stands still for a second just once per connection, so
its percentiles hide the second. service-a counts from when a request was due. Both see the same stall,
without a mesh in between.
"""

from __future__ import annotations

import math
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial

import psutil

from meshdemo.bench import machine
from meshdemo.bench.loops import closed_loop, closed_loop_tool
from meshdemo.bench.model import Bar, Figure, Findings, LeftOut
from meshdemo.bench.scale import Scale
from meshdemo.bench.stage import Process, Stage, Tell, attempt, until
from meshdemo.bench.stats import UNMEASURED
from meshdemo.errors import Failed
from meshdemo.resources import TEMPLATES

TITLE = "Whether the load is what was asked for"

OURS, _SERVER = "service-a", "service-b"
_ASKED_RPS = 2000.0
_STALL_RPS = 500.0
_CONNECTIONS = 5  # of the closed loops; at 500 requests/s of 1 ms, more than are ever used
_STALL_S = 1.0
_MANY = 500  # requests in flight at a server that takes its time
_SETTLE_S = 1.0
_ANSWER_S = 5.0
_PATIENCE_S = 30.0


@dataclass(slots=True)
class _Found:
    """Values of all rounds."""

    off: list[float] = field(default_factory=list)  # percent
    cost_us: dict[str, list[float]] = field(default_factory=dict)
    flight_ms: list[float] = field(default_factory=list)
    start_s: list[float] = field(default_factory=list)
    stall_ms: dict[str, list[float]] = field(default_factory=dict)


def run(stage: Stage, scale: Scale, tell: Tell) -> Findings:
    """Measure. Raises MeshdemoError."""
    found, failures = _Found(), list[str]()
    clients = [one for one in CLIENTS if one.there]
    seconds = scale.seconds(10, quick=4)
    stalls = {
        OURS: partial(_stall, stage, seconds),
        **{one.name: partial(_stalled, stage, one, seconds) for one in clients},
    }
    for number in range(scale.rounds(3, quick=1)):
        for what, measure in (("the rate", _rate), ("many in flight", _flight)):
            tell(f"round {number + 1}, {what}")
            with attempt(f"round {number + 1}, {what}", failures):
                measure(stage, seconds, found)
        for name, stall in stalls.items():
            tell(f"round {number + 1}, a stall, {name}")
            p99_ms = UNMEASURED
            with attempt(f"round {number + 1}, a stall, {name}", failures):
                p99_ms = stall()
            found.stall_ms.setdefault(name, []).append(p99_ms)
    return Findings(
        figures=_figures(found, seconds),
        left_out=[LeftOut(one.name, machine.missing(one.name)) for one in CLIENTS if one not in clients],
        notes=[
            *failures,
            "Percentiles of service-a are estimated from its buckets, as PromQL's histogram_quantile does.",
            f"service-a sends {_STALL_RPS:g} requests/s, hey up to as many; the closed loop and wrk send the "
            "next as soon as they have an answer.",
            f"{_MANY} in flight: a closed loop on as many connections, by {closed_loop_tool()}.",
            f"The truth about the stall: {_STALL_S / seconds:.0%} of the requests fell due in it, evenly, so "
            f"the 99th percentile of all is {true_p99_ms(_STALL_S, seconds):.0f} ms. wrk 4 knows of the "
            "problem, and makes up latencies for what it did not send (`stats_correct` in its source).",
        ],
    )


def _rate(stage: Stage, seconds: float, found: _Found) -> None:
    with _workload(stage, "service_b") as server, _load(stage, server, _ASKED_RPS) as load:
        found.start_s.append(server.took_s)
        time.sleep(_SETTLE_S)
        used = {OURS: load.cpu_s(), _SERVER: server.cpu_s()}
        sent, began = load.sent(), time.monotonic()
        time.sleep(seconds)
        requests, took_s = load.sent() - sent, time.monotonic() - began
        found.off.append(abs(requests / took_s - _ASKED_RPS) / _ASKED_RPS * 100)
        for name, one in ((OURS, load), (_SERVER, server)):
            spent_s = one.cpu_s() - used[name]
            found.cost_us.setdefault(name, []).append(spent_s / max(1.0, requests) * 1e6)


def _flight(stage: Stage, seconds: float, found: _Found) -> None:
    # As many connections, each with a request on it all the time.
    with _workload(stage, "service_b", LAT_MS="200") as server:
        closed_loop(server.port, _MANY, _SETTLE_S)
        found.flight_ms.append(closed_loop(server.port, _MANY, seconds).us["0.99"] / 1000)


def _stall(stage: Stage, seconds: float) -> float:
    """The 99th percentile (ms) that service-a tells if the server stands still in between."""
    with _workload(stage, "service_b") as server, _load(stage, server, _STALL_RPS) as load:
        until("the load to flow", lambda: load.sent() > _STALL_RPS)
        before, around_s = load.buckets(), (seconds - _STALL_S) / 2
        server.stall(after_s=around_s)
        time.sleep(around_s)
        return quantile_of(before, load.buckets(), 0.99) * 1000


def true_p99_ms(stall_s: float, seconds: float) -> float:
    """The 99th percentile of a steady load of so many seconds in which the server stood still once (ms).

    A request that fell due `t` before the end of the stall waited for `t`; all others took no time.
    """
    share = stall_s / seconds
    return max(0.0, 1 - 0.01 / share) * stall_s * 1000


def quantile_of(
    before: Sequence[tuple[float, float]], after: Sequence[tuple[float, float]], q: float
) -> float:
    """The quantile (s) of what happened in between, evenly spread within the bucket that holds it.

    As PromQL's histogram_quantile: https://prometheus.io/docs/prometheus/latest/querying/functions/
    Infinity of nothing, and where it is beyond the last bound.
    """
    counts = [(bound, count - old) for (bound, count), (_, old) in zip(after, before, strict=True)]
    if not counts or not counts[-1][1]:
        return math.inf
    rank, low, below = q * counts[-1][1], 0.0, 0.0
    for bound, count in counts:
        if count >= rank and count > below:
            return bound if math.isinf(bound) else low + (bound - low) * (rank - below) / (count - below)
        low, below = bound, count
    return math.inf


def _figures(found: _Found, seconds: float) -> list[Figure]:
    figures = [
        Figure(
            "load.rate", f"How far off is the rate, of {_ASKED_RPS:g} requests/s", "%", "lower",
            {OURS: found.off}, OURS, [Bar(1), Bar(1, of="worst")],
        ),
        Figure("load.cost", "Processor time of a request", "µs", "lower", found.cost_us),
        Figure(
            "load.flight", f"99th percentile, {_MANY} requests in flight at 200 ms", "ms", "lower",
            {_SERVER: found.flight_ms}, _SERVER, [Bar(260)],
        ),
        Figure("load.start", "Start, until it answers", "s", "lower", {_SERVER: found.start_s}, _SERVER),
        Figure(
            "load.stall", f"99th percentile of {seconds:g} s with a stall of {_STALL_S:g} s", "ms", "higher",
            found.stall_ms, OURS, [Bar(0.9 * true_p99_ms(_STALL_S, seconds))], note="higher is truer",
        ),
    ]  # fmt: skip
    return [one for one in figures if one.values and all(one.values.values())]


# -- the programs -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Server:
    """A workload of ours that runs by itself, without a mesh."""

    process: Process
    port: int
    took_s: float  # its start

    @property
    def url(self) -> str:
        """What is asked of service-b."""
        return f"http://127.0.0.1:{self.port}/work"

    def read(self, path: str) -> str:
        """What it answers."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{self.port}{path}", timeout=_ANSWER_S) as answer:
            text: str = answer.read().decode()
        return text

    def sent(self) -> float:
        """Requests of service-a that were answered with 200."""
        found = re.search(
            r'^service_a_requests_total\{code="200"\} (\S+)$', self.read("/metrics"), re.MULTILINE
        )
        return float(found[1]) if found else 0.0

    def buckets(self) -> list[tuple[float, float]]:
        """Latencies of service-a: upper bound (s), requests up to it."""
        rows = re.findall(r'service_a_latency_seconds_bucket\{le="(\S+)"\} (\S+)', self.read("/metrics"))
        return [(float(bound), float(count)) for bound, count in rows]

    def cpu_s(self) -> float:
        """Processor time that it has used (s)."""
        return machine.cpu_s([psutil.Process(self.process.pid)])

    def stall(self, after_s: float) -> None:
        """Let it stand still for a while."""
        time.sleep(after_s)
        self.process.popen.send_signal(signal.SIGSTOP)
        time.sleep(_STALL_S)
        self.process.popen.send_signal(signal.SIGCONT)


@contextmanager
def _workload(stage: Stage, program: str, **variables: str) -> Iterator[_Server]:
    port = stage.port()
    command = [sys.executable, "-P", "-m", f"meshdemo.workloads.{program}"]
    env = {"http_proxy": "", "HTTP_PROXY": "", "PORT": str(port), **variables}
    began = time.monotonic()
    with stage.running(program, command, env=env, port=port) as process:
        server = _Server(process, port, 0.0)
        server.read("/healthz")
        yield _Server(process, port, time.monotonic() - began)


def _load(stage: Stage, server: _Server, rps: float) -> AbstractContextManager[_Server]:
    return _workload(stage, "service_a", TARGET=server.url, RPS=f"{rps:g}")


# -- closed loops -----------------------------------------------------------------------------------------


def _stalled(stage: Stage, client: Client, seconds: float) -> float:
    """The 99th percentile (ms) that a client sees if the server stands still in between."""
    with _workload(stage, "service_b") as server:
        process = subprocess.Popen(
            client.command(server, seconds), stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL
        )
        server.stall(after_s=(seconds - _STALL_S) / 2)
        said, _ = process.communicate(timeout=seconds + _PATIENCE_S)
    found = re.search(client.p99, said)
    if process.returncode or not found:
        raise Failed(f"{client.name} failed: {said.strip()[-200:]}")
    return float(found[1]) * client.ms


@dataclass(frozen=True, slots=True)
class Client:
    """A closed-loop client: how it is run, and where its 99th percentile stands in what it says."""

    name: str
    p99: str  # pattern
    ms: float  # milliseconds in its unit
    tool: str | None  # the program that must be installed; None: it is part of the benchmark

    @property
    def there(self) -> bool:
        """Whether it is installed."""
        return self.tool is None or machine.tool(self.tool) is not None

    def command(self, server: _Server, seconds: float) -> list[str]:
        """Its command line."""
        program, most_s = str(machine.tool(self.tool or "")), f"{round(seconds + _STALL_S)}s"
        connections, length = str(_CONNECTIONS), f"{round(seconds)}s"
        if self.tool == "wrk":
            script = str(TEMPLATES / "bench" / "wrk.lua")
            limits = ["-t", "1", "-c", connections, "-d", length, "--timeout", most_s]
            return [program, *limits, "-s", script, server.url]
        if self.tool == "hey":
            each = str(round(_STALL_RPS / _CONNECTIONS))
            return [program, "-z", length, "-c", connections, "-q", each, server.url]
        return [
            sys.executable, "-P", "-m", "meshdemo.bench.client", "closed", "--port", str(server.port),
            "--connections", connections, "--seconds", f"{seconds:g}",
        ]  # fmt: skip


_JSON = r'"0\.99": ([0-9.]+)'
CLIENTS = (
    Client("closed loop", _JSON, 0.001, None),
    Client("hey", r"99%+ in ([0-9.]+) secs", 1000.0, "hey"),
    Client("wrk", _JSON, 0.001, "wrk"),
)
