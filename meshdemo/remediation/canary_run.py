"""A canary on a real mesh: shifts traffic as `canary.Canary` says, and never leaves a half shift behind."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Self

from meshdemo.control.client import ControlClient
from meshdemo.errors import BadInput, Failed, MeshdemoError
from meshdemo.remediation.canary import Canary, Decision
from meshdemo.remediation.choose import shares
from meshdemo.remediation.policy import Policy
from meshdemo.runtime.base import Runtime

_POLL_S = 0.2
_LOOK_S = 1.0  # how often it is seen whether somebody else has changed the split
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
    unless the canary was promoted.

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
        self._guard: subprocess.Popen[bytes] | None = None
        self._set: dict[str, int] = {}
        self._mine = False  # the split is ours to take back

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
                f"start it with: meshdemo up --version {service}={version}",
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
        split = json.dumps({**self._stable, self._version: 0})
        self._guard = subprocess.Popen(
            [
                sys.executable, "-P", "-m", "meshdemo.remediation.canary_guard",
                self._runtime.name, self._service, split,
            ],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            # Ctrl-C and a closed terminal must not reach it.
            start_new_session=True,
        )  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        restored = True
        if self._mine:
            try:
                self._restore()
                self._journal("interrupted", f"the canary of {self._version} was interrupted")
            except (MeshdemoError, OSError):
                restored = False  # then the guard goes on trying
        if self._guard is not None and self._guard.stdin is not None:
            with suppress(OSError):
                if restored:
                    self._guard.stdin.write(b"done\n")
                self._guard.stdin.close()
            if restored:
                self._guard.wait()

    # -- running ------------------------------------------------------------------------------------------

    def run(self) -> CanaryOutcome:
        """Shift step by step until it is promoted or taken back."""
        batch = self._client.samples(-1)
        seq, heard = batch.seq, time.monotonic()
        decision = self._canary.begin()
        looked = heard
        while True:
            if decision.kind == "shift":
                self._report(decision)
                self._shift(decision.weight)
                self._canary.in_force(decision.weight, self._now(batch.now, heard))
            elif decision.kind != "hold":
                return self._end(decision)
            try:
                batch = self._client.samples(seq, wait_s=_POLL_S)
                seq, heard = batch.seq, time.monotonic()
                if heard - looked > _LOOK_S:
                    looked = heard
                    if (other := self._foreign_split()) is not None:
                        return self._leave(other)
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
        self._mine = True
        others = shares(self._stable, 100 - weight)
        self._set = {**others, self._version: weight}
        effect = self._client.set_traffic(self._service, {"split": self._set}).effect
        self._tell(
            f"{self._version} gets {weight}% of the traffic of {self._service} "
            f"(in force on {effect.sidecars} sidecars after {effect.effective_ms:.0f} ms)"
        )
        self._journal("shifted", f"{self._version} of {self._service} gets {weight}%", weight=weight)

    def _restore(self) -> float:
        """Give the stable version all traffic; seconds that it took."""
        began = time.monotonic()
        give_up = began + _RESTORE_S
        while True:
            try:
                self._client.set_traffic(self._service, {"split": {**self._stable, self._version: 0}})
                self._mine = False
                return time.monotonic() - began
            except (MeshdemoError, OSError):
                if time.monotonic() > give_up:
                    raise
                time.sleep(_POLL_S)

    def _foreign_split(self) -> dict[str, int] | None:
        """The split, if it is not the one that we have set."""
        rules = self._client.traffic().get(self._service)
        split = dict(rules.split) if rules else {}
        return None if split == self._set else split

    def _leave(self, other: Mapping[str, int]) -> CanaryOutcome:
        """Somebody else has taken over the split: it is not ours any more."""
        self._mine = False
        words = ", ".join(f"{name}={weight}" for name, weight in other.items()) or "none"
        return self._outcome(
            False, f"the split was changed by somebody else (now: {words}), and is left as it is"
        )

    def _end(self, decision: Decision) -> CanaryOutcome:
        if decision.kind == "promoted":
            self._mine = False
            self._report(decision)
            return self._outcome(True, decision.reason)
        back_s = self._restore()
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
