"""Open-loop load: requests are sent when they are due, whatever became of the ones before.

A closed-loop client waits for the answer before it sends the next request, so a server that stalls for a
second is asked, and seen to fail, just once per connection. Here the schedule alone says when a request is
due; its latency counts from that moment, and a generator that was itself held up sends what is overdue at
once instead of shifting the schedule. See Gil Tene, "How NOT to Measure Latency" (coordinated omission).

The client is an HTTP/1.1 one of its own: everything happens in callbacks of gevent's event loop, one
keep-alive connection per request in flight, no greenlet or thread per request. That is what leaves half of a
small machine to the sidecars at 2,000 requests/s.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit
from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]

import gevent
import gevent.socket
import httptools

from meshdemo.workloads.settings import BadSetting

MAX_RPS = 100_000.0
MAX_IN_FLIGHT = 60_000

_READ, _WRITE = 1, 2  # events of gevent's loop
_CHUNK = 65536
_TICK_S = 0.25  # how often timeouts, idle connections and the achieved rate are looked after
_ACHIEVED_OVER_S = 10.0
_IDLE_S = 30.0
_RESOLVE_S = 5.0

# What stands in the place of a status code when there is none.
DROPPED = "dropped"  # was due with the limit of requests in flight reached: never sent
CONNECT = "connect"  # no connection, or no address
RESET = "reset"  # the connection broke before the answer was complete
TIMEOUT = "timeout"
INVALID = "invalid"  # the answer is not HTTP


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go, and what goes over the wire."""

    url: str
    host: str  # to connect to: the proxy's where there is one
    port: int
    origin: str  # what stands before the path in the request line: nothing, or http://host:port for a proxy
    netloc: str
    path: str

    @staticmethod
    def of(url: str, variables: Mapping[str, str]) -> Target:
        """`url` directly, or through http_proxy (HTTP_PROXY) unless no_proxy (NO_PROXY) excepts it.

        Raises:
            BadSetting: TARGET or the proxy is no http:// URL.
        """
        parts = _http_url("TARGET", url)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        proxies = {name.lower(): value for name, value in variables.items() if name.isupper()}
        proxies |= {name: value for name, value in variables.items() if name.islower()}  # these win
        proxy = proxies.get("http_proxy", "")
        if proxy and not proxy_bypass_environment(parts.netloc, {"no": proxies.get("no_proxy", "")}):
            gate, origin = _http_url("HTTP_PROXY", proxy), f"http://{parts.netloc}"
        else:
            gate, origin = parts, ""
        return Target(url, gate.hostname, gate.port, origin, parts.netloc, path)

    def request(self, agent: str, path: str | None = None) -> bytes:
        """A GET of `path` (default: the URL's own), as it goes over the wire."""
        line = f"{self.origin}{self.path if path is None else path}"
        head = f"GET {line} HTTP/1.1\r\nHost: {self.netloc}\r\nUser-Agent: {agent}\r\nAccept: */*\r\n\r\n"
        return head.encode("ascii")


@dataclass(frozen=True, slots=True)
class _Url:
    netloc: str
    hostname: str
    port: int
    path: str
    query: str


def _http_url(name: str, url: str) -> _Url:
    allowed = "a URL like http://service-b:5000/work"
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        port = parts.port or 80
        url.encode("ascii")
    except ValueError:
        raise BadSetting(name, url, allowed) from None
    if parts.scheme != "http" or not parts.hostname or parts.username or any(c.isspace() for c in url):
        raise BadSetting(name, url, allowed)
    return _Url(parts.netloc, parts.hostname, port, parts.path, parts.query)


class Schedule:
    """When requests are due. Pure: the clock (s) is passed in.

    Args:
        gap: time to the next request (s) at a rate of one per second; 1 for even spacing.
    """

    def __init__(self, gap: Callable[[], float] = lambda: 1.0) -> None:
        self._gap = gap
        self.rps = 0.0
        self.next_due: float | None = None  # None: paused

    def set_rate(self, rps: float, now: float) -> None:
        """From now on `rps` requests per second; 0 pauses. What is overdue should be taken before.

        What is left of the current gap shrinks or grows with the rate, so a change takes effect at once
        and changes that follow each other quickly neither starve nor add requests.
        """
        if rps == 0:
            self.next_due = None
        elif self.next_due is None:
            self.next_due = now
        else:
            self.next_due = now + (self.next_due - now) * self.rps / rps
        self.rps = rps

    def take(self, now: float) -> list[float]:
        """The times of the requests that are due by `now` and were not taken before."""
        due = []
        while self.next_due is not None and self.next_due <= now:
            due.append(self.next_due)
            self.next_due += self._gap() / self.rps
        return due


def uniform() -> float:
    """The gap of evenly spaced arrivals."""
    return 1.0


def poisson() -> float:
    """A gap of arrivals that know nothing of each other, as those of many independent users."""
    return random.expovariate(1.0)


