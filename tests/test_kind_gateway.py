"""The gateway on a real kind cluster: reached from this machine, led by Ingress and HTTPRoute."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from kind_harness import Mesh, on_kind, require, until
from xds_harness import free_port

from meshdemo.runtime.kubernetes import down

pytestmark = [pytest.mark.kind, pytest.mark.xdist_group("kind")]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    require()
    edge = ("--gateway-port", str(free_port()))  # 8081 may be another mesh's
    with on_kind(tmp_path_factory.mktemp("edge"), "--rps", "20", "--no-observability", *edge) as found:
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


# -- somebody else's app, in namespaces of its own ----------------------------------------------------------


def kubectl(mesh: Mesh, *words: str, stdin: str = "") -> str:
    """What kubectl prints."""
    path = shutil.which("kubectl")
    if path is None:
        pytest.skip("THE STORY OF AN INJECTED APP WAS NOT TESTED: there is no kubectl")
    command = [path, "--kubeconfig", str(mesh.kubeconfig), *words]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def shop(mesh: Mesh, namespace: str) -> list[dict[str, Any]]:
    """An app that knows of no mesh. Of its ports, one of each container, nothing is said."""
    ours = mesh.cluster.get("Deployment", "service-b-v1", mesh.name)
    assert ours is not None
    host = "0.0.0.0"  # noqa: S104 - as other people's apps do
    env = {"HOST": host, "PORT": "8080", "SERVICE": "shop", "VERSION": "v1", "INSTANCE": "shop"}
    container = {
        "name": "shop",
        "image": ours["spec"]["template"]["spec"]["containers"][0]["image"],
        "env": [{"name": name, "value": value} for name, value in env.items()],
        "readinessProbe": {"tcpSocket": {"port": 8080}},
    }
    admin = {
        **container,
        "name": "admin",
        "env": [{"name": name, "value": value} for name, value in {**env, "PORT": "8090"}.items()],
        "readinessProbe": {"httpGet": {"path": "/healthz", "port": 8090}},
    }
    edge = ingress(mesh, "shop", f"{namespace}.test", work="shop")
    edge["metadata"]["namespace"] = namespace
    edge["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]["port"] = {"number": 80}
    backend = {"service": {"name": "shop", "port": {"name": "admin"}}}
    paths = [{"path": "/", "pathType": "Prefix", "backend": backend}]
    edge["spec"]["rules"].append({"host": f"admin.{namespace}.test", "http": {"paths": paths}})
    return [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}},
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "shop", "namespace": namespace},
            "spec": {
                "selector": {"matchLabels": {"app": "shop"}},
                "template": {
                    "metadata": {"labels": {"app": "shop"}},
                    "spec": {"containers": [container, admin]},
                },
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "shop", "namespace": namespace},
            "spec": {
                "selector": {"app": "shop"},
                "ports": [
                    {"name": "main", "port": 80, "targetPort": 8080},
                    {"name": "admin", "port": 9000, "targetPort": 8090},
                ],
            },
        },
        edge,
    ]


def through(mesh: Mesh, namespace: str, change: str) -> None:
    """kubectl get deploy -n NAMESPACE -o yaml | meshdemo inject - | kubectl apply -f -"""
    running = kubectl(mesh, "get", "deploy", "-n", namespace, "-o", "yaml")
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(running)
        file.flush()
        kubectl(mesh, "apply", "-f", "-", stdin=mesh.run(change, file.name))
    kubectl(mesh, "rollout", "status", "deploy/shop", "-n", namespace, "--timeout", "110s")


def test_an_injected_app_is_part_of_the_mesh_in_whatever_namespace(mesh: Mesh) -> None:
    places = ("blue", "green")
    for place in places:
        kubectl(
            mesh,
            "apply",
            "-f",
            "-",
            stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": shop(mesh, place)}),
        )
    for place in places:
        kubectl(mesh, "rollout", "status", "deploy/shop", "-n", place, "--timeout", "110s")  # 2/2, without
        through(mesh, place, "inject")
        (pod,) = [
            one
            for one in mesh.cluster.find("Pod", place, labels="app=shop")
            if "deletionTimestamp" not in one["metadata"]
        ]
        assert [one["name"] for one in pod["spec"]["initContainers"]] == [
            "meshdemo-redirect",
            "meshdemo-sidecar",
        ]
        assert mesh.cluster.get("ConfigMap", f"meshdemo-{mesh.name}", place) is not None
    for place in places:
        until(
            lambda place=place: get(mesh, "/work", f"{place}.test")[0] == 200, f"{place} through the gateway"
        )

    def identities() -> dict[str, str]:
        return {
            one["identity"]: one["instance"]
            for one in mesh.json("identity", "show")["instances"]
            if one["identity"].endswith("/sa/shop")
        }

    known = until(lambda: len(found := identities()) == 2 and found, "their identities")
    assert known
    assert set(known) == {f"spiffe://{mesh.name}/ns/{place}/sa/shop" for place in places}

    def edge(place: str) -> dict[str, Any] | None:
        get(mesh, "/work", f"{place}.test")
        return next((one for one in mesh.json("edges") if one["service"] == f"shop.{place}"), None)

    for place in places:
        found = until(lambda place=place: edge(place), "the injected app among the edges")
        assert found is not None
        assert (found["caller"], found["secured"]) == ("gateway", True)

    def only_blue_is_called() -> bool:
        for _ in range(5):
            get(mesh, "/work", "blue.test")
        rows = {one["service"]: one for one in mesh.json("stat", "--window", "30s")}
        blue, green = rows["shop.blue"], rows.get("shop.green")
        return bool(blue["requests"] >= 5 and blue["success_rate"] == 1 and not (green and green["requests"]))

    until(only_blue_is_called, "signals of the one alone, as requests although nothing says that it is HTTP")

    def by_the_other_port() -> bool:
        status = get(mesh, "/work", "admin.blue.test")[0]
        rows = mesh.json("stat", "shop.blue", "--by", "route", "--window", "30s")
        return status == 200 and any(row["route"] == "port-9000" and row["requests"] for row in rows)

    until(by_the_other_port, "its other port, as a route of the same service")
    mesh.run("access", "deny", "gateway", "shop.green")
    assert get(mesh, "/work", "green.test")[0] == 403
    assert get(mesh, "/work", "blue.test")[0] == 200
    mesh.run("access", "allow", "gateway", "shop.green")
    assert get(mesh, "/work", "green.test")[0] == 200
    # A remedy, and logs, of what is not in the mesh's own namespace.
    (before,) = mesh.ids("shop.blue")
    mesh.runtime.restart(before, reason="a test")
    assert before not in mesh.ids("shop.blue")
    assert get(mesh, "/work", "blue.test")[0] == 200
    assert ".blue" in mesh.run("logs", "shop.blue")
    # The control plane starts anew, and nobody is missing for a moment.
    before = mesh.runtime._control_pod()
    mesh.cluster.delete("Pod", before, mesh.name)
    until(lambda: mesh.runtime._control_pod() != before, "another control plane")
    until(lambda: len(identities()) == 2 and get(mesh, "/work", "green.test")[0] == 200, "all of them again")
    # And out of it again.
    through(mesh, "green", "uninject")
    (pod,) = [
        one
        for one in mesh.cluster.find("Pod", "green", labels="app=shop")
        if "deletionTimestamp" not in one["metadata"]
    ]
    assert not pod["spec"].get("initContainers")
    until(lambda: get(mesh, "/work", "green.test")[0] == 503, "green is no part of it any more")
    notes: list[str] = []
    removed = down._remove_handouts(mesh.cluster, mesh.runtime.record, notes)
    assert f"ConfigMap meshdemo-{mesh.name} in blue" in removed
    assert "stay in blue" in notes[0]


# -- votes -------------------------------------------------------------------------------------------------


def test_votes_outlive_the_pods_that_counted_them(tmp_path: Path) -> None:
    require()
    edge = ("--gateway-port", str(free_port()))
    with on_kind(tmp_path, "--app", "emojivoto", "--rps", "20", "--no-observability", *edge) as mesh:

        def votes() -> int:
            status, body = get(mesh, "/api/leaderboard")
            assert status == 200, body
            return sum(one["votes"] for one in json.loads(body))

        before = until(lambda: (found := votes()) > 50 and found, "votes")
        claim = mesh.cluster.get("PersistentVolumeClaim", "voting-state", mesh.name)
        assert claim is not None
        assert claim["status"]["phase"] == "Bound"
        (voting,) = mesh.ids("voting")
        mesh.runtime.restart(voting, reason="a test")
        assert votes() >= before
        # Another release of it goes on with the same votes.
        mesh.run("up", "--runtime", "kind", "--version", "voting=v2", "--timeout", "200")
        before = votes()
        mesh.run("traffic", "set", "voting", "--split", "v1=0,v2=100")
        assert votes() >= before
        until(lambda: votes() > before + 20, "the other release counts on")
