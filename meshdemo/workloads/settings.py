"""What the environment says a workload should be, read once, at start.

A value that makes no sense ends the program before it serves anything: a bad release must fail where it is
rolled out, not misbehave quietly. Hence every reader here either returns a value in range or raises
`BadSetting` with one line that names the variable, the value and what is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_SHOWN = 60  # characters of a bad value that are worth repeating


class BadSetting(Exception):
    """An environment variable has a value that makes no sense. The message is one line for the user."""

    def __init__(self, name: str, value: str, allowed: str) -> None:
        shown = repr(value if len(value) <= _SHOWN else value[:_SHOWN] + "...")
        super().__init__(f"{name}={shown} makes no sense; allowed: {allowed}")


@dataclass(frozen=True, slots=True)
class Environment:
    """Typed access to environment variables. A variable that is not set takes the default.

    One that is set to nothing is a value like any other: no number is spelled ''.
    """

    variables: Mapping[str, str]

    def text(self, name: str, default: str) -> str:
        """A text of at least one character."""
        value = self.variables.get(name, default)
        if not value.strip() and default:
            raise BadSetting(name, value, "a text that is not empty")
        return value

    def number(self, name: str, default: float, *, allowed: str, low: float, high: float = math.inf) -> float:
        """A finite number from `low` to `high`, both included; `allowed` says so in words."""
        text = self.variables.get(name)
        if text is None:
            return default
        try:
            value = float(text)
        except ValueError:
            raise BadSetting(name, text, allowed) from None
        if not math.isfinite(value) or not low <= value <= high:
            raise BadSetting(name, text, allowed)
        return value + 0.0  # -0.0 becomes 0.0

    def whole(self, name: str, default: int, *, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        text = self.variables.get(name)
        if text is None:
            return default
        allowed = f"a whole number from {low} to {high}"
        try:
            value = int(text)
        except ValueError:
            raise BadSetting(name, text, allowed) from None
        if not low <= value <= high:
            raise BadSetting(name, text, allowed)
        return value

    def choice(self, name: str, choices: Sequence[str]) -> str:
        """One of `choices`; the first is the default."""
        value = self.variables.get(name, choices[0])
        if value not in choices:
            raise BadSetting(name, value, " or ".join(choices))
        return value


@dataclass(frozen=True, slots=True)
class Identity:
    """Where a workload listens, and who it is in the mesh."""

    host: str
    port: int  # 0: the system chooses
    service: str
    version: str
    instance: str
    drain_s: float  # how long requests in flight may take after SIGTERM

    @staticmethod
    def of(env: Environment, service: str) -> Identity:
        """Read HOST, PORT, SERVICE, VERSION, INSTANCE and DRAIN_S; `service` is the default name."""
        name = env.text("SERVICE", service)
        version = env.text("VERSION", "v1")
        return Identity(
            host=env.text("HOST", "127.0.0.1"),
            port=env.whole("PORT", 5000, low=0, high=65535),
            service=name,
            version=version,
            instance=env.text("INSTANCE", f"{name}-{version}"),
            drain_s=env.number("DRAIN_S", 10.0, allowed="seconds, 0 or more", low=0.0),
        )
