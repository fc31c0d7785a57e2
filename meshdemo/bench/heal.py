"""How soon a fault is found, and healed: by watch, next to other ways to go about it.

watch       meshdemo watch, with the default policy
nothing     no remedy at all, and no outlier detection
outlier     Envoy's outlier detection alone, as the mesh has it by default
prometheus  Prometheus and Alertmanager at one second, with a webhook that carries out the same remedies

Each run has a fresh mesh of its own, with a load of 200 requests/s through it that sees what callers see: a
service is healthy again from the moment from which every second keeps to the objective.
"""

from __future__ import annotations

import json
import math
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from meshdemo.apps import loader
from meshdemo.bench import prometheus
from meshdemo.bench.loops import OpenLoop
from meshdemo.bench.model import Bar, Figure, Findings, LeftOut
from meshdemo.bench.scale import Scale
from meshdemo.bench.stage import Process, Stage, Tell, attempt, command, until
from meshdemo.bench.stats import Objective, Request, healthy_after
from meshdemo.runtime import faults
from meshdemo.runtime.faults import FaultRequest

if TYPE_CHECKING:
    from meshdemo.runtime.local.runtime import LocalRuntime

TITLE = "How soon a fault is found, and healed"

WATCH, NOTHING, OUTLIER, PROMETHEUS = "watch", "nothing", "outlier", "prometheus"
RPS = 200.0
OBSERVED_S = 20.0
CRASH_S = 10.0  # for so long after a crash the failed requests are counted

_CRASH = "crash"
_SERVICE, _INSTANCE = "service-b", "service-b-v1-1"
_OBJECTIVE = Objective()  # as in policy.yaml
_CALM_S = 3.0
_SETTLED_S = 4.0  # good seconds in a row after which watch and Prometheus are taken to have healed it
_NORMAL_ERRORS = 0.005  # on healthy traffic: half of what the objective allows
_UNDER_WAY_S = 0.4
_STOP_S = 10.0


@dataclass(frozen=True, slots=True)
class Fault:
    """One kind of trouble, and by when it should be found and healed (s)."""

    key: str
    words: str
    asked: FaultRequest
    detect_worst: float = 2.0
    detect_median: float = 1.2
    healthy: float = 6.0


