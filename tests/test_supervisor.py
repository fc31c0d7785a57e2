"""Death in a running mesh: kill -9 of each kind of process, a lost port, a hung sidecar. One mesh for all."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest
from local_harness import Cli, kill, read_url, wait_for

from meshdemo.runtime.local.leftovers import find


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    with Cli(tmp_path_factory.mktemp("home")).up("--rps", "40") as cli:
        yield cli


@pytest.fixture(autouse=True)
def _healthy(mesh: Cli) -> None:
    wait_for("a healthy mesh", mesh.all_ready)


def _succeeding(mesh: Cli) -> None:
    """Requests come back with 200, some of them after now."""
    before = mesh.counts()["200"]
    wait_for("traffic", lambda: mesh.counts()["200"] > before + 20)


@pytest.mark.parametrize(
    "name",
    [
        "control plane",
        "sidecar of service-b-v1-1",
        "service-b-v1-2",
        "sidecar of service-a-v1-1",
        "service-a-v1-1",
    ],
)
def test_a_killed_process_is_back_and_takes_traffic(mesh: Cli, name: str) -> None:
    victim = mesh.process(name)
    kill(victim)
    wait_for(f"another {name}", lambda: mesh.process(name).pid != victim.pid)
    wait_for("everything ready", mesh.all_ready)
    _succeeding(mesh)


def test_a_dead_workload_takes_no_traffic_until_it_is_back(mesh: Cli) -> None:
    """What the control plane is told: not ready as soon as it is dead."""

    def ready() -> bool:
        state = json.loads(mesh.paths.instances.read_text())
        return next(bool(one["ready"]) for one in state["instances"] if one["id"] == "service-b-v1-1")

    def replaced(victim: psutil.Process) -> bool:
        return mesh.process("service-b-v1-1").pid != victim.pid and mesh.all_ready()

    def seen_dead() -> bool:
        """Its successor is up after a third of a second: who is kept waiting that long sees nothing."""
        victim = mesh.process("service-b-v1-1")
        kill(victim)
        looked_until = time.monotonic() + 1
        while ready():
            if time.monotonic() > looked_until:
                wait_for("another one", lambda: replaced(victim))
                return False
        wait_for("another one", lambda: replaced(victim))
        return True

    assert any(seen_dead() for _ in range(3))
    wait_for("it to be told ready", ready)


def test_the_guard_is_replaced(mesh: Cli) -> None:
    victim = mesh.process("guard")
    kill(victim)
    wait_for("another guard", lambda: mesh.process("guard").pid != victim.pid)


def test_a_hung_sidecar_is_replaced_by_a_restart(mesh: Cli) -> None:
    from meshdemo.runtime.local.runtime import LocalRuntime

    victim = mesh.process("sidecar of service-b-v1-2")
    kill(victim, signal.SIGSTOP)
    runtime = LocalRuntime("mesh-demo")
    runtime.paths = mesh.paths
    runtime._supervisor._paths = mesh.paths
    runtime.restart("service-b-v1-2", reason="test")
    assert mesh.process("sidecar of service-b-v1-2").pid != victim.pid
    _succeeding(mesh)


def test_a_taken_port_is_given_up_for_another(mesh: Cli) -> None:
    def port() -> int:
        (found,) = (one["app_port"] for one in mesh.describe()["instances"] if one["id"] == "service-b-v1-1")
        return int(found)

    taken = port()
    thief = socket.socket()
    thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    victim, supervisor = mesh.process("service-b-v1-1"), mesh.process("supervisor")
    supervisor.suspend()  # so that its successor starts after the thief
    try:
        kill(victim)

        def stolen() -> bool:
            with suppress(OSError):
                thief.bind(("127.0.0.1", taken))
                thief.listen()
                return True
            return False

        wait_for("the port", stolen)
        supervisor.resume()
        wait_for("another port", lambda: port() != taken)
        wait_for("everything ready", mesh.all_ready)
        _succeeding(mesh)
    finally:
        supervisor.resume()
        thief.close()


def test_prometheus_scrapes_workloads_and_sidecars(mesh: Cli) -> None:
    url = mesh.json("status")["endpoints"]["prometheus"]
    if url is None:
        import shutil

        assert shutil.which("prometheus") is None
        pytest.skip("no prometheus on the PATH")

    def up() -> set[str]:
        result = json.loads(read_url(f"{url}api/v1/query?query=up"))["data"]["result"]
        return {f"{row['metric']['job']}={row['value'][1]}" for row in result}

    wait_for("all targets up", lambda: up() == {"workloads=1", "sidecars=1", "control-plane=1"})


def test_every_listener_is_on_loopback(mesh: Cli) -> None:
    listeners = [
        connection.laddr.ip
        for process in find(mesh.paths.state)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listeners) > 10
    # gRPC's is an IPv6 socket bound to the IPv4 loopback.
    assert {address.removeprefix("::ffff:") for address in listeners} == {"127.0.0.1"}


def test_files_are_private(mesh: Cli) -> None:
    for path in (mesh.paths.state, mesh.paths.sockets):
        assert path.stat().st_mode & 0o077 == 0
    assert mesh.paths.instance("service-b-v1-1").joinpath("token").stat().st_mode & 0o077 == 0
