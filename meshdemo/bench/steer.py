"""How soon a split is in force, and how soon a bad canary is taken back.

The split is changed again and again under a steady load, by the call that the command makes; no request may
fail for it. The canary is a second version of which a fifth of the answers are errors, at a first step of
5 %, by the command that a user types.
"""

from __future__ import annotations

import json
import math
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from meshdemo.apps import loader
from meshdemo.bench.loops import OpenLoop
from meshdemo.bench.model import Bar, Figure, Findings
from meshdemo.bench.scale import Scale
from meshdemo.bench.stage import Stage, Tell, attempt, command
from meshdemo.errors import Failed

if TYPE_CHECKING:
    from meshdemo.control.client import ControlClient
    from meshdemo.runtime.local.runtime import LocalRuntime

TITLE = "How soon a split is in force, and a bad canary taken back"

MESH = "meshdemo"
RPS = 200.0
_SERVICE, _STABLE, _CANARY = "service-b", "v1", "v2"
_ERRORS = 0.2
_WARM = 50  # answers in a row, from which on the load flows
_PAUSE_S = 0.5
_CALM_S = 3.0  # what one round did is out of the windows of the next
_MOST_S = 120.0


@dataclass(slots=True)
class _Found:
    """Values of all rounds."""

    effective_ms: list[float] = field(default_factory=list)  # as the product says
    call_ms: list[float] = field(default_factory=list)  # as the caller of the control plane sees it
    failed: list[float] = field(default_factory=list)  # requests, of all changes of the split
    back_s: list[float] = field(default_factory=list)
    restore_s: list[float] = field(default_factory=list)


def run(stage: Stage, scale: Scale, tell: Tell) -> Findings:
    """Measure. Raises MeshdemoError."""
    found, failures = _Found(), list[str]()
    with stage.mesh(_with_second_version(), rps=0) as runtime:
        client = runtime.control()
        client.set_traffic(_SERVICE, {"outlier": False})  # it would shield callers from the bad version
        caller = next(one for one in runtime.instances() if one.service == "service-a")
        with attempt("the split", failures), OpenLoop(stage, caller.outbound_port, RPS) as load:
            load.await_answers(_WARM)
            _splits(client, load, scale.rounds(20, quick=5), tell, found)
        client.set_traffic(_SERVICE, {"split": {_STABLE: 100, _CANARY: 0}})
        client.add_fault(at="mesh", service=_SERVICE, version=_CANARY, err_rate=_ERRORS)
        with OpenLoop(stage, caller.outbound_port, RPS) as load:
            load.await_answers(_WARM)
            for number in range(scale.rounds(10, quick=1)):
                tell(f"canary {number + 1}")
                time.sleep(_CALM_S)
                with attempt(f"canary {number + 1}", failures):
                    _canary(runtime, client, found)
                load.process.check()
    return Findings(
        figures=_figures(found),
        notes=[
            *failures,
            f"{RPS:g} requests/s through the sidecar of service-a, open loop; two instances of {_STABLE}, "
            f"one of {_CANARY}, of which {_ERRORS:.0%} of the answers are errors while it is a canary.",
            "A canary's time is from when its step is in force until the stable version has all traffic "
            "again, by the journal of the control plane.",
        ],
    )


def _with_second_version() -> Any:
    """The pair, with the second version of service-b from the beginning."""
    app = loader.load("pair")
    service = app.services[_SERVICE]
    second = service.versions[_CANARY].model_copy(update={"initial": True})
    versions = {**service.versions, _CANARY: second}
    services = {**app.services, _SERVICE: service.model_copy(update={"versions": versions})}
    return app.model_copy(update={"services": services})


def _splits(client: ControlClient, load: OpenLoop, count: int, tell: Tell, found: _Found) -> None:
    began = time.monotonic()
    for number in range(count):
        tell(f"split {number + 1}")
        weight = 10 + 80 * (number % 2)
        asked = time.monotonic()
        effect = client.set_traffic(_SERVICE, {"split": {_STABLE: 100 - weight, _CANARY: weight}}).effect
        found.call_ms.append((time.monotonic() - asked) * 1000)
        found.effective_ms.append(effect.effective_ms)
        time.sleep(_PAUSE_S)
    found.failed.append(sum(one.failed for one in load.stop() if one.due >= began))


def _canary(runtime: LocalRuntime, client: ControlClient, found: _Found) -> None:
    """One bad canary. Raises Failed if it ends in another way than by being taken back, or promoted."""
    seq = client.events().seq
    arguments = ("canary", _SERVICE, "--to", _CANARY, "--steps", "5,25,50,100", "-o", "json")
    done = subprocess.run(
        command(runtime, *arguments), capture_output=True, text=True, check=False, timeout=_MOST_S,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if done.returncode not in (0, 1) or not done.stdout:
        raise Failed(f"the canary ended with {done.returncode}: {' '.join(done.stderr.split())[-300:]}")
    outcome = json.loads(done.stdout)
    events = [one for one in client.events(seq).events if one["event"] == "canary"]
    shifted = [one["time"] for one in events if one["what"] == "shifted"]
    back = [one["time"] for one in events if one["what"] == "rolled_back"]
    if outcome["promoted"]:  # it was never taken back
        found.back_s.append(math.inf)
        found.restore_s.append(math.inf)
        return
    if not shifted or not back or outcome["back_s"] is None:
        raise Failed(f"the canary was not taken back: {outcome['reason']}")
    found.back_s.append(back[0] - shifted[0])
    found.restore_s.append(outcome["back_s"])


def _figures(found: _Found) -> list[Figure]:
    def ours(values: Sequence[float]) -> Mapping[str, Sequence[float]]:
        return {MESH: values} if values else {}

    figures = [
        Figure(
            "steer.split", "A split in force on all sidecars, as the command says", "ms", "lower",
            ours(found.effective_ms), MESH, [Bar(50), Bar(50, of="worst")], varies=True,
        ),
        Figure(
            "steer.call", "... until the caller of the control plane knows", "ms", "lower",
            ours(found.call_ms), MESH, varies=True,
        ),
        Figure(
            "steer.failed", "Requests that failed while splits were changed", "requests", "lower",
            ours(found.failed), MESH, [Bar(0, of="worst")],
        ),
        Figure(
            "steer.canary", f"A canary with {_ERRORS:.0%} errors at a 5% step is taken back", "s", "lower",
            ours(found.back_s), MESH, [Bar(4)], varies=True,
        ),
        Figure(
            "steer.restore", "... of which the way back, from the decision", "s", "lower",
            ours(found.restore_s), MESH, [Bar(2, of="worst")], varies=True,
        ),
    ]  # fmt: skip
    return [one for one in figures if one.values]
