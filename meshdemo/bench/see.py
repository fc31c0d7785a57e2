"""What it costs to look, and how old the figures are that are seen.

tap    everything is tapped (`meshdemo tap`, as a user would) at 1,000 requests/s, and is not, in turn; what
       that does to the median latency of the traffic, and to the control plane
page   one request into an idle mesh, at any moment of a second; when the page's stream carries its figure
"""

from __future__ import annotations

import json
import math
import random
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPResponse
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import psutil

from meshdemo.bench import machine
from meshdemo.bench.loops import HOST, OpenLoop
from meshdemo.bench.model import Bar, Figure, Findings
from meshdemo.bench.overhead import instant_app
from meshdemo.bench.scale import Scale
from meshdemo.bench.stage import Stage, Tell, attempt, command, process_ids, until
from meshdemo.bench.stats import Request, quantile
from meshdemo.errors import Failed

if TYPE_CHECKING:
    from meshdemo.control.client import ControlClient
    from meshdemo.runtime.local.runtime import LocalRuntime

TITLE = "What it costs to look, and how old the figures are"

TAPPED, NOT_TAPPED = "tapped", "not tapped"
RPS = 1000.0
_SERVICE = "service-b"
_WARM = 50  # answers in a row, from which on the load flows
_SETTLE_S = 0.5  # after the tap was switched, and of new connections
_MOST_S = 30.0  # a figure that is not there by then never comes


@dataclass(slots=True)
class _Tapping:
    """Values of all rounds, by whether it was tapped."""

    p50_us: dict[str, list[float]] = field(default_factory=dict)
    p99_us: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)  # of the control plane, percent of one core
    failed: dict[str, list[float]] = field(default_factory=dict)
    seen: list[float] = field(default_factory=list)  # requests/s that the tap told of or counted


def run(stage: Stage, scale: Scale, tell: Tell) -> Findings:
    """Measure. Raises MeshdemoError."""
    tapping, late, failures = _Tapping(), list[float](), list[str]()
    with stage.mesh(instant_app(stage)) as runtime:
        port = next(one.outbound_port for one in runtime.instances() if one.service == "service-a")
        for number in range(scale.rounds(5, quick=1)):
            tell(f"a tap of everything, round {number + 1}")
            with attempt(f"a tap, round {number + 1}", failures):
                _round(stage, runtime, port, scale.seconds(10, quick=3), tapping)
        with _Page(runtime.control()) as page:
            for number in range(scale.rounds(20, quick=2)):
                tell(f"the page, request {number + 1}")
                with attempt(f"the page, request {number + 1}", failures):
                    late.append(_lateness(page, port))
    return Findings(
        figures=_figures(tapping, late),
        notes=[
            *failures,
            f"A tap of everything is `meshdemo tap -o json`; {RPS:g} requests/s, open loop, through two "
            "sidecars to a server that answers at once, tapped and not tapped in turn.",
            "The page's figure is on the page's stream of events; a browser draws it within milliseconds.",
        ],
    )


# -- the tap ----------------------------------------------------------------------------------------------


def _round(stage: Stage, runtime: LocalRuntime, port: int, seconds: float, found: _Tapping) -> None:
    """One load, in four parts: not tapped, tapped, and both again. Raises MeshdemoError."""
    control = psutil.Process(process_ids(runtime)["control plane"])
    parts: list[tuple[str, float, float, float]] = []  # and begin, end, processor time (s)
    seen = []
    with OpenLoop(stage, port, RPS) as load:
        load.await_answers(_WARM)
        for name in (NOT_TAPPED, TAPPED) * 2:
            with _tap(stage, runtime, name == TAPPED) as tap:
                time.sleep(_SETTLE_S)
                told, used, began = tap.told(), machine.cpu_s([control]), time.monotonic()
                time.sleep(seconds)
                end = time.monotonic()
                parts.append((name, began, end, machine.cpu_s([control]) - used))
                if name == TAPPED:
                    tap.check()
                    seen.append((tap.told() - told) / (end - began))
        requests = load.stop()
    for name, began, end, used in parts:
        of_part = [one for one in requests if began <= one.due < end]
        if not of_part:
            raise Failed("the load made no requests")
        latencies = [_latency(one) for one in of_part]
        found.p50_us.setdefault(name, []).append(quantile(latencies, 0.5) * 1e6)
        found.p99_us.setdefault(name, []).append(quantile(latencies, 0.99) * 1e6)
        found.cpu.setdefault(name, []).append(used / (end - began) * 100)
        found.failed.setdefault(name, []).append(sum(map(math.isinf, latencies)))
    found.seen += seen


def _latency(one: Request) -> float:
    return one.took_s if one.status == 200 else math.inf


