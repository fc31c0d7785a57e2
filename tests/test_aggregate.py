"""Samples into signals: sums by scope, windows that are covered in part, silence."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshdemo.control.aggregate import BY, Scope, edges, row, signals
from meshdemo.control.signals import Cell, Histogram, Sample, Signal, merge

NOW = 1_000.0


def cell(requests: int = 10, failures: int = 0, **more: object) -> Cell:
    known: dict[str, object] = {
        "inbound": True, "peer": "a", "route": "work", "requests": requests, "failures": failures,
        "secured": requests, "identity": "spiffe://m/ns/default/sa/a",
        "latency": Histogram.of([20.0] * requests),
    }  # fmt: skip
    return Cell(**{**known, **more})  # type: ignore[arg-type]


def sample(instance: str, end: float, *cells: Cell, service: str = "b", **more: object) -> Sample:
    known: dict[str, object] = {
        "instance": instance, "service": service, "version": "v1", "revision": 1,
        "start": end - 1, "end": end, "cells": cells,
    }  # fmt: skip
    return Sample(**{**known, **more})  # type: ignore[arg-type]


def only(found: list[Signal]) -> Signal:
    assert len(found) == 1
    return found[0]


many = st.lists(
    st.builds(
        sample,
        st.sampled_from(["b-1", "b-2", "b-3"]),
        st.floats(NOW - 9, NOW),
        st.builds(
            cell,
            st.integers(0, 50),
            st.integers(0, 50),
            peer=st.sampled_from(["a", "c"]),
            route=st.sampled_from(["work", "other"]),
            denied=st.integers(0, 5),
            inbound=st.booleans(),
        ),
        version=st.sampled_from(["v1", "v2"]),
        in_flight=st.integers(0, 5),
        waiting=st.integers(0, 5).map(lambda n: ((1.0, n),) if n else ()),
    ),
    max_size=20,
)


@given(many)
def test_every_way_to_cut_a_service_sums_to_the_whole(found: list[Sample]) -> None:
    found = sorted(found, key=lambda one: one.end)
    whole = {signal.service: signal for signal in signals(found, by="service", now=NOW, window_s=60)}
    for by in BY:
        parts: dict[str, list[Signal]] = {}
        for signal in signals(found, by=by, now=NOW, window_s=60):
            parts.setdefault(signal.service, []).append(signal)
        for service, of_service in parts.items():
            total = whole[service]
            assert sum(part.requests for part in of_service) == total.requests
            assert sum(part.failures for part in of_service) == total.failures
            assert sum(part.denied for part in of_service) == total.denied
            assert merge(part.latency for part in of_service) == total.latency
            if by in ("version", "instance"):
                assert sum(part.overdue for part in of_service) == total.overdue


@given(many, st.sampled_from(BY))
def test_a_window_never_divides_by_more_than_it_spans(found: list[Sample], by: str) -> None:
    for signal in signals(sorted(found, key=lambda one: one.end), by=by, now=NOW, window_s=5):  # type: ignore[arg-type]
        assert 0 <= signal.end - signal.start <= 5.001
        assert signal.rps >= 0


def test_a_full_window() -> None:
    found = [sample(name, NOW - age, cell(10)) for age in range(20) for name in ("b-1", "b-2")]
    signal = only(signals(sorted(found, key=lambda one: one.end), by="service", now=NOW, window_s=10))
    assert signal.requests == 200
    assert signal.rps == pytest.approx(20)


def test_sidecars_that_report_out_of_step() -> None:
    found = [sample("b-1", NOW - age, cell(10)) for age in range(20)]
    found += [sample("b-2", NOW - age - 0.6, cell(10)) for age in range(20)]
    signal = only(signals(sorted(found, key=lambda one: one.end), by="service", now=NOW, window_s=10))
    assert signal.rps == pytest.approx(20, rel=0.1)


def test_three_reports_that_end_in_two_seconds_are_not_three_seconds_of_requests() -> None:
    found = [
        sample("b-1", NOW - age * 0.99, cell(100), start=NOW - age * 0.99 - 0.99) for age in range(9, -1, -1)
    ]
    signal = only(signals(found, by="service", now=NOW, window_s=2))
    assert signal.requests == 300
    assert signal.rps == pytest.approx(100 / 0.99)


def test_a_mesh_that_has_just_started_is_not_divided_by_the_whole_window() -> None:
    found = [sample("b-1", NOW - 1, cell(50)), sample("b-1", NOW, cell(50))]
    assert only(signals(found, by="service", now=NOW, window_s=10)).rps == pytest.approx(50)


def test_an_instance_that_was_replaced_halfway_does_not_double_the_load() -> None:
    found = [sample("b-1" if age >= 5 else "b-2", NOW - age, cell(50)) for age in range(9, -1, -1)]
    assert only(signals(found, by="service", now=NOW, window_s=10)).rps == pytest.approx(50)


def test_a_window_is_never_shorter_than_what_the_sidecars_report() -> None:
    found = [
        sample("b-1", NOW, cell(50), start=NOW - 5),
        sample("b-2", NOW - 4, cell(50), start=NOW - 9),
    ]
    by_instance = signals(sorted(found, key=lambda one: one.end), by="instance", now=NOW, window_s=1)
    assert [round(signal.rps) for signal in by_instance] == [10, 10]


def test_old_samples_do_not_stand_for_now() -> None:
    found = [sample("b-1", NOW - 30, cell(50))]
    signal = only(signals(found, by="service", now=NOW, window_s=10, scopes=[Scope("b-1", "b", "v1", True)]))
    assert signal.requests == 0
    assert signal.silent


def test_a_silent_instance_is_silent_and_a_service_only_if_all_are() -> None:
    scopes = [Scope("b-1", "b", "v1", silent=True, ejected=True), Scope("b-2", "b", "v1")]
    found = [sample("b-2", NOW, cell(5))]
    first, second = signals(found, by="instance", now=NOW, window_s=10, scopes=scopes)
    assert (first.instance, first.silent, first.ejected, first.requests) == ("b-1", True, True, 0)
    assert (second.instance, second.silent, second.ejected, second.requests) == ("b-2", False, False, 5)
    whole = only(signals(found, by="service", now=NOW, window_s=10, scopes=scopes))
    assert not whole.silent
    assert not whole.ejected


def test_overdue_is_that_of_the_last_sample() -> None:
    found = [
        sample("b-1", NOW - 1, waiting=((1.0, 9),)),
        sample("b-1", NOW, waiting=((1.0, 3),)),
        sample("b-2", NOW, waiting=((1.0, 4),)),
    ]
    assert only(signals(found, by="service", now=NOW, window_s=10)).overdue == 7


def test_effective_success_is_what_callers_got() -> None:
    found = [
        sample("b-1", NOW, cell(100, 30)),
        sample("a-1", NOW, cell(90, 1, inbound=False, peer="b", version="v1"), service="a"),
    ]
    by_service = {one.service: one for one in signals(found, by="service", now=NOW, window_s=10)}
    assert by_service["b"].success_rate == pytest.approx(0.7)
    assert by_service["b"].effective_success_rate == pytest.approx(89 / 90)
    assert by_service["a"].success_rate is None
    assert by_service["a"].effective_success_rate is None
    version = {one.version: one for one in signals(found, by="version", now=NOW, window_s=10, service="b")}
    assert version["v1"].effective_requests == 90
    route = only(signals(found, by="route", now=NOW, window_s=10, service="b"))
    assert (route.route, route.effective_failures) == ("work", 1)
    caller = only(signals(found, by="caller", now=NOW, window_s=10, service="b"))
    assert (caller.caller, caller.effective_failures) == ("a", 1)
    instance = only(signals(found, by="instance", now=NOW, window_s=10, service="b"))
    assert instance.effective_requests is None


def test_a_service_alone() -> None:
    found = [sample("b-1", NOW, cell(1)), sample("c-1", NOW, cell(2), service="c")]
    assert only(signals(found, by="service", now=NOW, window_s=10, service="c")).requests == 2


def test_rows_have_the_keys_of_their_scope() -> None:
    found = [sample("b-1", NOW, cell(10, 1))]
    line = row(only(signals(found, by="instance", now=NOW, window_s=10)))
    assert line["service"] == "b"
    assert line["version"] == "v1"
    assert line["instance"] == "b-1"
    assert "route" not in line
    assert "caller" not in line
    assert line["success_rate"] == pytest.approx(0.9)
    assert line["p50_ms"] == pytest.approx(20, rel=0.1)


def test_edges_are_secured_only_if_every_request_was() -> None:
    plain = cell(5, peer="", secured=0, identity="")
    found = [sample("b-1", NOW, cell(10), plain), sample("b-2", NOW, cell(10))]
    unknown, known = edges(found, now=NOW, window_s=10)
    assert (unknown["caller"], unknown["secured"]) == ("", False)
    assert (known["caller"], known["secured"], known["requests"]) == ("a", True, 20)
    assert known["identity"] == "spiffe://m/ns/default/sa/a"
    mixed = [sample("b-1", NOW, replace(cell(10), secured=9))]
    assert not edges(mixed, now=NOW, window_s=10)[0]["secured"]


def test_an_edge_that_is_denied_is_still_seen() -> None:
    edge = edges([sample("b-1", NOW, cell(0, denied=7))], now=NOW, window_s=10)[0]
    assert (edge["requests"], edge["denied"], edge["success_rate"]) == (0, 7, None)