FAULTS: Sequence[Fault] = (
    Fault("errors", "30% errors, by the app", faults.request(err_rate=0.3, service=_SERVICE)),
    Fault("slow", "400 ms slower, by the app", faults.request(lat_ms=400, service=_SERVICE)),
    Fault(
        "instance", "one instance with 50% errors",
        faults.request(err_rate=0.5, at="mesh", instance=_INSTANCE, service=_SERVICE),
    ),
    Fault(
        "hang", "one instance hangs", faults.request(hang=True, instance=_INSTANCE, service=_SERVICE),
        detect_worst=3.0,
    ),
    Fault(
        _CRASH, "one instance is killed", faults.request(crash=True, instance=_INSTANCE, service=_SERVICE),
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Run:
    """What became of one fault (s; infinity: not within the time that was observed)."""

    detect: float
    healthy: float
    failed: float  # share of the requests of the first `CRASH_S`


def run(stage: Stage, scale: Scale, tell: Tell) -> Findings:
    """Measure. Raises MeshdemoError."""
    rounds, left_out, failures = scale.rounds(10, quick=1), [], list[str]()
    ways = [WATCH, PROMETHEUS, OUTLIER, NOTHING]
    if why := prometheus.not_installed():
        ways.remove(PROMETHEUS)
        left_out.append(LeftOut("Prometheus and Alertmanager", why))
    left_out.append(
        LeftOut("liveness probes", "they are Kubernetes' own, and this runs on the local runtime")
    )
    found: dict[tuple[str, str], list[_Run]] = {}
    for number in range(rounds):
        for fault in FAULTS if not scale.quick else FAULTS[:2]:
            for way in ways:
                # What does nothing does the same each time: two rounds of it say it all.
                if way in {NOTHING, OUTLIER} and number >= 2:
                    continue
                what = f"round {number + 1} of {rounds}, {fault.words}, {way}"
                tell(what)
                with attempt(what, failures):
                    found.setdefault((fault.key, way), []).append(_once(stage, fault, way))
    alarms: dict[str, list[float]] = {}
    for number in range(min(rounds, 3)):
        tell(f"round {number + 1}, false alarms")
        with attempt("false alarms", failures):
            for way, count in _false_alarms(stage, scale.seconds(60, quick=10), ways).items():
                alarms.setdefault(way, []).append(count)
    return Findings(
        figures=_figures(found, alarms),
        left_out=left_out,
        notes=[
            *failures,
            f"{RPS:g} requests/s, two instances of {_SERVICE}; observed for {OBSERVED_S:g} s; objective: "
            f"{1 - _OBJECTIVE.failed:.0%} answered well, {1 - _OBJECTIVE.slow:.0%} within "
            f"{_OBJECTIVE.slower_than_s * 1000:g} ms, in every second.",
            f"False alarms: on traffic with {_NORMAL_ERRORS:.1%} errors, which the objective allows.",
        ],
    )


# -- one run ----------------------------------------------------------------------------------------------


def _once(stage: Stage, fault: Fault, way: str) -> _Run:
    """One fault on a fresh mesh."""
    with ExitStack() as stack:
        runtime = stack.enter_context(stage.mesh(loader.load("pair"), rps=0))
        runtime.control().set_traffic(_SERVICE, {"outlier": way != NOTHING})
        load = stack.enter_context(_load(stage, runtime))
        detected, open_alarms = stack.enter_context(_watching(stage, runtime, way))
        until("everything to be calm", lambda: _is_calm(load) and not open_alarms())
        time.sleep(random.random())  # noqa: S311 (telemetry comes once a second: at any moment in it)
        started_at = faults.inject(runtime, fault.asked).fault.started_at
        start = time.monotonic() - (time.time() - started_at)
        end = start + OBSERVED_S
        # Where something heals, a few good seconds are enough; what does nothing is looked at to the end.
        least_s = CRASH_S if fault.key == _CRASH else _SETTLED_S
        enough = start + least_s if way in {WATCH, PROMETHEUS} else end
        while (now := time.monotonic()) < end:
            if now > enough and settled(load.requests(), now, _SETTLED_S):
                break
            time.sleep(0.1)
        observed = time.monotonic()
        requests = load.stop()
        alarms = [when for when in detected() if when >= started_at]
        first = [one for one in requests if start <= one.due < start + CRASH_S]
        return _Run(
            min(alarms, default=math.inf) - started_at,
            healthy_after(requests, start, observed, _OBJECTIVE),
            sum(one.failed for one in first) / max(1, len(first)),
        )


def settled(requests: Sequence[Request], now: float, seconds: float) -> bool:
    """Whether the objective has held in every one of the last seconds, as far as they can be told yet.

    What was due in the last 0.4 s may still be under way; what hangs is not in the list, so it is counted.
    """
    end = now - _UNDER_WAY_S
    recent = [one for one in requests[-round(2 * (seconds + 1) * RPS) :] if one.due >= end - seconds]
    complete = sum(one.due < end for one in recent) >= 0.99 * seconds * RPS
    return complete and healthy_after(recent, end - seconds, end, _OBJECTIVE) == 0


def _is_calm(load: OpenLoop) -> bool:
    load.process.check()
    return settled(load.requests(), time.monotonic(), _CALM_S)


@contextmanager
def _load(stage: Stage, runtime: LocalRuntime) -> Iterator[OpenLoop]:
    caller = next(one for one in runtime.instances() if one.service == "service-a")
    with OpenLoop(stage, caller.outbound_port, RPS) as load:
        load.await_answers(round(RPS / 2))
        yield load


@contextmanager
def _watching(
    stage: Stage, runtime: LocalRuntime, way: str
) -> Iterator[tuple[Callable[[], list[float]], Callable[[], bool]]]:
    """A way to heal for a block; when it raised alarms (seconds since the epoch), and is one open?"""
    if way == WATCH:
        with _Watch(stage, runtime) as watch:
            yield lambda: watch.times("violated"), watch.busy
    elif way == PROMETHEUS:
        with prometheus.running(stage, runtime, heals=True) as webhook:
            yield webhook.times, lambda: any(when > time.time() - _CALM_S for when in webhook.times())
    else:
        yield list, lambda: False


class _Watch:
    """`meshdemo watch` as a process of its own, and what it says."""

    def __init__(self, stage: Stage, runtime: LocalRuntime, *arguments: str) -> None:
        self.events: list[Mapping[str, Any]] = []
        words = command(runtime, "watch", "-o", "jsonl", *arguments)
        self._process: Process = stage.start("watch", words, stdout=subprocess.PIPE)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> _Watch:
        until("watch to start", self._started)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.popen.send_signal(signal.SIGINT)
        self._process.stop(_STOP_S)
        self._reader.join(_STOP_S)

    def times(self, name: str) -> list[float]:
        """When it said so (seconds since the epoch)."""
        return [event["time"] for event in self.events if event["event"] == name]

    def busy(self) -> bool:
        """Whether it works on an incident."""
        return len(self.times("violated")) > len(self.times("healed"))

    def _started(self) -> bool:
        self._process.check()
        return bool(self.times("started"))

    def _read(self) -> None:
        assert self._process.popen.stdout is not None
        for line in self._process.popen.stdout:
            self.events.append(json.loads(line))


def _false_alarms(stage: Stage, seconds: float, ways: Sequence[str]) -> dict[str, float]:
    """Alarms per minute on traffic that keeps to the objective, of all ways at the same time."""
    with ExitStack() as stack:
        runtime = stack.enter_context(stage.mesh(loader.load("pair"), rps=0))
        load = stack.enter_context(_load(stage, runtime))
        faults.inject(runtime, faults.request(at="mesh", err_rate=_NORMAL_ERRORS, service=_SERVICE))
        watch = stack.enter_context(_Watch(stage, runtime, "--dry-run"))
        webhook = None
        if PROMETHEUS in ways:
            webhook = stack.enter_context(prometheus.running(stage, runtime, heals=False))
        began = time.time()
        time.sleep(seconds)
        minutes = (time.time() - began) / 60
        load.process.check()
        counts = {WATCH: sum(when > began for when in watch.times("violated")) / minutes}
        if webhook is not None:
            counts[PROMETHEUS] = sum(when > began for when in webhook.times()) / minutes
        return counts


# -- figures ----------------------------------------------------------------------------------------------


def _figures(
    found: Mapping[tuple[str, str], Sequence[_Run]], alarms: Mapping[str, Sequence[float]]
) -> list[Figure]:
    figures: list[Figure] = []

    def add(
        key: str,
        title: str,
        unit: str,
        values: Mapping[str, Sequence[float]],
        bars: Sequence[Bar],
        observed: float | None = None,
    ) -> None:
        if values.get(WATCH):
            figures.append(
                Figure(f"heal.{key}", title, unit, "lower", values, WATCH, bars, observed, varies=True)
            )

    for fault in FAULTS:
        runs = {way: all_ for (key, way), all_ in found.items() if key == fault.key}
        add(
            f"{fault.key}.detect", f"Found: {fault.words}", "s",
            {way: [one.detect for one in runs[way]] for way in (WATCH, PROMETHEUS) if way in runs},
            [Bar(fault.detect_median), Bar(fault.detect_worst, of="worst")], observed=OBSERVED_S,
        )  # fmt: skip
        add(
            f"{fault.key}.healthy", f"Healthy again: {fault.words}", "s",
            {way: [one.healthy for one in all_] for way, all_ in runs.items()},
            [Bar(fault.healthy), Bar(fault.healthy, of="worst")], observed=OBSERVED_S,
        )  # fmt: skip
        if fault.key == _CRASH:
            add(
                "crash.failed", f"Failed requests of the {CRASH_S:g} s after one instance is killed", "%",
                {way: [one.failed * 100 for one in all_] for way, all_ in runs.items()},
                [Bar(1.0), Bar(1.0, of="worst")],
            )  # fmt: skip
    add("false", "False alarms on healthy traffic", "per minute", alarms, [Bar(0), Bar(0, of="worst")])
    return figures
