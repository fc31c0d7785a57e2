"""What the remedies make of what the control plane says."""

from __future__ import annotations

from typing import Any

import pytest

from meshdemo.control.client import TrafficResult
from meshdemo.control.model import Effect, Traffic
from meshdemo.errors import Failed
from meshdemo.remediation.choose import Plan
from meshdemo.remediation.remedies import Remedies


@pytest.mark.parametrize("sidecars", [0, 2])
def test_a_shift_that_changes_nothing_is_not_done(sidecars: int) -> None:
    class Client:
        def set_traffic(self, service: str, changes: Any) -> TrafficResult:
            return TrafficResult(Traffic(), Effect(revision=1, effective_ms=0, sidecars=sidecars))

    remedies = Remedies.__new__(Remedies)
    remedies._client = Client  # type: ignore[assignment]
    plan = Plan("shift-away", "b", "b v2", "shift", split={"v1": 100, "v2": 0})
    if sidecars:
        assert "2 sidecars" in remedies._shift_away(plan, "")
    else:
        with pytest.raises(Failed, match="already"):
            remedies._shift_away(plan, "")
