"""What the control plane would push, for people to read: `meshdemo render envoy`.

The same renderer as the running control plane's, its result decoded again, so that what is printed is what
a sidecar gets and not a second opinion.
"""

from __future__ import annotations

import json
from typing import Any

from envoy.service.discovery.v3.discovery_pb2 import DiscoveryResponse
from google.protobuf import json_format

from meshdemo.apps.model import GATEWAY, App
from meshdemo.control import xds
from meshdemo.control.model import Instance, Intent, MeshState
from meshdemo.control.render.renderer import Renderer
from meshdemo.errors import BadInput


def preview(mesh: MeshState, intent: Intent, service: str | None = None) -> dict[str, dict[str, Any]]:
    """The resources of one sidecar of each service, or of one: service (or gateway) -> type -> resources.

    Secrets are not in it. Raises BadInput if there is no such service, or it has no instance.
    """
    known = (*mesh.app.services, GATEWAY)
    if service is not None and service not in known:
        raise BadInput(f"no service '{service}'; there are: {', '.join(known)}")
    first: dict[str, Instance] = {}
    for instance in mesh.sidecars:
        first.setdefault(instance.service, instance)
    if service is not None and service not in first:
        raise BadInput(f"{service} has no instance, so nothing is pushed for it")
    snapshots = Renderer().snapshots(mesh, intent)
    return {
        name: _decoded(snapshots[instance.id]) for name, instance in first.items() if service in {None, name}
    }


def imagined(app: App, mesh: str) -> MeshState:
    """The app as it would run on one machine, with made-up ports."""
    instances: list[Instance] = []
    for service, definition in app.services.items():
        for version, workload in definition.versions.items():
            for number in range(1, workload.instances * workload.initial + 1):
                base = 20_000 + 10 * len(instances)
                instances.append(
                    Instance(
                        id=f"{service}-{version}-{number}",
                        service=service,
                        version=version,
                        ready=True,
                        inbound_port=base,
                        outbound_port=base + 1,
                        metrics_port=base + 2,
                        app_port=base + 3,
                    )
                )
    return MeshState(mesh=mesh, app=app, instances=tuple(instances), gateways=(edge(8081),))


def edge(port: int) -> Instance:
    """The gateway on one machine, at this port."""
    return Instance(
        id=GATEWAY, service=GATEWAY, version="v1", ready=True,
        inbound_port=0, outbound_port=port, metrics_port=20_000 - 1, app_port=0,
    )  # fmt: skip


def _decoded(snapshot: xds.Snapshot) -> dict[str, Any]:
    decoded: dict[str, Any] = {}
    for type_url in xds.ORDER:
        resources = [bundle.part(bundle.names) for bundle in snapshot.get(type_url, ())]
        if not resources:
            continue
        response = DiscoveryResponse.FromString(xds.response(type_url, "", "", resources))
        as_json = json_format.MessageToJson(response, preserving_proto_field_name=True)
        # By way of text, because protobuf makes ordered dicts, which YAML does not know.
        decoded[xds.SHORT[type_url]] = json.loads(as_json)["resources"]
    return decoded
