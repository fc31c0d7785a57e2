"""The mesh in Prometheus' form: `GET /metrics` of the control plane.

Counters are added up from the samples as they come, by service, version, route and caller; the histogram by
service and version alone, for each of its series costs one line a bucket. Names and units follow
https://prometheus.io/docs/practices/naming/. All start at zero when the control plane starts.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from meshdemo.control.objectives import Standings
from meshdemo.control.signals import OBJECTIVE_BOUNDS_MS, Cell, Sample, bucket, middle_ms

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from meshdemo.control.client import InstanceRow

_OUTLIERS_KEPT_S = 10.0  # of a caller that is gone nothing is said any more

_Series = tuple[str, str, str, str]  # service, version, route, caller
_LABELS = ("service", "version", "route", "caller")


class Totals:
    """What has been counted since the start. One thread adds, any may read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: defaultdict[tuple[str, ...], int] = defaultdict(int)  # _Series and code
        self._failures: defaultdict[_Series, int] = defaultdict(int)
        self._denied: defaultdict[_Series, int] = defaultdict(int)
        # What callers' outlier detection keeps out, by their instance: when, who they are, how many of what.
        self._outliers: dict[str, tuple[float, str, dict[tuple[str, str], int]]] = {}
        self._mirrored: defaultdict[tuple[str, str], int] = defaultdict(int)
        self._latency: defaultdict[tuple[str, str], defaultdict[int, int]] = defaultdict(
            lambda: defaultdict(int)
        )
        # What callers got, after retries: service and caller.
        self._client: defaultdict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
        self._client_latency: defaultdict[tuple[str], defaultdict[int, int]] = defaultdict(
            lambda: defaultdict(int)
        )
        # Of what is not HTTP: connections by service, version and caller; bytes by service and version.
        self._connections: defaultdict[tuple[str, str, str], int] = defaultdict(int)
        self._bytes: defaultdict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
        self._events: defaultdict[tuple[str, str, str], int] = defaultdict(int)
        self._exports = 0
        self.objectives = Standings()  # as watch says

    def sample(self, sample: Sample) -> None:
        """Count one export."""
        with self._lock:
            self._exports += 1
            kept_out: dict[tuple[str, str], int] = {}
            for cell in sample.cells:
                if not cell.inbound and cell.version:
                    version = (cell.peer, cell.version)
                    kept_out[version] = max(cell.ejected, kept_out.get(version, 0))
            self._outliers[sample.instance] = (sample.end, sample.service, kept_out)
            for cell in sample.cells:
                if not cell.inbound:
                    self._add_client(sample.service, cell)
                    continue
                if cell.mirrored:
                    self._mirrored[sample.service, sample.version] += cell.mirrored
                if cell.connections:
                    self._connections[sample.service, sample.version, cell.peer] += cell.connections
                if cell.received or cell.sent:
                    counted = self._bytes[sample.service, sample.version]
                    counted[0] += cell.received
                    counted[1] += cell.sent
                if not (cell.requests or cell.denied):
                    continue
                series = (sample.service, sample.version, cell.route, cell.peer)
                for code, n in cell.codes.items():
                    self._requests[(*series, code)] += n
                # Also where there are none: a series that begins with its first failure hides that one.
                self._failures[series] += cell.failures
                self._denied[series] += cell.denied
                latency = self._latency[series[:2]]
                for index, n in cell.latency.counts.items():
                    latency[index] += n

    def _add_client(self, caller: str, cell: Cell) -> None:
        if not cell.peer:
            return
        counts = self._client[cell.peer, caller]
        for position, n in enumerate((cell.requests, cell.failures, cell.refused)):
            counts[position] += n
        latency = self._client_latency[(cell.peer,)]
        for index, n in cell.latency.counts.items():
            latency[index] += n

    def event(self, event: Mapping[str, Any]) -> None:
        """Count what watch did and found."""
        if event.get("event") in ("acted", "violated"):
            what = event.get("remedy" if event["event"] == "acted" else "objective")
            with self._lock:
                self._events[(event["event"], str(event.get("service") or ""), str(what or ""))] += 1

    def families(self) -> Iterator[Metric]:
        """The counters and the histogram."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        with self._lock:
            requests, failures, denied = dict(self._requests), dict(self._failures), dict(self._denied)
            latency = {key: dict(counts) for key, counts in self._latency.items()}
            client = {key: tuple(counts) for key, counts in self._client.items()}
            client_latency = {key: dict(counts) for key, counts in self._client_latency.items()}
            events, exports = dict(self._events), self._exports
            connections, carried = dict(self._connections), dict(self._bytes)
            mirrored = dict(self._mirrored)
            newest = max((end for end, _, _ in self._outliers.values()), default=0.0)
            self._outliers = {
                name: said for name, said in self._outliers.items() if said[0] > newest - _OUTLIERS_KEPT_S
            }
            outliers: dict[tuple[str, str, str], int] = {}
            for _, caller, of_versions in self._outliers.values():
                for (service, version), n in of_versions.items():
                    series_of = (service, version, caller)
                    outliers[series_of] = max(n, outliers.get(series_of, 0))

        def counter(
            name: str, words: str, labels: Sequence[str], rows: Iterable[tuple[Sequence[str], float]]
        ) -> Metric:
            family = CounterMetricFamily(f"meshdemo_{name}", words, labels=labels)
            for values, n in rows:
                family.add_metric(values, n)
            return family

        yield counter(
            "requests",
            "Requests that a service answered, by response code.",
            (*_LABELS, "code"),
            requests.items(),
        )
        for name, words, counts in (
            ("failures", "Requests that failed: 5xx, gRPC error status, reset, timeout.", failures),
            ("denied", "Requests that access rules refused.", denied),
        ):
            yield counter(f"request_{name}", words, _LABELS, counts.items())
        gauge = GaugeMetricFamily(
            "meshdemo_outlier_ejected_instances",
            "Instances that the outlier detection of a caller keeps out of its load balancing.",
            labels=("service", "version", "caller"),
        )
        for labels_of, n in outliers.items():
            gauge.add_metric(labels_of, n)
        yield gauge
        yield counter(
            "mirrored_requests",
            "Copies of requests that a version answered to nobody.",
            ("service", "version"),
            mirrored.items(),
        )
        yield counter(
            "tcp_connections",
            "Connections to a service that is not HTTP.",
            ("service", "version", "caller"),
            connections.items(),
        )
        for position, (name, words) in enumerate(
            (("received", "Bytes that callers of such a service sent."), ("sent", "Bytes that they got."))
        ):
            rows = [(workload, both[position]) for workload, both in carried.items()]
            yield counter(f"tcp_{name}_bytes", words, ("service", "version"), rows)
        for position, (name, words) in enumerate(
            (
                ("requests", "Requests as callers see them: retries of one count once."),
                ("request_failures", "Requests that failed for the caller, after retries."),
                ("request_refused", "Requests that a circuit breaker refused; they are failures too."),
            )
        ):
            rows = [(key, counted[position]) for key, counted in client.items()]
            yield counter(f"client_{name}", words, ("service", "caller"), rows)
        for name, words, labels, histograms in (
            (
                "meshdemo_request_duration_seconds",
                "Time from a request's first to its answer's last byte.",
                ("service", "version"),
                latency,
            ),
            (
                "meshdemo_client_request_duration_seconds",
                "The same as callers see it, retries included.",
                ("service",),
                client_latency,
            ),
        ):
            duration = HistogramMetricFamily(name, words, labels=labels)
            for scope, by_index in histograms.items():
                duration.add_metric(scope, _buckets(by_index), sum_value=_sum_s(by_index))
            yield duration
        for event, name, label, words in (
            ("acted", "remedies", "remedy", "Remedies that watch tried."),
            ("violated", "violations", "objective", "Objectives that watch found violated."),
        ):
            said = [((service, what), n) for (kind, service, what), n in events.items() if kind == event]
            yield counter(name, words, ("service", label), said)
        budget = GaugeMetricFamily(
            "meshdemo_objective_error_budget",
            "Share of an objective's error budget that is left, by the watch that runs; below 0: overspent.",
            labels=("service", "objective"),
        )
        for row in self.objectives.now():
            budget.add_metric((row.service, row.objective), row.budget_left)
        yield budget
        yield CounterMetricFamily(
            "meshdemo_telemetry_exports", "Telemetry exports taken in from sidecars.", value=exports
        )


def le_of(bound_ms: float) -> str:
    """How a bound of `BOUNDS_MS` stands in the label `le`."""
    return str(round(bound_ms / 1000, 6))


def _buckets(by_index: Mapping[int, int]) -> list[tuple[str, float]]:
    """Cumulative buckets in seconds: those by which watch judges, so that a rule counts what watch does.

    A bucket holds what is below its bound, as Envoy counts it.
    """
    rows: list[tuple[str, float]] = []
    seen, position = 0, 0
    indices = sorted(by_index)
    for bound in OBJECTIVE_BOUNDS_MS:
        le = bucket(bound) - 1
        while position < len(indices) and indices[position] <= le:
            seen += by_index[indices[position]]
            position += 1
        rows.append((le_of(bound), seen))
    return [*rows, ("+Inf", sum(by_index.values()))]


def _sum_s(by_index: Mapping[int, int]) -> float:
    """The sum of all durations, each taken at its bucket's middle."""
    return sum(middle_ms(index) * n for index, n in by_index.items()) / 1000


