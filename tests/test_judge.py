"""Statistics and judging: right beyond doubt, quick where it is, silent where it is not."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshdemo.control.goals import Objective
from meshdemo.control.signals import Cell, Histogram, Sample, bucket
from meshdemo.remediation import stats
from meshdemo.remediation.core import Core
from meshdemo.remediation.judge import Budget, ObjectiveJudge, Window
from meshdemo.remediation.policyfile import check, load
from meshdemo.resources import DEFAULT_POLICY

# -- statistics -------------------------------------------------------------------------------------------


def _exact_tail(bad: int, total: int, share: float) -> float:
    return math.fsum(
        math.comb(total, k) * share**k * (1 - share) ** (total - k) for k in range(bad, total + 1)
    )


@given(
    st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.001, 0.999)
)
def test_the_tails_are_those_of_the_binomial_distribution(counts: tuple[int, int], share: float) -> None:
    bad, total = counts
    assert stats.tail(bad, total, share) == pytest.approx(_exact_tail(bad, total, share), rel=1e-6, abs=1e-12)
    assert stats.head(bad, total, share) + stats.tail(bad + 1, total, share) == pytest.approx(1, abs=1e-9)


def test_wilson_agrees_with_published_figures() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3: 95 %, two-sided.
    for bad, total, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert stats.wilson(bad, total, 0.025) == pytest.approx((low, high), abs=1e-4)
    assert stats.wilson(0, 20, 0.025)[0] == 0
    assert stats.wilson(0, 0, 0.025) == (0, 1)


@given(
    st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))),
    st.floats(0.001, 0.5),
    st.sampled_from([1e-9, 1e-6, 1e-3]),
)
def test_exceeds_means_that_both_tests_agree(counts: tuple[int, int], allowed: float, alpha: float) -> None:
    bad, total = counts
    if stats.exceeds(bad, total, allowed, alpha):
        assert bad / total > allowed
        assert stats.wilson(bad, total, alpha)[0] >= allowed * (1 - 1e-9)
        assert stats.tail(bad, total, allowed) <= alpha
        if bad < total:
            assert stats.exceeds(bad + 1, total, allowed, alpha)  # worse can only be clearer


def test_fishers_test_agrees_with_the_tea_lady() -> None:
    assert stats.worse(3, 4, 1, 4) == pytest.approx(17 / 70)
    assert stats.worse(4, 4, 0, 4) == pytest.approx(1 / 70)
    assert stats.worse(0, 10, 0, 10) == 1
    assert stats.worse(5, 10, 0, 0) == 1


# -- windows and budgets ----------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.floats(0.01, 3), st.integers(0, 100), st.integers(0, 100)), max_size=60),
    st.sampled_from([1.25, 10.0]),
)
def test_a_window_is_the_sum_of_its_last_seconds(steps: list[tuple[float, int, int]], span: float) -> None:
    window, entries, now = Window(span), [], 0.0
    for gap, requests, bad in steps:
        now += gap
        entries.append((now, requests, bad))
        window.add(entries[-1])
        inside = [entry for entry in entries if entry[0] > now - span]
        assert (window.requests, window.bad) == (sum(e[1] for e in inside), sum(e[2] for e in inside))


def test_a_budget_is_of_the_whole_period_and_not_of_the_first_seconds() -> None:
    budget = Budget(allowed=0.01, period_s=3600)
    for second in range(100):
        budget.add(second, second + 1, 100, 0)
    assert budget.left(100) == 1
    budget.add(100, 101, 100, 36)  # an hour at 100 requests/s allows 3,600 bad ones
    assert budget.left(101) == pytest.approx(0.99, abs=0.001)


def test_a_budget_rolls_on() -> None:
    budget = Budget(allowed=0.01, period_s=60)
    budget.add(0, 1, 100, 30)
    assert budget.left(1) < 1
    for second in range(1, 200):
        budget.add(second, second + 1, 100, 0)
    assert budget.left(200) == 1


# -- verdicts ---------------------------------------------------------------------------------------------


def objective(text: str = "success: 99%") -> Objective:
    policy = check(f"objectives:\n  - {{name: x, {text}}}\n").policy
    assert policy is not None
    return policy.objectives[0]


def sample(
    end: float, requests: int, bad: int = 0, *, slow: int = 0, overdue: int = 0, instance: str = "b-1"
) -> Sample:
    latency = Histogram({bucket(3.0): requests - slow, bucket(900.0): slow})
    cell = Cell(inbound=True, peer="a", route="", requests=requests, failures=bad, latency=latency)
    waiting = ((1.0, overdue),) if overdue else ()
    return Sample(instance, "b", "v1", 1, end - 1, end, in_flight=overdue, waiting=waiting, cells=(cell,))


def test_five_bad_of_twenty_are_not_an_incident() -> None:
    judge = ObjectiveJudge(objective(), "b")
    judge.add(sample(1, 20, 5))
    assert judge.verdict("b-1", 1) is None


def test_the_first_export_with_thirty_percent_errors_suffices() -> None:
    judge = ObjectiveJudge(objective(), "b")
    for second in range(1, 30):
        judge.add(sample(second, 100, second % 2, instance="b-1"))
        judge.add(sample(second + 0.5, 100, instance="b-2"))
        assert judge.verdict("b-1", second) is judge.verdict("b-2", second) is None
    judge.add(sample(30, 100, 30))
    verdict = judge.verdict("b-1", 30)
    assert verdict is not None
    assert verdict.surely > verdict.allowed
    assert verdict.window_s < 2


def test_a_slow_burn_is_found_over_the_long_window() -> None:
    judge = ObjectiveJudge(objective(), "b")
    for second in range(1, 61):
        judge.add(sample(second, 200, 4))  # 2 %, where 1 % is allowed
        verdict = judge.verdict("b-1", second)
        if verdict is not None:
            assert verdict.window_s == 60
            assert 10 < second < 50
            return
    raise AssertionError("never found")


def test_one_bad_instance_of_a_hundred_is_found_though_the_service_is_fine() -> None:
    judge = ObjectiveJudge(objective(), "b")
    for second in (1, 2):
        for number in range(100):
            end = second + number / 100
            broken = second == 2 and number == 7
            judge.add(sample(end, 100, 50 if broken else 0, instance=f"b-{number}"))
            verdict = judge.verdict(f"b-{number}", end)
            assert (verdict is not None) == broken
            assert verdict is None or verdict.instance == "b-7"


def test_what_hangs_is_found_though_it_answers_too_few_to_judge() -> None:
    judge = ObjectiveJudge(objective("latency: {below: 300ms, share: 95%}"), "b")
    for second in range(1, 10):
        judge.add(sample(second, 20))
        assert judge.verdict("b-1", second) is None
    judge.add(sample(10, 0, overdue=6))
    assert judge.verdict("b-1", 10) is None
    judge.add(sample(11, 0, overdue=12))
    verdict = judge.verdict("b-1", 11)
    assert verdict is not None and (verdict.bad, verdict.requests, verdict.overdue) == (12, 12, 12)


def test_what_hardly_anybody_asks_for_is_not_judged_even_if_it_hangs() -> None:
    judge = ObjectiveJudge(objective("latency: {below: 300ms, share: 95%}"), "b")
    judge.add(sample(1, 20))
    judge.add(sample(2, 0, overdue=12))
    assert judge.verdict("b-1", 2) is None


def test_what_may_take_its_time_is_not_overdue_before_it_is() -> None:
    judge = ObjectiveJudge(objective("latency: {below: 5s, share: 95%}"), "b")
    for second in range(1, 20):
        judge.add(sample(second, 60, overdue=60))  # each takes two seconds
        assert judge.verdict("b-1", second) is None and judge.whole.overdue == 0


def test_what_is_overdue_is_too_slow_so_a_hung_instance_is_seen() -> None:
    judge = ObjectiveJudge(objective("latency: {below: 300ms, share: 95%}"), "b")
    judge.add(sample(1, 100))
    judge.add(sample(2, 0, overdue=60))
    verdict = judge.verdict("b-1", 2)
    assert verdict is not None and verdict.overdue == 60
    # The same sixty in the next export are still sixty, and gone when they are answered.
    judge.add(sample(3, 0, overdue=60))
    assert judge.whole.overdue == 60
    judge.add(sample(4, 100))
    assert judge.whole.overdue == 0


def test_a_silent_instance_is_unknown() -> None:
    judge = ObjectiveJudge(objective("latency: {below: 300ms, share: 95%}"), "b")
    judge.add(sample(2, 0, overdue=60))
    judge.forget("b-1")
    assert judge.whole.overdue == 0


def test_a_remedy_is_not_condemned_by_the_seconds_before_it() -> None:
    judge = ObjectiveJudge(objective(), "b")
    for second in range(1, 20):
        judge.add(sample(second, 100, 30))
    judge.reset(19.5)
    judge.add(sample(20, 100, 30))  # began before the remedy took effect
    assert judge.verdict("b-1", 20) is None
    judge.add(sample(21, 100, 0))
    assert judge.whole.longest.requests == 100
    assert judge.budget.left(21) < 1  # the budget forgets nothing


def test_slow_answers_to_requests_from_before_the_remedy_are_forgiven_once() -> None:
    judge = ObjectiveJudge(objective("latency: {below: 300ms, share: 95%}"), "b")
    judge.reset(1.5)
    before = sample(2, 100)
    judge.add(Sample("b-1", "b", "v1", 1, 1, 2, in_flight=40, cells=before.cells))
    judge.add(sample(3, 100, slow=40))
    assert judge.verdict("b-1", 3) is None
    judge.add(sample(4, 100, slow=40))
    assert judge.verdict("b-1", 4) is not None


def test_effective_judges_what_callers_got() -> None:
    judge = ObjectiveJudge(objective("success: 99%, effective: true"), "b")
    cells = (
        Cell(inbound=False, peer="b", route="", requests=100, failures=30),
        Cell(True, "c", "", 100, 100),
    )
    judge.add(Sample("a-1", "a", "v1", 1, 0, 1, cells=cells))
    verdict = judge.verdict("a-1", 1)
    assert verdict is not None and (verdict.requests, verdict.bad) == (100, 30)


# -- a day --------------------------------------------------------------------------------------------------

_ROWS = [
    {"id": name, "service": "service-b", "version": "v1", "revision": 1, "ready": True, "silent": False,
     "ejected": False}
    for name in ("b-1", "b-2")
]  # fmt: skip


def _binomial(rng: random.Random, n: int, share: float) -> int:
    """By the gaps between successes, which for small shares is quick."""
    log_rest, count, at = math.log1p(-share), 0, 0
    while True:
        at += int(math.log(1 - rng.random()) / log_rest) + 1
        if at > n:
            return count
        count += 1


def _healthy_day(rps: float, seed: int) -> Iterator[Sample]:
    rng, index, slow_index = random.Random(seed), bucket(3.0), bucket(900.0)
    for half in range(2 * 86_400):
        for number, name in enumerate(("b-1", "b-2")):
            requests = int(rps / 4) + (rng.random() < rps / 4 % 1)
            bad = _binomial(rng, requests, 0.005)
            slow = _binomial(rng, requests, 0.01)
            latency = Histogram({index: requests - slow, slow_index: slow})
            cell = Cell(True, "service-a", "work", requests, bad, latency=latency)
            end = half / 2 + number / 4 + 0.5
            yield Sample(name, "service-b", "v1", 1, end - 0.5, end, 0, requests, cells=(cell,))


@pytest.mark.parametrize("rps", [5, 50, 500])
def test_a_healthy_day_is_left_in_peace(rps: float) -> None:
    core = Core(load(DEFAULT_POLICY))
    for one in _healthy_day(rps, seed=1):
        core.observe(one.end, (one,), _ROWS)
        step = core.step(one.end)
        assert not step.events and not step.actions, step.events
