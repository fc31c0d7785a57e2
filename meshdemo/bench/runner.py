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
from meshdemo.bench.stage import TROUBLE, Stage, Tell
from meshdemo.errors import BadInput


class _Suite(Protocol):
    TITLE: str

    def run(self, stage: Stage, scale: Scale, tell: Tell) -> Findings: ...


@dataclass(frozen=True, slots=True)
class About:
    """Roughly how long a suite takes (minutes), with so many rounds as it chooses itself."""

    minutes: float
    quick_minutes: float
    rounds: int
    kind_minutes: float = 0.0  # on top of it where kind is there
    kind_rounds: int = 0  # that is for so many; 0: for `rounds`
    large_minutes: float = 0.0  # on top of it with --large
    alone_minutes: float | None = None  # instead, with --alone
    alone_rounds: int = 0  # that is for so many; 0: for `rounds`


SUITES: Mapping[str, About] = {
    "overhead": About(5, 1, 5),
    "fault": About(2, 0.5, 10),
    "heal": About(33, 4, 5, kind_minutes=26, kind_rounds=2, alone_minutes=18, alone_rounds=10),
    "controlplane": About(3, 1, 5, large_minutes=5),
    "up": About(2, 0.5, 5, kind_minutes=15, kind_rounds=2),
    "load": About(3, 1, 3),
    "see": About(6, 1, 5),
    "steer": About(3, 0.5, 10),
}


def chosen(names: Sequence[str]) -> list[str]:
    """The suites that these names mean; none, or `all`, means all. Raises BadInput for a wrong name."""
    for name in names:
        if name not in {"all", *SUITES}:
            raise BadInput(f"no suite '{name}'; there are: {', '.join(SUITES)}, all")
    if not names or "all" in names:
        return list(SUITES)
    return [name for name in SUITES if name in names]


def minutes(names: Sequence[str], scale: Scale) -> float:
    """Roughly how long these suites take."""
    with_kind = not scale.quick and any(SUITES[name].kind_minutes for name in names) and _kind_is_there()
    return sum(_minutes(SUITES[name], scale, with_kind=with_kind) for name in names)


def _minutes(about: About, scale: Scale, *, with_kind: bool) -> float:
    large = about.large_minutes if scale.large else 0.0
    if scale.quick:
        return about.quick_minutes + large
    if scale.alone and about.alone_minutes is not None:
        base, rounds, on_kind = about.alone_minutes, about.alone_rounds or about.rounds, 0.0
    else:
        base, rounds, on_kind = about.minutes, about.rounds, about.kind_minutes if with_kind else 0.0
    if scale.runs is None:
        return base + large + on_kind
    on_kind *= scale.runs / (about.kind_rounds or about.rounds)
    return (base + large) * scale.runs / rounds + on_kind


def _kind_is_there() -> bool:
    from meshdemo.bench import up_kind

    return up_kind.missing() is None


def run(names: Sequence[str], scale: Scale, tell: Tell) -> Iterator[Report]:
    """Run suites; the report after each. An exception in a suite ends what it has started."""
    report = Report(time.time(), os.getloadavg(), scale.quick, machine.describe())
    for name in names:
        result = _run_one(name, scale, lambda line, name=name: tell(f"{name}: {line}"))  # type: ignore[misc]
        report = replace(report, suites=(*report.suites, result))
        yield report


def _run_one(name: str, scale: Scale, tell: Tell) -> SuiteResult:
    suite = cast(_Suite, import_module(f"meshdemo.bench.{name}"))
    tell("setting up")
    before, steal, began = machine.quiet(), machine.Steal(), time.monotonic()
    findings, error = Findings(), ""
    try:
        with Stage() as stage:
            findings = suite.run(stage, scale, tell).measured()
    except TROUBLE as raised:
        error = str(raised)
    seconds, stolen = time.monotonic() - began, steal.share()
    return SuiteResult(name, suite.TITLE, seconds, before, machine.quiet(), stolen, findings, error)
