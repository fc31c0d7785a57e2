"""Chooses the runtime: for a new mesh by what was asked for, for one that runs by where it runs.

Commands come here first, so nothing is imported before it is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshdemo.errors import BadInput, Failed, Missing

if TYPE_CHECKING:
    from meshdemo.control.client import ControlClient
    from meshdemo.runtime.base import Runtime

KINDS = ("auto", "local", "kind", "kubernetes")


def choose(kind: str, name: str) -> tuple[Runtime, str]:
    """The runtime to bring a mesh up with, and why that one.

    Raises BadInput if there is no such runtime, or something else is where the mesh's files would be.
    """
    from meshdemo.runtime.local.paths import check_free
    from meshdemo.runtime.local.runtime import LocalRuntime

    if kind not in KINDS:
        raise BadInput(f"--runtime '{kind}': allowed is {', '.join(KINDS)}")
    why = "asked for"
    local = LocalRuntime(name)
    check_free(local.paths.state)
    runs = _in_cluster(name) or (local if local.paths.spec.exists() else None)
    if kind == "auto":
        if runs is not None:
            return runs, "where it runs already"
        kind, why = _best()
    elif runs is not None and runs.kind != kind:
        raise Failed(
            f"mesh '{name}' runs on the runtime '{runs.kind}', not '{kind}'",
            f"run `meshdemo down --name {name}` first, or use another --name",
        )
    if kind == "local":
        return local, why
    from meshdemo.runtime.kubernetes.runtime import KubernetesRuntime

    return KubernetesRuntime(name, kind), why


def _best() -> tuple[str, str]:
    """kind where that is possible, else local; and why."""
    import shutil

    if shutil.which("kind") is None:
        return "local", "`kind` is not installed"
    from meshdemo.runtime.kubernetes.images import Builder

    try:
        Builder()
    except Missing as error:
        return "local", error.message
    return "kind", "kind and Docker are here"


def _in_cluster(name: str) -> Runtime | None:
    """The runtime of a mesh that this machine remembers to be in a cluster."""
    from meshdemo.runtime.local.paths import home

    if not (home() / name / "kubernetes.json").exists():
        return None
    from meshdemo.runtime.kubernetes import record
    from meshdemo.runtime.kubernetes.runtime import KubernetesRuntime

    found = record.load(name)
    return KubernetesRuntime(name, found.kind) if found else None


def find(name: str) -> Runtime:
    """The runtime of a mesh that was brought up. Raises Missing if none of this name was."""
    from meshdemo.runtime.local.runtime import LocalRuntime

    if elsewhere := _in_cluster(name):
        return elsewhere
    runtime = LocalRuntime(name)
    if not runtime.paths.spec.exists():
        raise Missing(f"no mesh '{name}' is running", f"run `meshdemo up --name {name}`")
    return runtime


def anything(name: str) -> Runtime:
    """The runtime that can remove whatever a mesh of this name has left."""
    from meshdemo.runtime.local.runtime import LocalRuntime

    return _in_cluster(name) or LocalRuntime(name)


def everything() -> list[Runtime]:
    """The runtimes of all meshes that have left anything."""
    from meshdemo.runtime.local.paths import names

    return [anything(name) for name in names()]


def control(name: str) -> ControlClient:
    """A client of the control plane of a running mesh. Raises Missing if there is none."""
    return find(name).control()
