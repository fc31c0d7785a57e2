"""Fault arguments and other values that users type: what is accepted, and that complaints help."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshdemo import limits
from meshdemo.apps.model import App
from meshdemo.cli import _values
from meshdemo.control.model import Instance
from meshdemo.errors import BadInput
from meshdemo.runtime import faults

# -- durations --------------------------------------------------------------------------------------------

UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
parts = st.lists(st.tuples(st.integers(0, 100_000), st.sampled_from(sorted(UNITS_S))), min_size=1, max_size=3)


@given(parts)
def test_durations_add_up(given_parts: list[tuple[int, str]]) -> None:
    text = "".join(f"{count}{unit}" for count, unit in given_parts)
    expected = sum(count * UNITS_S[unit] for count, unit in given_parts)
    if expected > 0:
        assert _values.duration_s(text, "--for") == pytest.approx(expected)
    else:
        with pytest.raises(BadInput):
            _values.duration_s(text, "--for")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30s", 30), ("500ms", 0.5), ("2m", 120), ("1m30s", 90), ("1.5s", 1.5), ("1h", 3600)],
)
def test_durations(text: str, seconds: float) -> None:
    assert _values.duration_s(text, "--for") == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text",
    ["", "30", "s", "-3s", "3 s", "0s", "1e3s", "inf", "nan", "3x", "3s3", " 3s", "٣s3s", "9" * 400 + "h"],
)
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(BadInput, match=r"--for .*500ms, 30s, 2m"):
        _values.duration_s(text, "--for")


@given(st.text())
def test_any_text_is_a_duration_or_a_complaint_on_one_line(text: str) -> None:
    try:
        seconds = _values.duration_s(text, "--for")
    except BadInput as error:
        assert one_line(error)
    else:
        assert 0 < seconds < math.inf


# -- splits and mirrors -------------------------------------------------------------------------------------


@given(st.dictionaries(st.from_regex(r"\Av[0-9]{1,3}\Z"), st.integers(0, 100), min_size=1, max_size=5))
def test_a_split_sums_to_100(weights: dict[str, int]) -> None:
    text = ",".join(f"{version}={weight}" for version, weight in weights.items())
    if sum(weights.values()) == 100:
        assert _values.split(text) == weights
    else:
        with pytest.raises(BadInput, match="sum to"):
            _values.split(text)


@pytest.mark.parametrize(
    "text",
    ["", "v1", "v1=", "=100", "v1=x", "v1=50,v1=50", "v1=nan", "v1=inf", "v1=99.5,v2=0.5", "v1=-1,v2=101"],
)
def test_what_is_no_split(text: str) -> None:
    with pytest.raises(BadInput) as caught:
        _values.split(text)
    assert one_line(caught.value)


def test_mirrors() -> None:
    assert _values.mirror("v2=0.1") == {"v2": 0.1}
    with pytest.raises(BadInput, match="0 to 1"):
        _values.mirror("v2=10")


# -- fault requests -----------------------------------------------------------------------------------------


def one_line(error: BadInput) -> bool:
    return "\n" not in str(error) and bool(str(error).strip())


options = st.fixed_dictionaries(
    {},
    optional={
        "lat_ms": st.floats(),
        "err_rate": st.floats(),
        "service": st.sampled_from(["service-a", "service-b"]),
        "version": st.just("v1"),
        "instance": st.just("service-b-v1-1"),
        "route": st.sampled_from(["/", "/work", "work", ""]),
        "caller": st.just("service-a"),
        "at": st.sampled_from(["app", "mesh", "elsewhere"]),
        "share": st.floats(),
        "for_s": st.floats(),
        "crash": st.booleans(),
        "hang": st.booleans(),
    },
)


@given(options)
def test_a_request_makes_sense_or_is_refused_on_one_line(asked: dict[str, Any]) -> None:
    try:
        made = faults.request(**asked)
    except BadInput as error:
        assert one_line(error)
        return
    assert made.lat_ms is None or 0 <= made.lat_ms <= limits.MAX_LATENCY_MS
    assert made.err_rate is None or 0 <= made.err_rate <= 1
    assert 0 <= made.share <= 1
    assert made.for_s is None or 0 < made.for_s <= limits.MAX_FAULT_S
    assert not made.err_rate or made.err_rate >= faults.MIN_SHARE
    if made.at != "mesh":
        assert made.route is None
        assert made.caller is None
        assert made.share == 1
    if made.kind == "degrade":
        assert made.at in {"app", "mesh"}
        assert (made.lat_ms and made.share) or made.err_rate
    else:
        assert made.at == "process"
        assert made.lat_ms is None
        assert made.err_rate is None


@given(
    lat_ms=st.none() | st.floats(0.1, limits.MAX_LATENCY_MS),
    err_rate=st.none() | st.floats(0.001, 1),
    share=st.none() | st.floats(0.01, 1),
    for_s=st.none() | st.floats(0.001, 1e6),
    route=st.none() | st.just("/work"),
    caller=st.none() | st.just("service-a"),
)
def test_every_sensible_mesh_fault_is_accepted(
    lat_ms: float | None, err_rate: float | None, share: float | None, **rest: Any
) -> None:
    if lat_ms is None and err_rate is None:
        return
    made = faults.request(
        lat_ms=lat_ms, err_rate=err_rate, share=share if lat_ms else None, at="mesh", **rest
    )
    assert (made.lat_ms, made.err_rate, made.route, made.caller) == (
        lat_ms, err_rate, rest["route"], rest["caller"],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({}, "nothing to break: give --lat MS, --err SHARE, --crash or --hang"),
        ({"lat_ms": 0.0}, "nothing to break: a latency of 0 and no errors"),
        ({"lat_ms": 5.0, "share": 0.0, "at": "mesh"}, "with --share 0 no request gets the latency"),
        ({"lat_ms": -1.0}, "--lat -1: a latency is 0 to 3600000"),
        ({"lat_ms": math.nan}, "--lat nan"),
        ({"err_rate": 1.01}, "--err 1.01: an error share is 0 to 1"),
        ({"err_rate": 20.0}, "--err 20: an error share is 0 to 1"),
        ({"lat_ms": 1.0, "share": 2.0, "at": "mesh"}, "--share 2: a share of requests is 0 to 1"),
        ({"err_rate": 0.5, "share": 0.5, "at": "mesh"}, "give --lat"),
        ({"err_rate": 1e-7, "at": "mesh"}, "--err 1e-07: the least share above 0 is 0.000001"),
        ({"lat_ms": 1.0, "share": 1e-7, "at": "mesh"}, "--share 1e-07: the least share"),
        ({"lat_ms": 5.0, "for_s": 3.6e12}, "--for 3.6e+12 s: a duration is more than 0 s and at most 365 days"),
        ({"err_rate": 0.5, "route": "/work"}, "--route /work: allowed with --at mesh only"),
        ({"err_rate": 0.5, "caller": "service-a"}, "--caller service-a: allowed with --at mesh only"),
        ({"lat_ms": 5.0, "share": 0.5}, "--share 0.5: allowed with --at mesh only"),
        ({"err_rate": 0.5, "route": "work", "at": "mesh"}, "starts with '/'"),
        ({"err_rate": 0.5, "at": "sidecar"}, "--at 'sidecar': allowed is app or mesh"),
        ({"crash": True, "lat_ms": 200.0}, "--crash with --lat: allowed beside it"),
        ({"crash": True, "hang": True}, "--crash with --hang"),
        ({"hang": True, "for_s": 3.0}, "--hang with --for"),
        ({"crash": True, "at": "mesh"}, "--crash with --at"),
    ],
)  # fmt: skip
def test_refusals_name_what_is_allowed(asked: dict[str, Any], complaint: str) -> None:
    with pytest.raises(BadInput) as caught:
        faults.request(**asked)
    assert complaint in str(caught.value)
    assert one_line(caught.value)


# -- what a request means in a mesh -------------------------------------------------------------------------

APP = App.model_validate(
    {
        "name": "pair",
        "front": "service-b",
        "services": {
            "service-a": {"port": 5000, "calls": ["service-b"], "versions": {"v1": {"program": "service_a"}}},
            "service-b": {
                "port": 5000,
                "versions": {"v1": {"program": "service_b"}, "v2": {"program": "service_b"}},
            },
        },
    }
)


def instance(service: str, version: str, number: int) -> Instance:
    return Instance(
        id=f"{service}-{version}-{number}", service=service, version=version, inbound_port=1, outbound_port=2,
        metrics_port=3, app_port=4, ready=True,
    )  # fmt: skip


INSTANCES = [
    instance("service-a", "v1", 1),
    instance("service-b", "v1", 1),
    instance("service-b", "v1", 2),
    instance("service-b", "v2", 1),
]


def resolve(**asked: Any) -> tuple[str, tuple[str, ...], list[str]]:
    target = faults.resolve(faults.request(err_rate=0.1, at="mesh", **asked), APP, INSTANCES)
    return target.service, target.versions, [one.id for one in target.instances]


def test_the_default_target_is_all_of_service_b() -> None:
    assert resolve() == (
        "service-b", ("v1", "v2"), ["service-b-v1-1", "service-b-v1-2", "service-b-v2-1"],
    )  # fmt: skip


def test_a_version_an_instance_and_another_service() -> None:
    assert resolve(version="v2") == ("service-b", ("v2",), ["service-b-v2-1"])
    assert resolve(instance="service-b-v1-2") == ("service-b", ("v1",), ["service-b-v1-2"])
    assert resolve(instance="service-a-v1-1") == ("service-a", ("v1",), ["service-a-v1-1"])
    assert resolve(service="service-a") == ("service-a", ("v1",), ["service-a-v1-1"])


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"service": "service-x"}, "no service 'service-x'; there are: service-a, service-b"),
        ({"version": "v9"}, "service-b runs no version 'v9'; there are: v1, v2"),
        ({"instance": "x"}, "no instance 'x'; there are: service-a-v1-1, service-b-v1-1"),
        ({"instance": "service-a-v1-1", "service": "service-b"}, "is an instance of service-a"),
        ({"instance": "service-b-v1-1", "version": "v2"}, "runs version v1, not v2"),
        ({"caller": "nobody"}, "no caller 'nobody'; there are: service-a, service-b"),
    ],
)
def test_unknown_targets_are_refused_with_what_there_is(asked: dict[str, Any], complaint: str) -> None:
    with pytest.raises(BadInput) as caught:
        resolve(**asked)
    assert complaint in str(caught.value)
    assert one_line(caught.value)


names = st.none() | st.sampled_from(["service-a", "service-b", "service-b-v1-1", "v1", "v2", "x", ""])


@given(service=names, version=names, instance=names)
def test_a_target_is_never_empty_nor_outside_what_was_asked(**asked: str | None) -> None:
    try:
        service, versions, ids = resolve(**asked)
    except BadInput as error:
        assert one_line(error)
        return
    assert ids
    assert asked["service"] in {None, service}
    assert asked["version"] is None or versions == (asked["version"],)
    assert asked["instance"] is None or ids == [asked["instance"]]


def test_only_what_honours_the_variables_is_broken_by_them() -> None:
    def at_app(app: App, **asked: Any) -> faults.Target:
        return faults.resolve(faults.request(lat_ms=300, **asked), app, INSTANCES)

    assert at_app(APP).versions == ("v1", "v2")
    with pytest.raises(BadInput, match=r"service-a v1 does not honour LAT_MS and ERR_RATE .* --at mesh"):
        at_app(APP, service="service-a")
    data = APP.model_dump()
    data["services"]["service-a"]["versions"]["v1"]["faults"] = True
    assert at_app(App.model_validate(data), service="service-a").service == "service-a"
    data["services"]["service-b"]["versions"]["v2"] = {"command": ["true"]}
    with pytest.raises(BadInput, match="service-b v2 does not honour"):
        at_app(App.model_validate(data))
    assert at_app(App.model_validate(data), version="v1").versions == ("v1",)
