"""The schedule of an open-loop load: every request that should be due is due once, at its time."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshdemo.workloads.load import Schedule, Target, poisson
from meshdemo.workloads.settings import BadSetting

rates = st.floats(min_value=0.5, max_value=500.0)
pauses = st.lists(st.floats(min_value=0.0, max_value=0.5), min_size=1, max_size=50)


@settings(deadline=None)
@given(rates, pauses)
def test_evenly_spaced_whenever_it_is_asked(rps: float, stalls: list[float]) -> None:
    schedule = Schedule()
    schedule.set_rate(rps, 100.0)
    now, taken = 100.0, []
    for stall in stalls:  # an event loop that is late shifts nothing
        now += stall
        due = schedule.take(now)
        assert all(time <= now for time in due)
        taken += due
    assert len(taken) == pytest.approx((now - 100.0) * rps + 1, abs=1.001)
    assert taken == pytest.approx([100.0 + n / rps for n in range(len(taken))])
    assert schedule.next_due is not None
    assert schedule.next_due > now


@settings(deadline=None)
@given(st.lists(st.tuples(rates, st.floats(min_value=0.0, max_value=0.5)), min_size=1, max_size=30))
def test_changes_of_the_rate_neither_add_nor_lose_requests(steps: list[tuple[float, float]]) -> None:
    schedule = Schedule()
    now, taken, expected = 50.0, 0, 0.0
    for rps, duration in steps:
        taken += len(schedule.take(now))
        schedule.set_rate(rps, now)
        now += duration
        expected += rps * duration
    taken += len(schedule.take(now))
    assert taken == pytest.approx(expected + 1, abs=1.01)


@settings(deadline=None)
@given(rates, rates)
def test_a_change_takes_effect_at_once(slow: float, fast: float) -> None:
    schedule = Schedule()
    schedule.set_rate(0.001, 0.0)
    schedule.take(0.0)  # the next would be due in 1,000 s
    schedule.set_rate(fast, 1.0)
    assert schedule.next_due is not None
    assert schedule.next_due <= 1.0 + 1.0 / fast


def test_paused_means_nothing_is_due() -> None:
    schedule = Schedule()
    assert schedule.take(1e9) == []
    schedule.set_rate(100.0, 0.0)
    assert len(schedule.take(0.995)) == 100
    schedule.set_rate(0.0, 1.0)
    assert schedule.next_due is None
    assert schedule.take(1e9) == []
    schedule.set_rate(100.0, 1e9)
    assert schedule.take(1e9) == [1e9]


def test_poisson_arrivals_have_the_rate() -> None:
    random.seed(1)
    schedule = Schedule(poisson)
    schedule.set_rate(1000.0, 0.0)
    assert len(schedule.take(100.0)) == pytest.approx(100_000, rel=0.02)


def target(url: str = "http://service-b:5000/work", **variables: str) -> Target:
    return Target.of(url, variables)


def test_direct() -> None:
    direct = target("http://service-b:5000/work?n=1")
    assert (direct.host, direct.port) == ("service-b", 5000)
    assert direct.request("a").startswith(b"GET /work?n=1 HTTP/1.1\r\nHost: service-b:5000\r\n")
    assert (target("http://[::1]").host, target("http://[::1]").port) == ("::1", 80)
    assert target("http://x").request("a").startswith(b"GET / HTTP/1.1\r\nHost: x\r\n")


def test_through_a_proxy() -> None:
    for name in ("HTTP_PROXY", "http_proxy"):
        proxied = target(**{name: "http://127.0.0.1:15001"})
        assert (proxied.host, proxied.port) == ("127.0.0.1", 15001)
        assert proxied.request("a").startswith(
            b"GET http://service-b:5000/work HTTP/1.1\r\nHost: service-b:5000\r\n"
        )
    assert target(HTTP_PROXY="http://a:1", http_proxy="http://b:2").host == "b"


@pytest.mark.parametrize("exception", ["service-b", "localhost,service-b", "service-b:5000", "*"])
def test_no_proxy(exception: str) -> None:
    assert target(HTTP_PROXY="http://127.0.0.1:15001", NO_PROXY=exception).host == "service-b"


def test_no_proxy_for_others() -> None:
    assert target(HTTP_PROXY="http://127.0.0.1:15001", NO_PROXY="127.0.0.1,localhost").port == 15001


@pytest.mark.parametrize(
    "url",
    ["", "https://service-b/work", "http://", "http://a:b/", "http://a:70000/", "ftp://a", "http://a/b c",
     "http://a/\r\nX: y", "http://bücher/", "http://user@a/"],
)  # fmt: skip
def test_what_is_no_target(url: str) -> None:
    with pytest.raises(BadSetting, match="TARGET"):
        target(url)
    if url:
        with pytest.raises(BadSetting, match="HTTP_PROXY"):
            target(HTTP_PROXY=url)
