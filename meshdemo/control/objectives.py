"""How the objectives stand, as watch judges them: told by it, shown on the page and in Prometheus.

A watch that runs says every few seconds how each objective of each service stands; what nobody has confirmed
for a while is forgotten, rather than shown as if it still held. The page judges single figures by the same
objectives (goals.py), and by those of the default policy while no watch runs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Literal

from flask import Blueprint, Response, jsonify, request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from meshdemo.control.goals import Goal
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
