"""What the control plane carries: simulated sidecars with real ADS and OTLP streams, from another process.

The control plane is the product's own process, with TLS, tokens, telemetry every 5 s (more seldom where there
are so many sidecars that the product has them report so) and 100 services (fewer where there are fewer
sidecars). The sidecars are on the same machine and take as much of it as they need.
"""

from __future__ import annotations

import hashlib
import math
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import psutil

from meshdemo.apps.model import App
from meshdemo.bench import machine
from meshdemo.bench.model import Bar, Curves, Figure, Findings, LeftOut
from meshdemo.bench.scale import Scale
from meshdemo.bench.sidecars import Crowd
from meshdemo.bench.stage import Process, Stage, Tell, attempt, until
from meshdemo.bench.stats import growth, quantile
from meshdemo.control.bootstrap import report_interval_s
from meshdemo.control.client import ControlClient
from meshdemo.control.model import Effect, Instance, MeshState
from meshdemo.files import write_atomic

TITLE = "What the control plane carries"

SIZES, LARGE = (10, 100, 1000), 5000
JUDGED = 1000  # the size that bars are about
_TURNS = 2  # A B A B: a machine is not as fast in one minute as in another
_ROUTES = 4  # changed routes to one changed cluster, right after each other: see _routes
_SERVICES = 100
_EXPORT_S = 5.0
_PAUSE_S = 0.5  # after a change, for its last work to be counted
_PATIENCE_S = 300.0
_MESH = "bench"


@dataclass(slots=True)
class _Found:
    """What was seen with so many sidecars."""

    storm_s: list[float] = field(default_factory=list)
    route_ms: list[float] = field(default_factory=list)
    cluster_ms: list[float] = field(default_factory=list)
    endpoint_ms: list[float] = field(default_factory=list)
    change_cpu_ms: list[float] = field(default_factory=list)
    each_us: list[float] = field(default_factory=list)  # of it, for each sidecar
    rest_cpu: list[float] = field(default_factory=list)  # percent of one processor
    memory_mb: list[float] = field(default_factory=list)


def run(stage: Stage, scale: Scale, tell: Tell) -> Findings:
    """Measure. Raises MeshdemoError."""
    sizes = [*(SIZES[:2] if scale.quick else SIZES), *([LARGE] if scale.large else [])]
    found = {size: _Found() for size in sizes}
    failures: list[str] = []
    turns = min(_TURNS, scale.rounds(_TURNS, quick=1))
    turn = scale if scale.runs is None else replace(scale, runs=math.ceil(scale.runs / turns))
    for _ in range(turns):
        for size in sizes:
            tell_of_it = partial(_tell, tell, size)
            with attempt(_name(size), failures), _open_files():
                _measure(stage, size, turn, found[size], tell_of_it)
    left_out = [LeftOut(_name(JUDGED), "this is a quick run")] if scale.quick else []
    if not scale.large:
        left_out.append(LeftOut(_name(LARGE), "they take a big machine; --large has them, too"))
    return Findings(
        figures=_figures(found),
        curves=_curves(found),
        left_out=left_out,
        notes=[
            *failures,
            *_growth(found),
            f"Telemetry comes every {_EXPORT_S:g} s, of {LARGE:,} sidecars every {_export_s(LARGE):g} s.",
            "The simulated sidecars run on the same machine. Every change reaches all of them; a changed "
            "cluster also has its endpoints sent again.",
        ],
    )


def _tell(tell: Tell, size: int, line: str) -> None:
    tell(f"{_name(size)}: {line}")


def _measure(stage: Stage, size: int, scale: Scale, found: _Found, tell: Tell) -> None:
    """One turn."""
    tell("starting")
    mesh = _mesh(size)
    with _ControlPlane(stage, mesh) as plane, _Sidecars(stage, plane, mesh) as sidecars:
        sidecars.await_all(sidecars.began)
        plane.await_acks()
        tell("at rest")
        # The sidecars report in turn, and not evenly: all of them do in this time.
        rest_s = scale.seconds(max(10, math.ceil(_export_s(size))), quick=5)
        shares = [plane.cpu_share(rest_s) for _ in range(scale.rounds(2, quick=1))]
        found.rest_cpu += [share * 100 for share in shares]
        at_rest = quantile(shares, 0.5)
        found.memory_mb.append(plane.memory_mb())
        client = plane.client()
        for number in range(scale.rounds(5, quick=2)):
            tell(f"changes, round {number + 1}")
            spent_s = _routes(plane, client, number, at_rest, found)
            found.change_cpu_ms.append(spent_s * 1000)
            found.each_us.append(spent_s / size * 1e6)
            plane.await_acks()
            effect = client.set_traffic("s0", {"max_pending": 1000 + number}).effect
            found.cluster_ms.append(_last_ack_ms(effect))
            plane.await_acks()
            time.sleep(_PAUSE_S)
            began = time.monotonic()
            plane.publish(_last_ready(mesh, ready=number % 2 == 1))
            client.refresh_instances()
            found.endpoint_ms.append((time.monotonic() - began) * 1000)
            plane.await_acks()
            time.sleep(_PAUSE_S)
        found.memory_mb.append(plane.memory_mb())
        for number in range(scale.rounds(2, quick=1)):
            tell(f"restart, round {number + 1}")
            began = plane.restart()
            found.storm_s.append(sidecars.await_all(began) - began)
            plane.await_acks()
            found.memory_mb.append(plane.memory_mb())


