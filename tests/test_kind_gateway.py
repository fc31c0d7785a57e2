"""The gateway on a real kind cluster: reached from this machine, led by Ingress and HTTPRoute."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from kind_harness import Mesh, on_kind, require, until

pytestmark = [pytest.mark.kind, pytest.mark.xdist_group("kind")]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    require()
    with on_kind(tmp_path_factory.mktemp("edge"), "--rps", "20", "--no-observability") as found:
        yield found


def get(mesh: Mesh, path: str, host: str = "localhost") -> tuple[int, str]:
    url = urlsplit(mesh.runtime.endpoints()["gateway"] or "")
    connection = http.client.HTTPConnection("127.0.0.1", url.port or 0, timeout=15)
    try:
        connection.request("GET", path, headers={"Host": host})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def ingress(mesh: Mesh, name: str, host: str, **services: str) -> dict[str, Any]:
    paths = [
        {
            "path": f"/{path}", "pathType": "Prefix",
            "backend": {"service": {"name": service, "port": {"number": 5000}}},
        }
        for path, service in services.items()
    ]  # fmt: skip
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "Ingress",
        "metadata": {"name": name, "namespace": mesh.name},
        "spec": {"ingressClassName": "meshdemo", "rules": [{"host": host, "http": {"paths": paths}}]},
    }


def test_it_is_reached_from_this_machine_and_leads_to_the_front(mesh: Mesh) -> None:
    url = mesh.json("status")["endpoints"]["gateway"]
    assert url.startswith("http://localhost:")
    assert get(mesh, "/work")[0] == 200

    def edge() -> dict[str, Any] | None:
        get(mesh, "/work")
        return next((one for one in mesh.json("edges") if one["caller"] == "gateway"), None)

    found = until(edge, "the gateway among the callers")
    assert found is not None
    assert (found["service"], found["secured"]) == ("service-b", True)
    assert found["identity"] == f"spiffe://{mesh.name}/ns/{mesh.name}/sa/gateway"
    mesh.run("access", "deny", "gateway", "service-b")
    assert get(mesh, "/work")[0] == 403
    mesh.run("access", "allow", "gateway", "service-b")
    assert get(mesh, "/work")[0] == 200


def test_an_ingress_is_obeyed_and_what_is_wrong_with_one_is_said(mesh: Mesh) -> None:
    mesh.cluster.apply(ingress(mesh, "shop", "shop.test", work="service-b", lost="nobody"))
    until(lambda: get(mesh, "/work", "shop.test")[0] == 200, "a path of the Ingress")
    status, said = get(mesh, "/other", "shop.test")
    assert status == 404
    assert "/work" in said
    assert get(mesh, "/lost", "shop.test")[0] == 503
    assert get(mesh, "/work")[0] == 200, "other hosts lead to the front"

    def published() -> bool:
        found = mesh.cluster.get("Ingress", "shop", mesh.name) or {}
        return bool(found.get("status", {}).get("loadBalancer", {}).get("ingress"))

    until(published, "an address in the Ingress' status")

    def events() -> list[str]:
        return [
            one["message"]
            for one in mesh.cluster.find("Event", mesh.name)
            if one["involvedObject"]["kind"] == "Ingress" and one["reason"] == "BackendNotFound"
        ]

    assert "service 'nobody' is not in the mesh" in until(events, "an Event on the Ingress")[0]
    mesh.cluster.delete("Ingress", "shop", mesh.name)
    until(lambda: "shop.test" not in get(mesh, "/other", "shop.test")[1], "it is forgotten")


def crd() -> dict[str, Any]:
    """As much of HTTPRoute's definition as the API server needs to keep such objects."""
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": "httproutes.gateway.networking.k8s.io",
            "annotations": {"api-approved.kubernetes.io": "unapproved, a test's"},
        },
        "spec": {
            "group": "gateway.networking.k8s.io",
            "names": {"kind": "HTTPRoute", "listKind": "HTTPRouteList", "plural": "httproutes", "singular": "httproute"},
            "scope": "Namespaced",
            "versions": [
                {
                    "name": "v1", "served": True, "storage": True, "subresources": {"status": {}},
                    "schema": {"openAPIV3Schema": {"type": "object", "properties": {"spec": anything, "status": anything}}},
                }
            ],
        },
    }  # fmt: skip


