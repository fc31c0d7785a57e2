"""Keeping a program running, with real processes: restarts, backoff, failure, lost ports, stopping, output."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from meshdemo.errors import Failed
from meshdemo.runtime.local import keeper
from meshdemo.runtime.local.keeper import Backoff, BoundedLog, Changes, Keeper, Plan, Reaper

PATIENCE_S = 30.0


async def _yes() -> bool:
    return True


class Bench:
    """A keeper of a small Python program, and what it needs."""

    def __init__(
        self,
        folder: Path,
        code: str,
        *,
        probe: Callable[[], Awaitable[bool]] = _yes,
        port_lost: Callable[[], bool] = lambda: False,
        tree: bool = False,
        command: list[str] | None = None,
        gate: asyncio.Semaphore | None = None,
        reaper: Reaper | None = None,
    ) -> None:
        self.reaper = reaper or Reaper()
        self.changes = Changes()
        self.deaths: list[str] = []
        self.keeper = Keeper(
            "it",
            lambda: Plan(command or [sys.executable, "-c", code], {"PATH": "/usr/bin:/bin"}, tree=tree),
            output=BoundedLog(folder / "it.log"),
            reaper=self.reaper,
            probe=probe,
            changed=self.changes.notify,
            died=lambda _, how: self.deaths.append(how),
            port_lost=port_lost,
            gate=gate,
        )
        self.keeper.start()

    async def until(self, condition: Callable[[], bool]) -> None:
        assert await self.changes.until(condition, PATIENCE_S)

    async def said(self, line: str) -> None:
        await _eventually(lambda: line in self.keeper.output.tail)


async def _eventually(condition: Callable[[], bool]) -> None:
    """For what no event tells of."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


SLEEP = "import time; print('here', flush=True); time.sleep(600)"


def test_a_killed_program_is_started_again_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        bench = Bench(tmp_path, SLEEP)
        await bench.until(lambda: bench.keeper.ready)
        first = bench.keeper.pid
        bench.keeper.signal(signal.SIGKILL)
        await bench.until(lambda: not bench.keeper.ready)
        assert bench.keeper.last_exit == "killed by SIGKILL"
        await bench.until(lambda: bench.keeper.ready)
        assert bench.keeper.pid != first
        assert not bench.keeper.failed
        await bench.keeper.stop(5)
        assert bench.keeper.pid is None
        assert bench.deaths == ["killed by SIGKILL"], "an ordered end is no death"

    asyncio.run(scenario())


def test_a_program_that_keeps_dying_is_a_failure_with_its_last_words(tmp_path: Path) -> None:
    async def never() -> bool:
        return False

    async def scenario() -> None:
        bench = Bench(tmp_path, "print('bad LAT_MS'); raise SystemExit(2)", probe=never)
        await bench.until(lambda: bench.keeper.failed)
        failure = bench.keeper.failure()
        assert "exit status 2" in failure.message
        assert "bad LAT_MS" in failure.remedy
        await bench.keeper.stop(5)

    asyncio.run(scenario())


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    async def scenario() -> None:
        bench = Bench(tmp_path, "", command=[str(tmp_path / "nowhere")])
        await bench.until(lambda: bench.keeper.failed)
        assert "nowhere: No such file" in bench.keeper.failure().message
        with pytest.raises(Failed, match="not running"):
            bench.keeper.signal(signal.SIGKILL)
        await bench.keeper.stop(5)

    asyncio.run(scenario())


def test_replacing_does_not_wait_for_the_backoff(tmp_path: Path) -> None:
    async def scenario() -> None:
        bench = Bench(tmp_path, "raise SystemExit(1)", probe=lambda: asyncio.sleep(600, False))
        await bench.until(lambda: bench.keeper.starts >= 4)  # the next wait is a long one
        starts, began = bench.keeper.starts, time.monotonic()
        bench.keeper.replace()
        await bench.until(lambda: bench.keeper.starts > starts)
        assert time.monotonic() - began < Backoff.LIMIT_S
        await bench.keeper.stop(0)

    asyncio.run(scenario())


