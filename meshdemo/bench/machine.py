"""What the machine is, what is installed on it, and how busy it is with other things."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import psutil

from meshdemo import __version__
from meshdemo.bench.model import Machine, Quiet
from meshdemo.control.bootstrap import find_envoy
from meshdemo.errors import MeshdemoError

_LOOK_S = 1.0
_ANSWER_S = 10.0

# What is compared with: the program, how it is asked for its version, and how to get it.
TOOLS: Mapping[str, tuple[str, str]] = {
    "haproxy": ("-v", "apt install haproxy"),
    "nginx": ("-v", "apt install nginx"),
    "wrk": ("-v", "apt install wrk"),
    "hey": ("", "apt install hey"),
    "prometheus": ("--version", "apt install prometheus"),
    "prometheus-alertmanager": ("--version", "apt install prometheus-alertmanager"),
    "alertmanager": ("--version", "see https://prometheus.io/download/"),
    "docker": ("--version", "see https://docs.docker.com/get-docker/"),
    "kind": ("--version", "see https://kind.sigs.k8s.io/docs/user/quick-start/#installation"),
    "kubectl": ("version --client", "see https://kubernetes.io/docs/tasks/tools/"),
}


def tool(*names: str) -> str | None:
    """The path of the first of these programs that is installed; system folders count, on the PATH or not."""
    path = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"))
    return next((found for name in names if (found := shutil.which(name, path=path))), None)


def missing(name: str) -> str:
    """Why an alternative is left out: its program is not installed, and how to get it."""
    return f"{name} is not installed ({TOOLS[name][1]})"


def describe() -> Machine:
    """This machine."""
    return Machine(
        processor=_processor(),
        processors=os.cpu_count() or 1,
        memory_gb=psutil.virtual_memory().total / 1e9,
        system=f"{platform.system()} {platform.release()}",
        versions=_versions(),
    )


def quiet() -> Quiet:
    """How busy the machine is for the next second. Ask while nothing of the benchmark runs."""
    busy = psutil.cpu_percent(interval=_LOOK_S) / 100
    return Quiet(os.getloadavg(), busy)


def cpu_s(processes: Iterable[psutil.Process]) -> float:
    """Processor time that these have used (s).

    Raises:
        psutil.NoSuchProcess: one of them has ended.
    """
    return sum(map(_cpu_s, processes))


def memory_mb(processes: Iterable[psutil.Process]) -> float:
    """Memory of these (MB); of what they share, where the system says so, each its part (PSS)."""
    return sum(map(_memory_mb, processes))


def _memory_mb(process: psutil.Process) -> float:
    memory = process.memory_full_info()
    return float(getattr(memory, "pss", memory.rss)) / 1e6


def _cpu_s(process: psutil.Process) -> float:
    if sys.platform == "linux":
        # /proc has it in steps of 10 ms, which is what a change takes. This is the id of the process' clock,
        # as clock_getcpuclockid(3) returns it, which Python has for threads only.
        with suppress(OSError):
            return time.clock_gettime(~process.pid << 3 | 2)
    times = process.cpu_times()
    return float(times.user + times.system)


class Steal:
    """What the hypervisor takes from now on."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._stolen = _stolen_s()

    def share(self) -> float:
        """Of the processors' time since, 0..1."""
        seconds = (time.monotonic() - self._began) * (os.cpu_count() or 1)
        return max(0.0, _stolen_s() - self._stolen) / seconds if seconds > 0 else 0.0


def _stolen_s() -> float:
    return float(getattr(psutil.cpu_times(), "steal", 0.0))


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def _versions() -> dict[str, str]:
    versions = {"meshdemo": __version__, "Python": platform.python_version()}
    for package in ("grpcio", "xds-protos"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    with suppress(MeshdemoError):
        versions["Envoy"] = _number(_said(str(find_envoy()), "--version").rpartition("version: ")[2])
    for name, (argument, _) in TOOLS.items():
        if path := tool(name):
            versions[name] = _number(_said(path, *argument.split())) if argument else "installed"
    return versions


def _number(text: str) -> str:
    found = re.search(r"\d+\.\d+[\w.+~-]*", text)
    return found[0] if found else "installed"


def _said(*command: str) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_ANSWER_S, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return f"{done.stdout}\n{done.stderr}"
