"""Signals: what happened in a window, from what the sidecars report. Pure: samples in, signals out.

A `Sample` is one telemetry export of one sidecar (about half a second). A `Signal` is the sum of samples over
a window for one scope. Success rate and latency of a service are what its own sidecars answered
(`inbound` cells); what its callers got after retries is in the `outbound` cells of the callers.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

# Upper bounds in ms: the round numbers that people write into objectives, which are therefore exact, and what
# it takes besides so that neighbours differ by at most 20 %: a quantile reported at a bucket's geometric
# middle is off by less than 10 % between 1 ms and 10 s. All are two-digit decimals, which are also the bin
# edges of Envoy's own log-linear histogram (circllhist), so that each of its bins lies in one bucket.
_DECADE = (1.0, 1.1, 1.3, 1.5, 1.7, 2.0, 2.2, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0, 7.0, 7.5, 8.0, 9.0)
BOUNDS_MS: tuple[float, ...] = (
    0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9,
    *(round(step * scale, 1) for scale in (1, 10, 100, 1000) for step in _DECADE),
    10_000.0, 12_000.0, 15_000.0, 20_000.0, 30_000.0, 60_000.0,
)  # fmt: skip

# Envoy counts a bin as below a bound if its lower edge is not above it: with a bound of 400 ms, all of
# [400, 410) ms would be in the bucket below. So it is given a microsecond less.
ENVOY_BOUNDS_US: tuple[int, ...] = tuple(round(bound * 1000) - 1 for bound in BOUNDS_MS)

# Those by which latencies are judged, by watch and by Prometheus alike. The control plane exports no others,
# for each costs a line of every histogram at every scrape.
_WRITTEN = frozenset((1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.5, 8.0))
OBJECTIVE_BOUNDS_MS: tuple[float, ...] = (
    0.5,
    *(round(step * scale, 1) for scale in (1, 10, 100, 1000) for step in _DECADE if step in _WRITTEN),
    10_000.0, 15_000.0, 20_000.0, 30_000.0, 60_000.0,
)  # fmt: skip

MIRRORED = "~"
"""What a route's name begins with, as sidecars report it, where the request was only a copy of another."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """Latency counts by bucket of `BOUNDS_MS`, sparse: bucket index -> count (the last index is +Inf)."""

    counts: Mapping[int, int] = field(default_factory=dict)

    @staticmethod
    def of(latencies_ms: Iterable[float]) -> Histogram:
        """The histogram of single latencies (ms)."""
        counts: dict[int, int] = {}
        for value in latencies_ms:
            index = bucket(value)
            counts[index] = counts.get(index, 0) + 1
        return Histogram(counts)

    @property
    def total(self) -> int:
        """Number of requests counted."""
        return sum(self.counts.values())

    def above(self, threshold_ms: float) -> int:
        """Requests that took the threshold or longer, to the next bound (see `effective_bound_ms`)."""
        first = slow_from(threshold_ms)
        return sum(n for index, n in self.counts.items() if index >= first)

    def quantile_ms(self, q: float) -> float | None:
        """The q-quantile (0..1) in ms, at its bucket's geometric middle; None without requests."""
        total = self.total
        if not total:
            return None
        rank, seen = max(1, math.ceil(q * total)), 0
        for index in sorted(self.counts):
            seen += self.counts[index]
            if seen >= rank:
                return middle_ms(index)
        raise AssertionError("unreachable: rank is at most total")


def bucket(latency_ms: float) -> int:
    """Index of the bucket that a latency falls into; a bound belongs to the bucket above it."""
    return bisect_right(BOUNDS_MS, latency_ms)


def middle_ms(index: int) -> float:
    """The geometric middle of a bucket; the last, open bucket is reported at its lower bound."""
    if index == 0:
        return BOUNDS_MS[0] / 2
    if index >= len(BOUNDS_MS):
        return BOUNDS_MS[-1]
    return math.sqrt(BOUNDS_MS[index - 1] * BOUNDS_MS[index])


def effective_bound_ms(threshold_ms: float) -> float:
    """The bound that a threshold comes down to: itself if it is one, else the one nearest to it by ratio."""
    return min(OBJECTIVE_BOUNDS_MS, key=lambda bound: abs(math.log(bound / threshold_ms)))


@lru_cache(maxsize=256)
def slow_from(threshold_ms: float) -> int:
    """The index of the first bucket that is too slow for a threshold (ms, more than 0)."""
    return bucket(effective_bound_ms(threshold_ms))


def merge(histograms: Iterable[Histogram]) -> Histogram:
    """The sum of histograms."""
    counts: dict[int, int] = {}
    for histogram in histograms:
        for index, n in histogram.counts.items():
            counts[index] = counts.get(index, 0) + n
    return Histogram(counts)


@dataclass(frozen=True, slots=True)
class Cell:
    """Requests (of what is not HTTP: connections) of one sidecar in one export that share direction, peer and
    route.

    inbound: `peer` is the caller's service ('' if it proved none); outbound: `peer` is the service called.
    """

    inbound: bool
    peer: str
    route: str
    requests: int = 0  # without the denied ones, which never reached the app
    failures: int = 0  # 5xx, gRPC error status, reset or timeout
    denied: int = 0  # refused by access rules; not a failure
    refused: int = 0  # refused by a circuit breaker; in outbound cells also counted as a failure
    secured: int = 0  # of requests and denied: over mutual TLS, the peer's certificate seen
    identity: str = ""  # the peer's SPIFFE id
    codes: Mapping[str, int] = field(default_factory=dict)  # response code -> count
    version: str = ""  # outbound: the version of `peer` that the (last) try went to
    ejected: int = 0  # outbound: instances of it that this caller's outlier detection keeps out just now
    mirrored: int = 0  # inbound: copies of requests (`traffic set --mirror`); in none of the other figures
    mirrored_failures: int = 0  # of them, those that failed; nobody got their answer
    connections: int = 0  # of a TCP service: opened, and led to the app
    received: int = 0  # of a TCP service: bytes from callers; not told apart by them, so `peer` is ''
    sent: int = 0  # bytes to them
    latency: Histogram = field(default_factory=Histogram)  # of `requests`; a reset one may have none
    failed_latency: Histogram = field(default_factory=Histogram)  # the part of `latency` that failed


