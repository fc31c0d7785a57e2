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

    Raises BadInput if there is no such runtime.
    """
    from meshdemo.runtime.local.runtime import LocalRuntime

    if kind not in KINDS:
        raise BadInput(f"--runtime '{kind}': allowed is {', '.join(KINDS)}")
    if kind in {"kind", "kubernetes"}:
        raise Failed(f"the runtime '{kind}' is not part of this version", "use --runtime local")
    return LocalRuntime(name), "asked for" if kind == "local" else "it needs nothing but Python"


def find(name: str) -> Runtime:
    """The runtime of a mesh that was brought up. Raises Missing if none of this name was."""
    from meshdemo.runtime.local.runtime import LocalRuntime

    runtime = LocalRuntime(name)
    if not runtime.paths.spec.exists():
        raise Missing(f"no mesh '{name}' is running", f"run `meshdemo up --name {name}`")
    return runtime


def anything(name: str) -> Runtime:
    """The runtime that can remove whatever a mesh of this name has left."""
    from meshdemo.runtime.local.runtime import LocalRuntime

    return LocalRuntime(name)


def everything() -> list[Runtime]:
    """The runtimes of all meshes that have left anything."""
    from meshdemo.runtime.local.paths import names

    return [anything(name) for name in names()]


def control(name: str) -> ControlClient:
    """A client of the control plane of a running mesh. Raises Missing if there is none."""
    return find(name).control()
