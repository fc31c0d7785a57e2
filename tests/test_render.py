"""Templates and what becomes of them: every variant parses, faults meet whom they are for, nothing is made
anew that did not change."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from envoy.config.cluster.v3.cluster_pb2 import Cluster
from envoy.config.endpoint.v3.endpoint_pb2 import ClusterLoadAssignment
from envoy.config.route.v3.route_pb2 import RouteConfiguration
from google.protobuf import json_format
from google.protobuf.any_pb2 import Any as ProtoAny
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st
from xds_harness import pair, resources

from meshdemo.apps.model import Route, Service
from meshdemo.control import xds
from meshdemo.control.model import Ejection, Fault, Instance, Intent, MeshState, Traffic
from meshdemo.control.render.inbound import open_paths
from meshdemo.control.render.renderer import Renderer
from meshdemo.control.render.routes import (
    Degradation,
    InboundRoute,
    combine,
    declared_routes,
    inbound_routes,
)
from meshdemo.control.render.split import effective_split
from meshdemo.control.rules import DEFAULTS
from meshdemo.resources import TEMPLATES


def instance(service: str, number: int, version: str = "v1", *, ready: bool = True) -> Instance:
    return Instance(
        id=f"{service}-{number}",
        service=service,
        version=version,
        inbound_port=10_000 + number,
        outbound_port=11_000 + number,
        metrics_port=12_000 + number,
        app_port=13_000 + number,
        ready=ready,
    )


APP = pair(
    voting={
        "port": 8080,
        "protocol": "grpc",
        "routes": [{"name": "vote", "path": "/v.V/Vote", "method": "POST"}],
    },
    cache={"port": 6379, "protocol": "tcp", "healthz": "/h", "metrics": None},
)
INSTANCES = (
    instance("service-a", 1),
    instance("service-b", 2),
    instance("service-b", 3),
    instance("service-b", 4, "v2"),
    instance("voting", 5),
    instance("cache", 6),
)
MESH = MeshState(mesh="m", app=APP, instances=INSTANCES)


def fault(**fields: Any) -> Fault:
    return Fault(id="f", at="mesh", service="service-b", started_at=0, **fields)


def resource(snapshot: xds.Snapshot, type_url: str, name: str, message: Message) -> Any:
    """A resource of a snapshot, decoded."""
    for bundle in snapshot[type_url]:
        if data := bundle.resources.get(name):
            holder = ProtoAny.FromString(data[2 + (data[1] > 0x7F) + (data[1] > 0x7F and data[2] > 0x7F) :])
            assert holder.type_url == type_url
            message.ParseFromString(holder.value)
            return message
    raise AssertionError(f"no {name}")


def addresses(snapshot: xds.Snapshot, cluster: str) -> list[int]:
    found = resource(snapshot, xds.ENDPOINTS, cluster, ClusterLoadAssignment())
    return [e.endpoint.address.socket_address.port_value for e in found.endpoints[0].lb_endpoints]


# -- every variant parses ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "intent",
    [
        Intent(),
        Intent(faults=(fault(lat_ms=0.5), fault(err_rate=1, route="/x", caller="service-a"))),
        Intent(
            traffic={
                name: Traffic(
                    split={"v1": 100} if name != "service-b" else {"v1": 1, "v2": 99},
                    timeout_ms=1,
                    retries=0 if name == "voting" else 3,
                    max_connections=1,
                    max_pending=2,
                    max_requests=3,
                    mirror={"v1": 0.333},
                    outlier=name == "cache",
                )
                for name in APP.services
            },
            access={"service-a>voting": True, "service-a>cache": True, "service-a>service-b": False},
        ),
    ],
)
def test_every_template_parses(intent: Intent) -> None:
    snapshots = Renderer().snapshots(MESH, intent, tap=True)
    assert set(snapshots) == {i.id for i in INSTANCES}
    for snapshot in snapshots.values():
        assert {xds.SHORT[kind] for kind in snapshot} == {
            "runtime", "clusters", "endpoints", "listeners", "routes",
        }  # fmt: skip
        assert {name for bundle in snapshot[xds.LISTENERS] for name in bundle.names} == {
            "inbound", "outbound", "plain",
        }  # fmt: skip


def test_a_template_with_an_unknown_field_is_refused(tmp_path: Path) -> None:
    shutil.copytree(TEMPLATES / "envoy", tmp_path / "envoy")
    path = tmp_path / "envoy" / "cluster.yaml.j2"
    path.write_text(path.read_text().replace("lb_policy:", "lb_polcy:"))
    with pytest.raises(json_format.ParseError, match="lb_polcy"):
        Renderer(tmp_path / "envoy").snapshots(MESH, Intent())


# -- faults -----------------------------------------------------------------------------------------------


def test_faults_on_the_same_requests_combine() -> None:
    assert combine([]) == [(1, None)]
    assert combine([fault(lat_ms=9, share=0.1), fault(err_rate=0.5)]) == [(1, Degradation(9, 0.1, 0.5))]
    ((_, both),) = combine([fault(err_rate=0.5), fault(err_rate=0.2)])
    assert both
    assert both.err_rate == pytest.approx(0.6)


def test_latencies_with_shares_are_all_felt() -> None:
    """Nine of ten get the 100 ms that all get, one the 300 ms that a tenth gets."""
    assert combine([fault(lat_ms=100), fault(lat_ms=300, share=0.1)]) == [
        (0.1, Degradation(300, 1, 0)),
        (1, Degradation(100, 1, 0)),
    ]
    assert combine([fault(lat_ms=100, share=0.5), fault(lat_ms=300, share=0.5), fault(lat_ms=7)]) == [
        (0.5, Degradation(300, 1, 0)),
        (0.75, Degradation(100, 1, 0)),
        (1, Degradation(7, 1, 0)),
    ]
    assert combine([fault(lat_ms=100), fault(lat_ms=50, share=0.1)]) == [(1, Degradation(100, 1, 0))]
    assert combine([fault(lat_ms=1, share=0.5), fault(lat_ms=2, share=0.5)])[-1] == (1, None)


LATENCIES = st.lists(
    st.tuples(st.sampled_from([5, 50, 500]), st.floats(0.01, 1), st.sampled_from([0, 0.5])), max_size=4
)


@given(LATENCIES)
def test_every_request_gets_the_longest_latency_that_strikes_it(
    asked: list[tuple[float, float, float]],
) -> None:
    faults = [fault(lat_ms=lat, share=share, err_rate=err) for lat, share, err in asked]
    felt: dict[float, float] = {}
    before = 0.0
    for below, what in combine(faults):
        part, before = below - before, below
        lat, share = (what.lat_ms, what.share) if what else (0.0, 1.0)
        felt[lat] = felt.get(lat, 0) + part * share
        felt[0] = felt.get(0, 0) + (part * (1 - share) if lat else 0)
    assert before == 1
    for lat in (5, 50, 500):
        spared = 1.0
        for one in faults:
            spared *= 1 - one.share if one.lat_ms >= lat else 1
        assert sum(part for what, part in felt.items() if what >= lat) == pytest.approx(1 - spared, abs=1e-5)


PATHS = st.sampled_from(["/", "/w", "/work", "/work/x", "/api", "/api/slow", "/other"])
ROUTES = st.lists(
    st.builds(
        lambda kind, path, method: Route(name="r", method=method, **{kind: path}),
        st.sampled_from(["path", "prefix"]),
        PATHS,
        st.sampled_from([None, "GET"]),
    ),
    max_size=3,
)
FAULTS = st.lists(
    st.builds(
        lambda route, caller, err: fault(route=route, caller=caller, err_rate=err),
        st.none() | PATHS,
        st.sampled_from([None, "service-a", "service-c"]),
        st.sampled_from([0.1, 0.5, 1.0]),
    ),
    max_size=4,
)


def taken(table: list[InboundRoute], path: str, method: str, caller: str) -> InboundRoute:
    """The entry that Envoy takes for a request: the first that matches."""
    return next(
        entry
        for entry in table
        if (path == entry.path if entry.kind == "path" else path.startswith(entry.path))
        and entry.method in (None, method)
        and entry.caller in (None, caller)
    )


@given(ROUTES, FAULTS, PATHS, st.sampled_from(["GET", "PUT"]), st.sampled_from(["service-a", "service-b"]))
def test_a_request_meets_exactly_the_faults_that_are_for_it(
    routes: list[Route], faults: list[Fault], path: str, method: str, caller: str
) -> None:
    service = Service.model_validate({"port": 1, "versions": {"v1": {"command": ["x"]}}, "routes": routes})
    entry = taken(inbound_routes(declared_routes(service), faults, lambda name: name), path, method, caller)
    meant = [f for f in faults if path.startswith(f.route or "/") and f.caller in (None, caller)]
    assert [(1.0, entry.fault)] == combine(meant)
    # And faults do not change what the route is called.
    assert (
        entry.name
        == taken(inbound_routes(declared_routes(service), [], lambda name: name), path, method, caller).name
    )


def test_declared_routes_go_from_the_narrow_to_the_wide() -> None:
    routes = [{"name": "a", "prefix": "/"}, {"name": "b", "prefix": "/x/y"}, {"name": "c", "path": "/x"}]
    service = Service.model_validate({"port": 1, "versions": {"v1": {"command": ["x"]}}, "routes": routes})
    assert [route.name for route in declared_routes(service)] == ["c", "b", "a", "other"]


def test_open_paths_are_probes_metrics_and_what_is_declared() -> None:
    assert open_paths(APP.services["cache"]) == {"/h": ["GET"]}
    service = APP.services["service-b"].model_copy(update={"open_paths": {"/x": ["GET"]}, "load": True})
    assert open_paths(service) == {"/healthz": ["GET"], "/metrics": ["GET"], "/load": ["GET"], "/x": ["GET"]}


# -- split and endpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "ready", "expected"),
    [
        ({}, {"v1": 2, "v2": 1}, {"v1": 100}),  # v2 is not started by `up` itself: nothing until told
        ({}, {"v1": 0, "v2": 1}, {"v2": 100}),
        ({}, {}, {"v1": 100}),
        ({"v1": 90, "v2": 10}, {"v1": 2, "v2": 1}, {"v1": 90, "v2": 10}),
        ({"v1": 100, "v2": 0}, {"v1": 2, "v2": 1}, {"v1": 100}),
        ({"v1": 90, "v2": 10}, {"v1": 2, "v2": 0}, {"v1": 90}),  # nobody ready: its share is not lost
        ({"v1": 90, "v2": 10}, {}, {"v1": 90, "v2": 10}),
    ],
)
def test_the_split_in_force(split: dict[str, int], ready: dict[str, int], expected: dict[str, int]) -> None:
    assert effective_split(APP.services["service-b"], Traffic(split=split), ready) == expected


def test_several_initial_versions_share_by_their_ready_instances() -> None:
    versions = {"v1": {"command": ["x"]}, "v2": {"command": ["x"]}}
    service = Service.model_validate({"port": 1, "versions": versions})
    assert effective_split(service, Traffic(), {"v1": 2, "v2": 1}) == {"v1": 2, "v2": 1}


def test_callers_know_the_instances_that_take_traffic() -> None:
    def known(cluster: str, intent: Intent = Intent(), **unready: Instance) -> list[int]:  # noqa: B008
        instances = tuple(unready.get(i.id.replace("-", "_"), i) for i in INSTANCES)
        mesh = MESH.model_copy(update={"instances": instances})
        return addresses(Renderer().snapshots(mesh, intent)["service-a-1"], cluster)

    def ejected(*names: str) -> Intent:
        return Intent(ejections=tuple(Ejection(instance=n, reason="", by="", at=0) for n in names))

    b2, b3 = instance("service-b", 2, ready=False), instance("service-b", 3, ready=False)
    assert known("service-b/v1") == [10_002, 10_003]
    assert known("service-b/v1", service_b_2=b2) == [10_003]
    assert known("service-b/v1", ejected("service-b-3")) == [10_002]
    # Of a version with nobody left its callers keep what there is: v2 has taken over, and until they know ...
    assert known("service-b/v1", service_b_2=b2, service_b_3=b3) == [10_002, 10_003]
    assert known("service-b/v1", ejected("service-b-2", "service-b-3")) == [10_002, 10_003]
    # ... and where there is no other version, one that is not ready is better than none, one ejected is not.
    c1 = instance("service-a", 1, ready=False)
    assert known("service-a/v1", service_a_1=c1) == [10_001]
    assert known("service-a/v1", ejected("service-a-1")) == []
    assert known("app") == [13_001]


# -- sharing ----------------------------------------------------------------------------------------------


def test_there_are_endpoints_for_every_cluster_that_asks_for_some() -> None:
    # Else an incremental stream would name them as gone, and the cluster go on without any.
    for snapshot in Renderer().snapshots(MESH, Intent()).values():
        clusters = resources(snapshot, xds.CLUSTERS, Cluster).values()
        asking = {
            one.eds_cluster_config.service_name or one.name for one in clusters if one.type == Cluster.EDS
        }
        assert "service-b/v2" in asking
        assert asking <= xds.names(snapshot[xds.ENDPOINTS])


def test_what_is_equal_is_the_same_object_and_a_change_touches_its_own_alone() -> None:
    renderer = Renderer()
    first = renderer.snapshots(MESH, Intent())
    for _ in range(3):
        # An equal mesh, as read again from a file, is the same mesh.
        again = MeshState.model_validate_json(MESH.model_dump_json())
        assert renderer.snapshots(again, Intent()) == first
    shared = first["service-a-1"], first["service-b-2"]
    assert shared[0][xds.CLUSTERS][0] is shared[1][xds.CLUSTERS][0]
    assert shared[0][xds.ROUTES][0] is shared[1][xds.ROUTES][0]

    def changed(intent: Intent) -> dict[str, set[str]]:
        now = renderer.snapshots(MESH, intent)
        differing = {
            name: {xds.SHORT[kind] for kind in snapshot if snapshot[kind] != first[name][kind]}
            for name, snapshot in now.items()
        }
        return {name: kinds for name, kinds in differing.items() if kinds}

    everyone = {i.id for i in INSTANCES}
    assert changed(Intent(revision=9)) == {}
    assert changed(Intent(faults=(fault(lat_ms=1, instance="service-b-3"),))) == {"service-b-3": {"routes"}}
    assert changed(Intent(faults=(fault(lat_ms=1, version="v1"),))) == {
        "service-b-2": {"routes"},
        "service-b-3": {"routes"},
    }
    assert changed(Intent(access={"service-c>voting": True})) == {"voting-5": {"routes"}}
    assert changed(Intent(traffic={"voting": Traffic(timeout_ms=5)})) == {n: {"routes"} for n in everyone}
    assert changed(Intent(traffic={"voting": Traffic(max_pending=5)})) == {n: {"clusters"} for n in everyone}
    out = Intent(ejections=(Ejection(instance="service-b-2", reason="", by="", at=0),))
    assert changed(out) == {n: {"endpoints"} for n in everyone}
    assert changed(Intent()) == {}


def test_a_change_encodes_what_is_new_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = Renderer()
    renderer.snapshots(MESH, Intent())
    encoded: list[str] = []

    def encode(type_url: str, resource: Message, real: Any = xds.encode) -> bytes:
        encoded.append(xds.SHORT[type_url])
        data: bytes = real(type_url, resource)
        return data

    monkeypatch.setattr(xds, "encode", encode)
    for traffic, kind in ((Traffic(timeout_ms=5), "routes"), (Traffic(max_pending=5), "clusters")):
        for _ in range(3):  # nothing changes: what is not asked for in the meantime must not be forgotten
            renderer.snapshots(MESH, Intent())
        encoded.clear()
        renderer.snapshots(MESH, Intent(traffic={"voting": traffic}))
        assert set(encoded) <= {"routes", "clusters"}, "the listeners of the instances stayed as they were"
        assert encoded.count(kind) == 1
    encoded.clear()
    last = MESH.instances[-1].model_copy(update={"ready": False})
    renderer.snapshots(MESH.model_copy(update={"instances": (*MESH.instances[:-1], last)}), Intent())
    assert "listeners" not in encoded
    assert encoded.count("endpoints") <= 1


def test_limits_and_defaults_stand_in_the_clusters() -> None:
    snapshot = Renderer().snapshots(
        MESH, Intent(traffic={"service-b": Traffic(max_connections=7, outlier=False)})
    )
    limited = resource(snapshot["service-a-1"], xds.CLUSTERS, "service-b/v2", Cluster())
    assert limited.circuit_breakers.thresholds[0].max_connections.value == 7
    assert not limited.HasField("outlier_detection")
    default = resource(snapshot["service-a-1"], xds.CLUSTERS, "voting/v1", Cluster())
    assert default.circuit_breakers.thresholds[0].max_connections.value == 4096
    assert default.outlier_detection.consecutive_5xx.value == 20
    # ... as `traffic show` says.
    limits = default.circuit_breakers.thresholds[0]
    assert DEFAULTS["max_connections"] == limits.max_connections.value
    assert DEFAULTS["max_pending"] == limits.max_pending_requests.value
    assert DEFAULTS["max_requests"] == limits.max_requests.value
    table = resource(snapshot["service-a-1"], xds.ROUTES, "outbound", RouteConfiguration())
    host = next(host for host in table.virtual_hosts if host.name == "service-b")
    assert DEFAULTS["retries"] == host.retry_policy.num_retries.value
    assert DEFAULTS["timeout_ms"] == host.routes[0].route.timeout.seconds * 1000


def test_the_outbound_table_has_a_host_for_each_service_by_all_its_names() -> None:
    table = resource(
        Renderer().snapshots(MESH, Intent())["service-a-1"], xds.ROUTES, "outbound", RouteConfiguration()
    )
    hosts = {host.name: list(host.domains) for host in table.virtual_hosts}
    assert set(hosts) == {*APP.services, "unknown"}
    assert hosts["voting"] == [
        "voting", "voting.default", "voting.default.svc", "voting.default.svc.cluster.local",
    ]  # fmt: skip
    assert hosts["unknown"] == ["*"]
