"""What healthy means: the objectives of a policy, and the goals that single figures are judged by. Pure.

Watch judges by statistics (`meshdemo.remediation.judge`); the page glances at the figures of some seconds, by
what the same objectives ask of requests.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from meshdemo import durations
from meshdemo.apps.model import App
from meshdemo.control.signals import Histogram, Signal

_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")


def duration_s(value: Any) -> float:
    """Seconds of a duration as people write it. Raises ValueError."""
    if isinstance(value, str) and (seconds := durations.seconds(value.strip())) is not None:
        return seconds
    raise ValueError(f"{value!r} is no duration; write a number and a unit, such as 300ms, 10s, 5m or 1h")


def _share(value: Any) -> float:
    if isinstance(value, str) and (match := _PERCENT.fullmatch(value)):
        return float(match[1]) / 100
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1:
        return float(value)
    raise ValueError(f"{value!r} is no share; write a percentage, such as 99%, or a number from 0 to 1")


Duration = Annotated[float, BeforeValidator(duration_s)]
Share = Annotated[float, BeforeValidator(_share)]
# Below 100 %: an objective without any room for errors is violated by the first one.
PartialShare = Annotated[Share, Field(gt=0, lt=1)]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]([-_A-Za-z0-9]{0,58}[A-Za-z0-9])?$")]
# A service by name; `app/service`: of that app alone.
ServicePattern = Annotated[
    str, StringConstraints(pattern=r"^([a-z0-9-]+/)?[a-z0-9*?\[\]!-]+$", max_length=120)
]


class Strict(BaseModel):
    """What people write: fields that it does not have, and values of other types, are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, strict=True)


class Latency(Strict):
    """At least `share` of the requests are answered within `below`."""

    below: Annotated[Duration, Field(gt=0, le=60)] = Field(description="seconds")
    share: PartialShare


class Selecting(Strict):
    """Something that applies to some services."""

    services: list[ServicePattern] = Field(default_factory=lambda: ["*"], min_length=1)
    except_: list[ServicePattern] = Field(default_factory=list, alias="except")

    def of_app(self, app: str) -> Self | None:
        """The same for one app, its patterns without the app; None if it speaks of other apps only."""
        services = [name for name in (_within(app, pattern) for pattern in self.services) if name]
        except_ = [name for name in (_within(app, pattern) for pattern in self.except_) if name]
        return self.model_copy(update={"services": services, "except_": except_}) if services else None

    def apps(self) -> set[str]:
        """The apps that its patterns name."""
        return {pattern.rpartition("/")[0] for pattern in (*self.services, *self.except_) if "/" in pattern}

    def applies_to(self, service: str) -> bool:
        """Does it speak of this service? A pattern that names an app fits none before `of_app`."""
        return any(fnmatchcase(service, pattern) for pattern in self.services) and not any(
            fnmatchcase(service, pattern) for pattern in self.except_
        )


def _within(app: str, pattern: str) -> str | None:
    """A pattern without the app that it names; None if that is another one."""
    named, _, service = pattern.rpartition("/")
    return service if named in ("", app) else None


