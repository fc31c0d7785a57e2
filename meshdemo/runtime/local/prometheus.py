"""The local Prometheus: what it is told (its configuration, the instances as targets), and its process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from meshdemo.apps.model import App
from meshdemo.control.model import Instance
from meshdemo.files import write_atomic
from meshdemo.resources import TEMPLATES
from meshdemo.runtime.local.control_plane import ControlPlane
from meshdemo.runtime.local.keeper import BoundedLog, Keeper, Plan, Reaper
from meshdemo.runtime.local.paths import MeshPaths
from meshdemo.runtime.local.ports import Port, renew_lost
from meshdemo.runtime.local.probe import answers

RULES = "rules/objectives.yml"  # beside the configuration; there need not be any
_INTERVAL_S = 5  # a scrape reads some 100 kB from each sidecar: more often would be felt in an idle mesh
_KEEP = "2h"


def find() -> Path | None:
    """Prometheus on the PATH, if there is one."""
    found = shutil.which("prometheus")
    return Path(found) if found else None


def config(*, mesh: str, targets: Path, control_plane: str, credentials: Path) -> str:
    """The configuration file (templates/prometheus).

    Args:
        targets: the folder that `write_targets` writes to.
        control_plane: its HTTP address, host:port.
        credentials: the file with its API token.
    """
    import jinja2

    loader = jinja2.FileSystemLoader(TEMPLATES / "prometheus")
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, autoescape=False)  # noqa: S701 - YAML
    return environment.get_template("prometheus.yml.j2").render(
        interval_s=_INTERVAL_S, mesh=mesh, rules=RULES, targets=str(targets), control_plane=control_plane,
        credentials=str(credentials),
    )  # fmt: skip


def command(binary: Path, folder: Path, port: int) -> list[str]:
    """The command line of Prometheus."""
    return [
        str(binary),
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--storage.tsdb.retention.time={_KEEP}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]


def write_targets(folder: Path, app: App, instances: Iterable[Instance]) -> None:
    """Write the files that Prometheus takes its targets from. Raises OSError."""
    workloads, sidecars = [], []
    for instance in instances:
        labels = {"service": instance.service, "version": instance.version, "instance": instance.id}
        target = f"{instance.host}:{instance.metrics_port}"
        sidecars.append({"targets": [target], "labels": labels})
        service = app.services.get(instance.service)  # the gateway is none, and has no program
        if service is not None and (path := service.metrics):
            workloads.append({"targets": [target], "labels": {**labels, "__metrics_path__": path}})
    write_atomic(folder / "workloads.json", json.dumps(workloads))
    write_atomic(folder / "sidecars.json", json.dumps(sidecars))


class Prometheus:
    """The Prometheus of one mesh, kept running.

    Args:
        moved: called when another port was chosen, since somebody else took the first meanwhile.
    """

    def __init__(
        self,
        binary: Path,
        *,
        mesh: str,
        paths: MeshPaths,
        control: ControlPlane,
        environ: Mapping[str, str],
        reaper: Reaper,
        changed: Callable[[], None],
        died: Callable[[str, str], None],
        moved: Callable[[], None],
    ) -> None:
        self.port = Port()
        self._binary = binary
        self._mesh = mesh
        self._folder = paths.prometheus
        self._control = control
        self._environ = environ
        self._moved = moved
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self.keeper = Keeper(
            "prometheus",
            self._plan,
            output=BoundedLog(paths.logs / "prometheus.log"),
            reaper=reaper,
            probe=lambda: answers(self.port.number, "/-/ready"),
            changed=changed,
            died=died,
            port_lost=self._port_lost,
        )

    def tell(self, app: App, instances: Iterable[Instance]) -> None:
        """Give it its targets. Raises OSError."""
        write_targets(self._folder, app, instances)

    def _plan(self) -> Plan:
        text = config(
            mesh=self._mesh, targets=self._folder, credentials=self._control.token,
            control_plane=self._control.address,
        )  # fmt: skip
        write_atomic(self._folder / "prometheus.yml", text)
        return Plan(command=command(self._binary, self._folder, self.port.number), env=self._environ, cwd="/")

    def _port_lost(self) -> bool:
        if lost := renew_lost([self.port]):
            self._moved()
        return bool(lost)
