"""Settings from the environment: in range, or refused with one line that says what is allowed."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshdemo.workloads.settings import BadSetting, Environment, Identity


def share(text: str) -> float:
    return Environment({"ERR_RATE": text}).number("ERR_RATE", 0.0, allowed="0 to 1", low=0.0, high=1.0)


@settings(deadline=None)
@given(st.text())
def test_any_text_is_in_range_or_refused_in_one_line(text: str) -> None:
    try:
        value = share(text)
    except BadSetting as error:
        message = str(error)
        assert "ERR_RATE" in message
        assert "0 to 1" in message
        assert len(message.splitlines()) == 1
        assert len(message) < 200 + 10 * 60
    else:
        assert 0.0 <= value <= 1.0


@settings(deadline=None)
@given(st.floats(min_value=0.0, max_value=1.0))
def test_what_is_in_range_is_taken_as_it_is(value: float) -> None:
    assert share(repr(value)) == value
    assert math.copysign(1.0, share(repr(-0.0))) == 1.0


@settings(deadline=None)
@given(st.floats().filter(lambda value: not 0.0 <= value <= 1.0))
def test_what_is_out_of_range_is_refused(value: float) -> None:
    with pytest.raises(BadSetting):
        share(repr(value))


@settings(deadline=None)
@given(st.integers())
def test_whole_numbers(value: int) -> None:
    env = Environment({"PORT": str(value)})
    if 0 <= value <= 65535:
        assert env.whole("PORT", 1, low=0, high=65535) == value
    else:
        with pytest.raises(BadSetting, match="from 0 to 65535"):
            env.whole("PORT", 1, low=0, high=65535)


@pytest.mark.parametrize("text", ["", " ", "1.5", "0x10", "five"])
def test_no_whole_number(text: str) -> None:
    with pytest.raises(BadSetting):
        Environment({"PORT": text}).whole("PORT", 1, low=0, high=65535)


def test_what_is_not_set_takes_the_default() -> None:
    env = Environment({})
    assert env.number("LAT_MS", 7.0, allowed="", low=0.0) == 7.0
    assert env.whole("PORT", 5000, low=0, high=65535) == 5000
    assert env.choice("ARRIVALS", ("uniform", "poisson")) == "uniform"
    assert Identity.of(env, "service-b") == Identity(
        "127.0.0.1", 5000, "service-b", "v1", "service-b-v1", 10.0
    )


def test_a_choice_names_what_there_is() -> None:
    with pytest.raises(BadSetting, match="uniform or poisson"):
        Environment({"ARRIVALS": "bursts"}).choice("ARRIVALS", ("uniform", "poisson"))
