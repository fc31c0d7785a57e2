"""Where a run of the benchmark plays: one folder, and every process and mesh that is started in it.

All of it is gone when the stage closes, be it at the end, by Ctrl-C or because the benchmark was killed (see
`guard`). Meshes of the stage have a home of their own: those of the user are neither seen nor touched.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jinja2
import psutil

from meshdemo.bench.guard import MARK
from meshdemo.errors import Failed, MeshdemoError
from meshdemo.resources import TEMPLATES
from meshdemo.runtime.local.ports import Port

if TYPE_CHECKING:
    from meshdemo.apps.model import App
    from meshdemo.runtime.base import Runtime
    from meshdemo.runtime.local.runtime import LocalRuntime

_T = TypeVar("_T")
_LOOK_S = 0.02
_PATIENCE_S = 60.0
_END_S = 30.0
_LAST_LINES = 5

TROUBLE = (MeshdemoError, OSError, subprocess.SubprocessError, psutil.Error, HTTPException)
"""What may go wrong with what is measured: a process that ends, a request without an answer, a time-out."""

Tell = Callable[[str], None]
"""Takes one line on what is being measured right now."""


class Process:
    """A program that was started on a stage."""

    def __init__(self, name: str, popen: subprocess.Popen[bytes], log: Path) -> None:
        self.name = name
        self.popen = popen
        self._log = log

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.popen.pid

    def stop(self, grace_s: float = 5.0) -> None:
        """End it: SIGTERM, and SIGKILL if that takes too long."""
        if self.popen.poll() is None:
            self.popen.terminate()
            try:
                self.popen.wait(grace_s)
            except subprocess.TimeoutExpired:
                self.kill()
        self.popen.wait()

    def kill(self) -> None:
        """End it with SIGKILL, and its children with it."""
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()

    def check(self) -> None:
        """Raise Failed with its last words if it has ended."""
        if self.popen.poll() is not None:
            raise Failed(f"{self.name} has ended with status {self.popen.returncode}: {self.last_words()}")

    def listens(self, port: int) -> bool:
        """Whether something accepts connections on a port of loopback. Raises Failed if this has ended."""
        self.check()
        return listens(port)

    def last_words(self) -> str:
        """The end of what it said."""
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return " | ".join(lines[-_LAST_LINES:]) or "it said nothing"


class Stage:
    """Starts things and keeps them together. Use it as a context."""

    def __init__(self) -> None:
        self.folder = Path()
        self._mark = secrets.token_hex(8)
        self._before: dict[str, str | None] = {}
        self._guard: subprocess.Popen[bytes] | None = None
        self._started: list[Process] = []
        self._ports: list[Port] = []
        self._number = 0

    def __enter__(self) -> Stage:
        self.folder = Path(tempfile.mkdtemp(prefix="mb"))  # short: Unix sockets lie below it
        for name, value in (
            (MARK, self._mark),
            ("MESHDEMO_HOME", str(self.folder / "home")),
        ):
            self._before[name] = os.environ.get(name)
            os.environ[name] = value
        self._guard = subprocess.Popen(
            [sys.executable, "-P", "-m", "meshdemo.bench.guard", self._mark, str(self.folder)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True, cwd="/",
        )  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        with uninterrupted():
            try:
                assert self._guard is not None and self._guard.stdin is not None
                self._guard.stdin.close()
                with suppress(subprocess.TimeoutExpired):
                    self._guard.wait(_END_S)
                for process in self._started:
                    with suppress(subprocess.TimeoutExpired):
                        process.popen.wait(1.0)
            finally:
                for port in self._ports:
                    port.release()
                for name, value in self._before.items():
                    if value is None:
                        os.environ.pop(name, None)
                    else:
                        os.environ[name] = value

    # -- files and ports -----------------------------------------------------------------------------------

    def path(self, name: str) -> Path:
        """A path for a new file or folder on the stage, different each time."""
        self._number += 1
        return self.folder / f"{self._number}-{name}"

    def port(self) -> int:
        """A port of loopback for a server, given to nobody else while the stage stands."""
        port = Port()
        self._ports.append(port)
        return port.number

    def render(self, template: str, **values: Any) -> Path:
        """A template of `templates/bench` as a file."""
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(TEMPLATES / "bench"),
            undefined=jinja2.StrictUndefined,
            keep_trailing_newline=True,
            autoescape=False,  # noqa: S701 (configuration files, not HTML)
        )
        path = self.path(template.removesuffix(".j2"))
        path.write_text(environment.get_template(template).render(values))
        return path

    # -- processes -----------------------------------------------------------------------------------------

    def start(
        self, name: str, command: Sequence[str | Path], *, env: Mapping[str, str] | None = None,
        stdout: int | None = None, together: bool = False,
    ) -> Process:  # fmt: skip
        """Start a program in a process group of its own.

        Args:
            env: variables on top of this process's own.
            stdout: where it goes (`subprocess.PIPE`); default: with stderr into a log.
            together: in one session with others that are started so. Linux shares the processors between
                sessions first (sched_autogroup), and what is compared should get the same share.
        """
        log = self.path(f"{name}.log")
        with log.open("wb") as file:
            popen = subprocess.Popen(
                [str(part) for part in command], stdin=subprocess.DEVNULL,
                stdout=file if stdout is None else stdout, stderr=file,
                env={**os.environ, **(env or {})}, start_new_session=not together,
                process_group=0 if together else None,
            )  # fmt: skip
        process = Process(name, popen, log)
        self._started.append(process)
        return process

    @contextmanager
    def running(
        self, name: str, command: Sequence[str | Path], *, port: int | None = None, **how: Any
    ) -> Iterator[Process]:
        """A program for a block, from when it listens on `port`; killed afterwards."""
        process = self.start(name, command, **how)
        try:
            if port is not None:
                until(f"{name} to listen", lambda: process.listens(port))
            yield process
        finally:
            process.kill()

    # -- meshes --------------------------------------------------------------------------------------------

    @contextmanager
    def mesh(
        self, app: App, *, rps: float | None = None, replicas: Mapping[str, int] | None = None
    ) -> Iterator[LocalRuntime]:
        """A local mesh for a block: brought up by the steps that `meshdemo up` takes."""
        from meshdemo.runtime.base import UpOptions
        from meshdemo.runtime.local.runtime import LocalRuntime
        from meshdemo.runtime.steps import run_steps

        self._number += 1
        runtime = LocalRuntime(f"bench-{self._number}")
        options = UpOptions(
            name=runtime.name, app=app, rps=rps, replicas=dict(replicas or {}),
            extra={"cwd": str(self.folder)},
        )  # fmt: skip
        try:
            run_steps(runtime.steps(options))
            yield runtime
        finally:
            runtime.down()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """No signal ends the block: a second Ctrl-C would only leave half of what was made behind."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def process_ids(runtime: LocalRuntime) -> dict[str, int]:
    """The processes of a mesh, by the names that its supervisor gives them."""
    from meshdemo.runtime.local.client import SupervisorClient

    description = SupervisorClient(runtime.paths).call("describe")
    return {one["name"]: one["pid"] for one in description["processes"]}


