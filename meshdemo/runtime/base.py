"""The Runtime protocol: all that the code above needs to know of where instances run.

Commands and remedies speak to this alone, so that faults, signals, watch and report are the same code on
every runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from meshdemo.apps.model import App
from meshdemo.control.client import ControlClient
from meshdemo.control.model import Instance, WorkloadRevision


@dataclass(frozen=True, slots=True)
class Step:
    """A named, undoable piece of `up`. `after` names steps that must be done first; the rest run at once."""

    title: str
    run: Callable[[], None]
    undo: Callable[[], None] | None = None
    after: Sequence[str] = ()
    detail: Callable[[], str] | None = None  # what it is doing right now, for whoever watches
    settle_s: float = 5.0  # how long it is waited for once it was told to give up


@dataclass(frozen=True, slots=True)
class UpOptions:
    """What the user asked `up` for."""

    name: str
    app: App
    rps: float | None = None
    replicas: dict[str, int] = field(default_factory=dict)  # service -> instances
    versions: dict[str, list[str]] = field(default_factory=dict)  # service -> further versions to start
    timeout_s: float = 300.0
    extra: dict[str, Any] = field(default_factory=dict)  # of one runtime only (context, kind_image, ...)


class Runtime(Protocol):
    """Where the instances of one mesh run. Every method raises MeshdemoError with a remedy on failure."""

    kind: str  # "local", "kind" or "kubernetes"
    name: str

    def steps(self, options: UpOptions) -> Sequence[Step]:
        """The steps that bring the mesh up, or bring a running one to what `options` ask for."""
        ...

    def down(self) -> list[str]:
        """Remove all that `up` made; what was removed, in words. Nothing running is fine."""
        ...

    def app(self) -> App:
        """The app that runs."""
        ...

    def instances(self) -> list[Instance]:
        """The instances, whether ready or not."""
        ...

    def endpoints(self) -> dict[str, str | None]:
        """URLs by name: gateway, dashboard, prometheus, grafana; None: it is not there."""
        ...

    def unavailable(self) -> dict[str, str]:
        """Why an endpoint that the mesh should have is not there, by name and on one line each."""
        ...

    def control(self) -> ControlClient:
        """A client of the control plane's API."""
        ...

    def revisions(self, service: str, version: str) -> list[WorkloadRevision]:
        """Revisions of a workload, oldest first; the last is the current one."""
        ...

    def set_env(
        self,
        service: str,
        version: str | None,
        env: dict[str, str | None],
        *,
        reason: str,
        instance: str | None = None,
        expires_at: float | None = None,
        fault_id: str | None = None,
    ) -> WorkloadRevision:
        """Roll out a new revision with these variables set (None: unset), no request failing.

        Returns when every affected instance runs it and is ready. `instance`: only this one.
        `fault_id`: it is a fault, laid over what is set otherwise until `end_faults`, or until `expires_at`,
        when the runtime itself ends it.
        """
        ...

    def faults(self) -> list[str]:
        """The ids of the faults in workloads' environments."""
        ...

    def end_faults(self, ids: Collection[str] | None, *, reason: str) -> list[str]:
        """Take these faults (None: all) out of the workloads that carry them; those that there were.

        What a workload then runs with is what it has without them, with the faults that are left. Returns
        when every affected instance runs it and is ready. An id that no workload carries is fine.
        """
        ...

    def rollback(self, service: str, version: str, revision: int, *, reason: str) -> WorkloadRevision:
        """Roll out again what `revision` ran with, as a new revision."""
        ...

    def restart(self, instance: str, *, reason: str) -> None:
        """Replace one instance's process (pod); returns when it, or its replacement, is ready."""
        ...

    def scale(self, service: str, version: str, instances: int, *, reason: str) -> None:
        """Change the number of instances; returns when all are ready, or gone."""
        ...

    def crash(self, instance: str) -> None:
        """Kill the workload's process of an instance (SIGKILL)."""
        ...

    def hang(self, instance: str) -> None:
        """Stop the workload's process of an instance without killing it (SIGSTOP)."""
        ...

    def unhang(self, instance: str) -> None:
        """Let a stopped process of an instance go on (SIGCONT)."""
        ...

    def load(self) -> float | None:
        """The rate (requests/s) of each instance that makes load, unless the intent has another."""
        ...

    def set_load(self, rps: float) -> None:
        """Set the rate of every instance that makes load; it outlives a restart of the instance."""
        ...

    def logs(self, service: str | None, follow: bool) -> Iterator[tuple[str, str]]:
        """(source, line) of instances, sidecars and the control plane."""
        ...

    def identity(self) -> str | None:
        """What tells this mesh from one brought up under its name later; None: there is none any more.

        Raises MeshdemoError where that cannot be found out just now.
        """
        ...

    def watch_lock(self) -> AbstractContextManager[None]:
        """Held while a watch runs; raises Failed naming the holder if another one holds it."""
        ...
