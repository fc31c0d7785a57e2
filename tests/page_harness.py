"""The control plane's HTTP side on made-up signals: a mesh of any size, with no sidecar anywhere.

Everything from the store to the web server is the real thing; the plane takes every change at once. Also a
program, to look at the page: `python tests/page_harness.py --services 50 --instances 500`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import random
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import waitress

from meshdemo.apps.model import App
from meshdemo.control import goals, hand, load, metrics, objectives, page
from meshdemo.control.api.app import create_app
from meshdemo.control.api.mesh import Control
from meshdemo.control.intent import Change
from meshdemo.control.journal import Journal
from meshdemo.control.model import Effect, Instance, Intent, MeshState
from meshdemo.control.otlp import Export
from meshdemo.control.plane import Sidecar
from meshdemo.control.session import Sessions
from meshdemo.control.signals import Cell, Histogram
from meshdemo.control.tap import Tap
from meshdemo.control.telemetry import Store
from meshdemo.resources import DEFAULT_POLICY

TOKEN = "token-of-a-test"  # noqa: S105


def made_up(services: int, instances: int) -> MeshState:
    """A mesh of so many services in tiers, each calling one to three of the next tier."""
    chance = random.Random(7)
    names = ["service-a", "service-b"] if services == 2 else [f"service-{n}" for n in range(services)]
    tiers = [names[:1]]
    while sum(map(len, tiers)) < services:
        done = sum(map(len, tiers))
        tiers.append(names[done : done + min(len(tiers[-1]) * 3, 10)])
    tier_of = {name: number for number, tier in enumerate(tiers) for name in tier}
    calls: dict[str, set[str]] = {name: set() for name in names}
    for name in names[1:]:  # everybody is called by somebody
        calls[chance.choice(tiers[tier_of[name] - 1])].add(name)
    for name in names:
        below = tiers[tier_of[name] + 1] if tier_of[name] + 1 < len(tiers) else []
        calls[name].update(chance.sample(below, min(len(below), chance.choice([0, 1, 1]))))
    app: dict[str, Any] = {"name": "made-up", "front": names[min(1, services - 1)], "services": {}}
    for position, name in enumerate(names):
        app["services"][name] = {
            "port": 5000,
            "calls": sorted(calls[name]),
            "routes": [{"name": "work", "path": "/work"}],
            "load": position == 0,
            "versions": {"v1": {"program": "service_b"}, "v2": {"program": "service_b", "initial": False}},
        }
    found = []
    for number in range(instances):
        name = names[number % services]
        position = number // services
        version = "v2" if name == app["front"] and position == 2 else "v1"
        found.append(
            Instance(
                id=f"{name}-{version}-{position}", service=name, version=version, inbound_port=1,
                outbound_port=2, metrics_port=3, app_port=4, ready=True,
            )
        )  # fmt: skip
    return MeshState(mesh="mesh-demo", app=App.model_validate(app), instances=tuple(found))


class FakePlane:
    """The control plane's values and changes, without sidecars."""

    load_token = "t"  # noqa: S105

    def __init__(self, mesh: MeshState) -> None:
        self.mesh = mesh
        self.intent = Intent()

    async def change(self, change: Change) -> Effect:
        self.intent = change(self.intent, self.mesh)
        return Effect(revision=self.intent.revision, effective_ms=4.2, sidecars=len(self.mesh.instances))

    def sidecars(self) -> list[Sidecar]:
        return [Sidecar(instance, True, True, {}) for instance in self.mesh.instances]

    async def set_tap(self, on: bool) -> Effect:
        return Effect(revision=self.intent.revision, effective_ms=1, sidecars=0)

    async def authenticate(self, metadata: object) -> None:
        return None


