"""Runs the suites that were asked for, one after the other, and keeps what each found.

A suite that fails says why, and the others run all the same: a long run must not be lost to its last part.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Protocol, cast

from meshdemo.bench import machine
from meshdemo.bench.model import Findings, Report, SuiteResult
from meshdemo.bench.scale import Scale
from meshdemo.bench.stage import Stage, Tell
from meshdemo.errors import BadInput, MeshdemoError


class _Suite(Protocol):
    TITLE: str

    def run(self, stage: Stage, scale: Scale, tell: Tell) -> Findings: ...


@dataclass(frozen=True, slots=True)
class About:
    """What a suite answers, and roughly how long it takes (minutes)."""

    module: str
    words: str
    minutes: float
    quick_minutes: float


SUITES: Mapping[str, About] = {
    "overhead": About("overhead", "what a request through two sidecars costs", 5, 1),
    "fault": About("fault", "how soon a fault is felt, and by everybody", 3, 0.5),
    "heal": About("heal", "how soon a fault is found and healed", 25, 3),
    "controlplane": About("controlplane", "what the control plane carries", 4, 1),
    "up": About("up", "how long `up` takes, and what an idle mesh uses", 1, 0.5),
    "load": About("load", "whether the load is what was asked for", 2, 0.5),
}


def chosen(names: Sequence[str]) -> list[str]:
    """The suites that these names mean; none, or `all`, means all. Raises BadInput for a wrong name."""
    for name in names:
        if name not in {"all", *SUITES}:
            raise BadInput(f"no suite '{name}'; there are: {', '.join(SUITES)}, all")
    if not names or "all" in names:
        return list(SUITES)
    return [name for name in SUITES if name in names]


def run(names: Sequence[str], scale: Scale, tell: Tell) -> Iterator[Report]:
    """Run suites; the report after each. An exception in a suite ends what it has started."""
    report = Report(time.time(), os.getloadavg(), scale.quick, machine.describe())
    for name in names:
        result = _run_one(name, scale, lambda line, name=name: tell(f"{name}: {line}"))  # type: ignore[misc]
        report = replace(report, suites=(*report.suites, result))
        yield report


def _run_one(name: str, scale: Scale, tell: Tell) -> SuiteResult:
    suite = cast(_Suite, import_module(f"meshdemo.bench.{SUITES[name].module}"))
    tell("setting up")
    before, steal, began = machine.quiet(), machine.Steal(), time.monotonic()
    findings, error = Findings(), ""
    try:
        with Stage() as stage:
            findings = suite.run(stage, scale, tell)
    except MeshdemoError as raised:
        error = str(raised)
    seconds, stolen = time.monotonic() - began, steal.share()
    return SuiteResult(name, suite.TITLE, seconds, before, machine.quiet(), stolen, findings, error)
