"""Keeps one program running: start it, notice its death, wait out the backoff, start it again.

A death is noticed through SIGCHLD, so within a millisecond and without polling. The first restart is
immediate; a program that keeps dying is started ever more seldom, until it has lived for a while. What it
prints goes through a pipe into a log of bounded size, whose last lines are kept to explain a failure.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from meshdemo.errors import Failed

log = logging.getLogger(__name__)

_LOG_LIMIT = 1_000_000  # bytes; one older file of this size is kept beside it
_LINE_LIMIT = 8_192
_TAIL = 15
_LAST_CHUNKS = 4  # read after a death at most; more would be a grandchild that goes on printing
_TURN_S = 3.0  # a program that takes longer to be ready is not busy starting but waiting for something
_GIVE_UP_AFTER = 2  # deaths before it was ready once that make it a failure worth telling


@dataclass(frozen=True, slots=True)
class Plan:
    """What to start. `tree`: it may have children of its own, which end with it."""

    command: Sequence[str]
    env: Mapping[str, str]
    cwd: str | None = None
    tree: bool = False


class Backoff:
    """Seconds to wait before the next start: 0 after a stable life, else doubling from 0.2 to 15 s."""

    FIRST_S, LIMIT_S, STABLE_S = 0.2, 15.0, 10.0

    def __init__(self) -> None:
        self._next_s = 0.0

    def after(self, lived_s: float) -> float:
        """The wait after a life of `lived_s` seconds."""
        if lived_s >= self.STABLE_S:
            self._next_s = 0.0
        wait_s = self._next_s
        self._next_s = min(max(self.FIRST_S, wait_s * 2), self.LIMIT_S)
        return wait_s


class BoundedLog:
    """A log that keeps its last megabytes. Each line carries the time at which it came.

    A disk that is full loses lines, nothing else.
    """

    def __init__(self, path: Path, limit: int = _LOG_LIMIT) -> None:
        self._path = path
        self._limit = limit
        self._file: IO[bytes] | None = None
        self._size = 0
        self._partial = b""
        self.tail: deque[str] = deque(maxlen=_TAIL)

    def write(self, chunk: bytes) -> None:
        """Add what a program printed; lines are taken when they are complete."""
        *lines, self._partial = (self._partial + chunk).split(b"\n")
        if len(self._partial) > _LINE_LIMIT:
            lines.append(self._partial)
            self._partial = b""
        if not lines:
            return
        stamp = f"{time.time():.3f} ".encode()
        self.tail.extend(line.decode("utf-8", "replace") for line in lines[-_TAIL:])
        with suppress(OSError):
            self._append(b"".join(stamp + line[:_LINE_LIMIT] + b"\n" for line in lines))

    def _append(self, text: bytes) -> None:
        if self._file is None or self._size > self._limit:
            self._rotate()
        assert self._file is not None
        self._file.write(text)
        self._size += len(text)

    def _rotate(self) -> None:
        if self._file is not None:
            self.close()
            self._path.replace(self._path.with_name(self._path.name + ".1"))
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._file = os.fdopen(descriptor, "ab", buffering=0)
        self._size = os.fstat(descriptor).st_size

    def close(self) -> None:
        """Close the file; a later write opens it again."""
        if self._file is not None:
            self._file.close()
            self._file = None


class Changes:
    """Lets tasks wait until something is so, looking again whenever anything has changed."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        """Something has changed."""
        event, self._event = self._event, asyncio.Event()
        event.set()

    async def until(self, condition: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Wait until the condition holds; False if the time ran out first."""
        try:
            async with asyncio.timeout(timeout_s):
                while not condition():
                    await self._event.wait()
        except TimeoutError:
            return False
        return True


class Reaper:
    """Hears of the death of children through SIGCHLD."""

    def __init__(self) -> None:
        self._living: dict[subprocess.Popen[bytes], asyncio.Future[int]] = {}
        asyncio.get_running_loop().add_signal_handler(signal.SIGCHLD, self._reap)

    def watch(self, process: subprocess.Popen[bytes]) -> asyncio.Future[int]:
        """A future of the child's exit status (negative: the signal that ended it)."""
        exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._living[process] = exited
        self._reap()  # it may be dead already
        return exited

    def _reap(self) -> None:
        for process, exited in list(self._living.items()):
            if (status := process.poll()) is not None:
                del self._living[process]
                if not exited.done():
                    exited.set_result(status)


class _Turn:
    """One place among those who start at the same time, for as long as starting should take."""

    def __init__(self, gate: asyncio.Semaphore | None) -> None:
        self._gate = gate
        self._timer: asyncio.TimerHandle | None = None

    async def take(self) -> None:
        """Wait for a place."""
        if self._gate is not None:
            await self._gate.acquire()
            self._timer = asyncio.get_running_loop().call_later(_TURN_S, self.end)

    def end(self) -> None:
        """Give it back, if that has not been done yet."""
        if self._gate is not None and self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._gate.release()


