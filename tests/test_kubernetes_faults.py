"""Faults in the environment of pods, on a cluster that only remembers: the same computation as on this machine,
whatever ends them, and pods that deviate are replaced with what they carry."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from meshdemo import names
from meshdemo.apps import loader
from meshdemo.runtime.base import UpOptions
from meshdemo.runtime.kubernetes.runtime import OVERRIDE, KubernetesRuntime
from meshdemo.runtime.kubernetes.server import Backend
from meshdemo.runtime.local import spec as specs
from meshdemo.runtime.local.spec import MeshSpec


class Specs:
    """Where the spec is kept."""

    def __init__(self) -> None:
        options = UpOptions(name="m", app=loader.load("pair"))
        self.spec = specs.wanted(options, None, now=0, runs_images=True)

    def load(self) -> MeshSpec:
        return self.spec

    def change(self, fn: Callable[[MeshSpec], MeshSpec]) -> MeshSpec:
        self.spec = fn(self.spec)
        return self.spec


class Cluster:
    """Pods by name; what is asked of Deployments."""

    def __init__(self) -> None:
        self.pods: dict[str, Any] = {}
        self.patches: list[Any] = []

    def create(self, kind: str, pod: Any, namespace: str) -> None:
        self.pods[pod["metadata"]["name"]] = pod

    def delete(self, kind: str, name: str, namespace: str, **_: Any) -> None:
        self.pods.pop(name, None)

    def patch(self, kind: str, name: str, namespace: str, body: Any, **_: Any) -> Any:
        if kind == "Deployment":
            self.patches.append(body["spec"]["template"]["spec"]["containers"][0]["env"])
        else:
            self.pods[name]["metadata"]["labels"].update(body["metadata"].get("labels", {}))
        return {"metadata": {"name": name}}


class Runtime(KubernetesRuntime):
    """Pods are there at once; a ReplicaSet makes a plain one for each that is restarted."""

    cluster = None  # type: ignore[assignment]
    spec_map = None  # type: ignore[assignment]
    namespace = "m"  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__("m", "kubernetes")
        self.cluster, self.spec_map = Cluster(), Specs()
        self.restarted: list[str] = []
        for number in (1, 2):
            self.cluster.pods[f"p{number}"] = {
                "metadata": {
                    "name": f"p{number}",
                    "labels": {names.SERVICE: "service-b", names.VERSION: "v1", "pod-template-hash": "x"},
                },
                "spec": {"containers": [{"name": "app", "env": [{"name": "PORT", "value": "1"}]}]},
            }

    def _pod(self, instance: str) -> Any:
        return self.cluster.pods[instance]

    def _pods(self, service: str, version: str | None = None) -> list[Any]:
        return list(self.cluster.pods.values())

    def _await_pod(self, name: str) -> None: ...

    def _await_effect(self, what: str, right: Any) -> None: ...

    def _await_gone(self, instance: str) -> None:
        self.cluster.pods.pop(instance, None)

    def restart(self, instance: str, *, reason: str) -> None:
        self.restarted.append(instance)
        self.cluster.pods.pop(instance)


def env_of(pod: Any) -> dict[str, str]:
    return {one["name"]: one["value"] for one in pod["spec"]["containers"][0]["env"]}


def broken(runtime: Runtime, instance: str, fault: str, **env: str) -> str:
    time.sleep(0.002)  # pods are named by the millisecond
    made = runtime.set_env(
        "service-b", "v1", dict(env), reason="test", instance=instance, fault_id=fault, expires_at=None
    )
    assert made.instance is not None
    return made.instance


def test_a_pod_carries_all_its_faults_and_sheds_them_one_by_one() -> None:
    runtime = Runtime()
    first = broken(runtime, "p1", "f-1", ERR_RATE="1")
    second = broken(runtime, first, "f-2", LAT_MS="9")
    assert set(runtime.cluster.pods) == {second, "p2"}
    assert env_of(runtime.cluster.pods[second]) == {"PORT": "1", "ERR_RATE": "1", "LAT_MS": "9"}
    annotations = runtime.cluster.pods[second]["metadata"]["annotations"]
    assert json.loads(annotations[OVERRIDE]) == {"ERR_RATE": "1", "LAT_MS": "9"}
    time.sleep(0.002)
    assert runtime.end_faults(["f-1"], reason="test") == ["f-1"]
    (third,) = set(runtime.cluster.pods) - {"p2"}
    assert env_of(runtime.cluster.pods[third]) == {"PORT": "1", "LAT_MS": "9"}
    assert runtime.faults() == ["f-2"]
    assert runtime.end_faults(None, reason="test") == ["f-2"]
    assert runtime.restarted == [third], "the ReplicaSet makes a plain one"
    assert runtime.faults() == []


def test_a_pod_that_does_not_start_has_changed_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime()
    before = runtime.spec_map.load()

    def fail(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runtime, "_await_pod", fail)
    with pytest.raises(KeyboardInterrupt):
        broken(runtime, "p1", "f-1", ERR_RATE="1")
    assert set(runtime.cluster.pods) == {"p1", "p2"}
    assert runtime.spec_map.load() == before


def test_a_fault_whose_time_is_over_leaves_those_that_are_not() -> None:
    backend = Backend.__new__(Backend)
    backend._specs, backend._cluster, backend._namespace = Specs(), Cluster(), "m"  # type: ignore[assignment]
    workload = backend._specs.load().workloads["service-b/v1"]
    for fault in (
        specs.AppFault(id="a", env={"LAT_MS": "100"}, expires_at=5),
        specs.AppFault(id="b", env={"LAT_MS": "200"}, expires_at=9),
    ):
        workload = specs.with_fault(workload, fault, reason="", now=0)
    backend._specs.change(lambda spec: spec.replacing(workload))
    backend._end("a")
    assert backend._specs.load().ends() == {"b": 9}
    assert backend._cluster.patches == []  # type: ignore[attr-defined]
    backend._end("b")
    assert backend._specs.load().ends() == {}
    assert backend._cluster.patches == [[{"name": "LAT_MS", "$patch": "delete"}]]  # type: ignore[attr-defined]
