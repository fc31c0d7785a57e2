"""Sidecars whose traffic is redirected to them: what they are told, and whether Envoy takes it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml
from envoy.config.cluster.v3.cluster_pb2 import Cluster
from envoy.config.listener.v3.listener_pb2 import Listener
from envoy.config.route.v3.route_pb2 import RouteConfiguration
from google.protobuf import json_format
from xds_harness import resources

from meshdemo.apps import loader
from meshdemo.apps.model import App
from meshdemo.control import xds
from meshdemo.control.bootstrap import Placement, bootstrap_files, find_envoy
from meshdemo.control.model import Instance, Intent, MeshState
from meshdemo.control.render.renderer import Renderer

TCP = App.model_validate(
    {
        "name": "shop",
        "front": "web",
        "services": {
            "web": {"port": 80, "calls": ["db"], "versions": {"v1": {"image": "web:1"}}},
            "db": {"port": 5432, "protocol": "tcp", "versions": {"v1": {"image": "db:1"}}},
        },
    }
)


def mesh(app: App) -> MeshState:
    instances = [
        Instance(
            id=f"{name}-abc-{n}", service=name, version="v1", host=f"10.0.{n}.{index}",
            inbound_port=service.port, outbound_port=15002, metrics_port=15020, app_port=service.port, ready=True,
        )
        for index, (name, service) in enumerate(app.services.items())
        for n in (1, 2)
    ]  # fmt: skip
    addresses = {name: f"10.96.0.{index + 1}" for index, name in enumerate(app.services)}
    return MeshState(mesh="m", namespace="m", app=app, instances=tuple(instances), addresses=addresses)


@pytest.mark.parametrize(
    "app", [loader.load("pair"), loader.load("emojivoto"), TCP], ids=lambda app: app.name
)
def test_envoy_takes_the_listeners(app: App, tmp_path: Path) -> None:
    state = mesh(app)
    for instance_id, snapshot in Renderer().snapshots(state, Intent()).items():
        instance = next(one for one in state.instances if one.id == instance_id)
        placement = Placement(
            folder=tmp_path, trust=tmp_path / "trust.pem", admin=tmp_path / "admin",
            control_host="control-plane.m.svc", control_port=15010,
        )  # fmt: skip
        for name, text in bootstrap_files(instance, placement).items():
            (tmp_path / name).write_text(text)
        (tmp_path / "token").write_text("t")
        (tmp_path / "trust.pem").write_text("")
        bootstrap = yaml.safe_load((tmp_path / "bootstrap.yaml").read_text())
        listeners = resources(snapshot, xds.LISTENERS, Listener)
        assert set(listeners) == {"inbound", "outbound", "plain", "proxy", "ready"}
        bootstrap["static_resources"]["listeners"] = [
            json_format.MessageToDict(listener) for listener in listeners.values()
        ]
        bootstrap["static_resources"]["clusters"] += [
            json_format.MessageToDict(cluster)
            for cluster in resources(snapshot, xds.CLUSTERS, Cluster).values()
        ]
        path = tmp_path / "validate.json"
        path.write_text(json.dumps(bootstrap))
        done = subprocess.run(
            [str(find_envoy()), "--mode", "validate", "-c", str(path), "--log-level", "error"],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_services_are_told_apart_by_address_and_port_alone() -> None:
    app = loader.load("pair")
    snapshot = Renderer().snapshots(mesh(app), Intent())["service-a-abc-1"]
    outbound = resources(snapshot, xds.LISTENERS, Listener)["outbound"]
    matched = {
        (
            match.prefix_ranges[0].address_prefix,
            match.prefix_ranges[0].prefix_len.value,
            match.destination_port.value,
        )
        for chain in outbound.filter_chains
        for match in [chain.filter_chain_match]
    }
    assert matched == {("127.0.0.0", 8, 0), ("10.96.0.1", 32, 5000), ("10.96.0.2", 32, 5000)}
    assert outbound.default_filter_chain.filters[0].name == "tcp"
    assert [f.name for f in outbound.listener_filters] == ["original-destination"]  # nothing inspects
    tables = resources(snapshot, xds.ROUTES, RouteConfiguration)
    assert {"inbound", "outbound", "outbound/service-a", "outbound/service-b"} == set(tables)
    for name in ("outbound/service-a", "outbound/service-b"):
        assert [list(host.domains) for host in tables[name].virtual_hosts] == [["*"]]


def test_inbound_takes_the_apps_port_only() -> None:
    snapshot = Renderer().snapshots(mesh(TCP), Intent())["db-abc-1"]
    inbound = resources(snapshot, xds.LISTENERS, Listener)["inbound"]
    chains = [
        (c.filter_chain_match.destination_port.value, c.filter_chain_match.transport_protocol)
        for c in inbound.filter_chains
    ]
    assert chains == [(5432, "tls")]  # a TCP service has no open paths, and its port none in plain text
    assert not inbound.HasField("default_filter_chain")
    web = resources(Renderer().snapshots(mesh(TCP), Intent())["web-abc-1"], xds.LISTENERS, Listener)[
        "inbound"
    ]
    assert [c.filter_chain_match.transport_protocol for c in web.filter_chains] == ["tls", "raw_buffer"]


def test_sidecars_share_what_is_the_same() -> None:
    snapshots = Renderer().snapshots(mesh(loader.load("pair")), Intent())
    one, two = snapshots["service-b-abc-1"], snapshots["service-b-abc-2"]
    assert all(a is b for a, b in zip(one[xds.LISTENERS], two[xds.LISTENERS], strict=True))