def test_a_lost_port_is_no_reason_to_wait(tmp_path: Path) -> None:
    lost = iter([True] * 10)

    async def scenario() -> None:
        bench = Bench(
            tmp_path, "raise SystemExit(1)", probe=lambda: asyncio.sleep(600, False),
            port_lost=lambda: next(lost, False),
        )  # fmt: skip
        await bench.until(lambda: bench.keeper.starts >= 11)
        await bench.keeper.stop(0)

    asyncio.run(scenario())


def test_one_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    code = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}"

    async def scenario() -> None:
        bench = Bench(tmp_path, code)
        await bench.said("here")
        await bench.keeper.stop(0.1)
        assert bench.keeper.last_exit == "killed by SIGKILL"

    asyncio.run(scenario())


def test_a_stopped_one_is_hung_and_killed_without_grace(tmp_path: Path) -> None:
    async def scenario() -> None:
        bench = Bench(tmp_path, SLEEP)
        await bench.said("here")
        assert not bench.keeper.hung()
        bench.keeper.signal(signal.SIGSTOP)
        await _eventually(bench.keeper.hung)
        await asyncio.wait_for(bench.keeper.stop(600), PATIENCE_S)

    asyncio.run(scenario())


def test_children_of_a_users_program_end_with_it(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True);"
        "time.sleep(600)"
    )

    async def scenario() -> int:
        bench = Bench(tmp_path, code, tree=True)
        await _eventually(lambda: bool(bench.keeper.output.tail))
        child = int(bench.keeper.output.tail[0])
        await bench.keeper.stop(5)
        return child

    child = asyncio.run(scenario())
    give_up = time.monotonic() + PATIENCE_S
    with suppress(psutil.NoSuchProcess):
        while psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < give_up
            time.sleep(0.01)


def test_all_output_is_read_also_that_of_the_last_moment(tmp_path: Path) -> None:
    async def scenario() -> None:
        code = "import sys; sys.stdout.write('x\\n' * 20000); print('the end'); raise SystemExit(3)"
        bench = Bench(tmp_path, code, probe=lambda: asyncio.sleep(600, False))
        await bench.until(lambda: bench.keeper.failures >= 1)
        assert bench.keeper.output.tail[-1] == "the end"
        await bench.keeper.stop(0)

    asyncio.run(scenario())


def test_programs_take_turns_to_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "_TURN_S", 600.0)  # a loaded machine takes longer than a turn may last

    async def scenario() -> None:
        gate = asyncio.Semaphore(1)
        ready = asyncio.Event()

        async def when_told() -> bool:
            return ready.is_set()

        first = Bench(tmp_path, SLEEP, probe=when_told, gate=gate)
        await first.said("here")
        second, third = (Bench(tmp_path, SLEEP, gate=gate, reaper=first.reaper) for _ in range(2))
        await asyncio.sleep(0.1)
        assert second.keeper.pid is third.keeper.pid is None
        ready.set()
        await second.until(lambda: second.keeper.ready)
        for bench in (first, second, third):
            await bench.keeper.stop(5)
            assert bench.keeper.pid is None

    asyncio.run(scenario())


def test_one_that_waits_for_its_turn_can_be_stopped(tmp_path: Path) -> None:
    async def scenario() -> None:
        gate = asyncio.Semaphore(1)
        await gate.acquire()
        bench = Bench(tmp_path, SLEEP, gate=gate)
        await asyncio.sleep(0.05)
        stopping = asyncio.create_task(bench.keeper.stop(5))
        await asyncio.sleep(0.05)
        gate.release()
        await asyncio.wait_for(stopping, PATIENCE_S)
        assert not bench.keeper.output.tail, "it was never started"

    asyncio.run(scenario())


def test_the_backoff_doubles_and_forgets() -> None:
    backoff = Backoff()
    waits = [backoff.after(0.5) for _ in range(10)]
    assert waits[:4] == [0.0, 0.2, 0.4, 0.8]
    assert waits[-1] == Backoff.LIMIT_S
    assert backoff.after(Backoff.STABLE_S) == 0.0
    assert backoff.after(0.5) == 0.2


def test_waiting_for_a_change_ends_in_time() -> None:
    async def scenario() -> None:
        changes = Changes()
        assert not await changes.until(lambda: False, 0.01)
        assert await changes.until(lambda: True, 0.01)

    asyncio.run(scenario())
