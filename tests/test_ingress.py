"""Ingress and HTTPRoute: what they ask of the gateway, what is wrong with them, and what is written back."""

from __future__ import annotations

import time
from typing import Any

import pytest
from kube_mock import FOREVER, ApiServer, Refusal
from xds_harness import pair

from meshdemo.apps.model import Found, FurtherPort
from meshdemo.control import ingress
from meshdemo.control.kubernetes.reflector import Reflector
from meshdemo.control.model import Entry
from meshdemo.runtime.kubernetes.entrance import Reporter

APP = pair(cache={"port": 6379, "protocol": "tcp", "healthz": "/h", "metrics": None})


def service(name: str, port: int = 5000, **more: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": name},
        "spec": {"clusterIP": "10.96.0.7", "ports": [{"name": "http", "port": port}]},
        **more,
    }


SERVICES = [service("service-a"), service("service-b"), service("gateway", 80)]


def ingress_of(*paths: tuple[str, str, str], host: str | None = None, **spec: Any) -> dict[str, Any]:
    """Paths as (path, pathType, service)."""
    rule: dict[str, Any] = {
        "http": {
            "paths": [
                {"path": path, "pathType": kind, "backend": backend(name)} for path, kind, name in paths
            ]
        }
    }
    if host:
        rule["host"] = host
    return {
        "metadata": {"name": "shop", "namespace": "n", "uid": "u1"},
        "spec": {"ingressClassName": "meshdemo", **({"rules": [rule]} if paths else {}), **spec},
    }


def backend(service: str, **port: Any) -> dict[str, Any]:
    return {"service": {"name": service, "port": port or {"number": 5000}}}


def route_of(*rules: dict[str, Any], **spec: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": "shop", "namespace": "n", "uid": "u2", "generation": 3},
        "spec": {"parentRefs": [{"name": "meshdemo"}], "rules": list(rules), **spec},
    }


def read(*ingresses: dict[str, Any], routes: tuple[dict[str, Any], ...] = ()) -> ingress.Entrance:
    return ingress.translate(ingresses, routes, SERVICES, APP, "n")


def reasons(verdicts: tuple[ingress.Verdict, ...]) -> list[str]:
    return [problem.reason for verdict in verdicts for problem in verdict.problems]


# -- Ingress -----------------------------------------------------------------------------------------------


def test_hosts_and_paths() -> None:
    found = read(ingress_of(("/a", "Prefix", "service-a"), ("/b", "Exact", "service-b"), host="shop.test"))
    assert found.entries == (
        Entry(host="shop.test", path="/a", backends={"service-a": 1}),
        Entry(host="shop.test", path="/b", exact=True, backends={"service-b": 1}),
    )
    assert reasons(found.ingresses) == []
    assert read(ingress_of(("/a", "ImplementationSpecific", "service-a"))).entries[0].host == "*"


def test_an_object_leads_to_services_of_its_own_namespace() -> None:
    app = APP.model_copy(update={"services": {**APP.services, "web.shop": APP.services["service-b"]}})
    web = service("web", 80)
    web["metadata"]["namespace"] = "shop"
    there = ingress_of(("/", "Prefix", "web"), ("/b", "Prefix", "service-b"), host="shop.test")
    there["metadata"]["namespace"] = "shop"
    there["spec"]["rules"][0]["http"]["paths"][0]["backend"] = backend("web", number=80)
    route = route_of({"backendRefs": [{"name": "web", "port": 80}]})
    route["metadata"]["namespace"] = "shop"
    stranger = {**route, "metadata": {**route["metadata"], "name": "stranger"}}
    route = {**route, "spec": {**route["spec"], "parentRefs": [{"name": "meshdemo", "namespace": "n"}]}}
    found = ingress.translate([there], [route, stranger], [*SERVICES, web], app, "n")
    assert [entry.backends for entry in found.entries] == [{"web.shop": 1}, {}, {"web.shop": 1}]
    (verdict,) = found.ingresses
    assert [one.message for one in verdict.problems] == [
        "service 'service-b.shop' is not in the mesh; there are: web.shop"
    ]
    # Whose parent is a Gateway of its own namespace is not ours.
    assert [one.manifest["metadata"]["name"] for one in found.routes] == ["shop"]
    status = ingress.route_status(found.routes[0], "n", "now")
    assert status is not None
    assert [one["status"] for one in status["parents"][0]["conditions"]] == ["True", "True"]


