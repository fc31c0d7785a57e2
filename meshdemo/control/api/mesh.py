"""The mesh as threads see it: what the API, and a dashboard beside it, are made from.

What changes the mesh goes to the control plane's loop and comes back when it is in force; what only reads is
answered from values that any thread may read.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import CancelledError
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any, TypeVar

from meshdemo.apps.model import GATEWAY
from meshdemo.control import aggregate, metrics
from meshdemo.control import intent as intents
from meshdemo.control.client import InstanceRow, StatusRow
from meshdemo.control.intent import Change
from meshdemo.control.journal import Journal
from meshdemo.control.model import Effect, Fault, Intent, MeshState
from meshdemo.control.plane import ControlPlane
from meshdemo.control.signals import Signal
from meshdemo.control.tap import Tap
from meshdemo.control.telemetry import Store
from meshdemo.errors import Failed

_CALL_TIMEOUT_S = 30.0
_T = TypeVar("_T")


class Control:
    """One mesh, for any thread."""

    def __init__(
        self,
        *,
        plane: ControlPlane,
        store: Store,
        journal: Journal,
        tap: Tap,
        totals: metrics.Totals,
        loop: asyncio.AbstractEventLoop,
        read_mesh: Callable[[], MeshState],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.plane = plane
        self.store = store
        self.journal = journal
        self.tap = tap
        self.totals = totals
        self.clock = clock
        self._loop = loop
        self._read_mesh = read_mesh

    # -- what is

    @property
    def intent(self) -> Intent:
        """The intent in force."""
        return self.plane.intent

    @property
    def mesh(self) -> MeshState:
        """The mesh as the runtime last reported it, but for instances that are leaving."""
        whole = self.plane.mesh
        staying = tuple(instance for instance in whole.instances if not instance.leaving)
        if len(staying) == len(whole.instances):
            return whole
        return whole.model_copy(update={"instances": staying})

    def status(self) -> StatusRow:
        """Every instance and how its sidecar stands, and what sidecars rejected."""
        sidecars = self.run(self._sidecars())
        intent, mesh = self.intent, self.mesh
        ejected = intent.ejected
        rows: list[InstanceRow] = []
        for sidecar in sidecars:
            instance = sidecar.instance
            if instance.leaving or instance.service == GATEWAY:
                continue
            report_s = self.store.last_report_s(instance.id)
            rows.append(
                {
                    "id": instance.id,
                    "service": instance.service,
                    "version": instance.version,
                    "revision": instance.revision,
                    "ready": instance.ready,
                    "restarts": instance.restarts,
                    "connected": sidecar.connected,
                    "acked": sidecar.acked,
                    "last_report_s": None if report_s is None else round(report_s, 3),
                    "silent": self.store.silent(instance.id),
                    "ejected": instance.id in ejected,
                }
            )
        return {
            "mesh": mesh.mesh,
            "revision": intent.revision,
            "instances": rows,
            "nacks": [
                {"instance": sidecar.instance.id, "type": kind, "error": words}
                for sidecar in sidecars
                for kind, words in sidecar.nacks.items()
            ],
            "trouble": self.journal.trouble,
        }

    def signals(self, by: aggregate.By, window_s: float, service: str | None = None) -> list[Signal]:
        """What happened in the last `window_s` seconds."""
        return aggregate.signals(
            self.store.window(window_s),
            by=by,
            now=self.clock(),
            window_s=window_s,
            scopes=aggregate.scopes_of(self.mesh, self.intent, self.store.silent),
            service=service,
        )

    # -- what should be

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Do this on the control plane's loop and wait for it.

        Raises:
            Failed: it took too long, and may still come into force; or the control plane is stopping.
        """
        try:
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        except RuntimeError:  # the loop has ended
            work.close()
            raise _stopping() from None
        try:
            return future.result(_CALL_TIMEOUT_S)
        except FutureTimeout:  # not cancelled: a change that is half done is worse than a late one
            raise Failed(
                f"the control plane did not finish within {_CALL_TIMEOUT_S:g} s",
                "`meshdemo status` names the sidecars that do not answer",
            ) from None
        except CancelledError:  # the loop is being ended under it
            raise _stopping() from None

    def change(self, change: Change) -> Effect:
        """Change the intent; returns when it is in force."""
        return self.run(self.plane.change(change))

    def record(self, event: Mapping[str, Any]) -> dict[str, Any]:
        """Write an event to the journal; as `Journal.append`."""
        kept = self.journal.append(event)
        self.totals.event(kept)
        return kept

    def add_fault(self, asked: dict[str, Any]) -> tuple[Fault, Effect]:
        """Put a fault in force, or record one that was made elsewhere."""
        fault = intents.new_fault(asked, self.mesh, self.clock())
        effect = self.change(lambda intent, _: intents.add_fault(intent, fault))
        if fault.starting:
            return fault, effect
        self.record(
            {
                **fault.model_dump(mode="json", exclude={"id"}, exclude_none=True),
                "event": "fault",
                "fault": fault.id,
                "effective_ms": effect.effective_ms,
                "sidecars": effect.sidecars,
            }
        )
        return fault, effect

    def clear_faults(self, chosen: Callable[[Fault], bool]) -> tuple[list[Fault], Effect]:
        """End the faults that are chosen; those of the app or the process are only no longer recorded."""
        gone: list[Fault] = []

        def clear(intent: Intent, _: MeshState) -> Intent:
            gone[:] = [fault for fault in intent.faults if chosen(fault)]
            for fault in gone:
                intent = intents.clear_fault(intent, fault.id)
            return intent

        effect = self.change(clear)
        self._record_cleared(gone)
        return gone, effect

    def clear_fault(self, fault_id: str) -> tuple[Fault, Effect]:
        """End one fault.

        Raises:
            BadInput: there is none of this id.
        """
        gone: list[Fault] = []

        def clear(intent: Intent, _: MeshState) -> Intent:
            after = intents.clear_fault(intent, fault_id)
            gone[:] = [fault for fault in intent.faults if fault.id == fault_id]
            return after

        effect = self.change(clear)
        self._record_cleared(gone)
        return gone[0], effect

    def _record_cleared(self, gone: Sequence[Fault]) -> None:
        for fault in gone:
            if fault.starting:
                continue  # nothing was told of it yet
            self.record(
                {
                    "event": "fault_cleared",
                    "fault": fault.id,
                    "at": fault.at,
                    "service": fault.service,
                    "started_at": fault.started_at,
                }
            )

    def refresh(self) -> Effect:
        """Read the instances anew."""
        return self.run(self._refresh())

    async def _refresh(self) -> Effect:
        mesh = self._read_mesh()
        self.store.track([instance.id for instance in mesh.sidecars])
        return await self.plane.refresh(mesh)

    async def _sidecars(self) -> Sequence[Any]:
        return self.plane.sidecars()


def _stopping() -> Failed:
    return Failed("the control plane is stopping", "ask again when it is back")
