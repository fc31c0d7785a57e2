"""Changes of the intent: what is allowed, what is refused and how; and the store."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xds_harness import pair

from meshdemo import files
from meshdemo.control.intent import (
    IntentStore,
    access,
    add_fault,
    callers,
    clear_fault,
    clear_faults,
    eject,
    expire_faults,
    forget_gone,
    new_fault,
    readmit,
    set_access,
    set_traffic,
)
from meshdemo.control.model import Fault, Instance, Intent, MeshState
from meshdemo.errors import BadInput, Failed


def instance(service: str, number: int, version: str = "v1") -> Instance:
    ports = {"inbound_port": 1, "outbound_port": 2, "metrics_port": 3, "app_port": 4}
    return Instance(id=f"{service}-{number}", service=service, version=version, **ports)


MESH = MeshState(
    mesh="m",
    app=pair(cache={"port": 6379, "protocol": "tcp"}),
    instances=(instance("service-a", 1), instance("service-b", 1), instance("service-b", 2)),
)
NOW = 1000.0


def fault(**request: Any) -> Fault:
    return new_fault({"service": "service-b", "err_rate": 0.5, **request}, MESH, NOW)


# -- faults -----------------------------------------------------------------------------------------------


def test_a_fault_is_what_was_asked_for() -> None:
    made = fault(lat_ms=200, share=0.5, instance="service-b-1", route="/work", caller="service-a", for_s=30)
    assert (made.at, made.kind, made.started_at, made.expires_at) == ("mesh", "degrade", NOW, NOW + 30)
    assert (made.lat_ms, made.err_rate, made.share) == (200, 0.5, 0.5)
    assert made.id.startswith("f-")
    assert fault(id="mine").id == "mine"
    assert new_fault({"service": "service-b", "at": "process", "kind": "crash"}, MESH, NOW).kind == "crash"


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"lat_ms": -1}, "latency -1 is out of range"),
        ({"lat_ms": math.inf}, "latency inf is out of range"),
        ({"lat_ms": "200"}, "latency 200 is out of range"),
        ({"err_rate": 1.01}, "error share 1.01 is out of range (allowed: 0 to 1)"),
        ({"err_rate": math.nan}, "error share nan is out of range"),
        ({"err_rate": True}, "error share True is out of range"),
        ({"share": 2}, "share 2 is out of range"),
        ({"service": "service-x"}, "unknown service 'service-x' (services of this mesh: service-a"),
        ({"service": None}, "unknown service 'None'"),
        ({"version": "v9"}, "unknown version 'v9' of service-b (its versions: v1, v2)"),
        ({"version": ["v1"]}, "unknown version '['v1']'"),
        (
            {"instance": "service-a-1"},
            "unknown instance 'service-a-1' of service-b (instances of service-b: ",
        ),
        ({"instance": "service-b-1", "version": "v2"}, "unknown instance 'service-b-1' of service-b v2"),
        ({"caller": "nobody"}, "unknown caller 'nobody'"),
        ({"route": "work"}, "route 'work' does not start with '/'"),
        ({"err_rate": 0}, "a fault needs a latency or an error share above 0"),
        ({"for_s": 0}, "duration 0 would end before it began"),
        ({"for_s": -5}, "duration -5 is out of range"),
        ({"at": "moon"}, "at 'moon' is unknown (allowed: app, mesh, process)"),
        ({"kind": "crash"}, "a fault of kind 'crash' cannot be at 'mesh'"),
        ({"service": "cache"}, "service 'cache' speaks tcp"),
        ({"latency": 5}, "a fault has no field 'latency'"),
        ({"id": 5}, "the fault makes no sense: id"),
    ],
)
def test_a_fault_that_makes_no_sense_is_refused(request_: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput) as caught:
        fault(**request_)
    assert str(caught.value).startswith(message)


ANYTHING = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.lists(st.text())


@given(
    st.dictionaries(
        st.sampled_from([*Fault.model_fields, "for_s", "x"]),
        ANYTHING | st.sampled_from(["service-b", "v1", "app", "mesh", "/work", "service-b-1", "degrade"]),
    )
)
def test_whatever_is_asked_for_becomes_a_sound_fault_or_bad_input(request_: dict[str, Any]) -> None:
    try:
        made = new_fault(request_, MESH, NOW)
    except BadInput as error:
        assert error.message
        return
    assert 0 <= made.lat_ms < math.inf
    assert 0 <= made.err_rate <= 1
    assert 0 <= made.share <= 1
    assert made.service in MESH.app.services
    assert made.expires_at is None or made.expires_at > made.started_at
    assert add_fault(Intent(), made).revision == 2


def test_faults_come_and_go_and_every_change_is_a_revision() -> None:
    one, two = fault(id="one", for_s=10), fault(id="two")
    intent = add_fault(add_fault(Intent(), one), two)
    assert (intent.revision, intent.faults) == (3, (one, two))
    with pytest.raises(BadInput, match="fault 'one' exists already"):
        add_fault(intent, one)
    with pytest.raises(BadInput, match=r"no fault 'three' .faults in force: one, two."):
        clear_fault(intent, "three")
    assert clear_fault(intent, "one").faults == (two,)
    assert expire_faults(intent, NOW + 9.9) is intent
    assert expire_faults(intent, NOW + 10).faults == (two,)
    cleared = clear_faults(intent)
    assert (cleared.revision, cleared.faults) == (4, ())
    assert clear_faults(cleared) is cleared


# -- traffic ----------------------------------------------------------------------------------------------


def traffic(intent: Intent = Intent(), service: str = "service-b", **changes: Any) -> Intent:  # noqa: B008
    return set_traffic(intent, MESH, service, changes, NOW)


def test_traffic_changes_what_is_named_and_goes_back_to_the_default() -> None:
    intent = traffic(timeout_ms=500, retries=0)
    intent = traffic(intent, split={"v1": 100, "v2": 0}, outlier=False)
    rules = intent.traffic["service-b"]
    assert (rules.timeout_ms, rules.retries, rules.split, rules.outlier) == (
        500,
        0,
        {"v1": 100, "v2": 0},
        False,
    )
    assert rules.since == NOW
    assert traffic(intent, timeout_ms=500) is intent
    intent = traffic(intent, timeout_ms=None, retries=None, split={}, outlier=None)
    assert intent.traffic == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"split": {"v1": 90, "v2": 5}},
            "version 'v2' of service-b has no instance to send traffic to (start",
        ),
        ({"split": {"v1": 90}}, "weights v1=90 sum to 90, not to 100"),
        ({"split": {"v1": 90, "v3": 10}}, "unknown version 'v3' of service-b"),
        ({"split": {"v1": -1}}, "weight of v1 -1 is out of range"),
        ({"split": {"v1": 99.5}}, "weight of v1 99.5 is out of range"),
        ({"split": "v1=100"}, "split 'v1=100' is not version=weight"),
        ({"mirror": {"v2": 0.5}}, "version 'v2' of service-b has no instance to mirror to"),
        ({"mirror": {"v1": 1.5}}, "mirrored share of v1 1.5 is out of range"),
        ({"timeout_ms": 0}, "timeout 0 is out of range (allowed: a whole number, 1 to 3600000 ms)"),
        ({"retries": 11}, "retries 11 is out of range"),
        ({"retries": -1}, "retries -1 is out of range"),
        ({"max_connections": 0}, "max connections 0 is out of range"),
        ({"max_pending": 1.5}, "max pending 1.5 is out of range"),
        ({"outlier": "on"}, "outlier 'on' is neither true nor false"),
        ({"colour": 1}, "traffic has no field 'colour'"),
        ({"since": 1}, "traffic has no field 'since'"),
    ],
)
def test_traffic_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput) as caught:
        traffic(**changes)
    assert str(caught.value).startswith(message)


def test_traffic_of_tcp_and_of_unknown_services() -> None:
    with pytest.raises(BadInput, match="speaks tcp"):
        traffic(service="cache", retries=1)
    assert traffic(service="cache", max_connections=5).traffic["cache"].max_connections == 5
    with pytest.raises(BadInput, match="unknown service 'x'"):
        traffic(service="x", retries=1)


@given(st.dictionaries(st.sampled_from(["split", "retries", "timeout_ms", "mirror", "x"]), ANYTHING))
def test_any_traffic_is_either_kept_or_bad_input(changes: dict[str, Any]) -> None:
    try:
        traffic(**changes)
    except BadInput as error:
        assert error.message


# -- access, ejections ------------------------------------------------------------------------------------


def test_access_starts_from_what_the_app_declares() -> None:
    assert callers(Intent(), MESH)["service-b"] == ["service-a"]
    intent = set_access(Intent(), MESH, "service-c", "service-b", True)
    intent = set_access(intent, MESH, "service-a", "service-b", False)
    assert callers(intent, MESH)["service-b"] == ["service-c"]
    assert [(row.caller, row.service, row.allowed, row.explicit) for row in access(intent, MESH)] == [
        ("service-a", "service-b", False, True),
        ("service-c", "service-b", True, True),
    ]
    with pytest.raises(BadInput, match="unknown caller 'x'"):
        set_access(intent, MESH, "x", "service-b", True)
    with pytest.raises(BadInput, match="neither true nor false"):
        set_access(intent, MESH, "service-a", "service-b", "yes")  # type: ignore[arg-type]


def test_ejections_last_until_readmitted_or_gone() -> None:
    intent = eject(Intent(), MESH, "service-b-1", reason="errors", by="watch", now=NOW)
    assert eject(intent, MESH, "service-b-1", reason="again", by="watch", now=NOW) is intent
    assert forget_gone(intent, MESH) is intent
    without = MESH.model_copy(update={"instances": MESH.instances[2:]})
    assert forget_gone(intent, without).ejections == ()
    assert readmit(intent, "service-b-1").ejections == ()
    with pytest.raises(BadInput, match=r"instance 'service-b-2' is not ejected .ejected: service-b-1."):
        readmit(intent, "service-b-2")
    with pytest.raises(BadInput, match="unknown instance 'service-b-9'"):
        eject(intent, MESH, "service-b-9", reason="", by="", now=NOW)


# -- the store --------------------------------------------------------------------------------------------


def test_the_intent_survives(tmp_path: Path) -> None:
    store = IntentStore(tmp_path / "intent.json")
    assert store.load() == Intent()
    intent = traffic(add_fault(Intent(), fault(id="x")), timeout_ms=5)
    store.save(intent)
    assert store.load() == intent
    assert (tmp_path / "intent.json").stat().st_mode & 0o077 == 0
    assert [path.name for path in tmp_path.iterdir()] == ["intent.json"]


def test_a_full_disk_keeps_the_intent_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = IntentStore(tmp_path / "intent.json")
    store.save(Intent(revision=7))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(Failed, match="No space left on device; nothing was changed"):
        store.save(Intent(revision=8))
    monkeypatch.undo()
    assert store.load().revision == 7
    assert [path.name for path in tmp_path.iterdir()] == ["intent.json"]


@pytest.mark.parametrize("content", ["", "{", '{"revision": "many"}', "[]", '{"faults": [{}]}', "\x00\xff"])
def test_a_corrupted_file_is_said_to_be_one(tmp_path: Path, content: str) -> None:
    path = tmp_path / "intent.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(Failed, match=r"does not hold an intent.*remove it"):
        IntentStore(path).load()
