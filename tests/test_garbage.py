"""How often Python looks for garbage while many streams are sent something."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from meshdemo.control.garbage import expect_streams


@pytest.fixture
def looks() -> Iterator[list[int]]:
    """The generation of each look for garbage."""
    before, found = gc.get_threshold(), list[int]()

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            found.append(info["generation"])

    gc.collect()
    gc.callbacks.append(note)
    yield found
    gc.callbacks.remove(note)
    gc.set_threshold(*before)


@pytest.mark.parametrize("streams", [1, 1000, 5000])
def test_a_push_to_all_is_not_looked_through(looks: list[int], streams: int) -> None:
    expect_streams(streams)
    under_way = [[[] for _ in range(40)] for _ in range(streams)]  # objects that could be part of a cycle
    assert looks == []
    assert len(under_way) == streams


def test_what_refers_to_itself_is_found_all_the_same(looks: list[int]) -> None:
    expect_streams(1000)
    made = 0
    while not looks:
        around: list[object] = []
        around.append(around)
        made += 1
        assert made < 1_000_000
    assert looks == [0]