SIDECAR_STATES = ("current", "outdated", "disconnected")
INSTANCE_STATES = ("ready", "ejected", "not_ready")


def _sidecar_state(row: InstanceRow) -> str:
    if not row["connected"]:
        return "disconnected"
    return "current" if row["acked"] else "outdated"


def _instance_state(row: InstanceRow) -> str:
    if row["ejected"]:
        return "ejected"
    return "ready" if row["ready"] else "not_ready"


def page(
    totals: Totals, instances: Collection[InstanceRow], *, revision: int, faults: int, trouble: bool
) -> bytes:
    """The whole page, in Prometheus' text format."""
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.core import GaugeMetricFamily
    from prometheus_client.registry import Collector

    class Now(Collector):
        def collect(self) -> Iterator[Metric]:
            yield from totals.families()
            # Each sidecar and each instance has one state, so that the sum over them is how many there are.
            sidecars = GaugeMetricFamily(
                "meshdemo_sidecars", "Sidecars by how their configuration stands.", labels=("state",)
            )
            held = Counter(_sidecar_state(row) for row in instances)
            for state in SIDECAR_STATES:
                sidecars.add_metric((state,), held[state])
            yield sidecars
            there = GaugeMetricFamily(
                "meshdemo_instances",
                "Instances by whether they take traffic.",
                labels=("service", "version", "state"),
            )
            silent = GaugeMetricFamily(
                "meshdemo_instances_silent",
                "Instances, in whatever state, whose sidecars have reported nothing lately.",
                labels=("service", "version"),
            )
            counted = Counter((row["service"], row["version"], _instance_state(row)) for row in instances)
            quiet = Counter((row["service"], row["version"]) for row in instances if row["silent"])
            for workload in dict.fromkeys((row["service"], row["version"]) for row in instances):
                for state in INSTANCE_STATES:
                    there.add_metric((*workload, state), counted[*workload, state])
                silent.add_metric(workload, quiet[workload])
            yield there
            yield silent
            yield GaugeMetricFamily("meshdemo_intent_revision", "Revision of the intent.", value=revision)
            yield GaugeMetricFamily("meshdemo_faults", "Faults in force.", value=faults)
            yield GaugeMetricFamily(
                "meshdemo_journal_trouble", "1 while the journal cannot be written to disk.", value=trouble
            )

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Now())
    return generate_latest(registry)
