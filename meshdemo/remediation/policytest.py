"""`policy test`: what a policy would do on recorded signals. Pure: looks in, events out.

Each remedy is taken to be carried out at once. The recording cannot show what it would have changed, so where
the signals stay bad the policy is seen to escalate, and where they get better it is seen to stop.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from meshdemo.remediation.core import Core, Result
from meshdemo.remediation.events import Event
from meshdemo.remediation.policy import Policy
from meshdemo.remediation.recording import Look


def decisions(policy: Policy, looks: Iterable[Look]) -> Iterator[Event]:
    """The events that watch would have had, in order."""
    core = Core(policy, "test")
    for look in looks:
        core.observe(look.now, look.samples, look.instances)
        if look.intent is not None:
            core.set_intent(look.intent)
        step = core.step(look.now)
        yield from step.events
        for action in step.actions:
            core.done(Result(action.id, ok=True, effective_at=look.now))