class Load:
    """Keeps a schedule against one target, and reports how each request ended.

    Args:
        next_request: what goes over the wire the next time; called for each request.
        record: called with the status code, or one of the words above, and the latency in seconds since the
            request was due (None if it was never sent).
    """

    def __init__(
        self,
        target: Target,
        schedule: Schedule,
        *,
        next_request: Callable[[], bytes],
        max_in_flight: int,
        timeout_s: float,
        record: Callable[[str, float | None], None],
    ) -> None:
        self.target = target
        self.next_request = next_request
        self.rps = 0.0  # asked for
        self.max_in_flight = max_in_flight
        self.loop = gevent.get_hub().loop
        self.addresses: list[tuple[int, tuple[object, ...]]] = []  # of the target: family, socket address
        self.active: dict[_Connection, None] = {}  # oldest first
        self.idle: list[_Connection] = []  # used from the end, so that those not needed stay idle
        self.dropped = 0
        self._sent = 0
        self._schedule = schedule
        self._timeout_s = timeout_s
        self._record = record
        self._alarm = _alarm(self._fire)
        self._ticker = self.loop.timer(_TICK_S, _TICK_S)
        self._history: deque[tuple[float, int]] = deque(maxlen=round(_ACHIEVED_OVER_S / _TICK_S))
        self._resolver: gevent.Greenlet | None = None
        self._started = False

    @property
    def in_flight(self) -> int:
        """Requests sent and not answered."""
        return len(self.active)

    def start(self) -> None:
        """Make load from when the target's name was looked up for the first time, found or not."""
        self._ticker.start(self._tick)
        self._resolver = gevent.spawn(self._resolve)

    def set(self, rps: float, max_in_flight: int) -> None:
        """Change rate (requests/s, 0 pauses) and limit, at once."""
        self.rps = rps
        self.max_in_flight = max_in_flight
        if not self._started:
            return
        if rps != self._schedule.rps:
            self._fire()
            now = time.monotonic()
            self._schedule.set_rate(rps, now)
            self._history.clear()
            self._history.append((now, self._sent))
        self._fire()

    def achieved_rps(self) -> float:
        """Requests sent per second, over the last 10 s or since the rate was changed."""
        now = time.monotonic()
        then, sent = self._history[0] if self._history else (now, self._sent)
        return (self._sent - sent) / (now - then) if now - then > _TICK_S / 2 else 0.0

    def stop(self, timeout_s: float) -> None:
        """Send nothing more and wait for what is in flight, for at most `timeout_s`."""
        if self._resolver is not None:
            self._resolver.kill()
        self._started = False  # a change that still comes is too late
        self._schedule.set_rate(0.0, time.monotonic())
        deadline = time.monotonic() + timeout_s
        while self.active and time.monotonic() < deadline:
            gevent.sleep(0.01)

    def finished(self, connection: _Connection, outcome: str, *, reusable: bool) -> None:
        """A connection reports the end of its request."""
        del self.active[connection]
        if reusable:
            self.idle.append(connection)
        self._record(outcome, time.monotonic() - connection.due)

    def _resolve(self) -> None:
        """Know the target's addresses, and keep knowing them. The first look-up starts the load."""
        while True:
            try:
                found = gevent.socket.getaddrinfo(self.target.host, self.target.port, type=socket.SOCK_STREAM)
                addresses = [(family, address) for family, _, _, _, address in found]
                if set(addresses) != set(self.addresses):
                    self.addresses = addresses
            except OSError:
                pass  # what was known may still be right; with nothing known each request says CONNECT
            if not self._started:
                self._started = True
                self.set(self.rps, self.max_in_flight)
            gevent.sleep(_RESOLVE_S)

    def _fire(self) -> None:
        """Send what is due, and be called again when the next request is."""
        for due in self._schedule.take(time.monotonic()):
            if len(self.active) >= self.max_in_flight:
                self.dropped += 1
                self._record(DROPPED, None)
                continue
            self._sent += 1
            connection = self.idle.pop() if self.idle else _Connection(self)
            self.active[connection] = None
            connection.begin(due)
        self._alarm.at(self._schedule.next_due)

    def _tick(self) -> None:
        now = time.monotonic()
        self._history.append((now, self._sent))
        while self.active:
            oldest = next(iter(self.active))
            if now - oldest.begun < self._timeout_s:
                break
            oldest.fail(TIMEOUT)
        while self.idle and now - self.idle[0].begun > _IDLE_S:
            self.idle.pop(0).close()