def _routes(plane: _ControlPlane, client: ControlClient, number: int, at_rest: float, found: _Found) -> float:
    """Change routes; the processor time of one change (s).

    It is what the control plane uses over what it does at rest. One right after the other: with a pause for
    each, what it does at rest, which is known to a tenth, would be a third of it all.
    """
    used, began = plane.cpu_s(), time.monotonic()
    for step in range(_ROUTES):
        timeout_ms = 5000 + number * _ROUTES + step
        effect = client.set_traffic("s0", {"timeout_ms": timeout_ms}).effect
        found.route_ms.append(_last_ack_ms(effect))
        if effect.unconfirmed:
            plane.await_acks()  # of those that were too late, for they would be so again
    time.sleep(_PAUSE_S)
    spent_s = plane.cpu_s() - used - at_rest * (time.monotonic() - began)
    return max(0.0, spent_s) / _ROUTES


def _export_s(size: int) -> float:
    """How often each of so many sidecars reports (s)."""
    return max(_EXPORT_S, report_interval_s(size))


def _last_ack_ms(effect: Effect) -> float:
    """When the last sidecar confirmed a change; infinity if one did not in the time that it was given."""
    return math.inf if effect.unconfirmed else effect.effective_ms


# -- the control plane ------------------------------------------------------------------------------------


class _ControlPlane:
    """The control plane's own process, as the local runtime starts it."""

    def __init__(self, stage: Stage, mesh: MeshState) -> None:
        self.grpc_port, self._http_port = stage.port(), stage.port()
        self._stage = stage
        self._state = stage.path("state")
        self._state.mkdir()
        self._process: Process | None = None
        self.publish(mesh)

    def __enter__(self) -> _ControlPlane:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()

    def publish(self, mesh: MeshState) -> None:
        """Say what runs."""
        write_atomic(self._state / "instances.json", mesh.model_dump_json())

    def restart(self) -> float:
        """Kill it and start it again; when it was started (monotonic clock)."""
        assert self._process is not None
        self._process.kill()
        began = time.monotonic()
        self._start()
        return began

    def client(self) -> ControlClient:
        """A client of its API."""
        token = (self._state / "control" / "api-token").read_text().strip()
        return ControlClient(f"http://127.0.0.1:{self._http_port}", token, timeout_s=_PATIENCE_S)

    @property
    def trust(self) -> Path:
        """The certificates that sidecars know it by."""
        return self._state / "control" / "trust.pem"

    def await_acks(self) -> None:
        """Wait until every sidecar has confirmed what it should have."""
        client = self.client()

        def acked() -> bool:
            self._running.check()
            return all(row["acked"] for row in client.status()["instances"])

        until("all sidecars to confirm", acked, _PATIENCE_S)

    def cpu_s(self) -> float:
        """Processor time that it has used (s)."""
        return machine.cpu_s([psutil.Process(self._running.pid)])

    def cpu_share(self, seconds: float) -> float:
        """What share of one processor it uses during the next seconds."""
        used, began = self.cpu_s(), time.monotonic()
        time.sleep(seconds)
        return (self.cpu_s() - used) / (time.monotonic() - began)

    def memory_mb(self) -> float:
        """Its resident memory (MB)."""
        return psutil.Process(self._running.pid).memory_info().rss / 1e6

    @property
    def _running(self) -> Process:
        assert self._process is not None
        return self._process

    def _start(self) -> None:
        command = [
            sys.executable, "-P", "-m", "meshdemo.control.server", "--state", str(self._state),
            "--grpc-port", str(self.grpc_port), "--http-port", str(self._http_port),
        ]  # fmt: skip
        process = self._process = self._stage.start("control-plane", command)
        until("the control plane to listen", lambda: process.listens(self._http_port))


# -- the sidecars -----------------------------------------------------------------------------------------


