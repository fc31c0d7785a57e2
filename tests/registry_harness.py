"""An image registry for tests: Debian's `docker-registry`, on addresses of this machine alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from meshdemo.runtime.local.ports import Port


def require() -> str:
    """The registry's command; skips where there is none, fails where CI demands one."""
    command = shutil.which("docker-registry")
    if command is None:
        if os.environ.get("CI"):
            raise AssertionError("no docker-registry on the PATH")
        pytest.skip("PUSHING WAS NOT TESTED: no docker-registry on the PATH (a Debian package)")
    return command


@contextmanager
def registry(folder: Path, *hosts: str) -> Iterator[int]:
    """A registry on the same port of each of these addresses; the port. A Docker Engine pushes to 127.0.0.1."""
    command = require()
    hosts = hosts or ("127.0.0.1",)
    held = Port()
    port = held.number
    with ExitStack() as stack:
        stack.callback(held.release)
        for host in hosts:
            config = {
                "version": 0.1,
                "log": {"level": "warn", "accesslog": {"disabled": True}},
                "storage": {"filesystem": {"rootdirectory": str(folder / "images")}},
                "http": {"addr": f"{host}:{port}"},
            }
            path = folder / f"{host}.yml"
            path.write_text(json.dumps(config))
            with (folder / f"{host}.log").open("wb") as log:
                process = subprocess.Popen([command, "serve", str(path)], stdout=log, stderr=log)
            stack.callback(process.wait, 20)
            stack.callback(process.terminate)
            _await(f"http://{host}:{port}/v2/")
        yield port


def _await(url: str) -> None:
    end = time.monotonic() + 30
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()  # noqa: S310 - our own registry
            return
        except OSError:
            assert time.monotonic() < end, f"{url} does not answer"
            time.sleep(0.1)
