"""A canary on a real mesh: shifts traffic as `canary.Canary` says, and never leaves a half shift behind."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

from meshdemo.control.client import ControlClient, LeaseRow
from meshdemo.errors import BadInput, Failed, MeshdemoError
from meshdemo.remediation.canary import Canary, Decision
from meshdemo.remediation.choose import shares
from meshdemo.remediation.policy import Policy
from meshdemo.runtime.base import Runtime

_POLL_S = 0.2
_RENEW_S = 0.5
_LEASE_S = 4.0  # after so long without a word of the canary, the control plane takes it back
_AWAY_S = 10.0  # without signals for so long the canary is taken back
_RESTORE_S = 10.0


@dataclass(frozen=True, slots=True)
class CanaryOutcome:
    """How a canary ended."""

    service: str
    version: str
    promoted: bool
    reason: str
    steps: Sequence[Mapping[str, Any]]
    back_s: float | None = None  # from the decision to all traffic at the stable version

    def to_json(self) -> dict[str, Any]:
        """As `meshdemo canary -o json` prints it."""
        return asdict(self)


def check_steps(steps: Sequence[int]) -> None:
    """Raises BadInput unless the weights rise, from 1 to 100 at most."""
    if not steps:
        raise BadInput("--steps is empty", "such as --steps 5,25,50,100")
    for weight, following in zip(steps, [*steps[1:], 101], strict=True):
        if not 1 <= weight <= 100:
            raise BadInput(f"--steps: {weight} is no weight", "weights are whole numbers from 1 to 100")
        if following <= weight:
            raise BadInput(f"--steps: {following} after {weight} does not rise", "such as 5,25,50,100")


class CanaryRun:
    """Runs one canary. Used as a context: whatever ends it, the stable version has all traffic again,
    unless the canary was promoted. Should it be killed, the control plane sees to that, for the split is only
    lent to it (`control.model.SplitLease`).

    Args:
        tell: is told what happens, in words.
    """

    def __init__(
        self,
        runtime: Runtime,
        policy: Policy,
        service: str,
        version: str,
        *,
        steps: Sequence[int],
        hold_s: float,
        tell: Callable[[str], None],
    ) -> None:
        check_steps(steps)
        self._runtime = runtime
        self._client: ControlClient = runtime.control()
        self._service, self._version = service, version
        self._tell = tell
        self._stable = self._stable_split()
        objectives = policy.objectives_of(service)
        self._canary = Canary(objectives, version, steps, hold_s)
        self._owner = secrets.token_hex(8)
        self._mine = False  # the split is ours to take back
        self._lost_to: LeaseRow | None = None  # what was said when it was not ours any more
        self._ended = threading.Event()

    def _stable_split(self) -> dict[str, int]:
        """The weights of the versions that have the traffic now, without the new one."""
        app = self._runtime.app()
        service, version = self._service, self._version
        if service not in app.services:
            raise BadInput(f"no service '{service}'; there are: {', '.join(app.services)}")
        ready: dict[str, int] = {}
        for row in self._client.status()["instances"]:
            if row["service"] == service and row["ready"] and not row["ejected"]:
                ready[row["version"]] = ready.get(row["version"], 0) + 1
        versions = app.services[service].versions
        if version not in versions and version not in ready:
            raise BadInput(f"{service} has no version '{version}'; there are: {', '.join(versions)}")
        if not ready.get(version):
            raise BadInput(
                f"{service} {version} does not run",
                f"start it with: `meshdemo up --version {service}={version}`",
            )
        rules = self._client.traffic().get(service)
        split = dict(rules.split) if rules else {}
        if split.get(version) == 100:
            raise BadInput(f"{service} {version} has all the traffic already")
        if split:
            weights = {name: weight for name, weight in split.items() if name != version and weight}
        else:
            weights = {
                name: count
                for name, count in ready.items()
                if name != version and (name not in versions or versions[name].initial)
            }
        if not weights:
            raise BadInput(
                f"{service} has no other version to compare {version} with",
                f"versions that run: {', '.join(sorted(ready))}",
            )
        return shares(weights)

    # -- as a context -------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        threading.Thread(target=self._hold, name="lease", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._mine:
            self._ended.set()
        else:
            stable = ", ".join(f"{name} {weight}%" for name, weight in self._stable.items())
            after = f"the control plane gives it back after {_LEASE_S:g} s"  # when the lease is over
            with suppress(MeshdemoError, OSError):
                self._restore()
                after = f"the traffic of {self._service} is as it was: {stable}"
                self._journal("interrupted", f"the canary of {self._version} was interrupted")
            self._ended.set()
            self._tell(f"stopped before its end: {after}")

    def _hold(self) -> None:
        """Renew the lease until the canary has ended. A thread of its own: whatever the canary waits for."""
        while not self._ended.wait(_RENEW_S):
            if not self._mine:
                continue
            with suppress(MeshdemoError, OSError):
                answer = self._client.renew_lease(self._service, self._owner)
                if not answer["held"]:
                    self._lost_to = answer

    def _lease(self, **more: bool) -> dict[str, Any]:
        return {
            "owner": self._owner,
            "by": f"the canary of {self._version}",
            "lasts_s": _LEASE_S,
            "fallback": {**self._stable, self._version: 0},
            **more,
        }

    # -- running ------------------------------------------------------------------------------------------

    def run(self) -> CanaryOutcome:
        """Shift step by step until it is promoted or taken back."""
        batch = self._client.samples(-1)
        seq, heard = batch.seq, time.monotonic()
        decision = self._canary.begin()
        while True:
            if decision.kind == "shift":
                self._report(decision)
                try:
                    self._shift(decision.weight)
                except Failed:
                    if self._canary.weight and self._lost():
                        return self._leave()
                    raise
                self._canary.in_force(decision.weight, self._now(batch.now, heard))
            elif decision.kind != "hold":
                return self._end(decision)
            try:
                batch = self._client.samples(seq, wait_s=_POLL_S)
                seq, heard = batch.seq, time.monotonic()
                if self._lost_to is not None:
                    return self._leave()
            except (MeshdemoError, OSError) as error:
                if time.monotonic() - heard > _AWAY_S:
                    raise Failed(
                        f"no signals for {_AWAY_S:g} s, the canary is taken back: {error}"
                    ) from error
                time.sleep(_POLL_S)
                continue
            self._canary.observe([one for one in batch.samples if one.service == self._service])
            in_service = any(
                row["service"] == self._service
                and row["version"] == self._version
                and row["ready"]
                and not row["ejected"]
                for row in batch.instances
            )
            decision = self._canary.step(self._now(batch.now, heard), in_service=in_service)

    @staticmethod
    def _now(now: float, heard: float) -> float:
        return now + time.monotonic() - heard

    def _shift(self, weight: int) -> None:
        begins, self._mine = not self._mine, True
        split = {**shares(self._stable, 100 - weight), self._version: weight}
        try:
            effect = self._client.lease_split(self._service, split, self._lease(begins=begins)).effect
        except BadInput:
            self._mine = False  # somebody else holds it
            raise
        self._tell(
            f"{self._version} gets {weight}% of the traffic of {self._service} "
            f"(in force on {effect.sidecars} sidecars after {effect.effective_ms:.0f} ms)"
        )
        self._journal("shifted", f"{self._version} of {self._service} gets {weight}%", weight=weight)

    def _restore(self) -> float | None:
        """Give the stable version all traffic; seconds that it took, None if it was not ours to give."""
        return self._end_with({**self._stable, self._version: 0})

    def _end_with(self, split: Mapping[str, int]) -> float | None:
        """Set the last split and let go of it; seconds that it took, None if it is not ours any more."""
        began = time.monotonic()
        give_up = began + _RESTORE_S
        while True:
            try:
                self._client.lease_split(self._service, split, self._lease(ends=True))
                self._mine = False
                return time.monotonic() - began
            except (MeshdemoError, OSError):
                if self._lost():
                    self._mine = False
                    return None
                if time.monotonic() > give_up:
                    raise
                time.sleep(_POLL_S)

    def _lost(self) -> bool:
        """Is the split certainly not ours any more?"""
        try:
            answer = self._client.renew_lease(self._service, self._owner)
        except (MeshdemoError, OSError):
            return False
        if not answer["held"]:
            self._lost_to = answer
        return not answer["held"]

    def _leave(self) -> CanaryOutcome:
        """Somebody else has taken over the split, or it was given back: it is not ours any more."""
        self._mine = False
        lost = self._lost_to
        split = lost["split"] if lost is not None else {}
        now = ", ".join(f"{name}={weight}" for name, weight in split.items()) or "none"
        if lost is not None and lost["ran_out"]:
            reason = (
                f"the lease of the split ran out, not renewed within {_LEASE_S:g} s (was this process "
                f"stopped, or the machine too busy?); the control plane gave the traffic back (now: {now})"
            )
        else:
            reason = f"the split was changed by somebody else (now: {now}), and is left as it is"
        return self._outcome(False, reason)

    def _end(self, decision: Decision) -> CanaryOutcome:
        if decision.kind == "promoted":
            last = {**shares(self._stable, 100 - decision.weight), self._version: decision.weight}
            if self._end_with(last) is None:
                return self._leave()
            self._report(decision)
            return self._outcome(True, decision.reason)
        if (back_s := self._restore()) is None:
            return self._leave()
        self._report(decision)
        return self._outcome(False, decision.reason, back_s)

    def _outcome(self, promoted: bool, reason: str, back_s: float | None = None) -> CanaryOutcome:
        words = "promoted" if promoted else "not promoted"
        self._journal("promoted" if promoted else "rolled_back", f"{self._version} {words}: {reason}")
        return CanaryOutcome(
            self._service,
            self._version,
            promoted,
            reason,
            [asdict(report) for report in self._canary.reports],
            None if back_s is None else round(back_s, 3),
        )

    def _report(self, decision: Decision) -> None:
        if decision.step is not None:
            self._tell(f"{decision.step.weight}% {decision.step.outcome} after {decision.step.held_s:.1f} s")

    def _journal(self, what: str, text: str, **fields: Any) -> None:
        with suppress(MeshdemoError, OSError):
            self._client.post_event(
                {
                    "event": "canary",
                    "by": "canary",
                    "service": self._service,
                    "version": self._version,
                    "what": what,
                    "text": text,
                    **fields,
                }
            )