@dataclass(frozen=True, slots=True)
class Sample:
    """One telemetry export of one sidecar, covering (start, end]."""

    instance: str
    service: str
    version: str
    revision: int
    start: float
    end: float
    in_flight: int = 0  # inbound requests unanswered at `end`
    arrived: int = 0  # inbound requests that arrived in (start, end]
    waiting: Sequence[tuple[float, int]] = ()  # (s, n): at least n of them were so for at least s; s grows
    usual: int = 0  # so many were in flight a few seconds ago anyway: what takes long, and may
    cells: Sequence[Cell] = ()

    @property
    def overdue(self) -> int:
        """At least so many inbound requests were in flight for the whole export, and are unanswered."""
        return self.waiting[0][1] if self.waiting else 0

    def waiting_for(self, seconds: float) -> int:
        """At least so many inbound requests more than usual were unanswered at `end` after that time.

        Those few that take long (and are counted when they are answered) are in flight together: 3 % of 100
        requests/s that take 10 s are 30 at any moment, and no sign that anything hangs.
        """
        return max(0, next((n for waited_s, n in self.waiting if waited_s >= seconds), 0) - self.usual)


@dataclass(frozen=True, slots=True)
class Signal:
    """What happened to one scope in one window. Fields that do not apply to the scope are None."""

    service: str
    version: str | None
    instance: str | None
    route: str | None
    caller: str | None
    start: float
    end: float
    requests: int  # all of the samples that end in the window
    requests_within: float  # of them, what lies in it: a sample may stick out at its start
    failures: int
    latency: Histogram
    failed_latency: Histogram = field(default_factory=Histogram)
    overdue: int = 0  # in flight for longer than one export and still unanswered
    denied: int = 0
    refused: int = 0
    silent: bool = False  # an instance whose sidecar reported nothing lately: unknown, not healthy
    ejected: bool = False
    outlier_ejected: int = 0  # instances that callers' outlier detection (Envoy's own) keeps out just now
    mirrored: int = 0  # copies of requests that were answered besides, in none of the other figures
    mirrored_failures: int = 0
    connections: int = 0  # of a TCP service; `received` and `sent` are bytes
    received: int = 0
    sent: int = 0
    effective_requests: int | None = None
    effective_failures: int | None = None

    @property
    def rps(self) -> float:
        """Requests per second over the window."""
        seconds = self.end - self.start
        return self.requests_within / seconds if seconds > 0 else 0.0

    @property
    def success_rate(self) -> float | None:
        """Share of requests that the service itself answered well (0..1); None without requests."""
        return 1 - self.failures / self.requests if self.requests else None

    def bad(self, slower_than_ms: float | None = None) -> int:
        """Requests that failed or were too slow; one that did both counts once."""
        if slower_than_ms is None:
            return self.failures
        slow = self.latency.above(slower_than_ms) - self.failed_latency.above(slower_than_ms)
        return self.failures + slow

    @property
    def effective_success_rate(self) -> float | None:
        """Share of requests that callers saw succeed after retries (0..1); None where unknown."""
        if not self.effective_requests:
            return None
        return 1 - (self.effective_failures or 0) / self.effective_requests


def sample_to_json(sample: Sample) -> dict[str, Any]:
    """A sample as plain JSON; fields at their default are left out."""
    return {
        "instance": sample.instance,
        "service": sample.service,
        "version": sample.version,
        "revision": sample.revision,
        "start": sample.start,
        "end": sample.end,
        "in_flight": sample.in_flight,
        "arrived": sample.arrived,
        "waiting": list(sample.waiting),
        "usual": sample.usual,
        "cells": [_cell_to_json(cell) for cell in sample.cells],
    }


_COUNTS = (
    "requests", "failures", "denied", "refused", "secured", "identity", "version", "ejected", "mirrored",
    "mirrored_failures", "connections", "received", "sent",
)  # fmt: skip


def _cell_to_json(cell: Cell) -> dict[str, Any]:
    row: dict[str, Any] = {"inbound": cell.inbound, "peer": cell.peer, "route": cell.route}
    for name in _COUNTS:
        if value := getattr(cell, name):
            row[name] = value
    if cell.codes:
        row["codes"] = dict(cell.codes)
    for name in ("latency", "failed_latency"):
        if counts := getattr(cell, name).counts:
            row[name] = list(counts.items())
    return row


def sample_from_json(row: Mapping[str, Any]) -> Sample:
    """The inverse of `sample_to_json`."""
    waiting = tuple((waited_s, n) for waited_s, n in row["waiting"])
    cells = tuple(_cell_from_json(cell) for cell in row["cells"])
    return Sample(**{**row, "waiting": waiting, "cells": cells})


def _cell_from_json(row: Mapping[str, Any]) -> Cell:
    latencies = {name: Histogram(dict(row[name])) for name in ("latency", "failed_latency") if name in row}
    return Cell(**{**row, **latencies})