class Objective(Selecting):
    """What healthy means: one of `success`, `latency`, `in_service`."""

    name: Name
    success: PartialShare | None = Field(default=None, description="share of requests that are answered well")
    latency: Latency | None = None
    in_service: Annotated[Share, Field(gt=0, le=1)] | None = Field(
        default=None, description="share of the service's instances that are ready"
    )
    effective: bool = Field(default=False, description="judge what callers got after retries")
    window: Annotated[Duration, Field(ge=10, le=600)] = Field(
        default=60.0, description="seconds; the longest stretch judged as a whole, for slow burns"
    )
    min_requests: int = Field(default=40, ge=1, le=1_000_000)
    budget: Annotated[Duration, Field(ge=60, le=30 * 86_400)] = Field(
        default=3600.0, description="seconds; the period over which the error budget is counted"
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Objective:
        if sum(kind is not None for kind in (self.success, self.latency, self.in_service)) != 1:
            raise ValueError("an objective has exactly one of: success, latency, in_service")
        if self.in_service is not None and self.effective:
            raise ValueError("'effective' is about requests, and this objective is about instances")
        return self

    @property
    def allowed(self) -> float:
        """The share of bad events that the objective allows, 0..1."""
        if self.success is not None:
            return 1 - self.success
        if self.latency is not None:
            return 1 - self.latency.share
        return 1 - (self.in_service or 0.0)

    @property
    def threshold_ms(self) -> float | None:
        """Slower than this is too slow; None unless this is about latency."""
        return None if self.latency is None else self.latency.below * 1000

    @property
    def text(self) -> str:
        """The objective in a few words."""
        after = " after retries" if self.effective else ""
        if self.latency is not None:
            return f"{self.latency.share * 100:g}% below {self.latency.below * 1000:g} ms{after}"
        if self.success is not None:
            return f"{self.success * 100:g}% answered well{after}"
        return f"{(self.in_service or 0) * 100:g}% of instances in service"


Wrong = Literal["", "degraded", "failing", "slow", "too_slow"]


@dataclass(frozen=True, slots=True)
class Goal:
    """What an objective asks of requests: at most so large a share fails, or takes longer than `below_ms`."""

    allowed: float  # 0..1
    below_ms: float | None = None
    effective: bool = False

    def verdict(self, requests: int, failures: int, latency: Histogram) -> Wrong:
        """How far these few seconds miss it; empty if they do not. A glance, where watch has statistics."""
        bad = failures if self.below_ms is None else latency.above(self.below_ms)
        if not requests or bad <= self.allowed * requests:
            return ""
        if self.below_ms is not None and bad < _SLOW_AT_LEAST:
            return ""
        # Plainly, where five times as much is bad as may be (or half of what is left, where that is less).
        plainly = bad > requests * min(_PLAINLY * self.allowed, (1 + self.allowed) / 2)
        if self.below_ms is None:
            return "failing" if plainly else "degraded"
        return "too_slow" if plainly else "slow"


_PLAINLY = 5
_SLOW_AT_LEAST = 2  # one request of a few may be slow without meaning anything
_WORST_FIRST: tuple[Wrong, ...] = ("failing", "too_slow", "degraded", "slow", "")
ANY_SERVICE = Goal(0.01)  # of a service that no objective about success speaks of
Goals = Mapping[str, Sequence[Goal]]  # by service


def verdict(goals: Sequence[Goal], signal: Signal) -> Wrong:
    """The worst of what a signal is by the objectives of its service."""
    about_success = any(goal.below_ms is None for goal in goals)
    found = []
    for goal in goals if about_success else (ANY_SERVICE, *goals):
        requests, failures = signal.requests, signal.failures
        if goal.effective:
            if goal.below_ms is not None or signal.effective_requests is None:
                continue  # known of the service as a whole, and of its success
            requests, failures = signal.effective_requests, signal.effective_failures or 0
        found.append(goal.verdict(requests, failures, signal.latency))
    return min(found, key=_WORST_FIRST.index, default="")


def of(objectives: Sequence[Objective]) -> Callable[[App], Goals]:
    """The goals of every service of an app; worked out once for an app that stays the same."""
    known: tuple[App, Goals] | None = None

    def goals(app: App) -> Goals:
        nonlocal known
        if known is None or known[0] is not app:
            meant = [one for objective in objectives if (one := objective.of_app(app.name))]
            known = (
                app,
                {
                    service: [
                        Goal(objective.allowed, objective.threshold_ms, objective.effective)
                        for objective in meant
                        if objective.in_service is None and objective.applies_to(service)
                    ]
                    for service in app.services
                },
            )
        return known[1]

    return goals


def by_policy(path: Path) -> Callable[[App], Goals]:
    """As `of`, the objectives of a policy file, which is known to be sound; it is read at the first call."""

    @cache
    def read() -> Callable[[App], Goals]:
        objectives = yaml.safe_load(path.read_text())["objectives"]
        return of([Objective.model_validate(objective) for objective in objectives])

    def goals(app: App) -> Goals:
        return read()(app)

    return goals