def command(runtime: Runtime, *arguments: str) -> list[str]:
    """The command line of `meshdemo` for a mesh."""
    return [sys.executable, "-P", "-m", "meshdemo", "--name", runtime.name, *arguments]


def ask(runtime: LocalRuntime, *arguments: str) -> Any:
    """What a command of `meshdemo` says with `-o json`. Raises Failed with its complaint if it fails."""
    what = f"`meshdemo {' '.join(arguments)}`"
    try:
        done = subprocess.run(
            command(runtime, *arguments, "-o", "json"), capture_output=True, text=True, check=False,
            timeout=_PATIENCE_S, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Failed(f"{what} did not end within {_PATIENCE_S:g} s") from None
    if done.returncode:
        raise Failed(f"{what} failed: {' '.join(done.stderr.split())}")
    return json.loads(done.stdout)


class InVain(Failed):
    """What was waited for did not come in time."""


@contextmanager
def attempt(what: str, failures: list[str]) -> Iterator[None]:
    """A measurement that may fail without taking those before it along: it is noted as left out."""
    try:
        yield
    except TROUBLE as error:
        failures.append(f"not measured: {what}: {error}")


def until(what: str, condition: Callable[[], _T], patience_s: float = _PATIENCE_S) -> _T:
    """Wait for a true value of a condition; that value. Raises InVain if there is none in time."""
    give_up = time.monotonic() + patience_s
    while not (value := condition()):
        if time.monotonic() > give_up:
            raise InVain(f"waited {patience_s:g} s in vain for {what}")
        time.sleep(_LOOK_S)
    return value


def listens(port: int) -> bool:
    """Whether something accepts connections on a port of loopback."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0