def test_a_default_backend() -> None:
    found = read(ingress_of(defaultBackend=backend("service-b", name="http")))
    assert found.entries == (Entry(default=True, backends={"service-b": 1}),)


@pytest.mark.parametrize(
    ("spec", "annotations", "ours"),
    [
        ({"ingressClassName": "meshdemo"}, {}, True),
        ({"ingressClassName": "nginx"}, {}, False),
        ({}, {}, False),
        ({}, {"kubernetes.io/ingress.class": "meshdemo"}, True),
        ({"ingressClassName": "nginx"}, {"kubernetes.io/ingress.class": "meshdemo"}, False),
    ],
)
def test_the_class_decides(spec: dict[str, Any], annotations: dict[str, str], ours: bool) -> None:
    one = ingress_of(("/", "Prefix", "service-b"))
    one["metadata"]["annotations"] = annotations
    one["spec"] = {**{k: v for k, v in one["spec"].items() if k != "ingressClassName"}, **spec}
    assert bool(read(one).entries) is ours


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (backend("nobody"), "BackendNotFound"),
        (backend("service-b", number=81), "BackendNotFound"),
        (backend("service-b", name="admin"), "BackendNotFound"),
        (backend("cache"), "UnsupportedProtocol"),
        ({"resource": {"kind": "Bucket", "name": "x"}}, "UnsupportedBackend"),
    ],
)
def test_what_leads_nowhere_is_said_and_the_rest_goes_on(wrong: dict[str, Any], reason: str) -> None:
    one = ingress_of(("/a", "Prefix", "service-a"), ("/b", "Prefix", "service-b"))
    one["spec"]["rules"][0]["http"]["paths"][1]["backend"] = wrong
    found = read(one)
    assert [entry.backends for entry in found.entries] == [{"service-a": 1}, {}]
    assert reasons(found.ingresses) == [reason]


def test_each_port_of_a_service_that_speaks_http_can_be_led_to() -> None:
    ports = (
        FurtherPort(called=81, port=8081, protocol="http"), FurtherPort(called=82, port=8082, protocol="tcp"),
    )  # fmt: skip
    found = APP.services["service-b"].model_copy(update={"found": Found(ports=ports)})
    app = APP.model_copy(update={"services": {**APP.services, "service-b": found}})
    several = service("service-b")
    several["spec"]["ports"] += [{"name": "admin", "port": 81}, {"name": "db", "port": 82}, {"port": 83}]
    backends = (
        backend("service-b"), backend("service-b", name="admin"), backend("service-b", number=81),
        backend("service-b", name="db"), backend("service-b", number=83),
    )  # fmt: skip
    one = ingress_of(*((f"/{n}", "Prefix", "service-b") for n in range(len(backends))))
    for path, of in zip(one["spec"]["rules"][0]["http"]["paths"], backends, strict=True):
        path["backend"] = of
    read = ingress.translate([one], [], [several], app, "n", {"service-b": 5000})
    assert [entry.backends for entry in read.entries] == [
        {"service-b": 1}, {"service-b:8081": 1}, {"service-b:8081": 1}, {}, {},
    ]  # fmt: skip
    assert [problem.message for problem in read.ingresses[0].problems] == [
        "service 'service-b' does not speak HTTP by its port 82",
        "service 'service-b' is in the mesh by its ports 5000 (http), 81 (admin), 82 (db), not 83",
    ]


