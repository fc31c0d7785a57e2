"""A mesh that exists only in numbers: what the tests of the pure remediation core watch and heal.

Time moves in ticks of 20 ms. Requests arrive, are spread over the instances in service, fail or take long as
the faults of the moment say; each instance exports about once a second at a phase of its own, as Envoys do.
Remedies take as long as on the local runtime. Everything is seeded.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from meshdemo.control.model import Ejection, Fault, Intent, Traffic
from meshdemo.control.signals import Cell, Histogram, Sample, bucket
from meshdemo.remediation.core import Action, Core, Result
from meshdemo.remediation.events import Event

TICK_S = 0.02
EXPORT_S = 0.5
START = 1_000_000.0


@dataclass
class Caller:
    """Who makes requests, and how many a second."""

    name: str
    rps: float


@dataclass
class Instance:
    """One simulated instance."""

    id: str
    service: str
    version: str
    revision: int
    next_export: float
    ready: bool = True
    hung: bool = False
    restarts: int = 0
    dead: bool = False
    silent: bool = False
    last_export: float = START
    stuck: list[float] = field(default_factory=list)  # arrival times of requests without an answer
    flying: list[tuple[float, str, bool, float]] = field(default_factory=list)  # due, caller, bad, latency
    # (end, in flight then) of the last exports
    flights: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=20))
    arrived: int = 0
    counts: dict[str, list[Any]] = field(default_factory=dict)  # caller -> [requests, failures, histogram]
    outbound: dict[str, list[int]] = field(default_factory=dict)  # callee -> [requests, failures]


class SimMesh:
    """One service under load, with all that can go wrong with it."""

    def __init__(
        self,
        seed: int = 0,
        *,
        rps: float = 200.0,
        versions: dict[str, int] | None = None,
        callers: Sequence[Caller] | None = None,
        background: float = 0.0,
        latency_ms: float = 3.0,
        service: str = "service-b",
    ) -> None:
        self.random = random.Random(seed)
        self.now = START
        self.service = service
        self.callers = list(callers or [Caller("service-a", rps)])
        self.background = background
        self.latency_ms = latency_ms
        self.faults: list[Fault] = []
        self.ejected: dict[str, Ejection] = {}
        self.split: dict[str, int] = {}
        # (version, revision) -> (error share, latency in ms): what a release brings with it
        self.releases: dict[tuple[str, int], tuple[float, float]] = {}
        self.revisions: dict[str, int] = {}
        self.instances: dict[str, Instance] = {}
        self.restart_s = 0.7
        self.rollout_s = 0.9
        self.restart_fixes: Callable[[Instance], None] = lambda _: None
        self.broken: dict[str, float] = {}  # instance -> error share that no fault record tells of
        self.later: list[tuple[float, Callable[[], None]]] = []
        self.requests = self.failed = 0
        for version, count in (versions or {"v1": 2}).items():
            self.revisions[version] = 1
            for _ in range(count):
                self.add(version)

    # -- what runs

    def add(self, version: str) -> Instance:
        number = len(self.instances) + 1
        one = Instance(
            f"{self.service}-{number}",
            self.service,
            version,
            self.revisions[version],
            self.now + self.random.random(),
            last_export=self.now,
        )
        self.instances[one.id] = one
        return one

    def release(self, version: str, errors: float = 0.0, latency_ms: float = 0.0) -> int:
        """A new revision of a version, on all its instances at once."""
        revision = self.revisions[version] = self.revisions[version] + 1
        self.releases[version, revision] = (errors, latency_ms)
        for one in self.instances.values():
            if one.version == version:
                one.revision = revision
        return revision

    def mesh_fault(self, **fields: Any) -> Fault:
        fault = Fault(
            id=f"f{len(self.faults) + 1}", at="mesh", service=self.service, started_at=self.now, **fields
        )
        self.faults.append(fault)
        return fault

    def hang(self, instance: str) -> None:
        self.instances[instance].hung = True

    def kill(self, instance: str, back_after_s: float = 0.7, noticed_after_s: float = 0.02) -> None:
        one = self.instances[instance]
        one.dead = True

        def noticed() -> None:
            one.ready = False
            one.restarts += 1

        self._later(noticed_after_s, noticed)

        def back() -> None:
            one.dead, one.hung, one.ready = False, False, True

        self._later(back_after_s, back)

    def _later(self, after_s: float, do: Callable[[], None]) -> None:
        self.later.append((self.now + after_s, do))

    def in_service(self) -> list[Instance]:
        return [one for one in self.instances.values() if one.ready and one.id not in self.ejected]

    def intent(self) -> Intent:
        traffic = {self.service: Traffic(split=dict(self.split))} if self.split else {}
        return Intent(faults=tuple(self.faults), ejections=tuple(self.ejected.values()), traffic=traffic)

    def rows(self) -> list[dict[str, Any]]:
        return [
            {
                "id": one.id,
                "service": one.service,
                "version": one.version,
                "revision": one.revision,
                "ready": one.ready,
                "silent": one.silent,
                "ejected": one.id in self.ejected,
                "restarts": one.restarts,
            }
            for one in self.instances.values()
        ]

    # -- time

    def tick(self) -> list[Sample]:
        """Let 20 ms pass; the exports that came."""
        self.now += TICK_S
        for due, do in [entry for entry in self.later if entry[0] <= self.now]:
            do()
            self.later.remove((due, do))
        for caller in self.callers:
            for _ in range(self._poisson(caller.rps * TICK_S)):
                self._request(caller.name)
        samples = []
        for one in self.instances.values():
            self._answer(one)
            if self.now >= one.next_export:
                sample = self._export(one)
                one.next_export += EXPORT_S
                if not one.silent:
                    samples.append(sample)
        return samples

    def _poisson(self, mean: float) -> int:
        whole, rest = divmod(mean, 1)
        return int(whole) + (self.random.random() < rest)

    def _request(self, caller: str, tries: int = 2, avoid: str = "") -> None:
        serving = [one for one in self.in_service() if one.id != avoid] or self.in_service()
        if self.split:
            wanted = self.random.choices(list(self.split), list(self.split.values()))[0]
            serving = [one for one in serving if one.version == wanted]
        self.requests += 1
        if not serving:
            self.failed += 1
            return
        one = self.random.choice(serving)
        one.arrived += 1
        if one.hung:
            one.stuck.append(self.now)
            return
        if one.dead:
            self._count(one, caller, True, 1.0)
            if tries > 1:
                self._request(caller, tries - 1, one.id)
            return
        errors, extra_ms = self._harm(one, caller)
        bad = self.random.random() < 1 - (1 - errors) * (1 - self.background)
        latency = self.random.lognormvariate(0, 0.3) * self.latency_ms + extra_ms
        one.flying.append((self.now + latency / 1000, caller, bad, latency))

    def _harm(self, one: Instance, caller: str) -> tuple[float, float]:
        errors, extra_ms = self.releases.get((one.version, one.revision), (0.0, 0.0))
        good = (1 - errors) * (1 - self.broken.get(one.id, 0.0))
        for fault in self.faults:
            if (
                fault.at == "mesh"
                and fault.instance in (None, one.id)
                and fault.version in (None, one.version)
                and fault.caller in (None, caller)
            ):
                good *= 1 - fault.err_rate
                extra_ms += fault.lat_ms
        return 1 - good, extra_ms

    def _count(self, one: Instance, caller: str, bad: bool, latency_ms: float) -> None:
        count = one.counts.setdefault(caller, [0, 0, {}])
        count[0] += 1
        count[1] += bad
        index = bucket(latency_ms)
        count[2][index] = count[2].get(index, 0) + 1
        self.failed += bad

    def _answer(self, one: Instance) -> None:
        if one.hung or one.dead:
            return
        due = [entry for entry in one.flying if entry[0] <= self.now]
        one.flying = [entry for entry in one.flying if entry[0] > self.now]
        for _, caller, bad, latency in due:
            self._count(one, caller, bad, latency)

    def _export(self, one: Instance) -> Sample:
        in_flight = len(one.stuck) + len(one.flying)
        cells = [
            Cell(
                inbound=True,
                peer=caller,
                route="work",
                requests=requests,
                failures=failures,
                codes={"200": requests - failures, "503": failures},
                latency=Histogram(latencies),
            )
            for caller, (requests, failures, latencies) in one.counts.items()
        ]
        cells += [
            Cell(inbound=False, peer=callee, route="", requests=requests, failures=failures)
            for callee, (requests, failures) in one.outbound.items()
        ]
        overdue = in_flight - one.arrived
        sample = Sample(
            instance=one.id,
            service=one.service,
            version=one.version,
            revision=one.revision,
            start=one.last_export,
            end=self.now,
            in_flight=in_flight,
            arrived=one.arrived,
            waiting=((self.now - one.last_export, overdue),) if overdue > 0 else (),
            usual=min((n for at, n in one.flights if 2 <= self.now - at <= 8), default=0),
            cells=tuple(cells),
        )
        one.flights.append((self.now, in_flight))
        one.last_export, one.arrived, one.counts, one.outbound = self.now, 0, {}, {}
        return sample

    # -- remedies

    def carry_out(self, action: Action, done: Callable[[Result], None]) -> None:
        """What the runtime and the control plane would do, and how long it would take them."""
        plan = action.plan

        def finish(after_s: float, do: Callable[[], None]) -> None:
            def end() -> None:
                do()
                done(Result(action.id, True, self.now))

            self._later(after_s, end)

        match plan.kind:
            case "eject":
                self.ejected[plan.target] = Ejection(
                    instance=plan.target, reason=action.reason, by="watch", at=self.now
                )
                finish(0.02, lambda: None)
            case "readmit":
                self.ejected.pop(plan.target, None)
                finish(0.02, lambda: None)
            case "restart":
                for index, name in enumerate(plan.instances):
                    self._restart(self.instances[name], index * self.restart_s)
                finish(self.restart_s * len(plan.instances), lambda: None)
            case "rollback":
                finish(self.rollout_s, lambda: self._rollback(plan.rollbacks))
            case "clear-fault":
                self.faults = [fault for fault in self.faults if fault.id not in plan.fault_ids]
                finish(0.02, lambda: None)
            case "shift-away":
                self.split = dict(plan.split)
                finish(0.02, lambda: None)
            case "scale":
                assert plan.scale is not None
                version, count = plan.scale
                running = sum(one.version == version for one in self.instances.values())
                finish(1.0, lambda: [self.add(version) for _ in range(count - running)] and None)
            case _:
                finish(0.0, lambda: None)

    def _restart(self, one: Instance, after_s: float) -> None:
        def down() -> None:
            one.ready, one.dead = False, True
            # Killing frees what is stuck: the sidecar answers 503, and callers try elsewhere.
            for _ in one.stuck:
                self._count(one, self.callers[0].name, True, 1500.0)
            one.stuck = []

        def up() -> None:
            one.ready, one.dead, one.hung = True, False, False
            self.restart_fixes(one)

        self._later(after_s, down)
        self._later(after_s + self.restart_s - TICK_S, up)

    def _rollback(self, rollbacks: Any) -> None:
        for version, revision in rollbacks.items():
            target = revision or self.revisions[version] - 1
            errors, latency = self.releases.get((version, target), (0.0, 0.0))
            self.release(version, errors, latency)


@dataclass
class Run:
    """A core watching a simulated mesh."""

    mesh: SimMesh
    core: Core
    events: list[Event] = field(default_factory=list)
    actions: list[Action] = field(default_factory=list)
    intent_every_s: float = 1.0
    fail: Callable[[Action], bool] = lambda _: False
    polls: bool = True

    def __post_init__(self) -> None:
        self._due = self.mesh.now
        self._intent_due = self.mesh.now
        self._batch: list[Sample] = []

    def run(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        """Let time pass."""
        end = self.mesh.now + seconds
        while self.mesh.now < end and not until():
            self._batch += self.mesh.tick()
            if self._batch or self.mesh.now >= self._due:
                self._due = self.mesh.now + 0.1
                self._poll()

    def _poll(self) -> None:
        core, mesh = self.core, self.mesh
        batch, self._batch = self._batch, []
        core.observe(mesh.now, batch, mesh.rows())
        if core.alarmed or mesh.now >= self._intent_due:
            core.set_intent(mesh.intent())
            self._intent_due = mesh.now + self.intent_every_s
        step = core.step(mesh.now)
        self.events += step.events
        for action in step.actions:
            self.actions.append(action)
            if self.fail(action):
                core.done(Result(action.id, False, mesh.now, "it did not work"))
            else:
                mesh.carry_out(action, core.done)

    def names(self) -> list[str]:
        return [event.event for event in self.events]

    def of(self, name: str) -> list[Event]:
        return [event for event in self.events if event.event == name]

    def kinds(self) -> list[str]:
        return [action.plan.kind for action in self.actions]

    def healed(self) -> bool:
        return bool(self.of("healed")) and not self.core.open


def quick_sample(one: Sample, **changes: Any) -> Sample:
    """A sample with some fields changed."""
    return replace(one, **changes)
