"""What a policy asks of requests, in the form in which the control plane's page judges by it."""

from __future__ import annotations

from collections.abc import Callable

from meshdemo.apps.model import App
from meshdemo.control.objectives import Goal, Goals
from meshdemo.remediation.policy import Policy


def of(policy: Policy) -> Callable[[App], Goals]:
    """The goals of every service of an app; worked out once for an app that stays the same."""
    known: tuple[App, Goals] | None = None

    def goals(app: App) -> Goals:
        nonlocal known
        if known is None or known[0] is not app:
            own = policy.of_app(app.name)
            known = (
                app,
                {
                    service: [
                        Goal(objective.allowed, objective.threshold_ms, objective.effective)
                        for objective in own.objectives_of(service)
                        if objective.in_service is None
                    ]
                    for service in app.services
                },
            )
        return known[1]

    return goals