class _Sidecars:
    """The process of the simulated sidecars."""

    def __init__(self, stage: Stage, plane: _ControlPlane, mesh: MeshState) -> None:
        path = stage.path("sidecars.json")
        Crowd(
            port=plane.grpc_port,
            trust=str(plane.trust),
            mesh=mesh.mesh,
            sidecars=[(one.id, one.service, _token(one.id)) for one in mesh.instances],
            endpoints=[f"{service}/v1" for service in mesh.app.services],
            export_every_s=_export_s(len(mesh.instances)),
        ).write(path)
        self._command = [sys.executable, "-P", "-m", "meshdemo.bench.sidecars", str(path)]
        self._stage = stage
        self._times: list[float] = []  # when all were configured
        self.began = 0.0

    def __enter__(self) -> _Sidecars:
        self.began = time.monotonic()
        self._process = self._stage.start("sidecars", self._command, stdout=subprocess.PIPE)
        threading.Thread(target=self._read, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()

    def await_all(self, since: float) -> float:
        """Wait until all are configured; when that was (monotonic clock), after `since`."""

        def times() -> list[float]:
            self._process.check()
            return [one for one in self._times if one > since]

        return until("all sidecars to be configured", times, _PATIENCE_S)[0]

    def _read(self) -> None:
        assert self._process.popen.stdout is not None
        for line in self._process.popen.stdout:
            self._times.append(float(line))


def _mesh(size: int) -> MeshState:
    """A mesh of so many instances; each service calls the next."""
    count = min(_SERVICES, size)
    program = {"v1": {"command": ["true"]}}
    services = {
        f"s{number}": {"port": 5000, "calls": [f"s{(number + 1) % count}"], "versions": program}
        for number in range(count)
    }
    app = App.model_validate({"name": "bench", "front": "s0", "services": services})
    return MeshState(mesh=_MESH, app=app, instances=tuple(_instance(n, count) for n in range(size)))


def _instance(number: int, services: int) -> Instance:
    name = f"i{number}"
    return Instance(
        id=name, service=f"s{number % services}", version="v1",
        host=f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}",
        inbound_port=15006, outbound_port=15001, metrics_port=15020, app_port=5000, ready=True,
        token_sha256=hashlib.sha256(_token(name).encode()).hexdigest(),
    )  # fmt: skip


def _token(instance: str) -> str:
    """The token of an instance. The authority that it is for lives for minutes, on loopback."""
    return f"token-of-{instance}"


def _last_ready(mesh: MeshState, *, ready: bool) -> MeshState:
    """The mesh with its last instance ready, or not."""
    last = mesh.instances[-1].model_copy(update={"ready": ready})
    return mesh.model_copy(update={"instances": (*mesh.instances[:-1], last)})


@contextmanager
def _open_files() -> Iterator[None]:
    """As many open files as the system allows, for what is started in the block: a connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# -- figures ----------------------------------------------------------------------------------------------

# key, title, unit, values, and the bar at `JUDGED` sidecars (of changes, there is one at `LARGE`, too)
_FIGURES: Sequence[tuple[str, str, str, Callable[[_Found], list[float]], Bar | None]] = (
    ("route", "A changed route: last ACK", "ms", lambda one: one.route_ms, Bar(500)),
    ("cluster", "A changed cluster: last ACK", "ms", lambda one: one.cluster_ms, Bar(500)),
    ("endpoint", "An instance leaves: taken in by all", "ms", lambda one: one.endpoint_ms, None),
    ("cpu", "Processor time of a route change", "ms", lambda one: one.change_cpu_ms, None),
    ("each", "... of this, for each sidecar", "µs", lambda one: one.each_us, None),
    ("storm", "From a restart until all are back and configured", "s", lambda one: one.storm_s, Bar(5)),
    ("rest", "Processor at rest, of one", "%", lambda one: one.rest_cpu, Bar(30)),
    (
        "memory",
        "Memory at rest, after changes and restarts",
        "MB",
        lambda one: one.memory_mb,
        Bar(250, of="worst"),
    ),
)


_LARGE_BARS: Mapping[str, Sequence[Bar]] = {
    "route": (Bar(3000),), "cluster": (Bar(3000),), "each": (Bar(1.1, against=f"{JUDGED:,} sidecars"),)
}  # fmt: skip
"""What is asked at `LARGE`: and that each sidecar costs no more than at `JUDGED`, but for the noise."""


def _figures(found: Mapping[int, _Found]) -> list[Figure]:
    figures = []
    judged = _name(JUDGED)
    for key, title, unit, values, bar in _FIGURES:
        by_size = {_name(size): values(one) for size, one in found.items() if values(one)}
        ours, bars = "", []
        if judged in by_size:
            ours, bars = judged, [] if bar is None else [bar]
            if _name(LARGE) in by_size:
                bars += [replace(one, alternative=_name(LARGE)) for one in _LARGE_BARS.get(key, ())]
        figures.append(Figure(f"controlplane.{key}", title, unit, "lower", by_size, ours, bars))
    return figures


def _name(size: int) -> str:
    return f"{size:,} sidecars"


_Values = Callable[[_Found], list[float]]


def _points(found: Mapping[int, _Found], values: _Values) -> list[tuple[float, float]]:
    return [(float(size), quantile(values(one), 0.5)) for size, one in found.items() if values(one)]


def _growth(found: Mapping[int, _Found]) -> Iterator[str]:
    """How each figure grows with the number of sidecars, in words."""
    for _, title, _, values, _ in _FIGURES:
        power = growth(_points(found, values))
        if power is not None:
            yield f"{title}: grows as the number of sidecars to the power of {power:.2f}"


def _curves(found: Mapping[int, _Found]) -> list[Curves]:
    curves = []
    for key, title, unit, values, _ in _FIGURES:
        points = [(x, y) for x, y in _points(found, values) if y > 0]
        if len(points) > 1:
            curves.append(
                Curves(
                    f"controlplane.{key}", title, "sidecars", unit, {unit: points}, log_x=True, log_y=True
                )
            )  # fmt: skip
    return curves