def test_tls_has_no_effect_and_a_strange_path_is_left_out() -> None:
    found = read(ingress_of(("x", "ImplementationSpecific", "service-b"), tls=[{"hosts": ["shop.test"]}]))
    assert found.entries == ()
    assert reasons(found.ingresses) == ["TLSIgnored", "InvalidPath"]


def test_where_an_ingress_is_reached() -> None:
    assert ingress.load_balancer(SERVICES) == [{"ip": "10.96.0.7"}]
    published = {"loadBalancer": {"ingress": [{"hostname": "lb.test", "ports": []}]}}
    at = ingress.load_balancer([service("gateway", status=published)])
    assert at == [{"hostname": "lb.test"}]
    assert ingress.ingress_status(ingress_of(), at) == {"loadBalancer": {"ingress": at}}
    assert ingress.ingress_status({**ingress_of(), "status": published}, at) is None
    assert ingress.load_balancer([]) == []


# -- HTTPRoute ---------------------------------------------------------------------------------------------


def test_a_route() -> None:
    rule = {
        "matches": [
            {"path": {"type": "PathPrefix", "value": "/a"}, "headers": [{"name": "X-A", "value": "1"}]},
            {"path": {"type": "Exact", "value": "/b"}, "method": "POST"},
        ],
        "backendRefs": [
            {"name": "service-a", "port": 5000, "weight": 9},
            {"name": "service-b", "port": 5000},
        ],
    }
    weights = {"service-a": 9, "service-b": 1}
    found = read(routes=(route_of(rule, hostnames=["x.test", "*.y.test"]),))
    assert found.entries == tuple(
        entry
        for path, more in (("/a", {"headers": (("x-a", "1"),)}), ("/b", {"exact": True, "method": "POST"}))
        for entry in (
            Entry(host="x.test", path=path, backends=weights, **more),
            Entry(host="*.y.test", path=path, backends=weights, **more),
        )
    )
    bare = route_of({"backendRefs": [{"name": "service-b", "port": 5000}]})
    assert read(routes=(bare,)).entries == (Entry(backends={"service-b": 1}),)


@pytest.mark.parametrize(
    "parent",
    [
        {"name": "other"},
        {"name": "meshdemo", "kind": "Service"},
        {"name": "meshdemo", "namespace": "elsewhere"},
    ],
)
def test_a_route_of_another_parent_is_not_ours(parent: dict[str, str]) -> None:
    found = read(routes=(route_of({"backendRefs": [{"name": "service-b"}]}, parentRefs=[parent]),))
    assert (found.entries, found.routes) == ((), ())


@pytest.mark.parametrize(
    ("rule", "reason", "entries"),
    [
        ({"backendRefs": [{"name": "nobody", "port": 1}]}, "BackendNotFound", 1),
        ({"backendRefs": [{"name": "b", "kind": "Bucket", "group": "x"}]}, "InvalidKind", 1),
        ({"backendRefs": [{"name": "service-b", "namespace": "other"}]}, "RefNotPermitted", 1),
        ({"filters": [{"type": "RequestRedirect"}]}, "UnsupportedValue", 1),
        ({"matches": [{"path": {"type": "RegularExpression", "value": "/.*"}}]}, "UnsupportedValue", 0),
        ({"matches": [{"queryParams": [{"name": "a", "value": "b"}]}]}, "UnsupportedValue", 0),
    ],
)
def test_a_route_that_cannot_be_obeyed(rule: dict[str, Any], reason: str, entries: int) -> None:
    found = read(routes=(route_of(rule),))
    assert reasons(found.routes) == [reason]
    assert [entry.backends for entry in found.entries] == [{}] * entries