class Place:
    """A control plane with made-up sidecars that report once a second."""

    def __init__(
        self, mesh: MeshState, folder: Path, *, port: int = 0, rps: float = 50.0, by_hand: Sequence[str] = ()
    ) -> None:
        self.mesh = mesh
        self.rps = rps
        self.chance = random.Random(3)
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.plane = FakePlane(mesh)
        self.store = Store()
        self.store.track([instance.id for instance in mesh.instances])
        self.journal = Journal(folder / "events.jsonl")
        self.sick: dict[str, float] = {}  # instance -> share of its requests that fail
        self.refused: dict[str, int] = {}  # service -> requests that callers' breakers refuse in a second
        self.slow_ms: dict[str, float] = {}  # instance -> what its requests take besides
        self.strangers: tuple[str, ...] = ()  # callers of the front service that are no services
        self.silent: set[str] = set()
        self.control = Control(
            plane=self.plane,  # type: ignore[arg-type]
            store=self.store,
            journal=self.journal,
            tap=Tap(self.plane.set_tap, self.plane.authenticate),
            totals=metrics.Totals(),
            loop=self.loop,
            read_mesh=lambda: mesh,
        )
        ours = hand.Hand(by_hand)
        self.broadcast = page.Broadcast(
            self.control, default_goals=goals.by_policy(DEFAULT_POLICY), by_hand=ours.there
        )
        sessions = Sessions(TOKEN, mesh.mesh)
        app = create_app(
            self.control,
            token=TOKEN,
            blueprints=[
                page.blueprint(self.broadcast, sessions),
                hand.blueprint(ours),
                load.blueprint(load.LoadKeeper(self.control)),
                objectives.blueprint(self.control.totals.objectives),
            ],
            authorize=[sessions.authorize],
        )
        self._server = waitress.create_server(app, listen=f"127.0.0.1:{port}", threads=24, ident=None)
        self.url = f"http://127.0.0.1:{self._server.effective_port}"
        self.link = f"{self.url}/#token={TOKEN}"
        self._serving = threading.Thread(target=self._server.run, daemon=True)
        self._stopping = threading.Event()

    def start(self, *, report: bool = True) -> None:
        """Serve, and have the sidecars report."""
        self._serving.start()
        asyncio.run_coroutine_threadsafe(self._beat(), self.loop)
        self.broadcast.start()
        if report:
            threading.Thread(target=self._report, daemon=True).start()

    def stop(self) -> None:
        """Stop serving, streams too."""
        self._stopping.set()
        self._server.close()
        for channel in list(self._server.active_channels.values()):
            with contextlib.suppress(OSError):
                channel.socket.shutdown(socket.SHUT_RDWR)
        self._serving.join(10)  # from then on its port can be had again
        self.broadcast._every_s = 3600.0  # its thread ends with the process only, and tests follow

    async def _beat(self) -> None:
        while not self._stopping.is_set():
            self.store.beat()
            await asyncio.sleep(0.1)

    def _report(self) -> None:
        due = time.time()
        while not self._stopping.wait(max(0.0, due - time.time())):
            self.report(due)
            due += 1

    def report(self, now: float) -> None:
        """One export of each sidecar, covering the second before `now`."""
        for instance in self.mesh.instances:
            if instance.id not in self.silent:
                self.store.add(instance, Export(now - 1, now, 0, int(self.rps), self._cells(instance, now)))

    def _cells(self, instance: Instance, now: float) -> tuple[Cell, ...]:
        services = self.mesh.app.services
        copies = sum(other.service == instance.service for other in self.mesh.instances)
        requests = round(self.rps * (1 + 0.1 * math.sin(now / 10)) / copies + self.chance.random())
        failures = round(requests * self.sick.get(instance.id, 0.0))
        cells = []
        callers = [name for name, service in services.items() if instance.service in service.calls]
        if instance.service == self.mesh.app.front:
            callers += self.strangers
        slow_ms = self.slow_ms.get(instance.id, 0.0)
        for caller in callers:
            identity = caller and f"spiffe://mesh-demo/ns/default/sa/{caller}"
            cells.append(self._cell(True, caller, requests, failures, identity, slow_ms))
        for callee in services[instance.service].calls:
            out = self._cell(False, callee, requests, 0, f"spiffe://mesh-demo/ns/default/sa/{callee}")
            if not_sent := self.refused.get(callee, 0) // copies:  # in outbound cells a failure, too
                more = out.requests + not_sent
                out = replace(out, requests=more, failures=out.failures + not_sent, refused=not_sent)
            cells.append(out)
        return tuple(cells)

    def _cell(
        self, inbound: bool, peer: str, requests: int, failures: int, identity: str, slow_ms: float = 0.0
    ) -> Cell:
        latencies = [slow_ms + self.chance.lognormvariate(1.2, 0.5) for _ in range(min(requests, 40))]
        return Cell(
            inbound=inbound, peer=peer, route="work", requests=requests, failures=failures,
            secured=requests if identity else 0, identity=identity, codes={"200": requests - failures, "500": failures},
            version="" if inbound else "v1", latency=Histogram.of(latencies),
        )  # fmt: skip

    def fill_history(self, seconds: int = 600) -> None:
        """Make up what the last minutes looked like, with an incident in them."""
        now = time.time()
        for number, name in enumerate(self.mesh.app.services):
            points = page.deque(maxlen=600)
            for ago in range(seconds, 0, -1):
                bad = name == self.mesh.app.front and 200 < ago < 212
                wave = 1 + 0.1 * math.sin((now - ago) / 10 + number)
                points.append(
                    (now - ago, 50 * wave, 0.86 if bad else 1.0, 0.99 if bad else 1.0,
                     2.1 * wave, 4.4 * wave, (90 if bad else 8.1) * wave, None)
                )  # fmt: skip
            self.broadcast._history[name] = points

    def story(self, instance: str) -> Sequence[dict[str, Any]]:
        """Journal an incident, from the fault to the healing, some minutes ago."""
        now, service = time.time(), next(i.service for i in self.mesh.instances if i.id == instance)
        fault = {"fault": "f-1", "at": "mesh", "kind": "degrade", "service": service, "instance": instance,
                 "lat_ms": 90, "err_rate": 0.3, "started_at": now - 212}  # fmt: skip
        where = {"service": service, "objective": "success", "incident": "i-1"}
        return [
            self.journal.append(event)
            for event in (
                {"time": now - 212, "event": "fault", **fault},
                {
                    "time": now - 210.6,
                    "event": "violated",
                    **where,
                    "detect_s": 1.4,
                    "evidence": {"bad": 21, "requests": 70},
                },
                {"time": now - 210.4, "event": "localised", **where, "scope": "instance", "target": instance},
                {
                    "time": now - 210.3,
                    "event": "chosen",
                    **where,
                    "rule": "bad-instance",
                    "remedy": "eject",
                    "target": instance,
                },
                {"time": now - 210.2, "event": "acted", **where, "remedy": "eject", "target": instance},
                {"time": now - 206, "event": "verified", **where, "remedy": "eject", "target": instance},
                {"time": now - 205, "event": "healed", **where, "recover_s": 7.0},
                {"time": now - 200, "event": "fault_cleared", "fault": "f-1", "service": service},
            )
        ]


@contextlib.contextmanager
def place(services: int = 2, instances: int = 3, **settings: Any) -> Iterator[Place]:
    """A control plane with made-up signals, serving."""
    with tempfile.TemporaryDirectory() as folder:
        made = Place(made_up(services, instances), Path(folder), **settings)
        made.start()
        try:
            yield made
        finally:
            made.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--services", type=int, default=2)
    parser.add_argument("--instances", type=int, default=4)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--sick", nargs="*", default=[], metavar="INSTANCE=SHARE")
    given = parser.parse_args()
    with place(given.services, given.instances, port=given.port) as made:
        made.fill_history()
        made.sick = {name: float(share) for name, share in (text.split("=") for text in given.sick)}
        made.story(next(i.id for i in made.mesh.instances if i.service == made.mesh.app.front))
        print(made.link, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
