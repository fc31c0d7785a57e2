"""Drives the command line against real local meshes: real Envoys, real workloads, each home in a folder of its
own. Waits are for conditions; the deadline only bounds a test that has failed."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import psutil

from meshdemo.runtime.local.leftovers import find
from meshdemo.runtime.local.paths import MeshPaths

T = TypeVar("T")
DEADLINE_S = 60.0


def wait_for(what: str, condition: Callable[[], T], deadline_s: float = DEADLINE_S) -> T:
    """What the condition gives once it is true; fails the test if it never is."""
    give_up = time.monotonic() + deadline_s
    problem: object = None
    while time.monotonic() < give_up:
        try:
            if found := condition():
                return found
            problem = found
        except Exception as error:
            problem = error
        time.sleep(0.02)
    raise AssertionError(f"not so after {deadline_s:g} s: {what} (last: {problem!r})")


class Cli:
    """The command line, with a home and a mesh of its own."""

    deadline_s = DEADLINE_S

    def __init__(self, home: Path, name: str = "mesh-demo") -> None:
        self.home = home.resolve()
        self.name = name
        self.paths = MeshPaths(self.home / name)
        self.env = {**os.environ, "MESHDEMO_HOME": str(self.home), "NO_COLOR": "1"}

    def start(self, *arguments: str, stdout: int = subprocess.PIPE, **env: str) -> subprocess.Popen[str]:
        """Start a command and do not wait for it."""
        return subprocess.Popen(
            [sys.executable, "-m", "meshdemo", "--name", self.name, *arguments],
            env={**self.env, **env}, stdout=stdout, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, *arguments: str, status: int | None = 0, **env: str) -> str:
        """stdout of a command that ends with this status (None: any), or stderr of one that fails."""
        process = self.start(*arguments, **env)
        try:
            out, err = process.communicate(timeout=self.deadline_s * 2)
        except BaseException:
            process.kill()
            raise
        assert status is None or process.returncode == status, (arguments, process.returncode, out, err)
        return out if process.returncode == 0 else err

    def at_terminal(self, *arguments: str) -> str:
        """What a person sees of a command that succeeds: stdout and stderr, on a terminal."""
        ours, theirs = pty.openpty()
        with os.fdopen(ours, "rb", buffering=0) as screen:
            process = subprocess.Popen(
                [sys.executable, "-m", "meshdemo", "--name", self.name, *arguments],
                env=self.env, stdin=theirs, stdout=theirs, stderr=theirs,
            )  # fmt: skip
            os.close(theirs)
            seen = b""
            with suppress(OSError):  # the terminal ends with the last that has it open
                while part := screen.read(4096):
                    seen += part
            assert process.wait(self.deadline_s) == 0, seen
        return seen.decode()

    def json(self, *arguments: str) -> Any:
        """What a command prints with `-o json`."""
        return json.loads(self.run(*arguments, "-o", "json"))

    def describe(self) -> dict[str, Any]:
        """What the supervisor says of itself."""
        from meshdemo.runtime.local.client import SupervisorClient

        description: dict[str, Any] = SupervisorClient(self.paths).call("describe")
        return description

    def process(self, name: str) -> psutil.Process:
        """A process of the mesh, by the name that the supervisor gives it."""
        if name == "supervisor":
            return psutil.Process(json.loads(self.paths.supervisor.read_text())["pid"])
        if name == "guard":
            return psutil.Process(self.describe()["guard_pid"])
        pids = {one["name"]: one["pid"] for one in self.describe()["processes"]}
        return psutil.Process(pids[name])

    def all_ready(self) -> bool:
        """Whether every process is up and every instance takes traffic."""
        description = self.describe()
        parts = (*description["processes"], *description["instances"])
        return all(part["ready"] for part in parts)

    def counts(self, instance: str = "service-a-v1-1") -> Counter[str]:
        """How many requests service-a has seen end, by code."""
        port = next(one["app_port"] for one in self.describe()["instances"] if one["id"] == instance)
        text = read_url(f"http://127.0.0.1:{port}/metrics")
        found = re.findall(r'^service_a_requests_total\{code="([^"]+)"\} (\S+)', text, re.MULTILINE)
        return Counter({code: int(float(value)) for code, value in found})

    def leftovers(self) -> list[str]:
        """Everything of the mesh that is there: processes, files, sockets."""
        found = [f"{process.pid} {' '.join(process.cmdline())}" for process in find(self.paths.state)]
        paths = (self.paths.state, self.paths.lock, self.paths.sockets)
        return found + [str(path) for path in paths if path.exists()]

    @contextmanager
    def up(self, *arguments: str) -> Iterator[Cli]:
        """A mesh for a block; afterwards nothing of it may be left."""
        try:
            self.run("up", "--timeout", str(DEADLINE_S), *arguments)
            yield self
        finally:
            self.run("down")
            assert self.leftovers() == []

    @contextmanager
    def no_request_lost(self, more: int = 20) -> Iterator[None]:
        """Every request that service-a sent during the block, and some after it, came back with 200.

        For what can be done but once; see `loses_no_request`.
        """
        before = self.counts()
        yield
        self._some_more(more)
        lost = self._lost_since(before)
        assert lost == {}, f"lost: {lost}"

    def loses_no_request(self, action: Callable[[int], object]) -> None:
        """Do it under load: every request that service-a sent meanwhile, and some after it, comes back with 200.

        An overloaded machine loses requests by itself (connections that time out). So it is done at a moment
        when none is lost, and again, up to three times, if some were. `action` is told which time it is.
        """
        losses = []
        for attempt in range(3):
            self._clean()
            before = self.counts()
            action(attempt)
            self._some_more(20)
            if not (lost := self._lost_since(before)):
                return
            losses.append(lost)
        raise AssertionError(f"lost: {losses}")

    def _some_more(self, requests: int) -> None:
        enough = self.counts()["200"] + requests
        wait_for("more requests", lambda: self.counts()["200"] >= enough)

    def _lost_since(self, before: Counter[str]) -> dict[str, int]:
        return {code: n for code, n in (self.counts() - before).items() if code != "200"}

    def _clean(self) -> None:
        """Wait until requests come back with 200 and nothing else."""

        def clean() -> bool:
            before = self.counts()
            time.sleep(0.5)
            new = self.counts() - before
            return new["200"] > 0 and set(new) == {"200"}

        wait_for("clean traffic", clean)


def read_url(url: str) -> str:
    """What a URL answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=5) as answer:
        text: str = answer.read().decode()
    return text


def kill(process: psutil.Process, number: signal.Signals = signal.SIGKILL) -> None:
    """Send a signal to this very process."""
    process.send_signal(number)
