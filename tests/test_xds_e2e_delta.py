"""Incremental ADS with real Envoys: what travels, and that it is in force."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from envoy.service.discovery.v3.discovery_pb2 import DeltaDiscoveryResponse
from xds_harness import Member, Mesh, mesh_of, pair, until

from meshdemo.control import wire, xds
from meshdemo.control.bootstrap import _ask
from meshdemo.control.intent import set_traffic
from meshdemo.control.plane import Settings
from meshdemo.errors import Failed
from meshdemo.resources import TEMPLATES

WORK = "http://service-b:5000/work"


@dataclass
class Heard:
    """What went over incremental streams."""

    sent: list[tuple[str, list[str], list[str]]] = field(default_factory=list)  # type, names, names gone
    asked: list[tuple[str, frozenset[str]]] = field(default_factory=list)  # type, names

    def clear(self) -> None:
        self.sent.clear()
        self.asked.clear()


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Heard:
    heard = Heard()
    read, write = wire.Wire.read, wire.Wire.write

    def reading(self: wire.Wire, data: bytes) -> wire.Request:
        request = read(self, data)
        if self.incremental and request.names:
            heard.asked.append((xds.SHORT[request.type_url], request.names))
        return request

    def writing(self: wire.Wire, response: wire.Response) -> bytes:
        data = write(self, response)
        if self.incremental:
            said = DeltaDiscoveryResponse.FromString(data)
            names = sorted(one.name for one in said.resources)
            heard.sent.append((xds.SHORT[said.type_url], names, sorted(said.removed_resources)))
        return data

    monkeypatch.setattr(wire.Wire, "read", reading)
    monkeypatch.setattr(wire.Wire, "write", writing)
    return heard


@pytest.fixture
def mesh(heard: Heard) -> Iterator[Mesh]:
    """service-a calls service-b (v1, v2); only service-a has a sidecar that is told of."""
    with mesh_of(pair()) as mesh:
        mesh.add("service-a")
        mesh.add("service-b")
        mesh.start_control()
        mesh.start_sidecar(mesh.members["service-a-1"])
        mesh.await_ready(mesh.members["service-a-1"])
        settle(mesh)
        heard.clear()
        yield mesh


def settle(mesh: Mesh) -> None:
    until(lambda: all(s.acked for s in mesh.sidecars() if s.connected), "all to have confirmed")


def traffic(mesh: Mesh, service: str = "service-b", **changes: Any) -> Any:
    return mesh.change(lambda intent, state: set_traffic(intent, state, service, changes, time.time()))


def clusters(member: Member, which: str = "active") -> dict[str, dict[str, Any]]:
    """The clusters that a sidecar has, or warms."""
    dump = json.loads(_ask(member.admin, f"/config_dump?resource=dynamic_{which}_clusters", 5) or "{}")
    return {entry["cluster"]["name"]: entry["cluster"] for entry in dump.get("configs", ())}


def max_pending(member: Member, cluster: str) -> int:
    thresholds = clusters(member)[cluster]["circuit_breakers"]["thresholds"]
    return int(thresholds[0]["max_pending_requests"])


def test_a_change_of_one_cluster_sends_that_cluster_and_its_endpoints(mesh: Mesh, heard: Heard) -> None:
    effect = traffic(mesh, "service-c", max_pending=77)
    assert (effect.sidecars, effect.unconfirmed) == (1, ())
    assert heard.sent == [("clusters", ["service-c/v1"], []), ("endpoints", ["service-c/v1"], [])]
    # The sidecar does not ask for the endpoints again, and warms the cluster until they come all the same.
    assert heard.asked == []
    a = mesh.members["service-a-1"]
    assert clusters(a, "warming") == {}
    assert max_pending(a, "service-c/v1") == 77


def test_after_a_restart_of_the_control_plane_only_what_differs_is_sent(mesh: Mesh, heard: Heard) -> None:
    traffic(mesh, max_pending=77)
    mesh.stop_control(abruptly=True)
    heard.clear()
    mesh.start_control()
    until(lambda: mesh.sidecars()[0].acked and len(heard.asked) >= 4, "the sidecar to be back")
    settle(mesh)
    assert {kind for kind, _ in heard.asked} == {"runtime", "endpoints", "routes", "secrets"}
    until(lambda: heard.sent, "its new certificate")
    assert heard.sent == [("secrets", ["identity"], [])]
    # An instance comes while it is away.
    mesh.stop_control(abruptly=True)
    heard.clear()
    mesh.add("service-b")
    mesh.start_control()
    until(lambda: len(heard.sent) >= 2, "the sidecar to be told")
    settle(mesh)
    assert sorted(heard.sent) == [("endpoints", ["service-b/v1"], []), ("secrets", ["identity"], [])]


def test_a_sidecar_that_takes_some_of_a_change_and_rejects_the_rest_is_brought_back(
    tmp_path: Path, heard: Heard
) -> None:
    templates = tmp_path / "envoy"
    shutil.copytree(TEMPLATES / "envoy", templates)
    cluster = templates / "cluster.yaml.j2"
    good = "lb_policy: LEAST_REQUEST"
    assert good in cluster.read_text()
    # With a limit of 666, one of both versions is something that Envoy will not take.
    bad = '{{ "CLUSTER_PROVIDED" if traffic.max_pending == 666 and name == "service-b/v2" else "LEAST_REQUEST" }}'
    cluster.write_text(cluster.read_text().replace(good, f"lb_policy: {bad}"))
    with mesh_of(pair(), Settings(templates=templates)) as mesh:
        a = mesh.add("service-a")
        mesh.add("service-b")
        mesh.start()
        settle(mesh)
        heard.clear()
        with pytest.raises(Failed, match=r"rejected its clusters .*service-b/v2"):
            traffic(mesh, max_pending=666)
        settle(mesh)
        both = ("clusters", ["service-b/v1", "service-b/v2"], [])
        assert heard.sent.count(both) == 4, heard.sent  # to each sidecar once, and once back
        assert mesh.journal("rejected")
        for member in mesh.members.values():
            assert clusters(member, "warming") == {}
            assert max_pending(member, "service-b/v1") == 4096
        assert a.client().get(WORK).status == 200
        heard.clear()
        assert traffic(mesh, max_pending=77).sidecars == 2
        assert max_pending(a, "service-b/v2") == 77


def test_a_service_that_goes_takes_its_clusters_last(mesh: Mesh, heard: Heard) -> None:
    services = {name: one for name, one in mesh.app.services.items() if name != "service-c"}
    mesh.app = mesh.app.model_copy(update={"services": services})
    mesh.refresh()
    settle(mesh)
    assert [kind for kind, _, _ in heard.sent][-2:] == ["routes", "clusters"]
    assert heard.sent[-1] == ("clusters", [], ["service-c/v1"])
    a = mesh.members["service-a-1"]
    assert "service-c/v1" not in clusters(a)
    heard.clear()
    mesh.app = pair()
    mesh.refresh()
    settle(mesh)
    assert heard.sent[:2] == [("clusters", ["service-c/v1"], []), ("endpoints", ["service-c/v1"], [])]
    assert clusters(a, "warming") == {}


def test_sidecars_that_speak_state_of_the_world_are_served_beside_the_others(mesh: Mesh) -> None:
    b = mesh.members["service-b-1"]
    mesh.start_sidecar(b)
    mesh.await_ready(b)
    assert b.process
    b.process.kill()
    b.process.wait()
    bootstrap = b.folder / "bootstrap.yaml"
    text = bootstrap.read_text()
    assert "api_type: DELTA_GRPC" in text
    bootstrap.write_text(text.replace("api_type: DELTA_GRPC", "api_type: GRPC"))
    mesh.run_envoy(b, bootstrap)
    mesh.await_ready(b)
    settle(mesh)
    stream = mesh.plane._discovery.stream("service-b-1")
    assert stream is not None
    assert stream.wire is wire.STATE_OF_THE_WORLD
    effect = traffic(mesh, max_pending=77)
    assert (effect.sidecars, effect.unconfirmed) == (2, ())
    for member in mesh.members.values():
        assert max_pending(member, "service-b/v1") == 77
        assert clusters(member, "warming") == {}
    assert mesh.members["service-a-1"].client().get(WORK).status == 200
    mesh.stop_control(abruptly=True)
    mesh.start_control()
    until(lambda: all(s.acked for s in mesh.sidecars()), "all to be back")
    assert traffic(mesh, max_pending=78).sidecars == 2
