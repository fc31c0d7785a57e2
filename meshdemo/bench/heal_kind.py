"""How soon a fault is found and healed on kind: by watch, and by Kubernetes' liveness probes alone.

One cluster and one mesh for all runs, since they take long to come up; after each run everything is mended
and calm again. The probes have Kubernetes' own defaults (every 10 s, 1 s to answer, 3 failures), and are
alone, without readiness probes. The load comes from outside, through the gateway.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from meshdemo.bench import up_kind
from meshdemo.bench.model import Bar, Figure, LeftOut
from meshdemo.bench.stage import Stage, Tell, attempt, uninterrupted, until
from meshdemo.bench.trial import (
    CRASH,
    CRASH_S,
    FAULTS,
    LOST,
    SERVICE,
    Fault,
    Outcome,
    Way,
    loaded,
    observe,
    watched,
)
from meshdemo.errors import Failed, MeshdemoError
from meshdemo.runtime import faults
from meshdemo.runtime.kubernetes.runtime import KubernetesRuntime
from meshdemo.runtime.steps import run_steps

WATCH, PROBES = "watch", "liveness probes"
OBSERVED_S = 60.0  # three failed probes, and a container that ends and starts

_Probes = Mapping[str, Any]
_ALONE: _Probes = {
    "livenessProbe": {"periodSeconds": 10, "timeoutSeconds": 1, "failureThreshold": 3},
    "readinessProbe": None,
}
_NEW_POD = ("errors", "slow", "hang")  # what is healed by a new pod, which may take longer
_MEND_S = 120.0


def missing(*, quick: bool) -> LeftOut | None:
    """Why there is no kind to measure on; None if there is."""
    if quick:
        return LeftOut(PROBES, "they are Kubernetes' own; kind takes minutes, and this is a quick run")
    why = up_kind.missing()
    return None if why is None else LeftOut(PROBES, f"they are Kubernetes' own; {why.why}")


def measure(stage: Stage, rounds: int, tell: Tell, failures: list[str]) -> list[Figure]:
    """Each fault, each way, in turn. What fails is noted in `failures`."""
    found: dict[tuple[str, str], list[Outcome]] = {}
    with attempt("healing on kind", failures), ExitStack() as stack:
        tell("kind comes up")
        runtime = stack.enter_context(_mesh())
        probes = {WATCH: _own_probes(runtime), PROBES: _ALONE}
        for number in range(rounds):
            for fault in FAULTS:
                for way in (WATCH, PROBES):
                    what = f"on kind, round {number + 1} of {rounds}, {fault.words}, {way}"
                    tell(what)
                    outcome = LOST
                    with attempt(what, failures):
                        _mend(runtime, probes[way])
                        outcome = _once(stage, runtime, fault, way)
                    found.setdefault((fault.key, way), []).append(outcome)
    return _figures(found)


@contextmanager
def _mesh() -> Iterator[KubernetesRuntime]:
    """A mesh on a kind cluster of its own; both are gone afterwards, and its images."""
    with up_kind.options(rps=0) as options:
        runtime = KubernetesRuntime(options.name, up_kind.KIND)
        try:
            run_steps(runtime.steps(options))
            yield runtime
        finally:
            with uninterrupted():
                runtime.down()


def _once(stage: Stage, runtime: KubernetesRuntime, fault: Fault, way: str) -> Outcome:
    runtime.control().set_traffic(SERVICE, {"outlier": way == WATCH})
    asked = fault.asked
    if asked.instance is not None:
        asked = replace(asked, instance=_instances(runtime)[0])
    with ExitStack() as stack:
        load = stack.enter_context(loaded(stage, _port(runtime)))
        at_work = stack.enter_context(watched(stage, runtime)) if way == WATCH else Way()
        return observe(runtime, load, asked, at_work, OBSERVED_S, CRASH_S if fault.key == CRASH else 0.0)


def _port(runtime: KubernetesRuntime) -> int:
    """Where the gateway leads to service-b."""
    url = runtime.endpoints()["gateway"]
    port = urlsplit(url).port if url else None
    if port is None:
        raise Failed("the mesh on kind has no gateway on this machine")
    return port


def _instances(runtime: KubernetesRuntime) -> list[str]:
    return sorted(one.id for one in runtime.instances() if one.service == SERVICE and one.ready)


def _mend(runtime: KubernetesRuntime, probes: _Probes) -> None:
    """End what the run before has left, and wait until all is ready and probed so."""

    def mended() -> bool:
        # A pod that is just being replaced may refuse; it is asked again.
        with suppress(MeshdemoError):
            faults.clear(runtime)
            for ejection in runtime.control().intent().ejections:
                runtime.control().readmit(ejection.instance)
            rows = [row for row in runtime.control().status()["instances"] if row["service"] == SERVICE]
            ready = len(rows) == len(_instances(runtime)) >= 2 and all(row["ready"] for row in rows)
            if ready and _is_probed(runtime, probes):
                return True
        time.sleep(1)
        return False

    until("the mesh on kind to be as it was", mended, _MEND_S)


def _own_probes(runtime: KubernetesRuntime) -> _Probes:
    """The probes that the mesh gives to the service."""
    deployment = runtime.cluster.get("Deployment", f"{SERVICE}-v1", runtime.namespace) or {}
    containers = deployment["spec"]["template"]["spec"]["containers"]
    app = next(one for one in containers if one["name"] == "app")
    return {name: app[name] for name in _ALONE}


def _is_probed(runtime: KubernetesRuntime, probes: _Probes) -> bool:
    """Whether all pods of the service are probed so; asks for it. Each new revision of the service, that of
    a fault in the app too, has the mesh's own again."""
    container = {"name": "app", **probes}
    runtime.cluster.patch(
        "Deployment", f"{SERVICE}-v1", runtime.namespace,
        {"spec": {"template": {"spec": {"containers": [container]}}}},
    )  # fmt: skip
    deployment = runtime.cluster.get("Deployment", f"{SERVICE}-v1", runtime.namespace) or {}
    return rolled_out(deployment)


def rolled_out(deployment: Mapping[str, Any]) -> bool:
    """Whether every pod of a Deployment is there, ready, and of its newest revision."""
    status = deployment.get("status", {})
    wanted = deployment.get("spec", {}).get("replicas", 1)
    return bool(
        status.get("observedGeneration", 0) >= deployment.get("metadata", {}).get("generation", 1)
        and status.get("updatedReplicas") == status.get("readyReplicas") == status.get("replicas") == wanted
    )


def _figures(found: Mapping[tuple[str, str], Sequence[Outcome]]) -> list[Figure]:
    figures = []
    for fault in FAULTS:
        runs = {way: all_ for (key, way), all_ in found.items() if key == fault.key}
        if WATCH not in runs:
            continue
        figures.append(
            Figure(
                f"heal.kind.{fault.key}.detect", f"On kind, found: {fault.words}", "s", "lower",
                {WATCH: [one.detect for one in runs[WATCH]]}, WATCH, [Bar(2.0, of="worst")], OBSERVED_S,
                varies=True,
            )
        )  # fmt: skip
        figures.append(
            Figure(
                f"heal.kind.{fault.key}.healthy", f"On kind, healthy again: {fault.words}", "s", "lower",
                {way: [one.healthy for one in all_] for way, all_ in runs.items()}, WATCH,
                [Bar(20.0 if fault.key in _NEW_POD else 8.0, of="worst")], OBSERVED_S, varies=True,
            )
        )  # fmt: skip
    return figures
