"""Making load: open loop by the project's own engine, closed loop by wrk or its stand-in."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from meshdemo.bench import machine
from meshdemo.bench.client import RECORD
from meshdemo.bench.stage import Process, Stage, until
from meshdemo.bench.stats import Request
from meshdemo.errors import Failed
from meshdemo.resources import TEMPLATES

HOST = "service-b:5000"
_STOP_S = 30.0  # with as many requests under way as a busy machine has, it takes a while
_CLIENT = (sys.executable, "-P", "-m", "meshdemo.bench.client")


class OpenLoop:
    """Load on a port of loopback, from a process of its own; gone at the end of the block."""

    def __init__(self, stage: Stage, port: int, rps: float, *, seconds: float | None = None) -> None:
        """`seconds`: ends by itself; default: when it is stopped."""
        self._file = stage.path("requests")
        self._file.touch()
        self._read: list[Request] = []
        command = [
            *_CLIENT, "open", "--port", str(port), "--host", HOST, "--rps", f"{rps:g}", "--file",
            str(self._file), *(["--seconds", f"{seconds:g}"] if seconds is not None else []),
        ]  # fmt: skip
        self.process: Process = stage.start("open-loop", command)

    def __enter__(self) -> OpenLoop:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self._file.unlink(missing_ok=True)

    def requests(self) -> list[Request]:
        """What has ended so far, in the order of their ends."""
        with self._file.open("rb") as file:
            file.seek(len(self._read) * RECORD.size)
            data = file.read()
        whole = len(data) // RECORD.size * RECORD.size
        self._read += [
            Request(due, took, int(status)) for due, took, status in RECORD.iter_unpack(data[:whole])
        ]
        return self._read

    def await_answers(self, count: int) -> None:
        """Wait until so many requests were answered with 200 without one that was not in between."""

        def flows() -> bool:
            self.process.check()
            return [one.status for one in self.requests()[-count:]] == [200] * count

        until("the load to flow", flows)

    def stop(self) -> list[Request]:
        """End it; all its requests, those without an answer too. Raises Failed if it did not run well."""
        self.process.popen.send_signal(signal.SIGTERM)
        return self.join(_STOP_S)

    def join(self, patience_s: float) -> list[Request]:
        """Wait for its end; all its requests. Raises Failed if it did not run well."""
        try:
            status = self.process.popen.wait(patience_s)
        except subprocess.TimeoutExpired:
            raise Failed("the load did not end in time") from None
        if status:
            raise Failed(f"the load ended with status {status}: {self.process.last_words()}")
        return self.requests()


@dataclass(frozen=True, slots=True)
class Closed:
    """What a closed loop saw."""

    requests: int
    seconds: float
    errors: int
    us: Mapping[str, float]  # quantile ("0.5") -> latency in microseconds

    @property
    def rps(self) -> float:
        """Requests per second."""
        return self.requests / self.seconds


def closed_loop_tool() -> str:
    """The name of the closed-loop client that is used."""
    return "wrk" if machine.tool("wrk") else "meshdemo's own"


def closed_loop(port: int, connections: int, seconds: float, path: str = "/work") -> Closed:
    """Requests on so many connections, one after the other on each. Raises Failed if the client fails."""
    if wrk := machine.tool("wrk"):
        command = [
            wrk, "--threads", "1", "--connections", str(connections),
            "--duration", f"{max(1, round(seconds))}s", "--script", str(TEMPLATES / "bench" / "wrk.lua"), f"http://127.0.0.1:{port}{path}",
        ]  # fmt: skip
    else:
        command = [
            *_CLIENT, "closed", "--port", str(port), "--path", path, "--connections", str(connections),
            "--seconds", f"{seconds:g}",
        ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=seconds + 30, stdin=subprocess.DEVNULL,
        start_new_session=True,  # see `Stage.start`
    )  # fmt: skip
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines or not lines[-1].startswith("{"):
        raise Failed(f"{Path(command[0]).name} failed: {(done.stderr or done.stdout).strip()[-300:]}")
    found = Closed(**json.loads(lines[-1]))
    if found.errors >= found.requests:
        raise Failed(f"{Path(command[0]).name}: all requests failed")
    return found
