"""Recorded signals: what watch saw, one JSON object a line, to try policies on later.

Each line is one look at the mesh, as the control plane's `/v1/samples` answered:

    {"now": 1700000000.0, "samples": [...], "instances": [...], "intent": {...}}

`now` is the control plane's clock, `samples` are exports of sidecars since the line before
(`control.signals.sample_to_json`), `instances` are the rows of `/v1/status`; `intent` (faults, splits,
ejections) stands only in lines where it has changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pydantic import ValidationError

from meshdemo.control.model import Intent
from meshdemo.control.signals import Sample, sample_from_json, sample_to_json
from meshdemo.errors import BadInput, Failed

_ROW = {"id", "service", "version", "revision", "ready", "silent", "ejected"}


@dataclass(frozen=True, slots=True)
class Look:
    """One look at the mesh. `intent` None: as before."""

    now: float
    samples: Sequence[Sample]
    instances: Sequence[Mapping[str, Any]]
    intent: Intent | None = None


class Recorder:
    """Writes looks to a file as they come."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("w", encoding="utf-8")
        except OSError as error:
            raise BadInput(f"cannot write {path}: {error.strerror or error}") from error
        self._path = path
        self._intent: Intent | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, look: Look) -> None:
        """Add a look. Raises Failed if it cannot be written."""
        row: dict[str, Any] = {
            "now": look.now,
            "samples": [sample_to_json(sample) for sample in look.samples],
            "instances": list(look.instances),
        }
        if look.intent is not None and look.intent != self._intent:
            self._intent = look.intent
            row["intent"] = look.intent.model_dump(mode="json")
        try:
            self._file.write(json.dumps(row, separators=(",", ":")) + "\n")
            self._file.flush()
        except OSError as error:
            raise Failed(f"cannot write {self._path}: {error.strerror or error}") from error


def read(path: Path) -> Iterator[Look]:
    """The looks of a recording. Raises BadInput naming the line that makes no sense."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _look(line, f"{path}:{number}")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read signals {path}: {getattr(error, 'strerror', None) or error}") from error


def _look(line: str, where: str) -> Look:
    try:
        row = json.loads(line)
        rows = row.get("instances", [])
        for one in rows:
            if missing := _ROW - one.keys():
                raise ValueError(f"an instance lacks {', '.join(sorted(missing))}")
        intent = Intent.model_validate(row["intent"]) if "intent" in row else None
        return Look(float(row["now"]), [sample_from_json(sample) for sample in row["samples"]], rows, intent)
    except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        words = str(error).splitlines()[0]
        raise BadInput(
            f"{where}: no recorded signals: {type(error).__name__}: {words}",
            "record some with: `meshdemo watch --record FILE`",
        ) from error
