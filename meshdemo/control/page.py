"""The page in the browser, and what it lives on: its files, its session, its stream and its history.

One thread makes a snapshot twice a second, once for all viewers, and only while there is one; the history
goes on without. A viewer always gets the newest snapshot: one who reads slowly misses some, and one who does
not read at all (a tab that the browser froze) is dropped before its backlog grows. It comes back by itself.

The stream is one of server-sent events: `journal` (a list of new events), `snapshot`, and comments as
heartbeats. The page reads it with `fetch`, for the key of its session travels in a header, which
`EventSource` cannot send.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flask import Blueprint, Response, abort, jsonify, request, send_from_directory

from meshdemo.apps.model import App
from meshdemo.control import aggregate
from meshdemo.control.api.mesh import Control
from meshdemo.control.api.request import control, open_to_all
from meshdemo.control.goals import Goals
from meshdemo.control.session import SECURITY_HEADERS, Sessions
from meshdemo.control.snapshot import POINT, WINDOW_S, by_service, point, snapshot
from meshdemo.control.telemetry import KEPT_S
from meshdemo.errors import BadInput, Failed

log = logging.getLogger(__name__)

_WEB = Path(__file__).resolve().parent.parent / "ui" / "web"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}

# Sidecars report twice a second. Looking as often, a figure is at most a second behind its request.
_EVERY_S = 0.5
_POINT_EVERY_S = 1.0
_HEARTBEAT_S = 5.0
_MAX_VIEWERS = 16
_MAX_BACKLOG = 2 << 20  # bytes that a viewer may leave unread
_EVENTS_AT_START = 500


@dataclass(frozen=True, slots=True)
class Frame:
    """A snapshot as it goes out."""

    number: int
    content: str


class Broadcast:
    """Makes snapshots while somebody watches, and keeps the history of all services.

    Args:
        mesh: what the snapshots are of.
        every_s: seconds from one snapshot to the next.
        default_goals: what to judge by while no watch says what it judges by.
        by_hand: whether the page can break apps and processes, too (see `hand`).
    """

    def __init__(
        self,
        mesh: Control,
        *,
        every_s: float = _EVERY_S,
        kept_s: float = KEPT_S,
        clock: Callable[[], float] = time.time,
        default_goals: Callable[[App], Goals] = lambda _: {},
        by_hand: bool = False,
    ) -> None:
        self._mesh = mesh
        self._by_hand = by_hand
        self._default_goals = default_goals
        self._every_s = every_s
        self._clock = clock
        self._condition = threading.Condition()
        self._frame = Frame(0, "")
        self._viewers = 0
        self._history: dict[str, deque[tuple[float | None, ...]]] = {}
        self._points_max = int(kept_s / _POINT_EVERY_S)
        self._last_point = 0.0

    def start(self) -> None:
        """Begin, in a thread that ends with the process."""
        threading.Thread(target=self._run, name="page", daemon=True).start()

    def _run(self) -> None:
        due = time.monotonic()
        while True:
            try:
                self.tick()
            except Exception:
                log.exception("no snapshot for the page")
            # At the same pace whatever a snapshot takes, and never faster than it can be made.
            due = max(due + self._every_s, time.monotonic() + 0.2 * self._every_s)
            time.sleep(max(0.0, due - time.monotonic()))

    def tick(self) -> None:
        """Keep a point of the history if one is due, and make a snapshot if somebody is watching."""
        now = self._clock()
        mesh, intent, store = self._mesh.mesh, self._mesh.intent, self._mesh.store
        with self._condition:
            watched = self._viewers > 0
        point_due = now - self._last_point >= _POINT_EVERY_S - self._every_s / 2
        if not (watched or point_due):
            return
        samples = store.window(WINDOW_S + 2)
        services = by_service(samples, aggregate.scopes_of(mesh, intent, store.silent), now)
        if point_due:
            self._last_point = now
            with self._condition:
                for signal in services:
                    points = self._history.setdefault(signal.service, deque(maxlen=self._points_max))
                    points.append(point(signal, now))
        if watched:
            standings = self._mesh.totals.objectives
            goals = standings.goals() or self._default_goals(mesh.app)
            made = snapshot(
                mesh, intent, samples, silent=store.silent, now=now, services=services, goals=goals
            )
            made["objectives"] = [row.model_dump(mode="json") for row in standings.now()]
            made["by_hand"] = self._by_hand
            content = json.dumps(made, separators=(",", ":"))
            with self._condition:
                self._frame = Frame(self._frame.number + 1, content)
                self._condition.notify_all()

    def history(self, service: str) -> list[tuple[float | None, ...]]:
        """The points of a service, oldest first; see `snapshot.POINT`."""
        with self._condition:
            return list(self._history.get(service, ()))

    @property
    def newest(self) -> int:
        """The number of the newest snapshot."""
        return self._frame.number

    def enter(self) -> None:
        """A viewer comes. Raises Failed if there are too many."""
        with self._condition:
            if self._viewers >= _MAX_VIEWERS:
                raise Failed(f"{_MAX_VIEWERS} pages are open already", "close one")
            self._viewers += 1

    def leave(self) -> None:
        """A viewer has gone."""
        with self._condition:
            self._viewers -= 1

    def next(self, seen: int, wait_s: float) -> Frame | None:
        """The newest snapshot if it is newer than `seen`, waiting for one; None if none came."""
        with self._condition:
            if self._condition.wait_for(lambda: self._frame.number > seen, wait_s):
                return self._frame
            return None


def stream(mesh: Control, broadcast: Broadcast, *, backlog: Callable[[], int] = lambda: 0) -> Iterator[str]:
    """The events for one viewer, for as long as it reads them.

    Args:
        backlog: bytes that were sent and that the viewer has not read yet.
    """
    journal_seq, events = mesh.journal.after(0)
    yield _event("journal", json.dumps(events[-_EVENTS_AT_START:], separators=(",", ":")))
    # What was made for earlier viewers may be old by now.
    seen = broadcast.newest
    while backlog() <= _MAX_BACKLOG:
        frame = broadcast.next(seen, _HEARTBEAT_S)
        if frame is None:
            yield ": still here\n\n"
            continue
        seen = frame.number
        journal_seq, events = mesh.journal.after(journal_seq)
        news = _event("journal", json.dumps(events, separators=(",", ":"))) if events else ""
        yield news + _event("snapshot", frame.content)


def _event(name: str, data: str) -> str:
    return f"event: {name}\ndata: {data}\n\n"


def blueprint(broadcast: Broadcast, sessions: Sessions) -> Blueprint:
    """The page's views, for `api.create_app`."""
    page = Blueprint("page", __name__)

    @page.after_app_request
    def secure(answer: Response) -> Response:
        for name, value in SECURITY_HEADERS.items():
            answer.headers.setdefault(name, value)
        return answer

    @page.get("/")
    @open_to_all
    def index() -> Response:
        return _file("index.html")

    @page.get("/web/<name>")
    @open_to_all
    def web(name: str) -> Response:
        return _file(name)

    @page.post("/v1/session")
    def session() -> Response:
        answer = sessions.open(request)
        if answer is None:
            raise BadInput(
                "a session is opened with the token", "open the link that `meshdemo dashboard` prints"
            )
        return answer

    @page.get("/v1/history")
    def history() -> Response:
        service = request.args.get("service", "")
        services = control().mesh.app.services
        if service not in services:
            raise BadInput(f"unknown service '{service}'", f"services: {', '.join(services)}")
        return jsonify({"service": service, "columns": POINT, "points": broadcast.history(service)})

    @page.get("/v1/stream")
    def events() -> Response:
        mesh = control()
        broadcast.enter()
        try:
            answer = Response(
                stream(mesh, broadcast, backlog=_backlog(request.environ)), content_type="text/event-stream"
            )
            # Not at the end of the iterator: one that was never begun is never ended.
            answer.call_on_close(broadcast.leave)
        except BaseException:
            broadcast.leave()
            raise
        return answer

    return page


def _file(name: str) -> Response:
    kind = _TYPES.get(Path(name).suffix)
    if kind is None:
        abort(404)
    answer = send_from_directory(_WEB, name, mimetype=kind)
    # The files of another version of meshdemo may have been at this address a minute ago.
    answer.headers["Cache-Control"] = "no-cache"
    return answer


def _backlog(environ: dict[str, Any]) -> Callable[[], int]:
    """How much the server (waitress) still holds for the client of this request.

    Waitress says so nowhere but in its channel, which it lets a request reach through this one method.
    """
    channel = getattr(environ.get("waitress.client_disconnected"), "__self__", None)
    return lambda: int(getattr(channel, "total_outbufs_len", 0))
