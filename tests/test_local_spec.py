"""What must run, as a value: what `up` makes of it, revisions, overrides, and changes that end by themselves."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshdemo.apps import loader
from meshdemo.apps.model import App
from meshdemo.errors import BadInput, Failed
from meshdemo.runtime.base import UpOptions
from meshdemo.runtime.local import spec as specs
from meshdemo.runtime.local.spec import MeshSpec, WorkloadSpec

PAIR = loader.load("pair")
NOW = 1000.0


def up(before: MeshSpec | None = None, app: App = PAIR, **options: Any) -> MeshSpec:
    return specs.wanted(UpOptions(name="m", app=app, **options), before, now=NOW)


def service_b(spec: MeshSpec | None = None) -> WorkloadSpec:
    return (spec or up()).workloads["service-b/v1"]


def test_up_starts_what_is_initial() -> None:
    spec = up()
    assert {key: workload.instances for key, workload in spec.workloads.items()} == {
        "service-a/v1": 1,
        "service-b/v1": 2,
    }
    assert service_b(spec).ids() == ["service-b-v1-1", "service-b-v1-2"]
    assert specs.differences(None, spec) == ["everything"]


def test_up_again_changes_nothing_by_itself() -> None:
    before = up(rps=80, replicas={"service-b": 3}, versions={"service-b": ["v2"]})
    assert up(before) == before
    assert specs.differences(before, up(before)) == []


def test_up_again_changes_what_differs() -> None:
    before = up()
    after = up(before, rps=80, replicas={"service-b": 3}, versions={"service-b": ["v2"]})
    assert after.workloads["service-b/v1"].instances == 3
    assert after.workloads["service-b/v2"].instances == 1
    assert specs.differences(before, after) == [
        "service-b v1: 3 instances, were 2",
        "service-b v2 added",
        "load: 80 requests/s",
    ]


def test_replicas_leave_a_further_version_alone() -> None:
    before = up(versions={"service-b": ["v2"]})
    assert up(before, replicas={"service-b": 5}).workloads["service-b/v2"].instances == 1


def test_a_service_that_is_called_needs_an_instance_of_some_version() -> None:
    after = up(versions={"service-b": ["v2"]}, replicas={"service-b": 0})
    assert after.workloads["service-b/v2"].instances == 1
    assert up(replicas={"service-a": 0}).workloads["service-a/v1"].instances == 0
    with pytest.raises(BadInput, match="it needs at least 1"):
        up(up(), replicas={"service-b": 0})


def test_a_fault_outlives_up() -> None:
    before = up()
    broken = before.replacing(
        specs.with_env(service_b(before), {"LAT_MS": "9"}, instance=None, reason="f", now=NOW)
    )
    assert up(broken) == broken


def test_a_changed_app_file_is_a_new_revision() -> None:
    data = PAIR.model_dump()
    data["services"]["service-b"]["versions"]["v1"]["env"] = {"LAT_MS": "5"}
    after = up(up(), App.model_validate(data))
    assert service_b(after).current.revision == 2
    assert service_b(after).current.env == {"LAT_MS": "5"}


def test_another_app_under_the_same_name_is_refused() -> None:
    other = PAIR.model_copy(update={"name": "other"})
    with pytest.raises(Failed, match="runs the app 'pair', not 'other'"):
        up(up(), other)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"replicas": {"nobody": 1}}, "no service 'nobody'; there are: service-a, service-b"),
        ({"replicas": {"service-b": -1}}, "allowed is 0 to 1000"),
        ({"replicas": {"service-b": 1001}}, "allowed is 0 to 1000"),
        ({"replicas": {"service-b": 0}}, "0 instances of service-b: it is called, so it needs at least 1"),
        ({"versions": {"service-b": ["v3"]}}, "no such version; there are: v1, v2"),
        ({"versions": {"nobody": ["v3"]}}, "no service 'nobody'"),
        ({"rps": -1.0}, "allowed is 0 to 100000"),
        ({"rps": float("nan")}, "allowed is 0 to 100000"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        up(**options)


def test_a_revision_for_all() -> None:
    workload = specs.with_env(service_b(), {"LAT_MS": "200"}, instance=None, reason="fault", now=NOW)
    assert [one.revision for one in workload.revisions] == [1, 2]
    assert workload.of("service-b-v1-1") == workload.of("service-b-v1-2") == (2, {"LAT_MS": "200"})


def test_setting_what_is_set_makes_no_revision() -> None:
    workload = specs.with_env(service_b(), {"LAT_MS": None}, instance=None, reason="", now=NOW)
    assert workload == service_b()


def test_an_override_is_of_one_instance() -> None:
    workload = specs.with_env(service_b(), {"ERR_RATE": "1"}, instance="service-b-v1-2", reason="", now=NOW)
    assert workload.of("service-b-v1-1") == (1, {})
    assert workload.of("service-b-v1-2") == (2, {"ERR_RATE": "1"})
    assert [one.revision for one in workload.revisions] == [1]
    ended = specs.with_env(workload, {"ERR_RATE": None}, instance="service-b-v1-2", reason="", now=NOW)
    assert ended.of("service-b-v1-2") == (1, {})
    again = specs.with_env(ended, {"ERR_RATE": "1"}, instance="service-b-v1-2", reason="", now=NOW)
    assert again.of("service-b-v1-2")[0] == 3, "a revision number is never used twice"


def test_a_rollback_ends_overrides() -> None:
    workload = specs.with_env(service_b(), {"LAT_MS": "1"}, instance=None, reason="", now=NOW)
    workload = specs.with_env(workload, {"ERR_RATE": "1"}, instance="service-b-v1-2", reason="", now=NOW)
    back = specs.rolled_back(workload, 1, reason="bad", now=NOW)
    assert back.of("service-b-v1-1") == back.of("service-b-v1-2") == (4, {})
    with pytest.raises(BadInput, match="no revision 9; there are: 1, 2, 4"):
        specs.rolled_back(back, 9, reason="", now=NOW)


def test_scaling_down_forgets_overrides_of_those_gone() -> None:
    workload = specs.with_env(service_b(), {"ERR_RATE": "1"}, instance="service-b-v1-2", reason="", now=NOW)
    assert specs.scaled(specs.scaled(workload, 1), 2).of("service-b-v1-2") == (1, {})


# -- faults ----------------------------------------------------------------------------------------------------

PLACES = st.sampled_from([None, "service-b-v1-1", "service-b-v1-2"])
VARIABLES = st.dictionaries(st.sampled_from(["LAT_MS", "ERR_RATE"]), st.sampled_from(["1", "2"]), min_size=1)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("inject"), PLACES, VARIABLES),
        st.tuples(st.just("end"), st.integers(0, 9)),
        st.tuples(st.just("roll back"), st.integers(0, 9)),
        st.tuples(st.just("release"), VARIABLES),
    ),
    max_size=12,
)


@given(steps=STEPS)
def test_what_runs_is_the_app_file_with_the_recorded_faults_over_it(steps: list[Any]) -> None:
    """In whatever order faults begin and end (cleared or their time over), nothing of one stays behind."""
    workload, base = service_b(), dict[str, str]()
    recorded: list[specs.AppFault] = []
    past: dict[int, tuple[dict[str, str], list[str]]] = {1: ({}, [])}
    for number, step in enumerate(steps):
        match step:
            case ("inject", place, env):
                recorded.append(specs.AppFault(id=f"f-{number}", instance=place, env=env))
                workload = specs.with_fault(workload, recorded[-1], reason="", now=NOW)
            case ("end", which) if recorded:
                ended = recorded.pop(which % len(recorded)).id
                workload = specs.without_faults(workload, [ended], reason="", now=NOW)
            case ("release", env):
                base = {**base, **env}
                workload = specs.with_env(workload, env, instance=None, reason="", now=NOW)
            case ("roll back", which):
                target = workload.revisions[which % len(workload.revisions)].revision
                base, carried = past[target]
                recorded = [one for one in recorded if one.instance is None and one.id in carried]
                workload = specs.rolled_back(workload, target, reason="", now=NOW)
        past[workload.current.revision] = (base, [one.id for one in recorded if one.instance is None])
        assert list(workload.faults) == recorded
        for instance in workload.ids():
            expected = dict(base)
            for fault in recorded:
                if fault.instance in {None, instance}:
                    expected |= fault.env
            assert workload.of(instance)[1] == expected
    workload = specs.without_faults(workload, None, reason="", now=NOW)
    assert [workload.of(one)[1] for one in workload.ids()] == [base, base]
    assert workload.overrides == {}


def test_what_an_instance_runs_changes_only_with_its_revision() -> None:
    """A rollout replaces the instances whose revision is another one; so no other may differ."""
    workload = specs.with_fault(
        service_b(),
        specs.AppFault(id="a", instance="service-b-v1-2", env={"ERR_RATE": "1"}),
        reason="",
        now=NOW,
    )
    before = workload.of("service-b-v1-2")
    workload = specs.with_fault(workload, specs.AppFault(id="b", env={"LAT_MS": "9"}), reason="", now=NOW)
    after = workload.of("service-b-v1-2")
    assert after[1] == {"ERR_RATE": "1", "LAT_MS": "9"}
    assert after[0] not in {before[0], workload.current.revision}


def test_faults_that_overlap_in_time_leave_nothing() -> None:
    first = specs.AppFault(id="a", env={"LAT_MS": "100"}, expires_at=NOW + 5)
    second = specs.AppFault(id="b", env={"LAT_MS": "200"}, expires_at=NOW + 9)
    workload = specs.with_fault(service_b(), first, reason="", now=NOW)
    workload = specs.with_fault(workload, second, reason="", now=NOW)
    assert up().replacing(workload).ends() == {"a": NOW + 5, "b": NOW + 9}
    workload = specs.without_faults(workload, ["a"], reason="", now=NOW + 5)
    assert workload.current.env == {"LAT_MS": "200"}
    workload = specs.without_faults(workload, ["b"], reason="", now=NOW + 9)
    assert workload.current.env == {}
    assert up().replacing(workload).ends() == {}


def test_a_fault_with_another_end() -> None:
    spec = up().replacing(
        specs.with_fault(
            service_b(), specs.AppFault(id="a", env={"LAT_MS": "1"}, expires_at=1), reason="", now=NOW
        )
    )
    assert specs.ending(spec, "a", 7).ends() == {"a": 7}


def test_a_changed_app_file_keeps_the_faults() -> None:
    broken = specs.with_fault(service_b(), specs.AppFault(id="a", env={"LAT_MS": "1"}), reason="", now=NOW)
    data = PAIR.model_dump()
    data["services"]["service-b"]["versions"]["v1"]["env"] = {"LAT_MS": "5", "X": "y"}
    after = service_b(up(up().replacing(broken), App.model_validate(data)))
    assert after.current.env == {"LAT_MS": "1", "X": "y"}
    assert specs.without_faults(after, ["a"], reason="", now=NOW).current.env == {"LAT_MS": "5", "X": "y"}


def test_scaling_down_forgets_faults_of_those_gone() -> None:
    workload = specs.with_fault(
        service_b(),
        specs.AppFault(id="a", instance="service-b-v1-2", env={"ERR_RATE": "1"}),
        reason="",
        now=NOW,
    )
    assert specs.scaled(specs.scaled(workload, 1), 2).faults == ()
    assert specs.scaled(workload, 3).faults == workload.faults


def test_an_instance_that_takes_the_place_of_another() -> None:
    """As a pod does: under another name, with what the other one carried."""
    fault = specs.AppFault(id="a", instance="old", env={"ERR_RATE": "1"})
    workload = specs.with_fault(service_b(), fault, reason="", now=NOW)
    workload = specs.renamed(workload, "old", "new")
    workload = specs.with_fault(
        workload, specs.AppFault(id="b", instance="new", env={"LAT_MS": "1"}), reason="", now=NOW
    )
    assert workload.of("new")[1] == {"ERR_RATE": "1", "LAT_MS": "1"}
    assert specs.uniform(workload).faults == ()


def test_names_of_things_that_are_not_there() -> None:
    spec = up()
    with pytest.raises(BadInput, match="no instance 'x'; there are: service-a-v1-1, service-b-v1-1"):
        spec.owner("x")
    with pytest.raises(BadInput, match="runs no version 'v2'; there are: v1"):
        spec.workload("service-b", "v2")
    with pytest.raises(BadInput, match="no service 'x'"):
        spec.workload("x", "v1")


def test_the_spec_survives_being_stored() -> None:
    spec = up(rps=5)
    assert MeshSpec.model_validate_json(spec.model_dump_json()) == spec


def test_two_workloads_whose_instances_would_have_the_same_names() -> None:
    data = PAIR.model_dump()
    data["services"]["service"] = {
        **data["services"]["service-b"],
        "versions": {"b-v1": {"program": "service_b"}},
    }
    with pytest.raises(BadInput, match="would both have instances named service-b-v1-1"):
        up(app=App.model_validate(data))
