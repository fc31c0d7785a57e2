"""Reads the logs that the supervisor writes: one file for each process, each line with its time."""

from __future__ import annotations

import heapq
import re
import time
from collections.abc import Collection, Iterator
from pathlib import Path

_LINE = re.compile(r"(\d+\.\d{3}) (.*)")
_LOOK_S = 0.2


def read(folder: Path, workloads: Collection[str] | None, follow: bool) -> Iterator[tuple[str, str]]:
    """(source, line) of all logs in `folder`, by time; `follow`: also those still to come.

    Args:
        workloads: only their instances and sidecars, each as `SERVICE-VERSION` (or what else has a log, by
            its name); None: everything.
    """
    readers: dict[Path, _Reader] = {}
    while True:
        for path in sorted(folder.glob("*.log")):
            if path not in readers and _belongs(path.stem, workloads):
                readers[path] = _Reader(path)
        lines = [reader.lines() for reader in readers.values()]
        for _, source, line in heapq.merge(*lines, key=lambda entry: entry[0]):
            yield source, line
        if not follow:
            return
        time.sleep(_LOOK_S)


def _belongs(stem: str, workloads: Collection[str] | None) -> bool:
    workload = stem.removesuffix(".sidecar").rpartition("-")[0]
    return workloads is None or stem in workloads or workload in workloads


class _Reader:
    """One process's log, from its beginning, across its rotation."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._source = path.stem.replace(".sidecar", " sidecar")
        self._inode = 0
        self._offset = 0
        self._time = 0.0
        self._started = False

    def lines(self) -> list[tuple[float, str, str]]:
        """(time, source, line) of what has come since the last call."""
        older = self._path.with_name(self._path.name + ".1")
        text = ""
        try:
            inode = self._path.stat().st_ino
            if not self._started:
                text += self._rest(older, 0) if older.exists() else ""
            elif inode != self._inode:
                text += self._rest(older, self._offset)
            if inode != self._inode:
                self._inode, self._offset = inode, 0
            rest = self._rest(self._path, self._offset)
            # A line that is still being written is left for the next time.
            rest = rest[: rest.rfind("\n") + 1]
            self._offset += len(rest.encode("utf-8", "surrogateescape"))
        except OSError:
            return []
        self._started = True
        return [self._parse(line) for line in (text + rest).splitlines()]

    @staticmethod
    def _rest(path: Path, offset: int) -> str:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read().decode("utf-8", "surrogateescape")

    def _parse(self, line: str) -> tuple[float, str, str]:
        """A line without a time (of a program that died early) belongs to the one before it."""
        if match := _LINE.fullmatch(line):
            self._time, line = float(match[1]), match[2]
        return self._time, self._source, line.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
