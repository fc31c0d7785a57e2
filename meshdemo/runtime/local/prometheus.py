"""What the local Prometheus is told: its configuration, and the instances as targets."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from meshdemo.apps.model import App
from meshdemo.control.model import Instance
from meshdemo.files import write_atomic
from meshdemo.resources import TEMPLATES

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
