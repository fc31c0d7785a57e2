"""Where the bad requests come from, by counts alone."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from meshdemo.remediation.localise import Part, localise

ALLOWED = 0.01


def part(
    name: str, bad: int, requests: int = 100, certain: float = 100, version: str = "v1", revision: int = 1
) -> Part:
    return Part(name, requests, bad, certain, version, revision)


def where(
    *parts: Part, callers: tuple[Part, ...] = (), final: bool = False, **options: object
) -> tuple[str, str] | None:
    place = localise("b", ALLOWED, parts, callers, final=final, **options)  # type: ignore[arg-type]
    return None if place is None else (place.scope, place.target)


def test_one_instance() -> None:
    assert where(part("b-1", 50), part("b-2", 0), part("b-3", 1)) == ("instance", "b-1")


def test_the_whole_service() -> None:
    assert where(part("b-1", 30), part("b-2", 28)) == ("service", "b")


def test_the_one_that_reports_first_is_not_blamed_before_the_other_has_spoken() -> None:
    # b-2's export ended before the alarm, or covers a tenth of a second after it.
    assert where(part("b-1", 30), part("b-2", 0, certain=0)) is None
    assert where(part("b-1", 30), part("b-2", 1, certain=10)) is None
    assert where(part("b-1", 30), part("b-2", 1, certain=60)) == ("instance", "b-1")


def test_in_the_end_what_is_likelier_is_taken() -> None:
    assert where(part("b-1", 30), part("b-2", 2, certain=12), final=True) == ("service", "b")
    assert where(part("b-1", 30), part("b-2", 0, certain=12), final=True) == ("instance", "b-1")
    assert where(part("b-1", 0), part("b-2", 1), final=True) == ("service", "b")


def test_one_version() -> None:
    parts = [part("b-1", 0), part("b-2", 1), part("b-3", 40, version="v2"), part("b-4", 44, version="v2")]
    assert where(*parts) == ("version", "v2")
    # The only instance of a version is the version: there is no other copy of it to compare with.
    assert where(*parts[:3]) == ("version", "v2")


def test_one_instance_of_one_version() -> None:
    parts = [part("b-1", 0), part("b-3", 40, version="v2"), part("b-4", 0, version="v2")]
    assert where(*parts) == ("instance", "b-3")


def test_a_revision_that_has_never_worked_is_blamed_rather_than_its_first_instance() -> None:
    parts = [part("b-1", 40, revision=2), part("b-2", 0, revision=1)]
    assert where(*parts, unproven={("v1", 2)}) == ("version", "v1")
    assert where(*parts) == ("instance", "b-1")


def test_one_caller() -> None:
    parts = [part("b-1", 25), part("b-2", 20)]
    callers = (part("web", 45, requests=100), part("batch", 0, requests=100))
    assert where(*parts, callers=callers) == ("caller", "web")
    assert where(*parts, callers=(part("web", 20), part("batch", 25))) == ("service", "b")
    # A caller that only seems bad because it calls the bad instance is not to blame.
    assert where(part("b-1", 45), part("b-2", 0), callers=callers) == ("instance", "b-1")


def test_several_bad_instances_are_taken_one_by_one_while_they_are_few() -> None:
    parts = [part("b-1", 30), part("b-2", 60), *(part(f"b-{n}", 0) for n in range(3, 9))]
    assert where(*parts) == ("instance", "b-2")
    assert where(*(part(f"b-{n}", 50 if n < 7 else 0) for n in range(1, 9))) == ("service", "b")


@given(
    seed=st.integers(0, 10_000),
    count=st.integers(2, 12),
    bad_ones=st.integers(1, 12),
    share=st.floats(0.2, 1.0),
)
def test_with_full_seconds_of_everybody_the_answer_is_right(
    seed: int, count: int, bad_ones: int, share: float
) -> None:
    rng = random.Random(seed)
    bad = set(rng.sample(range(count), min(bad_ones, count)))

    def failures(number: int) -> int:
        chance = share if number in bad else 0.002
        return sum(rng.random() < chance for _ in range(200))

    place = localise("b", ALLOWED, [part(f"b-{n}", failures(n), 200, 200) for n in range(count)], [])
    assert place is not None
    if len(bad) == 1 and count > 1:
        assert place.target == f"b-{next(iter(bad))}"
    elif len(bad) == count:
        assert place.scope == "service"
    else:
        assert {int(name.split("-")[1]) for name in place.instances} <= bad
