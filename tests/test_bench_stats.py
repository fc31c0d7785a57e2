"""The arithmetic of the benchmark: properties that hold for any figures, and hand-made cases."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshdemo.bench.load import quantile_of, true_p99_ms
from meshdemo.bench.stats import (
    Objective,
    Request,
    felt,
    growth,
    healthy_after,
    quantile,
    ratios,
    spread,
)

finite = st.floats(-1e9, 1e9, allow_nan=False)
positive = st.floats(1e-6, 1e9)


# -- quantiles and spread ---------------------------------------------------------------------------------


@given(st.lists(finite, min_size=1), st.floats(0, 1), st.floats(0, 1))
def test_quantiles_lie_within_the_values_and_rise(values: list[float], a: float, b: float) -> None:
    low, high = sorted((quantile(values, min(a, b)), quantile(values, max(a, b))))
    assert low == pytest.approx(quantile(values, min(a, b)))
    assert min(values) <= low <= high <= max(values) or low == pytest.approx(high)


@given(st.lists(finite, min_size=1))
def test_the_median_is_the_median(values: list[float]) -> None:
    assert quantile(values, 0.5) == pytest.approx(statistics.median(values))


@given(st.lists(finite, min_size=2))
def test_quartiles_are_those_of_the_standard_library(values: list[float]) -> None:
    theirs = statistics.quantiles(values, n=4, method="inclusive")
    lies = spread(values)
    assert [lies.q1, lies.median, lies.q3] == pytest.approx(theirs, rel=1e-6, abs=1e-6)


@given(st.lists(positive, min_size=1), st.integers(1, 10))
def test_what_never_came_makes_no_other_value_infinite(values: list[float], never: int) -> None:
    lies = spread([*values, *[math.inf] * never])
    assert lies.low == min(values)
    assert lies.high == math.inf
    assert math.isfinite(lies.median) == (never < len(values) or (len(values) + never == 1))
    assert not math.isnan(lies.relative)


@pytest.mark.parametrize(("values", "q"), [([], 0.5), ([1.0], -0.1), ([1.0], 1.1)])
def test_no_quantile_of_nothing(values: list[float], q: float) -> None:
    with pytest.raises(ValueError, match="quantile"):
        quantile(values, q)


@given(st.lists(positive, min_size=1), st.floats(0.001, 1000))
def test_noise_does_not_depend_on_the_unit(values: list[float], factor: float) -> None:
    scaled = spread([value * factor for value in values])
    assert scaled.relative == pytest.approx(spread(values).relative, rel=1e-6, abs=1e-9)


def test_values_that_lie_far_apart_are_noisy() -> None:
    assert not spread([100, 101, 99, 105]).noisy
    assert spread([100, 40, 180, 100, 20]).noisy
    assert not spread([100]).noisy


# -- ratios and growth ------------------------------------------------------------------------------------


@given(st.lists(st.tuples(positive, positive), min_size=1), st.floats(0.01, 100))
def test_a_machine_that_slows_both_down_leaves_the_ratio(
    rounds: list[tuple[float, float]], by: float
) -> None:
    ours, theirs = [a for a, _ in rounds], [b for _, b in rounds]
    slowed = ratios([value * by for value in ours], [value * by for value in theirs])
    assert slowed == pytest.approx(ratios(ours, theirs))


def test_rounds_that_make_no_sense_are_left_out() -> None:
    assert ratios([1, 2, math.inf, 3, math.inf], [2, 0, math.inf, math.inf, 2]) == [0.5, 0.0, math.inf]


@given(st.floats(0.1, 100), st.floats(-2, 3), st.lists(st.floats(1, 1e4), min_size=2, unique=True))
def test_growth_finds_the_power(factor: float, power: float, sizes: list[float]) -> None:
    if max(sizes) / min(sizes) < 1.01:
        return  # too close together to tell
    points = [(size, factor * size**power) for size in sizes]
    assert growth(points) == pytest.approx(power, abs=1e-6)


@pytest.mark.parametrize("points", [[], [(10, 1.0)], [(10, 1.0), (10, 2.0)], [(10, 0.0), (100, 5.0)]])
def test_no_growth_without_two_sizes(points: list[tuple[float, float]]) -> None:
    assert growth(points) is None


# -- a fault that is felt ---------------------------------------------------------------------------------


def requests(rps: int, seconds: float, status: list[tuple[float, float, int]]) -> list[Request]:
    """A steady load; those due within (from, to) got that status, the others 200."""
    made = []
    for number in range(round(rps * seconds)):
        due = number / rps
        code = next((code for begin, end, code in status if begin <= due < end), 200)
        made.append(Request(due, 0.001, code))
    return made


def test_a_fault_is_felt_first_by_one_and_then_by_all() -> None:
    load = requests(100, 5, [(2.0, 2.001, 500), (2.5, 5, 500)])
    first, everybody = felt(load, 1.0)
    assert first == pytest.approx(1.001)
    assert everybody == pytest.approx(2.49 - 1.0 + 0.001)


def test_a_fault_that_nobody_or_not_everybody_feels_has_no_time() -> None:
    assert felt(requests(100, 2, []), 0.5) == (math.inf, math.inf)
    first, everybody = felt(requests(100, 2, [(1, 1.5, 503)]), 0.5)
    assert first == pytest.approx(0.501)
    assert everybody == math.inf


@given(st.floats(0.1, 3.9), st.sampled_from([0, 500, 503]))
def test_all_is_never_before_the_last_good_answer(begin: float, status: int) -> None:
    load = requests(50, 5, [(begin, 5, status)])
    _, everybody = felt(load, 0.0)
    good = [one.ended for one in load if not one.failed]
    assert everybody == pytest.approx(max(good))


# -- healthy again ----------------------------------------------------------------------------------------

OBJECTIVE = Objective()


def test_healthy_throughout_is_healthy_at_once() -> None:
    assert healthy_after(requests(200, 10, []), 1.0, 10.0, OBJECTIVE) == 0


def test_healthy_from_the_second_from_which_the_objective_holds() -> None:
    load = requests(200, 12, [(2.0, 5.0, 500)])
    # At 200 requests/s two may fail in a second: the last second that holds more begins just before 5 s.
    assert healthy_after(load, 2.0, 12.0, OBJECTIVE) == pytest.approx(3.0, abs=0.02)


def test_not_healthy_if_it_comes_back() -> None:
    load = requests(200, 12, [(2.0, 3.0, 500), (8.0, 8.5, 500)])
    assert healthy_after(load, 2.0, 12.0, OBJECTIVE) == pytest.approx(6.5, abs=0.02)


def test_never_healthy_is_infinity() -> None:
    assert healthy_after(requests(200, 12, [(2.0, 12.0, 500)]), 2.0, 12.0, OBJECTIVE) == math.inf


def test_requests_that_hang_count_where_they_were_due() -> None:
    load = [
        Request(n / 100, math.inf if 200 <= n < 300 else 0.001, 0 if 200 <= n < 300 else 200)
        for n in range(1000)
    ]
    assert healthy_after(load, 2.0, 10.0, OBJECTIVE) == pytest.approx(1.0, abs=0.03)


def test_slow_is_bad_too_but_more_of_it_is_allowed() -> None:
    slow = [Request(n / 100, 0.4 if n % 25 == 0 else 0.01, 200) for n in range(1000)]  # 4 %
    assert healthy_after(slow, 0.0, 10.0, OBJECTIVE) == 0
    slower = [Request(n / 100, 0.4 if n % 10 == 0 else 0.01, 200) for n in range(1000)]  # 10 %
    assert healthy_after(slower, 0.0, 10.0, OBJECTIVE) == math.inf


@settings(max_examples=20, deadline=None)
@given(st.floats(0.5, 6.0), st.randoms())
def test_the_order_of_the_requests_does_not_matter(until: float, random: object) -> None:
    load = requests(50, 10, [(0.0, until, 503)])
    shuffled = list(load)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    expected = healthy_after(load, 0.0, 10.0, OBJECTIVE)
    assert healthy_after(shuffled, 0.0, 10.0, OBJECTIVE) == expected
    assert expected == pytest.approx(until, abs=0.05)


# -- a stall ----------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.floats(0.5, 2.0), st.integers(5, 30))
def test_the_truth_about_a_stall_is_what_counting_gives(stall_s: float, seconds: int) -> None:
    rps = 1000
    begin = seconds / 2
    latencies = []
    for number in range(seconds * rps):
        due = number / rps
        latencies.append(max(0.0, begin + stall_s - due) if due >= begin else 0.0)
    assert true_p99_ms(stall_s, seconds) == pytest.approx(quantile(latencies, 0.99) * 1000, abs=3.0)


def test_a_quantile_is_that_of_what_came_in_between() -> None:
    before = [(0.1, 100.0), (0.5, 100.0), (math.inf, 100.0)]
    after = [(0.1, 190.0), (0.5, 199.0), (math.inf, 200.0)]
    assert quantile_of(before, after, 0.45) == pytest.approx(0.05)  # half of the bucket
    assert quantile_of(before, after, 0.9) == pytest.approx(0.1)
    assert quantile_of(before, after, 0.95) == pytest.approx(0.1 + 0.4 * 5 / 9)
    assert quantile_of(before, after, 0.99) == pytest.approx(0.5)
    assert quantile_of(before, after, 1.0) == math.inf
    assert quantile_of(before, before, 0.5) == math.inf