class Keeper:
    """Keeps one program running.

    Args:
        name: for logs and messages.
        plan: what to start; asked anew before each start, so that a changed port takes effect.
        probe: whether it is ready; polled from its start until it says yes, once.
        changed: called whenever it became ready, or died.
        died: told its name and how it ended, if it was not told to.
        port_lost: asked after a death: did it fail for a port, and was another one chosen? Then it is
            started again at once.
        gate: passed while it starts, so that not too many do at the same time.
    """

    def __init__(
        self,
        name: str,
        plan: Callable[[], Plan],
        *,
        output: BoundedLog,
        reaper: Reaper,
        probe: Callable[[], Awaitable[bool]],
        changed: Callable[[], None],
        died: Callable[[str, str], None],
        port_lost: Callable[[], bool] = lambda: False,
        gate: asyncio.Semaphore | None = None,
    ) -> None:
        self.name = name
        self.output = output
        self.ready = False
        self.starts = 0
        self.failures = 0  # deaths since it was last ready
        self.deaths = 0  # that nobody asked for here
        self.last_exit = ""
        self._plan = plan
        self._reaper = reaper
        self._probe = probe
        self._changed = changed
        self._died = died
        self._port_lost = port_lost
        self._turn = _Turn(gate)
        self._backoff = Backoff()
        self._process: subprocess.Popen[bytes] | None = None
        self._exited: asyncio.Future[int] | None = None
        self._tree = False
        self._ending = self._replacing = False
        self._hurry = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Its process id while it runs."""
        return self._process.pid if self._process is not None else None

    @property
    def failed(self) -> bool:
        """Whether it died repeatedly without having been ready."""
        return self.failures >= _GIVE_UP_AFTER

    def failure(self) -> Failed:
        """Why it does not run, with what it said last."""
        said = "\n".join(f"    {line}" for line in self.output.tail if line.strip())
        silent = "it said nothing: is it the right command? `meshdemo check` looks for what is missing"
        return Failed(
            f"{self.name} does not start: {self.last_exit or 'it is not ready in time'}",
            f"it said:\n{said}" if said else silent,
        )

    def start(self) -> None:
        """Start it and keep it running until `stop`."""
        self._task = asyncio.get_running_loop().create_task(self._keep(), name=self.name)

    async def stop(self, grace_s: float) -> None:
        """End it: SIGTERM, and SIGKILL for what is still there after `grace_s` seconds."""
        self._ending = True
        self._hurry.set()
        if self._process is not None and self._exited is not None:
            tree = _descendants(self._process.pid) if self._tree else []
            if grace_s <= 0 or self.hung():
                self._process.kill()
            else:
                self._process.terminate()
                await asyncio.wait([self._exited], timeout=grace_s)
                if not self._exited.done():
                    self._process.kill()
            for process in tree:
                with suppress(psutil.Error):
                    process.kill()
        if self._task is not None:
            await self._task

    def signal(self, number: signal.Signals) -> None:
        """Send a signal. Raises Failed if it does not run."""
        if self._process is None or self._process.poll() is not None:
            raise Failed(f"{self.name} is not running", "it is being restarted; try again in a moment")
        self._process.send_signal(number)

    def hung(self) -> bool:
        """Whether its process is stopped (SIGSTOP), by us or by anybody."""
        if self._process is None:
            return False
        try:
            return psutil.Process(self._process.pid).status() == psutil.STATUS_STOPPED
        except psutil.Error:
            return False

    def replace(self) -> None:
        """Kill it and start it again at once, whatever the backoff says."""
        self.ready = False
        self.failures = 0
        self._hurry.set()
        if self._process is not None and self._process.poll() is None:
            self._replacing = True
            self._process.kill()
        self._changed()

    async def _keep(self) -> None:
        while not self._ending:
            self._hurry.clear()
            self.starts += 1
            started = time.monotonic()
            try:
                self.last_exit = _in_words(await self._live())
            except OSError as error:  # no such program, no more processes, a full disk
                program = f"{error.filename}: " if error.filename else ""
                self.last_exit = f"{program}{error.strerror or error}"
            except Exception as error:
                log.exception("cannot start %s", self.name)
                self.last_exit = f"{type(error).__name__}: {error}"
            self.ready = False
            self.failures += 1
            if self._ending:
                break
            self.deaths += not self._replacing
            self._replacing = False
            self._changed()
            self._died(self.name, self.last_exit)
            if not self._port_lost():
                wait_s = self._backoff.after(time.monotonic() - started)
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._hurry.wait(), wait_s)
        self.output.close()
        self._changed()

    async def _live(self) -> int:
        """One life, from start to death: its exit status."""
        await self._turn.take()
        try:
            return -signal.SIGTERM if self._ending else await self._live_now()
        finally:
            self._turn.end()

    async def _live_now(self) -> int:
        plan = self._plan()
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        try:
            process = subprocess.Popen(  # noqa: ASYNC220 - takes a millisecond, and SIGCHLD tells of its end
                plan.command, env=plan.env, cwd=plan.cwd,
                stdin=subprocess.DEVNULL, stdout=writing, stderr=writing,
            )  # fmt: skip
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        loop = asyncio.get_running_loop()
        loop.add_reader(reading, self._read, reading)
        self._process, self._tree = process, plan.tree
        self._exited = self._reaper.watch(process)
        probing = loop.create_task(self._await_ready())
        try:
            return await self._exited
        finally:
            probing.cancel()
            self._process = None
            self._read(reading, _LAST_CHUNKS)
            loop.remove_reader(reading)
            os.close(reading)

    async def _await_ready(self) -> None:
        wait_s = 0.02
        while not await self._probe():
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 1.05, 0.5)
        if self._exited is not None and not self._exited.done():
            self._turn.end()
            self.ready = True
            self.failures = 0
            self._changed()

    def _read(self, descriptor: int, chunks: int = 1) -> None:
        with suppress(BlockingIOError):
            for _ in range(chunks):
                if not (chunk := os.read(descriptor, 65536)):
                    asyncio.get_running_loop().remove_reader(descriptor)  # nobody is left who could write
                    return
                self.output.write(chunk)


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def _in_words(status: int) -> str:
    if status < 0:
        try:
            return f"killed by {signal.Signals(-status).name}"
        except ValueError:
            return f"killed by signal {-status}"
    return f"exit status {status}"
