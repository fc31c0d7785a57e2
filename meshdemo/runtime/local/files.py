"""Locks that the kernel releases when their holder dies."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from meshdemo.errors import Failed
from meshdemo.runtime.local.paths import make_home

_POLL_S = 0.05
_NAMED_AFTER = 20  # looks
_WAIT = "wait until it is done, then run this again"


class Lock:
    """A lock on a file, released by the kernel when its holder dies. The file names the holder."""

    def __init__(self, path: Path, fd: int) -> None:
        self._path = path
        self._fd = fd

    @staticmethod
    def take(path: Path, holder: str, *, wait_s: float = 0, remedy: str = _WAIT) -> Lock:
        """Take the lock, waiting up to `wait_s` for it.

        Raises Failed naming the holder (and `remedy`) if somebody else has it, or if the file cannot be made.
        """
        give_up = time.monotonic() + wait_s
        while (fd := _try(path)) is None:
            if time.monotonic() >= give_up:
                raise Failed(f"{_read(path)} is at work on it", remedy)
            time.sleep(_POLL_S)
        with suppress(OSError):  # on a full disk the lock holds all the same, it only has no name on it
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{holder} (process {os.getpid()})".encode(), 0)
        return Lock(path, fd)

    def release(self, *, remove: bool = False) -> None:
        """Give the lock back; `remove` takes the file away too."""
        if remove:
            self._path.unlink(missing_ok=True)
        os.close(self._fd)


def _try(path: Path) -> int | None:
    import fcntl  # not on Windows, where this module is imported all the same

    try:
        make_home(path.parent)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Failed(
            f"cannot write {path}: {error.strerror}", "set MESHDEMO_HOME to a folder that you can write to"
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The holder before may have removed the file: then this lock is on a file that nobody else sees.
        if os.fstat(fd).st_ino == path.stat().st_ino:
            return fd
    except OSError:
        pass
    os.close(fd)
    return None


def _read(path: Path) -> str:
    """Who holds a lock. It writes its name a moment after it has taken it."""
    with suppress(OSError):
        for _ in range(_NAMED_AFTER):
            if text := path.read_text().strip():
                return text
            time.sleep(_POLL_S)
    return "another meshdemo"


@contextmanager
def locked(path: Path, holder: str, remedy: str = _WAIT) -> Iterator[None]:
    """Hold a lock for a block; see `Lock.take`."""
    lock = Lock.take(path, holder, remedy=remedy)
    try:
        yield
    finally:
        lock.release(remove=True)
