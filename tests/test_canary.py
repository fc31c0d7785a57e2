"""The pure core of the canary, on simulated traffic; and the command line's checks of its arguments."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import pytest

from meshdemo.control.signals import Cell, Histogram, Sample, bucket
from meshdemo.errors import BadInput
from meshdemo.remediation.canary import Canary, Decision
from meshdemo.remediation.canary_run import check_steps
from meshdemo.remediation.choose import shares
from meshdemo.remediation.policy import Policy
from meshdemo.remediation.policyfile import load
from meshdemo.resources import DEFAULT_POLICY

STEPS = (5, 25, 50, 100)
POLICY: Policy = load(DEFAULT_POLICY)


@dataclass
class Bad:
    """Share of errors and of slow requests of one version at a time (seconds since the canary began)."""

    errors: Callable[[float], float] = lambda _: 0.005
    slow: float = 0.005


class Traffic:
    """Two instances of v1, one of v2, exporting once a second at phases of their own."""

    def __init__(self, seed: int, rps: float, v1: Bad, v2: Bad, hold_s: float = 10.0) -> None:
        self.random = random.Random(seed)
        self.rps, self.kinds = rps, {"v1": v1, "v2": v2}
        self.canary = Canary(POLICY.objectives_of("service-b"), "v2", STEPS, hold_s)
        self.phases = {name: self.random.random() for name in ("v1-1", "v1-2", "v2-1")}

    def run(self, delay_s: float = 0.05, limit_s: float = 400.0) -> tuple[Decision, float]:
        """The last decision, and when it was made, in seconds since the first shift."""
        decision = self.canary.begin()
        weights = [(-10.0, 0)]
        exports = sorted(
            (second + phase, name) for name, phase in self.phases.items() for second in range(int(limit_s))
        )
        self.canary.in_force(decision.weight, 0.0)
        weights.append((0.0, decision.weight))
        for end, name in exports:
            self.canary.observe([self.sample(name, end, weights)])
            decision = self.canary.step(end + delay_s)
            if decision.kind == "shift":
                self.canary.in_force(decision.weight, end + delay_s)
                weights.append((end + delay_s, decision.weight))
            elif decision.kind != "hold":
                return decision, end + delay_s
        raise AssertionError("the canary never ends")

    def sample(self, name: str, end: float, weights: list[tuple[float, int]]) -> Sample:
        version = name.partition("-")[0]
        share = 0.0
        for (since, weight), (until, _) in zip(weights, [*weights[1:], (end, 0)], strict=True):
            seconds = max(0.0, min(until, end) - max(since, end - 1))
            share += seconds * (weight / 100 if version == "v2" else (1 - weight / 100) / 2)
        mean = self.rps * share
        requests = int(mean) + (self.random.random() < mean % 1)
        kind = self.kinds[version]
        # Each request fails by the moment at which it was made, somewhere in the second.
        failures = sum(
            self.random.random() < kind.errors(end - self.random.random()) for _ in range(requests)
        )
        slow = sum(self.random.random() < kind.slow for _ in range(requests))
        latency = Histogram({bucket(3.0): requests - slow, bucket(900.0): slow})
        cell = Cell(
            inbound=True, peer="service-a", route="", requests=requests, failures=failures, latency=latency
        )
        return Sample(name, "service-b", version, 1, end - 1, end, cells=(cell,))


def test_a_thousand_good_canaries_are_promoted() -> None:
    ends = [Traffic(seed, 50, Bad(), Bad()).run() for seed in range(1000)]
    false = [decision.reason for decision, _ in ends if decision.kind != "promoted"]
    assert len(false) <= 1, false
    assert median(at for _, at in ends) < 45  # 4 steps of 10 s, and little more


@pytest.mark.parametrize("kind", ["errors", "slow"])
def test_a_bad_canary_is_sent_back_within_seconds(kind: str) -> None:
    bad = Bad(errors=lambda _: 0.2) if kind == "errors" else Bad(slow=0.5)
    ends = [Traffic(seed, 200, Bad(), bad).run() for seed in range(60)]
    assert all(decision.kind == "rolled_back" and decision.weight == 0 for decision, _ in ends)
    assert median(at for _, at in ends) < 3.5
    assert "of" in ends[0][0].reason and "allowed" in ends[0][0].reason


def test_a_canary_is_not_to_blame_when_both_are_bad() -> None:
    def outage(at: float) -> float:
        return 0.3 if 5 < at < 12 else 0.002

    for seed in range(60):
        decision, at = Traffic(seed, 200, Bad(outage), Bad(outage)).run()
        assert decision.kind == "promoted", decision.reason
        assert at > 45  # it waited


def test_a_canary_that_cannot_be_judged_is_sent_back_in_the_end() -> None:
    always = Bad(errors=lambda _: 0.3)
    decision, at = Traffic(1, 200, always, always).run()
    assert decision.kind == "rolled_back"
    assert "stable version is bad too" in decision.reason
    assert 60 <= at < 70


def test_what_only_load_brings_out_is_found_at_a_later_step() -> None:
    decision, at = Traffic(3, 200, Bad(), Bad(lambda at: 0.15 if at > 32 else 0.001)).run()
    assert decision.kind == "rolled_back"
    assert 31 < at < 36
    assert "in this step" in decision.reason


def test_without_requests_nothing_is_promoted() -> None:
    decision, _ = Traffic(1, 0.1, Bad(), Bad()).run()
    assert decision.kind == "rolled_back"
    assert "requests reached v2" in decision.reason


def test_without_an_instance_in_service_it_ends_at_once() -> None:
    canary = Canary(POLICY.objectives_of("service-b"), "v2", STEPS, 10)
    canary.in_force(canary.begin().weight, 100.0)
    decision = canary.step(100.3, in_service=False)
    assert (decision.kind, decision.weight) == ("rolled_back", 0)


def test_the_report_has_figures_of_every_step() -> None:
    traffic = Traffic(5, 200, Bad(), Bad(), hold_s=3)
    assert traffic.run()[0].kind == "promoted"
    reports = traffic.canary.reports
    assert [report.weight for report in reports] == list(STEPS)
    first = reports[0].objectives["success"]
    assert first["canary"]["requests"] < first["stable"]["requests"]


@pytest.mark.parametrize("steps", [[], [0, 50], [50, 25], [5, 5], [5, 101], [-1]])
def test_steps_that_make_no_sense(steps: list[int]) -> None:
    with pytest.raises(BadInput, match="--steps"):
        check_steps(steps)


def test_shares_sum_to_their_total() -> None:
    assert shares({"a": 1, "b": 1, "c": 1}, 95) == {"a": 32, "b": 32, "c": 31}
    assert shares({"a": 7}) == {"a": 100}
