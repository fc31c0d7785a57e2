"""Faults from request to effect, on a runtime and a control plane that only remember: whatever fails or ends
a command, what is in force and what is on record agree."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshdemo.apps import loader
from meshdemo.apps.model import App
from meshdemo.control.client import ClearResult, FaultResult
from meshdemo.control.intent import add_fault, clear_fault, new_fault
from meshdemo.control.model import Effect, Fault, Instance, Intent, MeshState, WorkloadRevision
from meshdemo.errors import Failed
from meshdemo.runtime import faults
from meshdemo.runtime.base import UpOptions
from meshdemo.runtime.local import spec as specs

PAIR = loader.load("pair")
EFFECT = Effect(revision=1, effective_ms=1, sidecars=0)


class Mesh:
    """A runtime with its control plane. `fails` maps what is asked of it to what is raised then."""

    def __init__(self) -> None:
        options = UpOptions(name="m", app=PAIR, versions={"service-b": ["v2"]})
        self.spec = specs.wanted(options, None, now=0)
        self.intent = Intent()
        self.stopped: set[str] = set()
        self.fails: dict[str, BaseException] = {}
        self.asked: list[str] = []

    def _ask(self, what: str) -> None:
        self.asked.append(what)
        if what in self.fails:
            raise self.fails.pop(what)

    # -- the runtime --------------------------------------------------------------------------------------

    def app(self) -> App:
        return PAIR

    def instances(self) -> list[Instance]:
        return [
            Instance(
                id=one, service=workload.service, version=workload.version, revision=workload.of(one)[0],
                inbound_port=1, outbound_port=2, metrics_port=3, app_port=4, ready=True,
            )
            for workload in self.spec.workloads.values()
            for one in workload.ids()
        ]  # fmt: skip

    def set_env(
        self, service: str, version: str, env: dict[str, str], *, reason: str, instance: str | None,
        expires_at: float | None, fault_id: str,
    ) -> WorkloadRevision:  # fmt: skip
        self._ask(f"set_env {version}")
        assert fault_id in {one.id for one in self.intent.faults}, "it is on record before it is in force"
        fault = specs.AppFault(id=fault_id, instance=instance, env=env, expires_at=expires_at)
        workload = specs.with_fault(self.spec.workload(service, version), fault, reason=reason, now=0)
        self.spec = self.spec.replacing(workload)
        return workload.current

    def faults(self) -> list[str]:
        return [fault.id for one in self.spec.workloads.values() for fault in one.faults]

    def end_faults(self, ids: Collection[str] | None, *, reason: str) -> list[str]:
        self._ask("end_faults")
        ended = [one for one in self.faults() if ids is None or one in ids]
        for workload in self.spec.workloads.values():
            self.spec = self.spec.replacing(specs.without_faults(workload, ids, reason=reason, now=0))
        return ended

    def hang(self, instance: str) -> None:
        self._ask("hang")
        assert self.intent.faults, "it is on record before it is in force"
        self.stopped.add(instance)

    def unhang(self, instance: str) -> None:
        self.stopped.discard(instance)

    # -- the control plane --------------------------------------------------------------------------------

    def control(self) -> _Client:
        return _Client(self)

    def add_fault(self, **asked: Any) -> FaultResult:
        self._ask("record starting" if asked.get("starting") else "record")
        asked["id"] = asked.pop("fault_id")
        state = MeshState(mesh="m", app=PAIR, instances=tuple(self.instances()))
        fault = new_fault({key: one for key, one in asked.items() if one is not None}, state, 0)
        self.intent = add_fault(self.intent, fault)
        if "answer" in self.fails:  # it is done, and the command that asked for it hears nothing of it
            raise self.fails.pop("answer")
        return FaultResult(fault, EFFECT)

    def list(self) -> list[Fault]:
        return list(self.intent.faults)

    def clear_fault(self, fault_id: str) -> ClearResult:
        self._ask("clear record")
        self.intent = clear_fault(self.intent, fault_id)
        return ClearResult([], EFFECT)

    # -- what must be so ----------------------------------------------------------------------------------

    def check(self) -> None:
        """Every workload runs with the app file's environment and the recorded faults over it."""
        for workload in self.spec.workloads.values():
            for instance in workload.ids():
                expected = dict(PAIR.services[workload.service].versions[workload.version].env)
                for fault in self.intent.faults:
                    here = fault.service == workload.service and fault.version in {None, workload.version}
                    if fault.at == "app" and here and fault.instance in {None, instance}:
                        expected |= {"LAT_MS": f"{fault.lat_ms:g}"} if fault.lat_ms else {}
                        expected |= {"ERR_RATE": f"{fault.err_rate:g}"} if fault.err_rate else {}
                assert workload.of(instance)[1] == expected
        assert not any(fault.starting for fault in self.intent.faults)


