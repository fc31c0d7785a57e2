"""What this machine remembers of a mesh in a cluster: how to reach it, and what `down` may remove.

The mesh itself is in the cluster; this file only leads there. It is written before anything is made, so that
an interrupted `up` leaves a trail.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from meshdemo.errors import Failed
from meshdemo.files import write_atomic
from meshdemo.names import RECORD
from meshdemo.runtime.local.paths import claim, home, is_marked, remove_home

if TYPE_CHECKING:
    from meshdemo.kube import Cluster


class Record(BaseModel):
    """One mesh in a cluster."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["kind", "kubernetes"]
    mesh: str
    context: str | None = None
    cluster: str | None = Field(default=None, description="the kind cluster")
    made_cluster: bool = Field(default=False, description="meshdemo made it, so `down` removes it")
    ports: dict[str, int] = Field(default_factory=dict, description="endpoint -> port of this machine (kind)")
    inside: bool = Field(default=False, description="this is a pod of the cluster")
    registry: str | None = None
    base_image: str | None = None
    observability: bool = True
    watch: bool = False

    @property
    def namespace(self) -> str:
        """Where in the cluster the mesh is."""
        return self.mesh

    def connect(self, *, patience_s: float | None = None) -> Cluster:
        """The cluster. Raises MeshdemoError if the kubeconfig does not lead there."""
        from meshdemo.kube import PATIENCE_S, Cluster

        if self.inside:
            return Cluster.inside(patience_s=PATIENCE_S if patience_s is None else patience_s)
        own = kubeconfig(self.mesh) if self.kind == "kind" else None
        patience_s = PATIENCE_S if patience_s is None else patience_s
        return Cluster.from_kubeconfig(own, self.context, patience_s=patience_s)


def kubeconfig(mesh: str) -> Path:
    """The access to a kind cluster; never the user's own file."""
    return home() / mesh / "kubeconfig"


def load(mesh: str) -> Record | None:
    """What is remembered of a mesh; None if nothing is. Raises Failed if it cannot be read."""
    path = home() / mesh / RECORD
    try:
        return Record.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise Failed(f"cannot read {path}: {error}", f"remove {path} if the mesh is gone") from error


def save(record: Record) -> None:
    """Remember. Raises Failed, BadInput if the folder for it holds something else."""
    folder = home() / record.mesh
    try:
        claim(folder)
        write_atomic(folder / RECORD, record.model_dump_json(indent=2).encode(), durable=True)
    except OSError as error:
        raise Failed(
            f"cannot write to {folder}: {error.strerror}",
            "set MESHDEMO_HOME to a folder that you can write to",
        ) from error


def forget(mesh: str) -> None:
    """Remove all that this machine remembers of a mesh."""
    if is_marked(home() / mesh):
        shutil.rmtree(home() / mesh, ignore_errors=True)
        remove_home(home())
