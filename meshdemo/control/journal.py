"""The journal: what happened to the mesh, one JSON object a line, only ever appended to.

Faults, remedies, violations, restarts: `report` and the time lines are made from it. A line is written with
one system call, so a process killed at any moment leaves at most one torn line, the last, which is dropped
when the file is read. A disk that is full does not stop the mesh: events stay in memory, the trouble is
shown (`trouble`), and what could not be written is written once there is room.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from meshdemo.errors import BadInput
from meshdemo.files import write_atomic

log = logging.getLogger(__name__)

MAX_EVENT_BYTES = 64 << 10


class Journal:
    """Events, numbered from 1 on, also over restarts. Any thread may append and read.

    Args:
        path: the file; its folder exists.
        max_bytes: a longer file loses its older half.
        kept: so many of the newest events are in memory and can be asked for.
    """

    def __init__(
        self,
        path: Path,
        *,
        clock: Callable[[], float] = time.time,
        max_bytes: int = 8 << 20,
        kept: int = 20_000,
    ) -> None:
        self._path = path
        self._clock = clock
        self._max_bytes = max_bytes
        self._condition = threading.Condition()
        self._events: deque[dict[str, Any]] = deque(maxlen=kept)
        self._unwritten: deque[bytes] = deque(maxlen=kept)
        self._fd: int | None = None
        self._size = 0
        self.trouble = ""  # why events are in memory alone; empty: all is on disk
        self._load()
        self._seq: int = self._events[-1]["seq"] if self._events else 0

    def append(self, event: Mapping[str, Any]) -> dict[str, Any]:
        """Add an event; it gets `seq`, and `time` (now) if it has none. Returns it as it is kept.

        Raises:
            BadInput: not an event (a JSON object that says in `event` what it is), or too long.
        """
        if not isinstance(event.get("event"), str):
            raise BadInput("an event says in `event` what it is", 'such as {"event": "healed", ...}')
        now = self._clock()
        if not isinstance(event.get("time", now), (int, float)):
            raise BadInput(f"time '{event['time']}' of an event is no number", "seconds since the epoch")
        with self._condition:
            kept = {"time": now, **event, "seq": self._seq + 1}
            try:
                line = json.dumps(kept, separators=(",", ":"), allow_nan=False).encode() + b"\n"
            except (TypeError, ValueError) as error:
                raise BadInput(f"an event that is not JSON: {error}") from error
            if len(line) > MAX_EVENT_BYTES:
                raise BadInput(f"an event of {len(line)} bytes", f"at most {MAX_EVENT_BYTES} are kept")
            self._seq += 1
            self._events.append(kept)
            self._unwritten.append(line)
            self._write()
            self._condition.notify_all()
        return kept

    def after(self, seq: int, wait_s: float = 0.0) -> tuple[int, list[dict[str, Any]]]:
        """The newest sequence number, and the events after `seq` that are kept; waits for one to come.

        A negative `seq` stands for the newest.
        """
        with self._condition:
            if seq < 0:
                return self._seq, []
            if self._seq <= seq:
                self._condition.wait_for(lambda: self._seq > seq, wait_s)
            events = []
            for event in reversed(self._events):
                if event["seq"] <= seq:
                    break
                events.append(event)
            return self._seq, events[::-1]

    def close(self) -> None:
        """Let go of the file; a later append opens it anew."""
        with self._condition:
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None

    # -- the file

    def _load(self) -> None:
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            self._complain(error)
            return
        whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:whole].splitlines(), 1):
            event = _parsed(line)
            if event is None:
                log.warning("%s, line %d is no event and is left out", self._path, number)
            else:
                self._events.append(event)
        if whole < len(content):
            log.warning("%s ended in a torn line, which is dropped", self._path)
            try:
                os.truncate(self._path, whole)
            except OSError as error:
                self._complain(error)

    def _write(self) -> None:
        """Bring what is in memory alone to the disk, as far as that takes it."""
        try:
            if self._fd is None:
                self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
                self._size = os.fstat(self._fd).st_size
            if self._size > self._max_bytes:
                self._shorten()
            while self._unwritten:
                self._write_line(self._fd, self._unwritten[0])
                self._unwritten.popleft()
        except OSError as error:
            self._complain(error)
            return
        if self.trouble:
            log.warning("the journal is on disk again")
            self.trouble = ""

    def _write_line(self, fd: int, line: bytes) -> None:
        written = 0
        try:
            while written < len(line):  # a disk that fills up takes a part first
                written += os.write(fd, line[written:])
        except OSError:
            if written:
                os.ftruncate(fd, self._size)
            raise
        self._size += len(line)

    def _shorten(self) -> None:
        """Replace the file by the newest events that fit into half of what is allowed."""
        lines: list[bytes] = []
        size, unwritten = 0, len(self._unwritten)
        for event in list(self._events)[-1 - unwritten :: -1]:
            line = json.dumps(event, separators=(",", ":")).encode() + b"\n"
            size += len(line)
            if size > self._max_bytes // 2:
                break
            lines.append(line)
        write_atomic(self._path, b"".join(reversed(lines)), durable=True)
        if self._fd is not None:
            os.close(self._fd)
        self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._size = os.fstat(self._fd).st_size

    def _complain(self, error: OSError) -> None:
        trouble = f"the journal is kept in memory alone: {self._path}: {error.strerror}"
        if trouble != self.trouble:
            log.error("%s", trouble)
            self.trouble = trouble


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The event on a line; None if it is none."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    if isinstance(event, dict) and isinstance(event.get("seq"), int):
        return event
    return None
