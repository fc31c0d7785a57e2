"""Remedies carried out, through the intent and the runtime. The only place where watch changes anything.

A remedy runs to its end once it has begun, and leaves the mesh consistent if it fails: an instance that was
taken out of load balancing for a restart is let back in.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from meshdemo.control.client import ControlClient
from meshdemo.control.model import Effect, Fault
from meshdemo.errors import BadInput, Failed, MeshdemoError
from meshdemo.remediation.choose import Plan
from meshdemo.remediation.core import Action, Result
from meshdemo.runtime import faults
from meshdemo.runtime.base import Runtime

BY = "watch"


class Remedies:
    """Carries out actions.

    Args:
        client: gives a client of the control plane as it runs now; it may have been restarted.
        clock: seconds by the control plane's clock.
    """

    def __init__(
        self, client: Callable[[], ControlClient], runtime: Runtime, clock: Callable[[], float]
    ) -> None:
        self._client = client
        self._runtime = runtime
        self._clock = clock
        self._kinds: dict[str, Callable[[Plan, str], str]] = {
            "eject": self._eject,
            "readmit": self._readmit,
            "restart": self._restart,
            "rollback": self._rollback,
            "clear-fault": self._clear_fault,
            "shift-away": self._shift_away,
            "scale": self._scale,
            "notify": lambda plan, reason: "",
        }

    def carry_out(self, action: Action) -> Result:
        """Do it, and say from when on it was in force. Never raises."""
        try:
            detail = self._kinds[action.plan.kind](action.plan, action.reason)
        except MeshdemoError as error:
            return Result(action.id, False, self._clock(), str(error))
        except Exception as error:  # a remedy that breaks must not end watch
            return Result(action.id, False, self._clock(), f"{type(error).__name__}: {error}")
        return Result(action.id, True, self._clock(), detail)

    def _eject(self, plan: Plan, reason: str) -> str:
        return _in_force(self._client().eject(plan.instances[0], reason=reason, by=BY))

    def _readmit(self, plan: Plan, reason: str) -> str:
        with suppress(BadInput):  # it is not ejected any more, or gone
            return _in_force(self._client().readmit(plan.instances[0]))
        return ""

    def _restart(self, plan: Plan, reason: str) -> str:
        for instance in plan.instances:
            self._restart_one(plan.service, instance, reason)
        self._forget_faults(lambda fault: fault.at == "process" and fault.instance in plan.instances)
        return ""

    def _restart_one(self, service: str, instance: str, reason: str) -> None:
        others = [
            one
            for one in self._runtime.instances()
            if one.service == service and one.id != instance and one.ready
        ]
        if others:
            # Out of load balancing first: that takes milliseconds, and a restart may take seconds.
            self._client().eject(instance, reason=f"restart: {reason}", by=BY)
        try:
            self._runtime.restart(instance, reason=reason)
        finally:
            with suppress(BadInput):  # a replacement has another id, and nobody has ejected it
                self._client().readmit(instance)

    def _rollback(self, plan: Plan, reason: str) -> str:
        done = []
        for version, revision in plan.rollbacks.items():
            target = revision if revision is not None else self._revision_before(plan.service, version)
            new = self._runtime.rollback(plan.service, version, target, reason=reason)
            done.append(f"{version} runs revision {new.revision}, as revision {target} was")
        carried = set(self._runtime.faults())  # what an earlier revision carried already is still in force
        self._forget_faults(
            lambda fault: (
                fault.at == "app"
                and fault.service == plan.service
                and not fault.starting
                and fault.id not in carried
            )
        )
        return "; ".join(done)

    def _revision_before(self, service: str, version: str) -> int:
        revisions = self._runtime.revisions(service, version)
        if len(revisions) < 2:
            raise Failed(f"{service} {version} has no earlier revision to go back to")
        return revisions[-2].revision

    def _clear_fault(self, plan: Plan, reason: str) -> str:
        words = ""
        for fault_id in plan.fault_ids:
            with suppress(BadInput):  # it has ended by itself
                cleared = faults.clear(self._runtime, fault_id)
                words = f"out of force after {cleared.effective_ms:.0f} ms"
        return words

    def _shift_away(self, plan: Plan, reason: str) -> str:
        effect = self._client().set_traffic(plan.service, {"split": dict(plan.split)}).effect
        if not effect.sidecars:
            raise Failed("the traffic went there already: no sidecar had anything to change")
        return _in_force(effect)

    def _scale(self, plan: Plan, reason: str) -> str:
        assert plan.scale is not None
        version, count = plan.scale
        self._runtime.scale(plan.service, version, count, reason=reason)
        return ""

    def _forget_faults(self, ended: Callable[[Fault], bool]) -> None:
        """End the records of faults that the remedy has ended; they live in the app or the process."""
        client = self._client()
        for fault in client.faults():
            if ended(fault):
                with suppress(BadInput):
                    client.clear_fault(fault.id)


def _in_force(effect: Effect) -> str:
    return f"in force on {effect.sidecars} sidecars after {effect.effective_ms:.0f} ms"
