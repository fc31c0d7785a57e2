"""Start a workload as its users do: a process of its own, told everything by its environment."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

DEADLINE_S = 60.0  # for conditions that hold within milliseconds on an idle machine


def wait_for(what: str, condition: Callable[[], T]) -> T:
    """The first true value of `condition`."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"waited {DEADLINE_S} s in vain for: {what}"
        time.sleep(0.02)


def environment(**variables: object) -> dict[str, str]:
    """This process's environment, without what would reach a workload by accident."""
    inherited = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return inherited | {name: str(value) for name, value in variables.items()}


def sample_of(page: str, sample: str) -> float:
    """The value of one sample of a page of metrics, named with its labels as it is exposed; 0 if there is none."""
    found = re.search(rf"^{re.escape(sample)} (\S+)$", page, re.MULTILINE)
    return float(found[1]) if found else 0.0


class Workload:
    """A running workload."""

    def __init__(self, program: str, variables: dict[str, object]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"meshdemo.workloads.{program}"],
            env=environment(**{"PORT": 0, **variables}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()  # ends at once if the program does
        found = re.search(r"listens on http://(\S+):(\d+)$", line.strip())
        if not found:
            raise AssertionError(f"{program} did not start: {line!r} {self.process.communicate()[1]!r}")
        self.host, self.port = found[1], int(found[2])

    def get(self, path: str, method: str = "GET", body: bytes | None = None) -> tuple[int, Any]:
        """Status and body, parsed where it is JSON."""
        request = urllib.request.Request(f"http://{self.host}:{self.port}{path}", body, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            response = opener.open(request, timeout=DEADLINE_S)
        except urllib.error.HTTPError as error:
            response = error
        with response:
            text = response.read().decode()
            is_json = response.headers.get_content_type() == "application/json"
            return response.status, json.loads(text) if is_json and text else text

    def metric(self, sample: str) -> float:
        """The value of one sample; as `sample_of`."""
        return sample_of(self.get("/metrics")[1], sample)

    def connect(self) -> socket.socket:
        """A bare connection."""
        return socket.create_connection((self.host, self.port), timeout=DEADLINE_S)

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(DEADLINE_S)


@contextmanager
def workload(program: str, **variables: object) -> Iterator[Workload]:
    """A workload that is gone at the end."""
    started = Workload(program, variables)
    try:
        yield started
    finally:
        started.process.kill()
        started.process.communicate()


def refused(program: str, **variables: object) -> tuple[int, str]:
    """Exit status and stderr of a program that is expected not to start."""
    done = subprocess.run(
        [sys.executable, "-m", f"meshdemo.workloads.{program}"],
        env=environment(**{"PORT": 0, **variables}),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    return done.returncode, done.stderr


def read_response(connection: socket.socket) -> tuple[bytes, bytes]:
    """Head and body of one response with a Content-Length; (b"", b"") at the end of the connection."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = connection.recv(65536)
        if not more:
            assert not data, f"the connection ended within {data!r}"
            return b"", b""
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(re.search(rb"(?i)content-length: (\d+)", head)[1])  # type: ignore[index]
    while len(body) < length:
        body += connection.recv(65536)
    return head, body