class _Client:
    """The control plane's half of `Mesh`: both halves have a method `faults`."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mesh, "list" if name == "faults" else name)


@pytest.fixture
def mesh() -> Mesh:
    return Mesh()


def inject(mesh: Mesh, **asked: Any) -> faults.FaultOutcome:
    return faults.inject(mesh, faults.request(**asked))  # type: ignore[arg-type]


def test_no_error_share_of_zero_stays_behind(mesh: Mesh) -> None:
    inject(mesh, lat_ms=60, err_rate=0)
    mesh.check()
    faults.clear(mesh)  # type: ignore[arg-type]
    assert mesh.spec.workloads["service-b/v1"].current.env == {}


@pytest.mark.parametrize("error", [Failed("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("what", ["record starting", "set_env v1", "set_env v2", "record"])
def test_a_fault_in_the_app_that_fails_leaves_the_others(mesh: Mesh, what: str, error: BaseException) -> None:
    """Whatever goes wrong, at whatever moment: nothing has changed."""
    inject(mesh, lat_ms=40)
    kept = list(mesh.intent.faults)
    mesh.fails[what] = error
    with pytest.raises(type(error)):
        inject(mesh, lat_ms=80, err_rate=0.5)
    assert list(mesh.intent.faults) == kept
    mesh.check()


@pytest.mark.parametrize("asked", [{"lat_ms": 80}, {"lat_ms": 80, "at": "mesh"}, {"hang": True}])
def test_until_it_stays_a_fault_is_undone(mesh: Mesh, asked: dict[str, Any]) -> None:
    def interrupted() -> None:
        assert len(mesh.intent.faults) == 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        faults.inject(mesh, faults.request(**asked), stays=interrupted)  # type: ignore[arg-type]
    assert list(mesh.intent.faults) == []
    mesh.check()


def test_a_fault_that_cannot_be_undone_stays_on_record(mesh: Mesh) -> None:
    mesh.fails = {"set_env v2": Failed("no"), "end_faults": Failed("neither")}
    with pytest.raises(Failed, match="no"):
        inject(mesh, lat_ms=80)
    assert len(mesh.intent.faults) == 1
    faults.clear(mesh)  # type: ignore[arg-type]
    mesh.check()


@pytest.mark.parametrize("error", [Failed("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("what", ["record starting", "hang", "record"])
def test_a_hang_that_fails_lets_the_process_go_on(mesh: Mesh, what: str, error: BaseException) -> None:
    mesh.fails[what] = error
    with pytest.raises(type(error)):
        inject(mesh, hang=True)
    assert mesh.stopped == set()
    assert mesh.intent.faults == ()


@pytest.mark.parametrize("what", ["record", "answer"])
def test_a_fault_in_the_sidecars_whose_command_is_interrupted_is_ended(mesh: Mesh, what: str) -> None:
    mesh.fails[what] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        inject(mesh, err_rate=0.5, at="mesh")
    assert mesh.intent.faults == ()


def test_a_hang_is_recorded_and_ends(mesh: Mesh) -> None:
    made = inject(mesh, hang=True, instance="service-b-v1-2").fault
    assert mesh.stopped == {"service-b-v1-2"}
    assert mesh.asked == ["record starting", "hang", "record"]
    faults.clear(mesh, made.id)  # type: ignore[arg-type]
    assert mesh.stopped == set()


def test_clearing_ends_what_is_on_no_record(mesh: Mesh) -> None:
    made = inject(mesh, lat_ms=80).fault
    mesh.intent = clear_fault(mesh.intent, made.id)
    faults.clear(mesh)  # type: ignore[arg-type]
    mesh.check()


STEPS = st.lists(
    st.one_of(
        st.tuples(
            st.just("inject"),
            st.fixed_dictionaries(
                {"lat_ms": st.sampled_from([5, 60])},
                optional={
                    "err_rate": st.sampled_from([0, 0.5]),
                    "version": st.just("v1"),
                    "instance": st.sampled_from(["service-b-v1-1", "service-b-v1-2"]),
                    "for_s": st.just(5),
                },
            ),
        ),
        st.tuples(st.just("clear"), st.integers(0, 9)),
        st.tuples(st.just("expire"), st.integers(0, 9)),
        st.tuples(st.just("fail"), st.sampled_from(["set_env v2", "record", "record starting"])),
    ),
    max_size=8,
)


@given(steps=STEPS)
def test_what_runs_is_always_what_is_on_record(steps: list[Any]) -> None:
    mesh = Mesh()
    for step in steps:
        recorded = list(mesh.intent.faults)
        match step:
            case ("inject", asked):
                inject(mesh, **asked)
            case ("clear", which) if recorded:
                faults.clear(mesh, recorded[which % len(recorded)].id)  # type: ignore[arg-type]
            case ("expire", which) if recorded:
                over = recorded[which % len(recorded)].id
                mesh.end_faults([over], reason="")
                mesh.clear_fault(over)
            case ("fail", what):
                mesh.fails = {what: Failed("no")}
                with pytest.raises(Failed):
                    inject(mesh, err_rate=1)
                mesh.fails = {}
        mesh.check()
