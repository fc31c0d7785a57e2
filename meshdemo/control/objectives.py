"""How the objectives stand, as watch judges them: told by it, shown on the page and in Prometheus.

A watch that runs says every few seconds how each objective of each service stands; what nobody has confirmed
for a while is forgotten, rather than shown as if it still held. The page judges single figures by the same
objectives (`Goal`), and by those of the default policy while no watch runs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from flask import Blueprint, Response, jsonify, request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from meshdemo.control.signals import Histogram, Signal
from meshdemo.errors import BadInput

FORGOTTEN_AFTER_S = 15.0


class Standing(BaseModel):
    """One objective of one service."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    service: str = Field(max_length=80)
    objective: str = Field(max_length=80)
    text: str = Field(max_length=200, description="such as '99% answered well'")
    health: str = Field(max_length=20, description="ok, unknown, violated or healing")
    good_share: float | None = Field(description="of the longest window judged, 0..1")
    wanted_share: float
    budget_left: float = Field(description="1: nothing spent; 0: all spent; below 0: overspent")
    kind: Literal["success", "latency", "in_service"] = "success"
    below_ms: float | None = Field(default=None, gt=0, description="of one about latency")
    effective: bool = Field(default=False, description="about what callers got after retries")


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


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")

    objectives: list[Standing] = Field(max_length=2_000)


class Standings:
    """What watch said last. Any thread may read and write."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._said_at = float("-inf")
        self._rows: tuple[Standing, ...] = ()

    def say(self, rows: list[Standing]) -> None:
        """This is how all objectives stand now."""
        with self._lock:
            self._said_at, self._rows = self._clock(), tuple(rows)

    def goals(self) -> dict[str, list[Goal]]:
        """What the watch that runs judges by; empty if none does."""
        found: dict[str, list[Goal]] = {}
        for row in self.now():
            if row.kind != "in_service":
                goal = Goal(1 - row.wanted_share, row.below_ms, row.effective)
                found.setdefault(row.service, []).append(goal)
        return found

    def now(self) -> tuple[Standing, ...]:
        """How the objectives stand; nothing if no watch has said so lately."""
        with self._lock:
            return self._rows if self._clock() - self._said_at < FORGOTTEN_AFTER_S else ()


def blueprint(standings: Standings) -> Blueprint:
    """`/v1/objectives`, for `api.create_app`."""
    objectives = Blueprint("objectives", __name__)

    @objectives.get("/v1/objectives")
    def get_objectives() -> Response:
        return jsonify({"objectives": [row.model_dump(mode="json") for row in standings.now()]})

    @objectives.put("/v1/objectives")
    def put_objectives() -> Response:
        try:
            body = _Body.model_validate(request.get_json(silent=True))
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()[:5]
            )
            raise BadInput(f"objectives that make no sense: {problems}") from error
        standings.say(body.objectives)
        return jsonify({})

    return objectives