def test_an_http_route_is_obeyed_once_its_kind_is_there(mesh: Mesh) -> None:
    mesh.cluster.request("POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", body=crd())
    until(lambda: mesh.cluster.serves("HTTPRoute"), "the kind HTTPRoute")
    route = {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {"name": "shop", "namespace": mesh.name},
        "spec": {
            "parentRefs": [{"name": "meshdemo"}],
            "hostnames": ["route.test"],
            "rules": [
                {
                    "matches": [{"path": {"type": "Exact", "value": "/work"}}],
                    "backendRefs": [{"name": "service-b", "port": 5000}],
                }
            ],
        },
    }
    until(lambda: mesh.cluster.apply(route), "the route")
    until(lambda: "paths of route.test: /work" in get(mesh, "/nothing", "route.test")[1], "its host")
    assert get(mesh, "/work", "route.test")[0] == 200

    def conditions() -> dict[str, str]:
        found = mesh.cluster.get("HTTPRoute", "shop", mesh.name) or {}
        parents = found.get("status", {}).get("parents", [])
        return {one["type"]: one["status"] for parent in parents for one in parent["conditions"]}

    assert until(conditions, "its conditions") == {"Accepted": "True", "ResolvedRefs": "True"}


def test_it_comes_back(mesh: Mesh) -> None:
    pods = mesh.cluster.find("Pod", mesh.name, labels="app.kubernetes.io/component=gateway")
    mesh.cluster.delete("Pod", pods[0]["metadata"]["name"], mesh.name, grace_s=0)
    until(lambda: get(mesh, "/work")[0] == 200, "a gateway that leads on")


# -- somebody else's app in the same namespace --------------------------------------------------------------


def test_an_injected_app_is_part_of_the_mesh(mesh: Mesh, tmp_path: Path) -> None:
    ours = mesh.cluster.get("Deployment", "service-b-v1", mesh.name)
    assert ours is not None
    image = ours["spec"]["template"]["spec"]["containers"][0]["image"]
    labels = {"app": "shop"}
    host = "0.0.0.0"  # noqa: S104 - as other people's apps do
    env = {"HOST": host, "PORT": "8080", "SERVICE": "shop", "VERSION": "v1", "INSTANCE": "shop"}
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "shop", "namespace": mesh.name},
        "spec": {
            "selector": {"matchLabels": labels},
            "template": {
                # A copy, or YAML would have an alias, which inject does not edit.
                "metadata": {"labels": dict(labels)},
                "spec": {
                    "containers": [
                        {
                            "name": "shop",
                            "image": image,
                            "env": [{"name": name, "value": value} for name, value in env.items()],
                            "readinessProbe": {"httpGet": {"path": "/healthz", "port": 8080}},
                        }
                    ]
                },
            },
        },
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "shop", "namespace": mesh.name},
        "spec": {"selector": dict(labels), "ports": [{"port": 80, "targetPort": 8080}]},
    }
    (tmp_path / "shop.yaml").write_text(yaml.safe_dump_all([deployment, service]))
    for manifest in yaml.safe_load_all(mesh.run("inject", str(tmp_path / "shop.yaml"))):
        mesh.cluster.apply(manifest)
    route = ingress(mesh, "shop", "shop.test", work="shop")
    route["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]["port"] = {"number": 80}
    mesh.cluster.apply(route)
    until(lambda: get(mesh, "/work", "shop.test")[0] == 200, "the injected app through the gateway")

    def edge() -> dict[str, Any] | None:
        get(mesh, "/work", "shop.test")
        return next((one for one in mesh.json("edges") if one["service"] == "shop"), None)

    found = until(edge, "the injected app among the edges")
    assert found is not None
    assert (found["caller"], found["secured"]) == ("gateway", True)

    def well() -> bool:
        # Until it was ready, requests failed.
        get(mesh, "/work", "shop.test")
        (row,) = mesh.json("stat", "shop", "--window", "3s")
        return bool(row["requests"] and row["success_rate"] == 1)

    until(well, "its signals")
    (pod,) = mesh.cluster.find("Pod", mesh.name, labels="app=shop")
    assert "meshdemo-sidecar" in {one["name"] for one in pod["spec"]["initContainers"]}