class _Connection:
    """One keep-alive connection, with at most one request on it.

    Nothing is ever sent twice: a retry would hide the very failures that this load is there to show, and is
    the sidecar's decision.
    """

    __slots__ = ("_load", "_parser", "_reusable", "_sock", "_status", "_tried", "_watcher", "begun", "due")

    def __init__(self, load: Load) -> None:
        self.due = 0.0  # of the current request
        self.begun = 0.0
        self._load = load
        self._sock: socket.socket | None = None
        self._watcher: object = None
        self._status = 0  # of a complete answer
        self._reusable = False
        self._tried = 0
        self._parser = httptools.HttpResponseParser(self)

    def begin(self, due: float) -> None:
        """Send the request that was due at `due`."""
        self.due = due
        self.begun = time.monotonic()
        if self._sock is None:
            self._connect()
        else:
            self._send()

    def fail(self, outcome: str) -> None:
        """The request on this connection ends without an answer."""
        self.close()
        self._load.finished(self, outcome, reusable=False)

    def close(self) -> None:
        """Let go of the socket."""
        self._unwatch()
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def on_message_complete(self) -> None:
        """Called by the parser."""
        status = self._parser.get_status_code()
        if status >= 200:  # 1xx only announce the answer
            self._status = status
            self._reusable = self._parser.should_keep_alive()  # forgotten once this returns

    def _connect(self) -> None:
        """Connect to the first address that takes the connection."""
        addresses = self._load.addresses
        while self._tried < len(addresses):
            family, address = addresses[self._tried]
            self._tried += 1
            try:
                self._sock = socket.socket(family, socket.SOCK_STREAM)
                self._sock.setblocking(False)
                self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._sock.connect(address)
            except BlockingIOError:
                self._watch(_WRITE, self._on_connected)
                return
            except OSError:  # refused at once, or no more file descriptors
                self.close()
                continue
            self._on_connected()
            return
        self.fail(CONNECT)

    def _on_connected(self) -> None:
        assert self._sock is not None
        self._unwatch()
        if self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.close()
            self._connect()
            return
        self._watch(_READ, self._on_readable)
        self._send()

    def _send(self) -> None:
        assert self._sock is not None
        request = self._load.next_request()
        try:
            sent = self._sock.send(request)  # fits into the empty buffer of a connection that was idle
        except OSError:
            sent = 0
        if sent != len(request):
            self.fail(RESET)

    def _on_readable(self) -> None:
        assert self._sock is not None
        try:
            data = self._sock.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        busy = self in self._load.active
        if not data or not busy:  # the end, or an answer that nobody asked for
            if busy:
                self.fail(RESET)
            else:
                self._load.idle.remove(self)
                self.close()
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.fail(INVALID)
            return
        if self._status:
            status, self._status = self._status, 0
            if not self._reusable:
                self.close()
            self._load.finished(self, str(status), reusable=self._reusable)

    def _watch(self, events: int, callback: Callable[[], None]) -> None:
        assert self._sock is not None
        watcher = self._load.loop.io(self._sock.fileno(), events)
        watcher.start(callback)
        self._watcher = watcher

    def _unwatch(self) -> None:
        if self._watcher is not None:
            self._watcher.stop()  # type: ignore[attr-defined]
            self._watcher.close()  # type: ignore[attr-defined]
            self._watcher = None


class _LoopAlarm:
    """Calls back at a time of the monotonic clock, by the event loop's timer: up to 1 ms late.

    The callback must call `at` again.
    """

    def __init__(self, callback: Callable[[], None]) -> None:
        self._loop = gevent.get_hub().loop
        self._callback = callback
        self._timer: object = None

    def at(self, when: float | None) -> None:
        """Call back at `when`, instead of what was set before; None: not at all."""
        if self._timer is not None:
            self._timer.close()  # type: ignore[attr-defined]
            self._timer = None
        if when is not None:
            timer = self._loop.timer(max(0.0, when - time.monotonic()))
            timer.start(self._callback)
            self._timer = timer


class _KernelAlarm:
    """The same by a Linux timerfd: to some 50 µs.

    A latency counts from when a request was due, so what the alarm is late would be counted as latency, and
    the wait of an event loop is in whole milliseconds.

    Raises:
        OSError, AttributeError: this system has no timerfd.
    """

    class _Spec(ctypes.Structure):
        """struct itimerspec."""

        _fields_ = tuple((name, ctypes.c_long) for name in ("every_s", "every_ns", "first_s", "first_ns"))

    def __init__(self, callback: Callable[[], None]) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._settime = libc.timerfd_settime
        clock_monotonic, absolute = 1, 1
        self._fd = libc.timerfd_create(clock_monotonic, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._flags = absolute
        self._watcher = gevent.get_hub().loop.io(self._fd, _READ)
        self._watcher.start(callback)

    def at(self, when: float | None) -> None:
        """Call back at `when`, instead of what was set before; None: not at all."""
        # Setting the time also takes back that it rang, so there is nothing to read.
        seconds, part = divmod(when, 1.0) if when is not None else (0.0, 0.0)
        spec = self._Spec(0, 0, int(seconds), int(part * 1e9))
        self._settime(self._fd, self._flags, ctypes.byref(spec), None)


def _alarm(callback: Callable[[], None]) -> _LoopAlarm | _KernelAlarm:
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            return _KernelAlarm(callback)
    return _LoopAlarm(callback)
