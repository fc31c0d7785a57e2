"""The supervisor: one background process for each local mesh, parent of everything that runs in it.

It reads what must run (spec.json), starts all of it at once, restarts what dies (fleet.py), tells the control
plane of every change (instances.json, and a poke: publisher.py), rolls out new revisions (rollout.py), and
ends faults when their time is up. It does what LocalRuntime asks of it (operations.py) over a Unix socket
(api.py).

All of it runs on one asyncio loop; what would block (the control plane's client) is given to a thread.
Started as `python -m meshdemo.runtime.local.supervisor --state DIR`, in a session of its own; prints `ready`
once it can be spoken to, or an error as JSON if it cannot start.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from meshdemo.errors import MeshdemoError
from meshdemo.runtime.local import api
from meshdemo.runtime.local.fleet import Fleet
from meshdemo.runtime.local.keeper import BoundedLog
from meshdemo.runtime.local.operations import Operations
from meshdemo.runtime.local.paths import MeshPaths
from meshdemo.runtime.local.rollout import Rollouts
from meshdemo.runtime.local.spec import MeshSpec

log = logging.getLogger(__name__)

_SHUTDOWN_GRACE_S = 1.0
_EXPIRY_S = 30.0  # the end of a fault is rolled out within this time, or tried again
_FILES = 65_536


class Supervisor:
    """The life of one mesh, from its start to its end."""

    def __init__(self, paths: MeshPaths, spec: MeshSpec) -> None:
        self._paths = paths
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stopping = asyncio.Event()
        self._guard: subprocess.Popen[bytes] | None = None
        self._fleet = Fleet(paths, spec)
        self._operations = Operations(
            self._fleet,
            Rollouts(self._fleet, self._spawn),
            end=self._stopping.set,
            guard_pid=lambda: self._guard.pid if self._guard else None,
        )

    async def run(self) -> None:
        """Start everything, serve until told to stop, stop everything."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._stopping.set)
        self._start_guard()
        self._fleet.start()
        self._spawn(self._fleet.publisher.run())
        self._spawn(self._end_faults())
        self._spawn(self._fleet.start_sidecars())
        self._spawn(self._fleet.begin_load())
        server = await api.listen(self._operations, self._paths.api)
        _say("ready")
        await self._stopping.wait()
        log.info("stopping")
        server.close()
        await self._stop()

    async def _stop(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await self._fleet.stop(_SHUTDOWN_GRACE_S)
        self._paths.api.unlink(missing_ok=True)
        with suppress(OSError):
            self._paths.sockets.rmdir()  # `up` makes it again; the state is `down`'s to remove
        if self._guard is not None:
            # Not through the pipe's end, at which it would kill us too.
            self._guard.kill()
            self._guard.wait()

    def _start_guard(self) -> None:
        module = "meshdemo.runtime.local.guard"
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, str(os.getpgrp()), str(self._paths.state)],
            stdin=subprocess.PIPE, env=self._fleet.environ, cwd="/", start_new_session=True,
        )  # fmt: skip
        self._guard = process
        self._fleet.reaper.watch(process).add_done_callback(lambda _: self._guard_ended(process))

    def _guard_ended(self, process: subprocess.Popen[bytes]) -> None:
        if process.stdin is not None:
            process.stdin.close()
        if not self._stopping.is_set():
            log.warning("the guard ended; starting another one")
            self._start_guard()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s", error, exc_info=error)

    async def _end_faults(self) -> None:
        """End faults when their time is over."""
        while True:
            ends = self._fleet.spec.ends()
            fault_id = min(ends, key=ends.__getitem__, default=None)
            left = None if fault_id is None else ends[fault_id] - time.time()
            if fault_id is not None and left is not None and left <= 0:
                try:
                    await self._operations.end_faults([fault_id], f"end of fault {fault_id}", _EXPIRY_S)
                    await self._fleet.control.forget_fault(fault_id)
                except MeshdemoError as error:
                    log.error("cannot end fault %s: %s", fault_id, error)
                    await asyncio.sleep(1)
                continue
            await self._fleet.changes.until(partial(self._other_ends_than, ends), left)

    def _other_ends_than(self, ends: Mapping[str, float]) -> bool:
        return self._fleet.spec.ends() != ends


def _say(line: str) -> None:
    """Tell whoever started us, if they are still there, and let go of them."""
    with suppress(OSError):
        os.write(1, line.encode() + b"\n")
    os.dup2(2, 1)


class _LogHandler(logging.Handler):
    """The supervisor's own log, bounded like those of its children."""

    def __init__(self, output: BoundedLog) -> None:
        super().__init__()
        self._output = output

    def emit(self, record: logging.LogRecord) -> None:
        self._output.write(self.format(record).encode() + b"\n")


def _raise_file_limit() -> None:
    """Each instance takes some file descriptors of ours, and common soft limits (256, 1024) are low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def main() -> None:
    """Run the supervisor of the mesh in `--state`."""
    parser = argparse.ArgumentParser(description="The supervisor of a local mesh; started by `meshdemo up`.")
    parser.add_argument("--state", type=Path, required=True)
    paths = MeshPaths(parser.parse_args().state)
    _raise_file_limit()
    handler = _LogHandler(BoundedLog(paths.logs / "supervisor.log"))
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO, handlers=[handler])
    spec = MeshSpec.model_validate_json(paths.spec.read_text())

    async def serve() -> None:
        await Supervisor(paths, spec).run()

    try:
        asyncio.run(serve())
    except MeshdemoError as error:
        _say(json.dumps(api.refusal(error)))
    except OSError as error:
        message = f"{error.filename or paths.state}: {error.strerror or error}"
        _say(json.dumps({"error": message, "remedy": "see `meshdemo check`", "exit_status": 1}))


if __name__ == "__main__":
    main()
