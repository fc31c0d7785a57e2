"""Steps: order, concurrency, what is undone when, and that waiting ends at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress

import pytest

from meshdemo.errors import Failed
from meshdemo.runtime.base import Step
from meshdemo.runtime.steps import Cancelled, pause, run_steps


class Book:
    """Notes what happens, in order."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def writes(self, line: str) -> Callable[[], None]:
        return lambda: self.lines.append(line)

    def step(self, title: str, *after: str, undo: bool = True) -> Step:
        return Step(title, self.writes(title), self.writes(f"undo {title}") if undo else None, after)


def _raises(error: BaseException) -> Callable[[], None]:
    def run() -> None:
        raise error

    return run


def test_steps_run_after_what_they_name() -> None:
    book = Book()
    seconds = run_steps([book.step("c", "b"), book.step("a"), book.step("b", "a")])
    assert book.lines == ["a", "b", "c"]
    assert seconds.keys() == {"a", "b", "c"}


def test_independent_steps_run_at_the_same_time() -> None:
    both = threading.Barrier(2, timeout=20)
    run_steps([Step("a", lambda: void(both.wait())), Step("b", lambda: void(both.wait()))])


def void(_: object) -> None:
    """Makes a callable of no result out of one that has one."""


def test_failure_undoes_what_was_started_the_last_first() -> None:
    book = Book()
    steps = [
        book.step("a"),
        book.step("b", "a"),
        Step("bad", _raises(Failed("no")), book.writes("undo bad"), ["b"]),
        book.step("never", "bad"),
    ]
    with pytest.raises(Failed, match="no"):
        run_steps(steps)
    assert book.lines == ["a", "b", "undo bad", "undo b", "undo a"]


def test_a_waiting_step_is_told_to_give_up_before_the_undoing() -> None:
    book = Book()
    waiting = threading.Event()

    def wait() -> None:
        waiting.set()
        try:
            pause(600)
        except Cancelled:
            book.lines.append("gave up")
            raise

    def fail() -> None:
        assert waiting.wait(20)
        raise Failed("no")

    started = time.monotonic()
    with pytest.raises(Failed):
        run_steps([Step("waits", wait, book.writes("undo waits")), Step("fails", fail)])
    assert book.lines == ["gave up", "undo waits"]
    assert time.monotonic() - started < 20


def test_a_step_is_waited_for_as_long_as_it_may_take_to_give_up() -> None:
    book, over = Book(), threading.Event()

    def clean_up() -> None:
        with suppress(Cancelled):
            pause(600)
        assert deaf_is_given_up.wait(20)
        book.lines.append("cleaned up")

    deaf_is_given_up = threading.Event()
    threading.Timer(1.0, deaf_is_given_up.set).start()
    deaf = Step("deaf", lambda: void(over.wait(20)), settle_s=0.1)
    try:
        with pytest.raises(Failed, match="no"):
            run_steps([deaf, Step("cleans up", clean_up, settle_s=20), Step("fails", _raises(Failed("no")))])
    finally:
        over.set()
    assert book.lines == ["cleaned up"]


def test_keyboard_interrupt_undoes_too() -> None:
    book = Book()
    with pytest.raises(KeyboardInterrupt):
        run_steps([book.step("a"), Step("interrupted", _raises(KeyboardInterrupt()), after=["a"])])
    assert book.lines == ["a", "undo a"]


def test_an_undo_that_fails_is_told_and_the_others_still_run() -> None:
    book = Book()
    steps = [
        book.step("a"),
        Step("b", book.writes("b"), _raises(OSError("disk")), ["a"]),
        Step("bad", _raises(Failed("no", "try")), after=["b"]),
    ]
    with pytest.raises(Failed, match="no; undoing 'b' failed: disk") as caught:
        run_steps(steps)
    assert "meshdemo down" in caught.value.remedy
    assert book.lines == ["a", "b", "undo a"]


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([Step("a", print, after=["nowhere"])], "no steps"),
        ([Step("a", print, after=["b"]), Step("b", print, after=["a"])], "each other"),
        ([Step("a", print), Step("a", print)], "same title"),
    ],
)
def test_steps_that_make_no_sense(steps: list[Step], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run_steps(steps)


def test_the_status_lines_say_how_each_step_ended() -> None:
    import io

    from rich.console import Console

    book = Book()
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True, no_color=True)
    with pytest.raises(Failed):
        run_steps([book.step("first"), Step("second", _raises(Failed("no")), after=["first"])], console)
    final = out.getvalue().rsplit("first", 1)
    assert "↩" in out.getvalue()
    assert "✗ second" in final[1]


def test_pause_outside_of_a_run_just_sleeps() -> None:
    pause(0)


def test_when_the_time_is_over_it_says_what_was_being_done() -> None:
    """Also of a step that does not listen: whoever waits for `up` gets an answer."""
    book, over = Book(), threading.Event()
    deaf = Step(
        "deaf", lambda: void(over.wait(20)), book.writes("undo deaf"), detail=lambda: "asking somebody"
    )
    try:
        with pytest.raises(
            Failed, match=r"after 0\.1 s ('a' is not done and )?'deaf' is not done \(asking somebody\)"
        ) as caught:
            run_steps([book.step("a"), deaf], timeout_s=0.1)
    finally:
        over.set()
    assert "--timeout" in caught.value.remedy
    assert book.lines == ["a", "undo deaf", "undo a"]
