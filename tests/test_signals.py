"""The windows' arithmetic: histograms, quantiles, and the JSON form of samples."""

from __future__ import annotations

import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshdemo.control.signals import (
    BOUNDS_MS,
    OBJECTIVE_BOUNDS_MS,
    Cell,
    Histogram,
    Sample,
    Signal,
    bucket,
    effective_bound_ms,
    merge,
    middle_ms,
    sample_from_json,
    sample_to_json,
)

latencies = st.lists(st.floats(1, 10_000), min_size=1, max_size=300)
histograms = st.dictionaries(st.integers(0, len(BOUNDS_MS)), st.integers(1, 10_000), max_size=12).map(
    Histogram
)
cells = st.builds(
    Cell,
    inbound=st.booleans(),
    peer=st.sampled_from(["", "service-a", "service-b"]),
    route=st.sampled_from(["work", "other"]),
    requests=st.integers(0, 1000),
    failures=st.integers(0, 1000),
    denied=st.integers(0, 10),
    refused=st.integers(0, 10),
    secured=st.integers(0, 1000),
    identity=st.sampled_from(["", "spiffe://m/ns/default/sa/service-a"]),
    codes=st.dictionaries(st.sampled_from(["200", "500", "0"]), st.integers(1, 1000)),
    version=st.sampled_from(["", "v1"]),
    latency=histograms,
    failed_latency=histograms,
)
samples = st.builds(
    Sample,
    instance=st.sampled_from(["b-1", "b-2"]),
    service=st.just("service-b"),
    version=st.sampled_from(["v1", "v2"]),
    revision=st.integers(1, 5),
    start=st.floats(1e9, 2e9),
    end=st.floats(1e9, 2e9),
    in_flight=st.integers(0, 100),
    arrived=st.integers(0, 100),
    waiting=st.lists(st.tuples(st.floats(0, 60), st.integers(1, 100)), max_size=3).map(tuple),
    usual=st.integers(0, 100),
    cells=st.lists(cells, max_size=3).map(tuple),
)


@given(latencies, st.sampled_from([0.5, 0.9, 0.95, 0.99, 1.0]))
def test_quantiles_are_within_10_percent_of_the_exact_ones(values: list[float], q: float) -> None:
    exact = sorted(values)[max(1, math.ceil(q * len(values))) - 1]
    reported = Histogram.of(values).quantile_ms(q)
    assert reported is not None
    assert abs(reported - exact) <= 0.1 * exact


@given(st.lists(histograms, max_size=6), st.integers(0, 6))
def test_merging_is_associative_and_keeps_every_request(parts: list[Histogram], cut: int) -> None:
    whole = merge(parts)
    assert merge([merge(parts[:cut]), merge(parts[cut:])]) == whole == merge(parts[::-1])
    assert whole.total == sum(part.total for part in parts)


@given(st.floats(0, 1e6))
def test_a_latency_lies_in_its_bucket(value: float) -> None:
    index = bucket(value)
    assert index == 0 or BOUNDS_MS[index - 1] <= value
    assert index == len(BOUNDS_MS) or value < BOUNDS_MS[index]


def test_buckets_are_fine_enough_from_1_ms_to_10_s() -> None:
    for low, high in itertools.pairwise(BOUNDS_MS):
        if 1 <= low < 10_000:
            assert middle_ms(bucket(low)) <= low * 1.1
            assert middle_ms(bucket(low)) >= high / 1.1


@pytest.mark.parametrize(
    "threshold_ms",
    [1, 2, 5, 10, 20, 25, 50, 75, 100, 150, 200, 250, 300, 400, 500, 750, 800, 1000, 2000, 5000, 10_000],
)
def test_thresholds_that_people_write_are_exact(threshold_ms: float) -> None:
    assert effective_bound_ms(threshold_ms) == threshold_ms
    assert Histogram.of([threshold_ms * 0.99] * 100).above(threshold_ms) == 0
    assert Histogram.of([threshold_ms * 1.01] * 100).above(threshold_ms) == 100


def test_bounds_are_few_and_edges_of_envoys_own_bins() -> None:
    assert len(BOUNDS_MS) <= 91  # every one is in every export of every sidecar
    assert len(OBJECTIVE_BOUNDS_MS) <= 50  # ... and every one of these a line at every scrape
    assert set(OBJECTIVE_BOUNDS_MS) <= set(BOUNDS_MS)
    for bound in BOUNDS_MS:
        mantissa = float(f"{bound:e}".split("e")[0])
        assert round(mantissa, 1) == mantissa


def test_quantiles_of_nothing_and_beyond_the_last_bound() -> None:
    assert Histogram().quantile_ms(0.5) is None
    assert Histogram.of([90_000]).quantile_ms(0.5) == BOUNDS_MS[-1]


def test_a_slow_failure_is_one_bad_request() -> None:
    signal = Signal(
        service="b", version=None, instance=None, route=None, caller=None, start=0, end=1,
        requests=4, requests_within=4, failures=2,
        latency=Histogram.of([5, 5, 500, 500]), failed_latency=Histogram.of([5, 500]),
    )  # fmt: skip
    assert signal.bad() == 2
    assert signal.bad(slower_than_ms=200) == 3


@given(samples)
def test_samples_survive_json(sample: Sample) -> None:
    assert sample_from_json(json.loads(json.dumps(sample_to_json(sample)))) == sample
