"""How much to measure: the whole of it, or a quick look."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scale:
    """What was asked for. Each suite says what it does by default, and what in a quick run."""

    quick: bool = False
    runs: int | None = None  # rounds that were asked for
    large: bool = False  # also what takes a big machine
    alone: bool = False  # heal: watch alone

    def rounds(self, whole: int, *, quick: int) -> int:
        """Rounds: as asked for, else by the suite's own numbers."""
        return self.runs if self.runs is not None else self.seconds(whole, quick=quick)

    def seconds(self, whole: int, *, quick: int) -> int:
        """A length: that of a whole run, or of a quick one."""
        return quick if self.quick else whole