def test_the_conditions_of_a_route() -> None:
    (good,) = read(routes=(route_of({"backendRefs": [{"name": "service-b"}]}),)).routes
    status = ingress.route_status(good, "n", "T1")
    assert status is not None
    (parent,) = status["parents"]
    assert parent["controllerName"] == "meshdemo.dev/gateway"
    assert [(one["type"], one["status"]) for one in parent["conditions"]] == [
        ("Accepted", "True"),
        ("ResolvedRefs", "True"),
    ]
    # What is there already is not written again, and what others wrote is kept.
    foreign = {"controllerName": "other", "parentRef": {"name": "meshdemo"}, "conditions": []}
    known = {**good.manifest, "status": {"parents": [foreign, parent]}}
    assert ingress.route_status(ingress.Verdict(known, good.problems), "n", "T2") is None
    lost = ingress.Verdict(known, (ingress.Problem("BackendNotFound", "gone", True),))
    status = ingress.route_status(lost, "n", "T3")
    assert status is not None
    assert status["parents"][0] == foreign
    accepted, resolved = status["parents"][1]["conditions"]
    assert (accepted["status"], accepted["lastTransitionTime"]) == ("True", "T1")
    assert (resolved["status"], resolved["reason"], resolved["lastTransitionTime"]) == (
        "False",
        "BackendNotFound",
        "T3",
    )


# -- the API server ----------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Any:
    server = ApiServer()
    yield server
    server.close()


def test_status_is_written_and_a_problem_is_said_once(server: ApiServer) -> None:
    server.answer("patch /apis/networking.k8s.io/v1/namespaces/n/ingresses/shop/status", {})
    server.answer("patch /apis/gateway.networking.k8s.io/v1/namespaces/n/httproutes/shop/status", {})
    server.answer("post /api/v1/namespaces/n/events", {})
    reporter = Reporter(server.cluster(), "n")
    found = read(
        ingress_of(("/", "Prefix", "nobody")),
        routes=(route_of({"backendRefs": [{"name": "nobody"}]}),),
    )
    reporter.report(found, SERVICES)
    reporter.report(found, SERVICES)
    events = [request.data for request in server.requests("post", "/events")]
    assert [(one["involvedObject"]["kind"], one["type"], one["reason"]) for one in events] == [
        ("Ingress", "Warning", "BackendNotFound"),
        ("HTTPRoute", "Warning", "BackendNotFound"),
    ]
    assert "there are: service-a, service-b" in events[0]["message"]
    (written, *_) = server.requests("patch", "/ingresses/shop/status")
    assert written.data == {"status": {"loadBalancer": {"ingress": [{"ip": "10.96.0.7"}]}}}
    assert server.requests("patch", "/httproutes/shop/status")
    # Mended and broken again, it is said again.
    reporter.report(read(ingress_of(("/", "Prefix", "service-b"))), SERVICES)
    reporter.report(found, SERVICES)
    assert len(server.requests("post", "/events")) == 4


def test_a_refusal_does_no_harm(server: ApiServer) -> None:
    refusal = Refusal(403, "Forbidden", "no")
    server.answer("patch /apis/networking.k8s.io/v1/namespaces/n/ingresses/shop/status", refusal)
    server.answer("post /api/v1/namespaces/n/events", refusal)
    Reporter(server.cluster(patience_s=0), "n").report(read(ingress_of(("/", "Prefix", "nobody"))), SERVICES)


def test_a_kind_that_the_cluster_lacks_is_looked_for_again(server: ApiServer) -> None:
    path = "/apis/gateway.networking.k8s.io/v1/namespaces/n/httproutes"
    server.answer(f"get {path}", Refusal(404, "NotFound", "no such kind"), times=2)
    server.answer(
        f"get {path}",
        lambda request: (
            list(FOREVER)
            if "watch" in str(request.url)
            else {"metadata": {"resourceVersion": "1"}, "items": [route_of()]}
        ),
    )
    reflector = Reflector(server.cluster(), "HTTPRoute", "n", lambda: None, absent_pause_s=0.05)
    reflector.start()
    try:
        assert reflector.listed.wait(10), "its absence is an answer"
        give_up = time.monotonic() + 20
        while not reflector.objects:
            assert time.monotonic() < give_up
            time.sleep(0.02)
    finally:
        reflector.stop()
