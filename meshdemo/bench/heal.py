"""How soon a fault is found, and healed: by watch, next to other ways to go about it.

watch       meshdemo watch, with the default policy
nothing     no remedy at all, and no outlier detection
outlier     Envoy's outlier detection alone, with Envoy's own defaults
prometheus  Prometheus and Alertmanager at one second, with a webhook that carries out the same remedies
liveness    Kubernetes' liveness probes alone, on kind (`heal_kind`)

Each run has a fresh mesh of its own, with a load of 200 requests/s through it that sees what callers see: a
service is healthy again from the moment from which every second keeps to the objective.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from meshdemo.apps import loader
from meshdemo.bench import heal_kind, outlier, prometheus
from meshdemo.bench.model import Bar, Figure, Findings, LeftOut
from meshdemo.bench.scale import Scale
from meshdemo.bench.stage import Stage, Tell, attempt
from meshdemo.bench.trial import (
    CALM_S,
    CRASH,
    CRASH_S,
    FAULTS,
    LOST,
    OBJECTIVE,
    RPS,
    SERVICE,
    Fault,
    Outcome,
    Watch,
    Way,
    loaded,
    observe,
    watched,
)
from meshdemo.runtime import faults

if TYPE_CHECKING:
    from meshdemo.runtime.local.runtime import LocalRuntime

TITLE = "How soon a fault is found, and healed"

WATCH, NOTHING, OUTLIER, PROMETHEUS = "watch", "nothing", "outlier", "prometheus"
OBSERVED_S = 20.0
_SAME_ROUNDS = 2  # what does nothing does the same each time: so many rounds of it say it all
_QUICK = 2  # faults of a quick run
_NORMAL_ERRORS = 0.005  # on healthy traffic: half of what the objective allows


def run(stage: Stage, scale: Scale, tell: Tell) -> Findings:
    """Measure. Raises MeshdemoError."""
    rounds, left_out, failures = scale.rounds(10 if scale.alone else 5, quick=1), [], list[str]()
    if scale.quick:
        left_out.append(LeftOut("; ".join(fault.words for fault in FAULTS[_QUICK:]), "this is a quick run"))
    ways = [WATCH] if scale.alone else [WATCH, PROMETHEUS, OUTLIER, NOTHING]
    if scale.alone:
        left_out.append(LeftOut("the alternatives", "--alone leaves them out"))
    elif why := prometheus.not_installed():
        ways.remove(PROMETHEUS)
        left_out.append(LeftOut("Prometheus and Alertmanager", why))
    found: dict[tuple[str, str], list[Outcome]] = {}
    for number in range(rounds):
        for fault in FAULTS if not scale.quick else FAULTS[:_QUICK]:
            for way in ways:
                if way in {NOTHING, OUTLIER} and number >= _SAME_ROUNDS:
                    continue
                what = f"round {number + 1} of {rounds}, {fault.words}, {way}"
                tell(what)
                outcome = LOST
                with attempt(what, failures):
                    outcome = _once(stage, fault, way)
                found.setdefault((fault.key, way), []).append(outcome)
    alarms: dict[str, list[float]] = {}
    for number in range(min(rounds, 3)):
        tell(f"round {number + 1}, false alarms")
        with attempt("false alarms", failures):
            for way, count in _false_alarms(stage, scale.seconds(60, quick=10), ways).items():
                alarms.setdefault(way, []).append(count)
    figures = _figures(found, alarms)
    if not scale.alone:
        if (no_kind := heal_kind.missing(quick=scale.quick)) is not None:
            left_out.append(no_kind)
        else:
            figures += heal_kind.measure(stage, scale.rounds(2, quick=1), tell, failures)
    return Findings(
        figures=figures,
        left_out=left_out,
        notes=[
            *failures,
            f"{RPS:g} requests/s, two instances of {SERVICE}; observed for {OBSERVED_S:g} s, or until "
            f"{WATCH} or {PROMETHEUS} has healed it; objective: {1 - OBJECTIVE.failed:.0%} answered well, "
            f"{1 - OBJECTIVE.slow:.0%} within {OBJECTIVE.slower_than_s * 1000:g} ms, in every second.",
            f"{OUTLIER}: Envoy's defaults (5 errors in a row, then left alone for 30 s, longer each time), "
            f"but that one of two instances may be. Beside {WATCH} and {PROMETHEUS} the mesh has its own, "
            "which wait for 20 in a row.",
            f"{PROMETHEUS}: bare ratios of the last second, the quickest that there is; waiting for more "
            "would make fewer false alarms, and find later.",
            f"{NOTHING} and {OUTLIER}: at most {_SAME_ROUNDS} rounds.",
            f"False alarms: on traffic with {_NORMAL_ERRORS:.1%} errors, which the objective allows.",
        ],
    )


# -- one run ----------------------------------------------------------------------------------------------


def _once(stage: Stage, fault: Fault, way: str) -> Outcome:
    """One fault on a fresh mesh."""
    with ExitStack() as stack:
        runtime = stack.enter_context(stage.mesh(loader.load("pair"), rps=0))
        runtime.control().set_traffic(SERVICE, {"outlier": way != NOTHING})
        if way == OUTLIER:
            outlier.as_in_envoy(_caller(runtime))
        load = stack.enter_context(loaded(stage, _port(runtime)))
        at_work = stack.enter_context(_way(stage, runtime, way))
        return observe(
            runtime, load, fault.asked, at_work, OBSERVED_S, CRASH_S if fault.key == CRASH else 0.0
        )


def _port(runtime: LocalRuntime) -> int:
    """Where service-a calls others."""
    return next(one.outbound_port for one in runtime.instances() if one.service == "service-a")


def _caller(runtime: LocalRuntime) -> Path:
    """The admin endpoint of the sidecar of service-a."""
    name = next(one.id for one in runtime.instances() if one.service == "service-a")
    bootstrap = yaml.safe_load((runtime.paths.instance(name) / "bootstrap.yaml").read_text())
    return Path(bootstrap["admin"]["address"]["pipe"]["path"])


@contextmanager
def _way(stage: Stage, runtime: LocalRuntime, way: str) -> Iterator[Way]:
    """A way to heal for a block."""
    if way == WATCH:
        with watched(stage, runtime) as at_work:
            yield at_work
    elif way == PROMETHEUS:
        with prometheus.running(stage, runtime, heals=True) as webhook:
            yield Way(
                webhook.times,
                lambda: any(when > time.time() - CALM_S for when in webhook.times()),
                heals=True,
            )
    else:
        yield Way()


def _false_alarms(stage: Stage, seconds: float, ways: Sequence[str]) -> dict[str, float]:
    """Alarms per minute on traffic that keeps to the objective, of all ways at the same time."""
    with ExitStack() as stack:
        runtime = stack.enter_context(stage.mesh(loader.load("pair"), rps=0))
        load = stack.enter_context(loaded(stage, _port(runtime)))
        faults.inject(runtime, faults.request(at="mesh", err_rate=_NORMAL_ERRORS, service=SERVICE))
        watch = stack.enter_context(Watch(stage, runtime, "--dry-run"))
        if OUTLIER in ways:
            outlier.as_in_envoy(_caller(runtime))
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
        if OUTLIER in ways:
            counts[OUTLIER] = outlier.ejections(_caller(runtime)) / minutes
        return counts


# -- figures ----------------------------------------------------------------------------------------------


def _figures(
    found: Mapping[tuple[str, str], Sequence[Outcome]], alarms: Mapping[str, Sequence[float]]
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
        if fault.key == CRASH:
            add(
                "crash.failed", f"Failed requests of the {CRASH_S:g} s after one instance is killed", "%",
                {way: [one.failed * 100 for one in all_] for way, all_ in runs.items()},
                [Bar(1.0), Bar(1.0, of="worst")],
            )  # fmt: skip
    add("false", "False alarms on healthy traffic", "per minute", alarms, [Bar(0), Bar(0, of="worst")])
    return figures
