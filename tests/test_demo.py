"""What the demo makes of what watch says; the whole of it runs in `test_cli_mesh`."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from meshdemo.cli import demo
from meshdemo.cli._context import Context
from meshdemo.control.model import Fault
from meshdemo.runtime import faults


def test_an_incident_that_opens_while_the_fault_is_made_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine something is amiss before; the fault becomes part of it, and is healed with it."""
    story = demo._Story(Context(), SimpleNamespace(kind="local"), 60, ran_before=False)  # type: ignore[arg-type]
    now = time.time()

    def say(name: str, at: float, **more: object) -> None:
        story._events.put({"event": name, "time": at, "service": demo.SERVICE, "incident": "i-1", **more})

    def inject(*_: Any) -> Any:
        say("violated", now - 1)
        say("acted", now + 1, remedy="rollback")
        say("healed", now + 2, recover_s=2.0)
        fault = Fault(id="f-1", at="app", kind="degrade", service=demo.SERVICE, lat_ms=200, started_at=now)
        return SimpleNamespace(fault=fault, effective_ms=5.0)

    monkeypatch.setattr(faults, "inject", inject)
    monkeypatch.setattr(faults, "clear", lambda *_: None)
    monkeypatch.setattr(demo, "_PATIENCE_S", 5.0)
    story.play("A bad release", faults.request(lat_ms=200, service=demo.SERVICE))
    (act,) = story.acts
    assert (act.healed, act.recover_s, act.remedies) == (True, 2.0, ["rollback"])
