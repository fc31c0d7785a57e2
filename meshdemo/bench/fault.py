"""How soon a fault is felt, and by everybody: in the sidecars, next to one in the app's environment.

Both by the command that a user types, so the start of Python is in it; and in the sidecars also by the call
that the command makes, as another program would. A load through the mesh sees when the first answer is a
failure, and when the last one is none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from meshdemo.apps import loader
from meshdemo.bench.loops import OpenLoop
from meshdemo.bench.model import Bar, Figure, Findings
from meshdemo.bench.scale import Scale
from meshdemo.bench.stage import TROUBLE, InVain, Stage, Tell, ask, attempt, until
from meshdemo.bench.stats import UNMEASURED, Request, felt
from meshdemo.errors import MeshdemoError
from meshdemo.runtime import faults

if TYPE_CHECKING:
    from meshdemo.runtime.local.runtime import LocalRuntime

TITLE = "How soon a fault is felt"

MESH, CALL, APP = "in the sidecars", "in the sidecars, by a call", "in the app (a restart)"
_SERVICE = "service-b"
_RPS = 200.0  # a request every 5 ms: the resolution
_ALIKE = 50  # so many answers in a row that are all failures, or none: everybody feels it, or nobody


@dataclass(frozen=True, slots=True)
class _Felt:
    """What became of one fault (s)."""

    first: float
    all: float
    over: float  # from the start of `fault clear` until nobody feels it
    effective_ms: float  # as the product says


def run(stage: Stage, scale: Scale, tell: Tell) -> Findings:
    """Measure. Raises MeshdemoError."""
    found: dict[str, list[_Felt]] = {MESH: [], CALL: [], APP: []}
    failures: list[str] = []
    with stage.mesh(loader.load("pair"), rps=0) as runtime:
        # It would shield callers from the first instance that fails: another question.
        runtime.control().set_traffic(_SERVICE, {"outlier": False})
        caller = next(one for one in runtime.instances() if one.service == "service-a")
        with OpenLoop(stage, caller.outbound_port, _RPS) as load:
            load.await_answers(_ALIKE)
            for number in range(scale.rounds(10, quick=1)):
                for name, inject in (
                    (MESH, lambda: _command(runtime, "mesh")),
                    (CALL, lambda: _call(runtime)),
                    (APP, lambda: _command(runtime, "app")),
                ):
                    tell(f"round {number + 1}, {name}")
                    once = _Felt(UNMEASURED, UNMEASURED, UNMEASURED, UNMEASURED)
                    with attempt(f"round {number + 1}, {name}", failures):
                        once = _once(runtime, load, inject)
                    found[name].append(once)
    return Findings(
        figures=_figures(found),
        notes=[
            *failures,
            f"{_RPS:g} requests/s through the sidecar of service-a, open loop, two instances of {_SERVICE}; "
            "the fault is 100% errors.",
        ],
    )


def _once(runtime: LocalRuntime, load: OpenLoop, inject: Callable[[], float]) -> _Felt:
    """One fault, from none to none. Raises MeshdemoError; then it is cleared as far as that is possible."""
    try:
        began = time.monotonic()
        effective_ms = inject()
        with suppress(InVain):
            _await(load, began, failing=True)
        first, everybody = felt(_since(load.requests(), began), began)
        cleared = time.monotonic()
        ask(runtime, "fault", "clear")
        _await(load, cleared, failing=False)
    except TROUBLE:
        with suppress(MeshdemoError):
            faults.clear(runtime)
            _await(load, time.monotonic(), failing=False)
        raise
    last = max((one.ended for one in load.requests() if one.failed), default=cleared)
    return _Felt(first, everybody, max(0.0, last - cleared), effective_ms)


def _await(load: OpenLoop, since: float, *, failing: bool) -> None:
    """Wait until all answers are failures, or none is."""

    def alike() -> bool:
        load.process.check()
        last = load.requests()[-_ALIKE:]
        return last[0].due > since and all(one.failed is failing for one in last)

    until("everybody to feel the fault" if failing else "nobody to feel the fault", alike)


def _since(requests: Sequence[Request], since: float) -> list[Request]:
    return [one for one in requests if one.ended >= since]


def _command(runtime: LocalRuntime, at: str) -> float:
    return float(ask(runtime, "fault", "--at", at, "--err", "1")["effective_ms"])


def _call(runtime: LocalRuntime) -> float:
    return faults.inject(runtime, faults.request(at="mesh", err_rate=1.0, service=_SERVICE)).effective_ms


def _figures(found: dict[str, list[_Felt]]) -> list[Figure]:
    def values(of: Callable[[_Felt], float], *names: str) -> dict[str, list[float]]:
        return {name: [of(one) for one in found[name]] for name in names or found if found[name]}

    if not found[MESH]:
        return []
    return [
        Figure(
            "fault.effective", "In force, as the command says", "ms", "lower",
            values(lambda one: one.effective_ms, MESH), MESH, [Bar(50), Bar(50, of="worst")],
        ),
        Figure(
            "fault.first", "From the start of the command until the first request feels it", "s", "lower",
            values(lambda one: one.first), MESH, varies=True,
        ),
        Figure(
            "fault.all", "... until every request feels it", "s", "lower",
            values(lambda one: one.all), MESH, varies=True,
        ),
        Figure(
            "fault.over", "From the start of `fault clear` until no request feels it", "s", "lower",
            values(lambda one: one.over, MESH, APP), MESH, varies=True,
        ),
    ]  # fmt: skip
