"""One fault, and how soon it is found and healed: what `heal` measures again and again, on any runtime."""

from __future__ import annotations

import json
import math
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from meshdemo.bench.loops import OpenLoop
from meshdemo.bench.stage import Process, Stage, command, until
from meshdemo.bench.stats import UNMEASURED, Objective, Request, healthy_after
from meshdemo.runtime import faults
from meshdemo.runtime.base import Runtime
from meshdemo.runtime.faults import FaultRequest

RPS = 200.0
SERVICE = "service-b"
CRASH = "crash"
CRASH_S = 10.0  # for so long after a crash the failed requests are counted
OBJECTIVE = Objective()  # as in policy.yaml
CALM_S = 3.0

_INSTANCE = "service-b-v1-1"
_SETTLED_S = 4.0  # good seconds in a row after which a way that heals is taken to have healed it
_UNDER_WAY_S = 0.4
_STOP_S = 10.0
_PATIENCE_S = 120.0


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
    Fault("errors", "30% errors, by the app", faults.request(err_rate=0.3, service=SERVICE)),
    Fault("slow", "400 ms slower, by the app", faults.request(lat_ms=400, service=SERVICE)),
    Fault(
        "mesh-errors", "30% errors, by the sidecars",
        faults.request(err_rate=0.3, at="mesh", service=SERVICE),
    ),
    Fault(
        "mesh-slow", "400 ms slower, by the sidecars", faults.request(lat_ms=400, at="mesh", service=SERVICE)
    ),
    Fault(
        "instance", "one instance with 50% errors",
        faults.request(err_rate=0.5, at="mesh", instance=_INSTANCE, service=SERVICE),
    ),
    Fault(
        "hang", "one instance hangs", faults.request(hang=True, instance=_INSTANCE, service=SERVICE),
        detect_worst=3.0, detect_median=3.0,
    ),
    Fault(CRASH, "one instance is killed", faults.request(crash=True, instance=_INSTANCE, service=SERVICE)),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one fault (s; infinity: not within the time that was observed)."""

    detect: float
    healthy: float
    failed: float  # share of the requests of the first `CRASH_S`


LOST = Outcome(UNMEASURED, UNMEASURED, UNMEASURED)
"""A round that could not be measured."""


@dataclass(frozen=True, slots=True)
class Way:
    """A way to heal, at work."""

    alarms: Callable[[], list[float]] = list  # when it raised some (seconds since the epoch)
    busy: Callable[[], bool] = lambda: False  # is one open?
    heals: bool = False  # a few good seconds are enough then; what does nothing is looked at to the end


def observe(
    runtime: Runtime, load: OpenLoop, asked: FaultRequest, way: Way, observed_s: float, least_s: float = 0.0
) -> Outcome:
    """Break something in a calm mesh, and look for `observed_s` what becomes of it. Ends the load.

    Args:
        least_s: looked for so long even if all is well before.
    """
    until("everything to be calm", lambda: _is_calm(load) and not way.busy(), _PATIENCE_S)
    time.sleep(random.random())  # noqa: S311 (telemetry comes once a second: at any moment in it)
    started_at = faults.inject(runtime, asked).fault.started_at
    start = time.monotonic() - (time.time() - started_at)
    end = start + observed_s
    enough = start + max(least_s, _SETTLED_S) if way.heals else end
    while (now := time.monotonic()) < end:
        if now > enough and settled(load.requests(), now, _SETTLED_S):
            break
        time.sleep(0.1)
    observed = time.monotonic()
    requests = load.stop()
    alarms = [when for when in way.alarms() if when >= started_at]
    first = [one for one in requests if start <= one.due < start + CRASH_S]
    return Outcome(
        min(alarms, default=math.inf) - started_at,
        healthy_after(requests, start, observed, OBJECTIVE),
        sum(one.failed for one in first) / max(1, len(first)),
    )


def settled(requests: Sequence[Request], now: float, seconds: float) -> bool:
    """Whether the objective has held in every one of the last seconds, as far as they can be told yet.

    What was due in the last 0.4 s may still be under way; what hangs is not in the list, so it is counted.
    """
    end = now - _UNDER_WAY_S
    recent = [one for one in requests[-round(2 * (seconds + 1) * RPS) :] if one.due >= end - seconds]
    complete = sum(one.due < end for one in recent) >= 0.99 * seconds * RPS
    return complete and healthy_after(recent, end - seconds, end, OBJECTIVE) == 0


def _is_calm(load: OpenLoop) -> bool:
    load.process.check()
    return settled(load.requests(), time.monotonic(), CALM_S)


@contextmanager
def loaded(stage: Stage, port: int) -> Iterator[OpenLoop]:
    """The load, from when it flows."""
    with OpenLoop(stage, port, RPS) as load:
        load.await_answers(round(RPS / 2))
        yield load


@contextmanager
def watched(stage: Stage, runtime: Runtime) -> Iterator[Way]:
    """`meshdemo watch` at work for a block, with the default policy."""
    with Watch(stage, runtime) as watch:
        yield Way(lambda: watch.times("violated"), watch.busy, heals=True)


class Watch:
    """`meshdemo watch` as a process of its own, and what it says."""

    def __init__(self, stage: Stage, runtime: Runtime, *arguments: str) -> None:
        self.events: list[Mapping[str, Any]] = []
        words = command(runtime, "watch", "-o", "jsonl", *arguments)
        self._process: Process = stage.start("watch", words, stdout=subprocess.PIPE)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Watch:
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
