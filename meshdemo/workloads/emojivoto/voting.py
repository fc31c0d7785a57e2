"""voting: counts the votes, over gRPC, in SQLite, so that they survive a restart.

STATE_DIR is the folder of the database (default: the current one); several may share it. RELEASE selects
what it does: release 1 carries the bug of the exercise, release 2 does not.
"""

from __future__ import annotations

import os
import sqlite3
import sys
import threading
import time
from pathlib import Path
from typing import Any

import grpc

from meshdemo.workloads.emojivoto import rpc
from meshdemo.workloads.emojivoto.catalogue import CATALOGUE
from meshdemo.workloads.emojivoto.rpc import pb

_SHARE_S = 5.0
# Choices that a release fails to count.
_BROKEN = {"1": frozenset({":doughnut:"}), "2": frozenset[str]()}


class Votes:
    """The votes by choice, in one SQLite file.

    Args:
        path: of the database; made where it is not there.
    """

    def __init__(self, path: Path) -> None:
        # One connection for all threads: SQLite has one writer anyway, and the lock is held for microseconds.
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, check_same_thread=False, timeout=5)
        # A vote that was answered survives a kill of the process; fsync at each vote would only serve a
        # power failure, at a cost of milliseconds a vote.
        self._share()
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.execute("CREATE TABLE IF NOT EXISTS votes (choice TEXT PRIMARY KEY, n INTEGER NOT NULL)")
        self._db.commit()

    def _share(self) -> None:
        """Have readers and writers of other processes not be in each other's way.

        On a new database that needs it for itself for a moment, and SQLite does not wait for it here.
        """
        give_up = time.monotonic() + _SHARE_S
        while True:
            try:
                self._db.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError:
                if time.monotonic() > give_up:
                    raise
                time.sleep(0.05)

    def add(self, choice: str) -> int:
        """Count one vote; the votes of this choice so far."""
        with self._lock, self._db:
            row = self._db.execute(
                "INSERT INTO votes VALUES (?, 1) ON CONFLICT (choice) DO UPDATE SET n = n + 1 RETURNING n",
                (choice,),
            ).fetchone()
        return int(row[0])

    def standings(self) -> list[tuple[str, int]]:
        """(choice, votes), most votes first."""
        with self._lock:
            return self._db.execute("SELECT choice, n FROM votes ORDER BY n DESC, choice").fetchall()


def main() -> None:
    """Serve until SIGTERM."""
    release = os.environ.get("RELEASE", "1")
    if release not in _BROKEN:
        sys.exit(f"RELEASE={release!r}: there are releases {', '.join(_BROKEN)}")
    folder = Path(os.environ.get("STATE_DIR", "."))
    try:
        votes = Votes(folder / "votes.sqlite")
    except sqlite3.OperationalError as error:
        sys.exit(f"STATE_DIR={str(folder)!r}: cannot keep votes there: {error}")
    broken = _BROKEN[release]

    def vote(request: Any, context: grpc.ServicerContext) -> Any:
        if request.shortcode not in CATALOGUE:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"no emoji {request.shortcode!r}")
        if request.shortcode in broken:
            context.abort(grpc.StatusCode.INTERNAL, "the vote could not be counted")
        return pb.VoteReply(votes=votes.add(request.shortcode))

    def leaderboard(_: Any, __: grpc.ServicerContext) -> Any:
        rows = votes.standings()
        return pb.LeaderboardReply(standings=[pb.Standing(shortcode=c, votes=n) for c, n in rows])

    rpc.serve("VotingService", {"Vote": vote, "Leaderboard": leaderboard})


if __name__ == "__main__":
    main()