class _Tap:
    """`meshdemo tap` of everything as a process, and how many requests it told of or counted as left out."""

    def __init__(self, stage: Stage, runtime: LocalRuntime) -> None:
        self._process = stage.start("tap", command(runtime, "tap", "-o", "json"), stdout=subprocess.PIPE)
        self._told = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def told(self) -> int:
        return self._told

    def check(self) -> None:
        self._process.check()

    def tells(self) -> bool:
        self.check()
        return self._told > 0

    def stop(self) -> None:
        self._process.kill()
        self._reader.join()

    def _read(self) -> None:
        assert self._process.popen.stdout is not None
        for line in self._process.popen.stdout:
            self._told += 1 + json.loads(line)["skipped"]


class _NoTap:
    def told(self) -> int:
        return 0

    def check(self) -> None:
        return None


@contextmanager
def _tap(stage: Stage, runtime: LocalRuntime, on: bool) -> Iterator[_Tap | _NoTap]:
    """A tap for a block, from when it tells of requests; or none."""
    if not on:
        yield _NoTap()
        return
    tap = _Tap(stage, runtime)
    try:
        until("the tap to tell of requests", tap.tells)
        yield tap
    finally:
        tap.stop()


# -- the page ---------------------------------------------------------------------------------------------


class _Page:
    """What the page is sent: the number of requests to the service in each snapshot, as it arrives."""

    def __init__(self, client: ControlClient) -> None:
        link = urlsplit(client.page_url())
        token = parse_qs(link.fragment)["token"][0]
        self._connection = HTTPConnection(link.hostname or "", link.port, timeout=_MOST_S)
        self._connection.request("GET", "/v1/stream", headers={"Authorization": f"Bearer {token}"})
        self._answer: HTTPResponse = self._connection.getresponse()
        if self._answer.status != 200:
            raise Failed(f"the page's stream answers {self._answer.status}")

    def __enter__(self) -> _Page:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def requests(self) -> int:
        """Those of the next snapshot. Raises Failed if none comes."""
        event = ""
        while line := self._answer.readline():
            name, _, value = line.decode().rstrip("\n").partition(": ")
            if name == "event":
                event = value
            elif name == "data" and event == "snapshot":
                return _requests(json.loads(value))
        raise Failed("the page's stream has ended")


def _requests(snapshot: dict[str, Any]) -> int:
    return sum(one.get("requests") or 0 for one in snapshot["services"] if one["name"] == _SERVICE)


def _lateness(page: _Page, port: int) -> float:
    """From a request until the page's stream carries it (s); infinity if it never does.

    Raises Failed if it is not answered.
    """
    # That of the last round leaves the page's window, or comes into it: a report may be late.
    while page.requests() or page.requests():
        pass
    pause = threading.Event()
    asked: list[float] = []

    def ask() -> None:
        pause.wait(random.random())  # noqa: S311 (at any moment between two reports)
        connection = HTTPConnection("127.0.0.1", port, timeout=_MOST_S)
        began = time.monotonic()
        connection.request("GET", "/work", headers={"Host": HOST})
        if connection.getresponse().status == 200:
            asked.append(began)
        connection.close()

    asking = threading.Thread(target=ask)
    asking.start()
    give_up = time.monotonic() + _MOST_S
    seen = math.inf
    while math.isinf(seen) and time.monotonic() < give_up:
        if page.requests():
            seen = time.monotonic()
    asking.join()
    if not asked:
        raise Failed("the request was not answered with 200")
    return seen - asked[0]


# -- figures ----------------------------------------------------------------------------------------------


def _figures(tapping: _Tapping, late: Sequence[float]) -> list[Figure]:
    figures = [
        Figure(
            "see.tap.p50", f"Median latency at {RPS:g} requests/s", "µs", "lower", tapping.p50_us, TAPPED,
            [Bar(1.05, against=NOT_TAPPED)],
        ),
        Figure(
            "see.tap.p99", f"99th percentile at {RPS:g} requests/s", "µs", "lower", tapping.p99_us, TAPPED,
        ),
        Figure(
            "see.tap.cpu", "Processor of the control plane, of one core", "%", "lower", tapping.cpu, TAPPED,
            [Bar(50)],
        ),
        Figure(
            "see.tap.failed", "Requests that failed", "requests", "lower", tapping.failed, TAPPED,
            [Bar(0, of="worst")],
        ),
        Figure(
            "see.tap.seen", "Requests that the tap told of or counted", "requests/s", "higher",
            {TAPPED: tapping.seen} if tapping.seen else {}, TAPPED, [Bar(0.99 * RPS)],
        ),
        Figure(
            "see.page", "From a request until the page has its figure", "s", "lower",
            {"page": late} if late else {}, "page", [Bar(2, of="worst")], varies=True,
        ),
    ]  # fmt: skip
    return [one for one in figures if one.values]
