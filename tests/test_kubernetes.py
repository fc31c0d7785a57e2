"""What the code asks of the API server and makes of its answers, faults included; against a mock of it."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import kmock
import pytest
from envoy.config.endpoint.v3.endpoint_pb2 import ClusterLoadAssignment
from envoy.config.listener.v3.listener_pb2 import Listener
from kube_mock import FOREVER, ApiServer, Refusal, Stored
from xds_harness import resources

from meshdemo.apps import loader
from meshdemo.apps.model import Found
from meshdemo.control import xds
from meshdemo.control.discovered import declared
from meshdemo.control.identity import service_of, spiffe_id
from meshdemo.control.intent import Overtaken, eject, set_access
from meshdemo.control.kubernetes.handouts import Handouts
from meshdemo.control.kubernetes.kept import API, IntentMap, Keeper, pack
from meshdemo.control.kubernetes.reflector import Reflector
from meshdemo.control.kubernetes.source import Source
from meshdemo.control.kubernetes.state import mesh_state
from meshdemo.control.kubernetes.tokens import TokenReviews
from meshdemo.control.model import Intent, MeshState
from meshdemo.control.plane import ControlPlane
from meshdemo.control.render.inbound import open_paths
from meshdemo.control.render.renderer import Renderer
from meshdemo.errors import BadInput, Failed, MeshdemoError, Missing
from meshdemo.kube import ApiError, Cluster
from meshdemo.names import COMPONENT, REVISION, SERVICE, VERSION
from meshdemo.names import MESH as MESH_LABEL
from meshdemo.runtime.base import UpOptions
from meshdemo.runtime.kubernetes import apply, down, lease, record
from meshdemo.runtime.kubernetes.runtime import KubernetesRuntime
from meshdemo.runtime.kubernetes.specs import SpecMap
from meshdemo.runtime.local.spec import wanted

PAIR = loader.load("pair")
PODS = "/api/v1/namespaces/n/pods"
MAPS = "/api/v1/namespaces/n/configmaps"


@pytest.fixture
def server() -> Iterator[ApiServer]:
    found = ApiServer()
    yield found
    found.close()


def until(condition: Callable[[], Any], what: str) -> Any:
    end = time.monotonic() + 20
    while not (found := condition()):
        assert time.monotonic() < end, f"gave up waiting for: {what}"
        time.sleep(0.01)
    return found


# -- requests ----------------------------------------------------------------------------------------------


def test_a_busy_server_is_asked_again_when_it_says(server: ApiServer) -> None:
    server.answer(f"get {PODS}/p", status=429, headers={"Retry-After": "1"}, times=1)
    server.answer(f"get {PODS}/p", status=503, times=1)
    server.answer(f"get {PODS}/p", {"metadata": {"name": "p"}})
    began = time.monotonic()
    assert server.cluster().get("Pod", "p", "n") == {"metadata": {"name": "p"}}
    assert time.monotonic() - began >= 1
    assert len(server.requests("get")) == 3


def test_patience_ends(server: ApiServer) -> None:
    server.answer(f"get {PODS}", status=503)
    with pytest.raises(ApiError) as caught:
        server.cluster(patience_s=0).find("Pod", "n")
    assert caught.value.status == 503
    assert len(server.requests("get")) == 1


def test_a_server_that_is_away_for_a_while_is_waited_for() -> None:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))  # who connects is refused until it listens
    from kubernetes import client as api

    configuration = api.Configuration()
    configuration.host = f"http://127.0.0.1:{listener.getsockname()[1]}"
    cluster = Cluster(configuration, patience_s=20)

    def come_back() -> None:
        time.sleep(1)
        listener.listen()
        connection, _ = listener.accept()
        connection.recv(4096)
        body = b'{"metadata": {"name": "p"}}'
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        connection.close()
        listener.close()

    thread = threading.Thread(target=come_back)
    thread.start()
    assert cluster.get("Pod", "p", "n") == {"metadata": {"name": "p"}}
    thread.join()


def test_an_answer_that_breaks_off_is_asked_for_again() -> None:
    from kubernetes import client as api

    listener = socket.create_server(("127.0.0.1", 0))
    configuration = api.Configuration()
    configuration.host = f"http://127.0.0.1:{listener.getsockname()[1]}"

    def serve() -> None:
        body = b'{"metadata": {"name": "p"}}'
        for sent in (body[:5], body):
            connection, _ = listener.accept()
            connection.recv(4096)
            connection.sendall(
                b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), sent)
            )
            connection.close()

    thread = threading.Thread(target=serve)
    thread.start()
    assert Cluster(configuration).get("Pod", "p", "n") == {"metadata": {"name": "p"}}
    thread.join()
    listener.close()


def test_tls_that_breaks_off_is_an_absence_too() -> None:
    from kubernetes import client as api

    listener = socket.create_server(("127.0.0.1", 0))
    configuration = api.Configuration()
    configuration.host = f"https://127.0.0.1:{listener.getsockname()[1]}"
    attempts = 0

    def serve() -> None:
        nonlocal attempts
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                attempts += 1
                connection.recv(4096)
                connection.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    with pytest.raises(ApiError, match="does not answer") as caught:
        Cluster(configuration, patience_s=3.0).find("Pod", "n")
    assert caught.value.status == 0
    assert attempts >= 2
    listener.close()


def test_a_server_that_says_nothing_is_not_waited_for_longer_than_there_is_time() -> None:
    from kubernetes import client as api

    with socket.create_server(("127.0.0.1", 0)) as listener:
        configuration = api.Configuration()
        configuration.host = f"http://127.0.0.1:{listener.getsockname()[1]}"
        cluster = Cluster(configuration)
        cluster.deadline = time.monotonic()
        with pytest.raises(ApiError, match="it takes connections and says nothing"):
            cluster.find("Pod", "n")
        assert time.monotonic() - cluster.deadline < 20  # and not the 30 s of one attempt


def test_a_dead_cluster_is_told_at_once() -> None:
    from kubernetes import client as api

    configuration = api.Configuration()
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # and does not listen
        configuration.host = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ApiError, match=r"does not answer: .*refused") as caught:
            Cluster(configuration, patience_s=0).version()
    assert "\n" not in caught.value.message


def test_a_refusal_carries_the_servers_own_words(server: ApiServer) -> None:
    said = 'pods is forbidden: User "eve" cannot create resource "pods"'
    server.answer(f"post {PODS}", Refusal(403, "Forbidden", said))
    with pytest.raises(ApiError) as caught:
        server.cluster().create("Pod", {"metadata": {"name": "x"}}, "n")
    assert said in caught.value.message
    assert caught.value.reason == "Forbidden"
    assert caught.value.remedy


def test_a_context_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(
        json.dumps(
            {
                "apiVersion": "v1", "kind": "Config", "current-context": "one",
                "clusters": [{"name": "c", "cluster": {"server": "https://127.0.0.1:1"}}],
                "users": [{"name": "u", "user": {}}],
                "contexts": [{"name": name, "context": {"cluster": "c", "user": "u"}} for name in ("one", "two")],
            }
        )
    )  # fmt: skip
    with pytest.raises(BadInput, match="no context 'three'") as caught:
        Cluster.from_kubeconfig(config, "three")
    assert "one, two" in caught.value.remedy
    with pytest.raises(Missing):
        Cluster.from_kubeconfig(tmp_path / "nothing")


def test_apply_is_server_side_with_a_manager(server: ApiServer) -> None:
    server.answer(f"patch {MAPS}/x", {"kind": "ConfigMap"})
    server.cluster().apply(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x", "namespace": "n"}}
    )
    (request,) = server.requests("patch")
    assert request.params == {"fieldManager": "meshdemo", "force": "true"}
    assert request.headers["Content-Type"] == "application/apply-patch+yaml"


# -- watching ----------------------------------------------------------------------------------------------


def pod(name: str, version: str = "1", **fields: Any) -> dict[str, Any]:
    return {"kind": "Pod", "metadata": {"name": name, "namespace": "n", "resourceVersion": version, **fields}}


def pods(version: str, *names: str) -> dict[str, Any]:
    return {"metadata": {"resourceVersion": version}, "items": [pod(name) for name in names]}


def reflect(server: ApiServer, **options: Any) -> Reflector:
    options = {"first_pause_s": 0.05, **options}
    reflector = Reflector(server.cluster(patience_s=0), "Pod", "n", lambda: None, **options)
    reflector.start()
    return reflector


def names(reflector: Reflector) -> set[str]:
    return {one["metadata"]["name"] for one in reflector.objects}


def lines(*events: Any) -> bytes:
    return b"".join(json.dumps({"type": kind, "object": what}).encode() + b"\n" for kind, what in events)


def watches(server: ApiServer) -> list[str]:
    return [
        request.params["resourceVersion"] for request in server.requests("get") if "watch" in request.params
    ]


def test_changes_arrive(server: ApiServer) -> None:
    server.answer(
        f"get {PODS}?watch=true",
        lines(("ADDED", pod("b", "11")), ("MODIFIED", pod("a", "12")), ("DELETED", pod("a", "13"))),
        times=1,
    )
    server.answer(f"get {PODS}?watch=true", FOREVER)
    server.answer(f"get {PODS}", pods("10", "a"))
    reflector = reflect(server)
    until(lambda: names(reflector) == {"b"}, "the changes")
    until(lambda: len(watches(server)) >= 2, "the next watch")
    assert watches(server)[:2] == ["10", "13"]  # it goes on from where it was
    reflector.stop()


def test_a_dropped_watch_goes_on_where_it_was(server: ApiServer) -> None:
    whole = lines(("ADDED", pod("b", "11")))
    torn = lines(("ADDED", pod("c", "12")))[:-20]  # the connection breaks in the middle of a line
    server.answer(f"get {PODS}?watch=true", whole + torn, times=1)
    server.answer(f"get {PODS}?watch=true", lines(("ADDED", pod("c", "12"))), times=1)
    server.answer(f"get {PODS}?watch=true", FOREVER)
    server.answer(f"get {PODS}", pods("10", "a"))
    reflector = reflect(server)
    until(lambda: names(reflector) == {"a", "b", "c"}, "what was torn")
    assert watches(server)[:2] == ["10", "11"]
    assert (
        len([r for r in server.requests("get") if "watch" not in r.params]) == 1
    )  # nothing was listed again
    reflector.stop()


@pytest.mark.parametrize("how", ["event", "status"])
def test_a_version_that_is_too_old_has_all_listed_again(server: ApiServer, how: str) -> None:
    gone = Refusal(410, "Expired", "too old resource version: 10 (99)")
    server.answer(
        f"get {PODS}?watch=true", lines(("ERROR", gone.body())) if how == "event" else gone, times=1
    )
    server.answer(f"get {PODS}?watch=true", FOREVER)
    server.answer(f"get {PODS}", pods("10", "a"), times=1)
    server.answer(f"get {PODS}", pods("99", "b"))
    reflector = reflect(server)
    until(lambda: names(reflector) == {"b"}, "the second list")
    until(lambda: watches(server)[-1:] == ["99"], "a watch from there")
    reflector.stop()


def test_a_bookmark_moves_the_version_and_nothing_else(server: ApiServer) -> None:
    mark = {"kind": "Pod", "metadata": {"resourceVersion": "50"}}
    server.answer(f"get {PODS}?watch=true", lines(("BOOKMARK", mark)), times=1)
    server.answer(f"get {PODS}?watch=true", FOREVER)
    server.answer(f"get {PODS}", pods("10", "a"))
    reflector = reflect(server)
    until(lambda: "50" in watches(server), "a watch from the bookmark")
    assert names(reflector) == {"a"}
    reflector.stop()


def test_while_the_server_is_away_the_copy_stays(server: ApiServer) -> None:
    server.answer(f"get {PODS}?watch=true", status=500, times=1)
    server.answer(f"get {PODS}?watch=true", FOREVER)
    server.answer(f"get {PODS}", pods("10", "a"), times=1)
    server.answer(f"get {PODS}", status=503, times=3)
    server.answer(f"get {PODS}", pods("20", "a", "b"))
    reflector = reflect(server)
    assert reflector.listed.wait(10)
    seen = set()
    until(
        lambda: seen.add(frozenset(names(reflector))) or names(reflector) == {"a", "b"},
        "the server to be back",
    )
    assert frozenset() not in seen
    reflector.stop()


def test_everything_is_listed_again_now_and_then(server: ApiServer) -> None:
    server.answer(f"get {PODS}?watch=true", b"")
    counter = itertools.count(1)
    server.answer(f"get {PODS}", lambda: pods("10", f"p{next(counter)}"))
    reflector = reflect(server, resync_s=0.05)
    until(lambda: max((int(name[1:]) for name in names(reflector)), default=0) >= 3, "a third list")
    reflector.stop()


# -- the mesh as the cluster shows it ----------------------------------------------------------------------


def app_pod(
    name: str, service: str = "service-b", *, revision: str = "1", ip: str = "10.0.0.1", **meta: Any
) -> dict[str, Any]:
    labels = {MESH_LABEL: "m", SERVICE: service, VERSION: "v1"}
    return {
        "metadata": {"name": name, "uid": f"uid-{name}", "labels": labels, "annotations": {REVISION: revision}, **meta},
        "status": {"phase": "Running", "podIP": ip},
    }  # fmt: skip


def endpoints(service: str, **ready: bool) -> dict[str, Any]:
    return {
        "metadata": {"name": f"{service}-x", "labels": {"kubernetes.io/service-name": service}},
        "endpoints": [
            {"conditions": {"ready": is_ready}, "targetRef": {"kind": "Pod", "name": name.replace("_", "-")}}
            for name, is_ready in ready.items()
        ],
    }  # fmt: skip


def service(name: str, address: str) -> dict[str, Any]:
    return {"metadata": {"name": name}, "spec": {"clusterIP": address}}


def test_the_mesh_is_what_pods_slices_and_services_say() -> None:
    found = mesh_state(
        "m", "n", PAIR,
        [
            app_pod("b-1", revision="3"),
            app_pod("b-2", deletionTimestamp="2026-01-01T00:00:00Z"),
            app_pod("b-3", ip=""),
            {**app_pod("b-4"), "status": {"phase": "Failed"}},
            app_pod("x-1", service="x"),
        ],
        [endpoints("service-b", b_1=True, b_2=True, b_3=False), endpoints("service-a", b_3=True)],
        [service("service-a", "10.96.0.1"), service("service-b", "None"), service("other", "10.96.0.9")],
    )  # fmt: skip
    by_id = {one.id: one for one in found.instances}
    assert set(by_id) == {"b-1", "b-2", "b-3", "x-1"}  # x-1 was injected
    assert (by_id["b-1"].ready, by_id["b-1"].revision, by_id["b-1"].host) == (True, 3, "10.0.0.1")
    # Its endpoint is still there, but it is going: it gets no more traffic, and nobody judges it.
    assert (by_id["b-2"].ready, by_id["b-2"].leaving) == (False, True)
    assert (by_id["b-3"].ready, by_id["b-3"].host) == (False, "")
    assert found.addresses == {"service-a": "10.96.0.1"}
    assert by_id["b-1"].inbound_port == by_id["b-1"].app_port == 5000


# -- pods that were injected -------------------------------------------------------------------------------


def injected(
    name: str, label: str, *, version: str = "v1", account: str = "default", **spec: Any
) -> dict[str, Any]:
    found = app_pod(name, service=label)
    found["metadata"]["labels"][VERSION] = version
    return {**found, "spec": {"serviceAccountName": account, "containers": [{"name": "c", **spec}]}}


def slice_of(service: str, port: int, *names: str, port_name: str = "") -> dict[str, Any]:
    return {
        "metadata": {"name": f"{service}-y", "labels": {"kubernetes.io/service-name": service}},
        "ports": [{"name": port_name, "port": port}],
        "endpoints": [
            {"conditions": {"ready": True}, "targetRef": {"kind": "Pod", "name": name}} for name in names
        ],
    }


def k8s_service(
    service: str, address: str, port: int, *, selector: dict[str, str] | None = None, **fields: Any
) -> dict[str, Any]:
    return {
        "metadata": {"name": service},
        "spec": {
            "clusterIP": address,
            "ports": [{"port": port, **fields}],
            "selector": {SERVICE: service} if selector is None else selector,
        },
    }


def test_what_was_injected_is_found_without_an_app_file() -> None:
    probe = {"readinessProbe": {"httpGet": {"path": "/ready?x=1", "port": 8080}}}
    found = mesh_state(
        "m", "n", PAIR,
        [
            app_pod("b-1"),
            injected("shop-1", "shop", version="1.2.3", **probe), injected("shop-2", "shop", version="1.2.3"),
            injected("cart-1", "cart"), injected("db-0", "db"), injected("bot-1", "bot"),
            injected("odd-1", "Not_A_Name"),
        ],
        [
            slice_of("shop-front", 8080, "shop-1", "shop-2", port_name="http"), slice_of("cart", 9000, "cart-1", port_name="api"),
            slice_of("db", 5432, "db-0"), slice_of("elsewhere", 1, "not-meshed"),
        ],
        [
            k8s_service("shop-front", "10.96.1.1", 80, name="http", selector={SERVICE: "shop"}), k8s_service("cart", "10.96.1.2", 9000, name="api", appProtocol="kubernetes.io/h2c"),
            k8s_service("db", "10.96.1.3", 5432), k8s_service("elsewhere", "10.96.1.4", 1), service("service-b", "10.96.0.2"),
        ],
    )  # fmt: skip
    services = found.app.services
    assert set(services) == {"service-a", "service-b", "shop-front", "cart", "db", "account-default"}
    assert (
        services["shop-front"].port,
        services["shop-front"].protocol,
        services["shop-front"].open_paths,
    ) == (8080, "http", {"/ready?x=1": ["GET"]})
    assert [services[name].protocol for name in ("cart", "db", "account-default")] == ["grpc", "tcp", "http"]
    assert set(services["account-default"].calls) == {"shop-front", "cart", "db"}
    assert services["service-a"] == PAIR.services["service-a"]
    assert found.ports == {"shop-front": 80, "cart": 9000, "db": 5432}
    assert found.addresses["shop-front"] == "10.96.1.1"
    by_id = {one.id: one for one in found.instances}
    assert set(by_id) == {"b-1", "shop-1", "shop-2", "cart-1", "db-0", "bot-1", "odd-1"}
    assert (by_id["shop-1"].service, by_id["shop-1"].version, by_id["shop-1"].inbound_port) == (
        "shop-front",
        "v-1-2-3",
        8080,
    )
    assert by_id["shop-1"].ready
    assert by_id["bot-1"].ready is False  # nobody has said that it is
    assert declared(found.app) == PAIR


def service_names(
    pods: list[dict[str, Any]], slices: list[dict[str, Any]], services: list[dict[str, Any]]
) -> dict[str, str]:
    found = mesh_state("m", "n", PAIR, pods, slices, services)
    return {one.id: one.service for one in found.instances}


def test_a_pod_does_not_get_a_name_by_its_label() -> None:
    """Who merely labels a pod so is neither a Service's pod nor another caller than its account is."""
    shop = k8s_service("shop", "10.96.1.1", 80, selector={"app": "shop"})
    real, fake, other = injected("shop-1", "shop"), injected("fake-1", "shop"), injected("bot-1", "bot")
    real["metadata"]["labels"]["app"] = "shop"
    worker = injected(
        "worker-1", "x", account="shop"
    )  # the account's name is a Service's: still no Service's pod
    pods = [real, fake, other, worker]
    assert service_names(pods, [slice_of("shop", 8080, "shop-1")], [shop]) == {
        "shop-1": "shop",
        "fake-1": "account-default",
        "bot-1": "account-default",
        "worker-1": "account-shop",
    }
    # An EndpointSlice that somebody wrote does not make a pod the Service's.
    slices = [slice_of("shop", 8080, "shop-1", "fake-1")]
    assert service_names(pods, slices, [shop])["fake-1"] == "account-default"
    open_to_all = k8s_service("open", "10.96.1.2", 80, selector={})
    assert service_names([fake], [slice_of("open", 1, "fake-1")], [open_to_all]) == {
        "fake-1": "account-default"
    }


def test_a_pod_that_the_gateways_service_selects_is_no_gateway() -> None:
    edge = k8s_service("gateway", "10.96.1.1", 80, selector={"app.kubernetes.io/component": "gateway"})
    pod = injected("fake-1", "shop")
    pod["metadata"]["labels"]["app.kubernetes.io/component"] = "gateway"
    slices = [slice_of("gateway", 8080, "fake-1")]
    assert service_names([pod], slices, [edge]) == {"fake-1": "account-default"}


def test_a_pod_waits_for_its_services_name() -> None:
    """It has no other identity for the moment until the EndpointSlice has it."""
    pod, shop = injected("shop-1", "shop"), k8s_service("shop", "10.96.1.1", 80)
    assert service_names([pod], [slice_of("shop", 8080)], [shop]) == {}
    assert service_names([pod], [slice_of("shop", 8080, "shop-1")], [shop]) == {"shop-1": "shop"}


def test_names_that_are_taken_or_none_are_no_callers() -> None:
    taken, odd = injected("a-1", "a"), injected("b-9", "b", account="with.dots")
    service = k8s_service("account-default", "10.96.1.1", 80, selector={"app": "else"})
    assert service_names([taken, odd], [], [service]) == {}


@pytest.mark.parametrize(
    ("annotations", "port", "pod", "protocol"),
    [
        ({}, {"name": "http-api"}, {}, "http"),
        ({}, {"name": "grpc"}, {}, "grpc"),
        ({}, {"name": "tcp-x"}, {"readinessProbe": {"httpGet": {"port": 8080}}}, "tcp"),
        ({}, {"name": "x", "appProtocol": "redis"}, {"readinessProbe": {"httpGet": {"port": 8080}}}, "tcp"),
        ({}, {}, {"readinessProbe": {"httpGet": {"port": 8080}}}, "http"),
        ({}, {}, {"livenessProbe": {"httpGet": {"port": "w"}}, "ports": [{"name": "w", "containerPort": 8080}]}, "http"),
        ({}, {}, {"readinessProbe": {"httpGet": {"port": 9090}}}, "any"),
        ({}, {}, {"readinessProbe": {"tcpSocket": {"port": 8080}}}, "any"),
        ({}, {}, {"readinessProbe": {"grpc": {"port": 8080}}}, "grpc"),
        ({}, {"port": 3306}, {}, "tcp"),
        ({"meshdemo.dev/protocol": "grpc"}, {"name": "http"}, {}, "grpc"),
        ({"meshdemo.dev/told-protocol": "tcp"}, {"name": "http"}, {}, "tcp"),
        ({"meshdemo.dev/protocol": "9000=tcp, 8080=grpc, http"}, {"name": "tcp"}, {}, "grpc"),
        ({"meshdemo.dev/protocol": "nonsense"}, {"name": "http"}, {}, "http"),
    ],
)  # fmt: skip
def test_how_a_protocol_is_told(
    annotations: dict[str, str], port: dict[str, str], pod: dict[str, Any], protocol: str
) -> None:
    one = injected("x-1", "x", **pod)
    one["metadata"]["annotations"] = annotations
    found = mesh_state(
        "m", "n", PAIR, [one], [slice_of("x", 8080, "x-1", port_name=port.get("name", ""))],
        [k8s_service("x", "10.96.1.1", **{"port": 80, **port})],
    )  # fmt: skip
    assert found.app.services["x"].spoken == protocol


def test_probes_and_other_ports_of_a_pod_go_on_as_they_were() -> None:
    pod = injected(
        "x-1", "x", ports=[{"name": "w", "containerPort": 8080}, {"containerPort": 53, "protocol": "UDP"}],
        readinessProbe={"httpGet": {"path": "/r", "port": 9000}}, livenessProbe={"grpc": {"port": 8080}},
    )  # fmt: skip
    pod["spec"]["initContainers"] = [
        {"name": "meshdemo-sidecar", "restartPolicy": "Always", "ports": [{"containerPort": 15020}]},
        {"name": "logger", "restartPolicy": "Always", "ports": [{"containerPort": 24224}]},
        {"name": "once", "ports": [{"containerPort": 1234}]},
    ]
    metrics = k8s_service("metrics", "10.96.1.2", 9464, selector={"never": "mind"})
    slices = [slice_of("x", 8080, "x-1"), slice_of("metrics", 9464, "x-1")]
    found = mesh_state("m", "n", PAIR, [pod], slices, [k8s_service("x", "10.96.1.1", 80), metrics])
    service = found.app.services["x"]
    assert service.found == Found(grpc_probe=True, aside=(9000, 9464, 24224))
    assert open_paths(service) == {"/grpc.health.v1.Health/Check": ["POST"]}  # the other probe goes elsewhere
    # A pod that nobody calls may be probed as well.
    alone = mesh_state(
        "m", "n", PAIR, [injected("y-1", "y", livenessProbe={"tcpSocket": {"port": 7}})], [], []
    )
    assert alone.app.services["account-default"].found == Found(aside=(7,))


def test_what_the_kubelet_asks_is_answered_whatever_the_port_speaks() -> None:
    """Also the hooks of a container's life cycle, and of a port that is said to carry bytes."""
    pod = injected(
        "x-1", "x", lifecycle={"postStart": {"httpGet": {"path": "warm", "port": 8080}}, "preStop": {"exec": {}}},
        startupProbe={"httpGet": {"port": 8080}},
    )  # fmt: skip
    slices, service = (
        [slice_of("x", 8080, "x-1", port_name="tcp")],
        k8s_service("x", "10.96.1.1", 80, name="tcp"),
    )
    found = mesh_state("m", "n", PAIR, [pod], slices, [service])
    assert found.app.services["x"].spoken == "tcp"
    assert found.app.services["x"].open_paths == {"/": ["GET"], "/warm": ["GET"]}
    assert found.app.services["x"].healthz == "/"
    inbound = resources(Renderer().snapshots(found, Intent())["x-1"], xds.LISTENERS, Listener)["inbound"]
    assert [chain.name for chain in inbound.filter_chains] == ["8080/tls", "8080/raw_buffer"]


def test_all_ways_to_the_same_port_are_the_same_service() -> None:
    web, more = k8s_service("web", "10.96.1.1", 80, name="http"), k8s_service("web-lb", "10.96.1.2", 8000)
    more["spec"]["selector"] = web["spec"]["selector"] = {SERVICE: "web"}
    web["spec"]["ports"].append({"name": "also", "port": 81})
    slices = [slice_of("web", 8080, "web-1", port_name="http"), slice_of("web-lb", 8080, "web-1")]
    slices[0]["ports"].append({"name": "also", "port": 8080})
    found = mesh_state("m", "n", PAIR, [injected("web-1", "web")], slices, [web, more])
    assert set(found.app.services) - set(PAIR.services) == {"web"}
    assert found.places("web") == [
        ("web", "10.96.1.1", 80, ""),
        ("web@10.96.1.1:81", "10.96.1.1", 81, ""), ("web@10.96.1.2:8000", "10.96.1.2", 8000, ""),
    ]  # fmt: skip
    outbound = Renderer().snapshots(found, Intent())["web-1"]
    assert outbound


def several(name: str, address: str, **ports: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """A Service of the pods labelled like it with these ports, each 10000 higher in the pods, and its
    EndpointSlice of the pod `x-1`."""
    service, (first, *_) = k8s_service(name, address, 1, selector={SERVICE: "x"}), ports.values()
    service["spec"]["ports"] = [{"name": port, "port": number} for port, number in ports.items()]
    found = slice_of(name, first + 10000, "x-1")
    found["ports"] = [{"name": port, "port": number + 10000} for port, number in ports.items()]
    return service, found


def test_every_port_of_a_service_is_in_the_mesh() -> None:
    """Under its one name, each by its own protocol, also where another Service leads to it."""
    pod = injected("x-1", "x", readinessProbe={"httpGet": {"path": "/r", "port": 19001}})
    pod["metadata"]["annotations"] = {
        "prometheus.io/scrape": "true", "prometheus.io/port": "19002", "prometheus.io/path": "/stats",
        "meshdemo.dev/told-protocol": "grpc,19002=http",
    }  # fmt: skip
    (x, its), (admin, of_admin) = (
        several("x", "10.96.1.1", http=80, grpc=9000, web=9001, odd=9002, dns=53),
        several("x-admin", "10.96.1.2", metrics=9003, again=9000),
    )
    x["spec"]["ports"].insert(0, {"name": "udp", "port": 53, "protocol": "UDP"})
    x["spec"]["ports"][-1]["protocol"] = its["ports"][-1]["protocol"] = "SCTP"
    found = mesh_state("m", "n", PAIR, [pod], [its, of_admin], [x, admin])
    service = found.app.services["x"]
    assert set(found.app.services) - set(PAIR.services) == {"x"}
    assert (service.port, service.spoken, service.open_paths) == (10080, "grpc", {})
    assert [(one.called, one.port, one.spoken, list(one.open_paths)) for one in service.further] == [
        (9000, 19000, "grpc", []), (9001, 19001, "http", ["/r"]), (9002, 19002, "http", ["/stats"]),
        (9003, 19003, "any", ["/metrics"]),
    ]  # fmt: skip
    assert service.found is not None
    assert service.found.aside == ()
    assert [(address, port, target) for _, address, port, target in found.places("x")] == [
        ("10.96.1.1", 80, ""), ("10.96.1.1", 9000, "19000"), ("10.96.1.1", 9001, "19001"),
        ("10.96.1.1", 9002, "19002"), ("10.96.1.2", 9003, "19003"), ("10.96.1.2", 9000, "19000"),
    ]  # fmt: skip
    (instance,) = found.instances
    assert instance.further == ("19000", "19001", "19002", "19003")
    assert not service.without_requests


def test_callers_know_of_the_instances_that_have_a_port() -> None:
    """While a rollout adds one, not all do."""
    old, new = injected("x-0", "x", version="v1"), injected("x-1", "x", version="v1")
    x, its = several("x", "10.96.1.1", http=80, grpc=9000)
    before = {**its, "ports": its["ports"][:1], "endpoints": slice_of("x", 1, "x-0")["endpoints"]}
    for pod, address in ((old, "10.0.0.1"), (new, "10.0.0.2")):
        pod["status"]["podIP"] = address
    found = mesh_state("m", "n", PAIR, [old, new], [before, its], [x])
    snapshot = Renderer().snapshots(found, Intent())["x-0"]
    endpoints = {
        name: [one.endpoint.address.socket_address for one in message.endpoints[0].lb_endpoints]
        for name, message in resources(snapshot, xds.ENDPOINTS, ClusterLoadAssignment).items()
    }
    assert {(one.address, one.port_value) for one in endpoints["x/v1"]} == {
        ("10.0.0.1", 10080), ("10.0.0.2", 10080),
    }  # fmt: skip
    assert [(one.address, one.port_value) for one in endpoints["x/v1/19000"]] == [("10.0.0.2", 19000)]
    assert [one.port_value for one in endpoints["app:19000"]] == [19000]


def test_a_service_of_some_of_the_pods_leads_to_them_alone() -> None:
    """Such as `db-rw` to the one that takes writes, whatever is alphabetical, and however the versions are split."""
    pods = [injected(f"db-{n}", "db", version=f"v{n}") for n in (1, 2, 3)]
    for n, pod in enumerate(pods, 1):
        pod["status"]["podIP"] = f"10.0.0.{n}"
        pod["metadata"]["labels"]["role"] = "primary" if n == 2 else "replica"
    services = [
        k8s_service("a-rw", "10.96.1.1", 5432, selector={SERVICE: "db", "role": "primary"}),
        k8s_service("db", "10.96.1.2", 5432), k8s_service("also-db", "10.96.1.3", 5432, selector={SERVICE: "db"}),
    ]  # fmt: skip
    # The EndpointSlice of a Service of all of them does not know the third yet.
    slices = [
        slice_of("a-rw", 5432, "db-2"), slice_of("db", 5432, "db-1", "db-2"),
        slice_of("also-db", 5432, "db-1", "db-2", "db-3"),
    ]  # fmt: skip
    found = mesh_state("m", "n", PAIR, pods, slices, services)
    assert {one.service for one in found.instances} == {"also-db"}
    assert {place[1:] for place in found.places("also-db")} == {
        ("10.96.1.3", 5432, ""), ("10.96.1.2", 5432, ""), ("10.96.1.1", 5432, "5432/a-rw"),
    }  # fmt: skip
    snapshot = Renderer().snapshots(found, Intent())["db-1"]
    endpoints = resources(snapshot, xds.ENDPOINTS, ClusterLoadAssignment)
    hosts = {
        name: [one.endpoint.address.socket_address.address for one in of.endpoints[0].lb_endpoints]
        for name, of in endpoints.items()
    }
    assert (hosts["also-db/v2/5432/a-rw"], hosts["also-db/v1/5432/a-rw"]) == (["10.0.0.2"], [])
    outbound = resources(snapshot, xds.LISTENERS, Listener)["outbound"]
    chain = next(one for one in outbound.filter_chains if one.name.endswith("10.96.1.1:5432"))
    assert b"also-db/v2/5432/a-rw" in chain.SerializeToString()
    assert b"also-db/v1/5432/a-rw" not in chain.SerializeToString()
    # At the pods it is the one port that they have.
    inbound = resources(snapshot, xds.LISTENERS, Listener)["inbound"]
    assert [one.name for one in inbound.filter_chains] == ["5432/tls"]
    assert {name for name in endpoints if name.startswith("app")} == {"app"}


def test_ports_that_stay_past_the_mesh() -> None:
    """What their owner had skipped, what the kubelet asks by TLS, and where members of a StatefulSet meet."""
    pod = injected("x-1", "x", livenessProbe={"httpGet": {"path": "/", "port": 19001, "scheme": "HTTPS"}})
    pod["metadata"]["annotations"] = {"meshdemo.dev/told-skipped-ports": "10080"}
    x, its = several("x", "10.96.1.1", skipped=80, https=9001, http=9002, peers=9003)
    members, of_members = several("x-members", "None", http=9002, peers=9003)
    found = mesh_state("m", "n", PAIR, [pod], [its, of_members], [x, members])
    service = found.app.services["x"]
    assert (service.port, service.further) == (19002, ())
    assert service.found == Found(aside=(10080, 19001, 19003))
    assert found.places("x") == [("x", "10.96.1.1", 9002, "")]
    # Without any that is left, it has its name nevertheless, and nobody is led there by the mesh.
    pod["metadata"]["annotations"]["meshdemo.dev/skip-inbound-ports"] = "10080 19002"
    found = mesh_state("m", "n", PAIR, [pod], [its], [x])
    assert found.places("x") == [("x", "10.96.1.1", 9003, "")]
    pod["metadata"]["annotations"]["meshdemo.dev/skip-inbound-ports"] = "10080 19002 19003"
    found = mesh_state("m", "n", PAIR, [pod], [its], [x])
    assert [one.service for one in found.instances] == ["x"]
    assert found.places("x") == []
    assert Renderer().snapshots(found, Intent())["x-1"]


def test_a_headless_service_is_reached_as_before() -> None:
    headless = k8s_service("db", "None", 5432)
    found = mesh_state("m", "n", PAIR, [injected("db-0", "db")], [slice_of("db", 5432, "db-0")], [headless])
    assert {one.id: one.service for one in found.instances} == {"db-0": "account-default"}
    assert found.app.services["account-default"].found == Found(aside=(5432,))


def test_a_gateway_is_told_by_its_labels_and_its_account() -> None:
    edge, impostor = injected("gateway-1", "gateway", account="gateway"), injected("other-1", "gateway")
    edge["metadata"]["labels"][COMPONENT] = "gateway"
    found = mesh_state("m", "n", PAIR, [app_pod("b-1"), edge, impostor], [], [])
    assert [one.id for one in found.gateways] == ["gateway-1"]
    assert [one.id for one in found.instances] == ["b-1"]
    assert found.app == PAIR


def test_without_injected_pods_the_app_is_what_was_declared() -> None:
    found = mesh_state("m", "n", PAIR, [app_pod("b-1")], [], [k8s_service("other", "10.96.9.9", 80)])
    assert found.app == PAIR
    assert found.ports == {}


def of(namespace: str, manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest, in a namespace."""
    return {**manifest, "metadata": {**manifest["metadata"], "namespace": namespace}}


def test_services_of_the_same_name_in_two_namespaces_are_two() -> None:
    """Also where pods, labels and accounts are called alike, and like what the mesh itself has."""
    others = [
        of(namespace, one)
        for namespace, address in (("blue", "10.96.2.1"), ("green", "10.96.3.1"))
        for one in (
            injected("web-0", "web"), slice_of("web", 8080, "web-0"), k8s_service("web", address, 80),
            injected("b-1", "service-b"), injected("edge-0", "gateway"),
        )
    ]  # fmt: skip
    found = mesh_state(
        "m", "n", PAIR,
        [of("n", app_pod("b-1")), of("n", injected("dotted.name", "x"))] + [one for one in others if "status" in one],
        [endpoints("service-b", b_1=True)] + [one for one in others if "endpoints" in one],
        [service("service-b", "10.96.0.1")] + [one for one in others if "clusterIP" in one.get("spec", {})],
    )  # fmt: skip
    assert {one.id: one.service for one in found.instances} == {
        "b-1": "service-b", "dotted.name.n": "account-default",
        "web-0.blue": "web.blue", "b-1.blue": "account-default.blue", "edge-0.blue": "account-default.blue",
        "web-0.green": "web.green", "b-1.green": "account-default.green", "edge-0.green": "account-default.green",
    }  # fmt: skip
    assert found.gateways == ()
    assert found.addresses == {"service-b": "10.96.0.1", "web.blue": "10.96.2.1", "web.green": "10.96.3.1"}
    assert found.ports == {"web.blue": 80, "web.green": 80}
    assert "web.green" in found.app.services["web.blue"].calls
    assert found.app.services["service-b"] == PAIR.services["service-b"]
    assert declared(found.app) == PAIR
    by_id = {one.id: one for one in found.instances}
    assert by_id["web-0.blue"].ready
    identities = {name: spiffe_id("m", "n", name) for name in found.app.services}
    assert identities["service-b"] == "spiffe://m/ns/n/sa/service-b"
    assert identities["web.blue"] == "spiffe://m/ns/blue/sa/web"
    assert identities["account-default.green"] == "spiffe://m/ns/green/sa/account-default"
    assert {name: service_of(identity, "n") for name, identity in identities.items()} == {
        name: name for name in identities
    }


class Places:
    """As much of an API server as has pods in namespaces, and what surrounds them."""

    def __init__(self, server: ApiServer, *objects: tuple[str, dict[str, Any]]) -> None:
        spec = {
            "metadata": {"name": "meshdemo-spec", "namespace": "n"},
            "data": {"spec.json": json.dumps({"app": PAIR.model_dump(mode="json")})},
        }
        for path, found in {
            "/api/v1/pods": [one for kind, one in objects if kind == "Pod"],
            "/api/v1/namespaces/n/configmaps": [spec],
        }.items():
            self.listed(server, path, found)
        for namespace in ("n", "shop"):
            for kind, path in (
                ("Service", f"/api/v1/namespaces/{namespace}/services"),
                ("EndpointSlice", f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices"),
                ("Ingress", f"/apis/networking.k8s.io/v1/namespaces/{namespace}/ingresses"),
            ):
                here = [
                    one for its, one in objects if its == kind and one["metadata"]["namespace"] == namespace
                ]
                self.listed(server, path, here)
            server.answer(
                f"get /apis/gateway.networking.k8s.io/v1/namespaces/{namespace}/httproutes",
                Refusal(404, "NotFound", "no such kind"),
            )

    @staticmethod
    def listed(server: ApiServer, path: str, items: list[dict[str, Any]]) -> None:
        answer = {"metadata": {"resourceVersion": "1"}, "items": items}
        server.answer(f"get {path}", lambda request: FOREVER if "watch" in str(request.url) else answer)


def test_pods_are_looked_for_everywhere_and_what_is_around_them_where_they_are(
    server: ApiServer, tmp_path: Path
) -> None:
    shop = of("shop", injected("web-0", "web"))
    Places(
        server,
        ("Pod", of("n", app_pod("b-1"))), ("Pod", shop),
        ("Service", of("shop", k8s_service("web", "10.96.2.1", 80))),
        ("EndpointSlice", of("shop", slice_of("web", 8080, "web-0"))),
    )  # fmt: skip
    server.answer("patch /api/v1/namespaces/shop/configmaps/meshdemo-m")
    server.answer(REVIEWS, review("web-0", user="system:serviceaccount:shop:default"), times=1)
    server.answer(REVIEWS, review("web-0", user="system:serviceaccount:n:default"))
    cluster = server.cluster(patience_s=0)
    (tmp_path / "trust.pem").write_text("root")

    async def look() -> None:
        source = Source(cluster, "m", "n")
        try:
            async with asyncio.timeout(60):
                mesh = await source.start()
            assert {one.id: one.service for one in mesh.instances} == {
                "b-1": "service-b",
                "web-0.shop": "web.shop",
            }
            assert source.guests() == {"shop"}
            reviews = TokenReviews(cluster, source)
            proven = await reviews.instance("of web-0", mesh)
            assert proven is not None and proven.id == "web-0.shop"
            assert await reviews.instance("of a web-0 of the mesh's own namespace", mesh) is None
            files = {"bootstrap.yaml": "b"}
            handouts = Handouts(cluster, "m", source.guests, lambda: dict(files), tmp_path / "trust.pem")
            assert await asyncio.to_thread(handouts.save)
            assert not await asyncio.to_thread(handouts.save)
            files["bootstrap.yaml"] = "of a larger mesh"
            assert await asyncio.to_thread(handouts.save)
            assert not await asyncio.to_thread(handouts.save)
        finally:
            source.stop()

    asyncio.run(look())
    given, last = server.requests("patch", "configmaps")
    assert given.data["data"] == {"bootstrap.yaml": "b", "trust.pem": "root"}
    assert last.data["data"]["bootstrap.yaml"] == "of a larger mesh"
    assert given.data["metadata"]["labels"]["meshdemo.dev/mesh"] == "m"
    assert "fieldManager" in str(given.url)  # server-side apply
    (pods,) = [one for one in server.requests("get", "/api/v1/pods") if "watch" not in str(one.url)]
    assert "labelSelector=meshdemo.dev/mesh%3Dm" in str(pods.url)


def test_down_takes_back_what_other_namespaces_were_given(server: ApiServer) -> None:
    given = [of(namespace, {"metadata": {"name": "meshdemo-m"}}) for namespace in ("n", "shop")]
    server.answer("get /api/v1/configmaps", {"items": given}, times=1)
    server.answer("get /api/v1/configmaps", Refusal(403, "Forbidden", "not you"))
    server.answer("get /api/v1/pods", {"items": [of("shop", injected("web-0", "web"))]})
    server.answer("delete /api/v1/namespaces/shop/configmaps/meshdemo-m")
    found = record.Record(kind="kubernetes", mesh="n")
    notes: list[str] = []
    removed = down._remove_handouts(server.cluster(patience_s=0), found, notes)
    assert removed == ["ConfigMap meshdemo-m in shop"]
    assert [str(one.url.path) for one in server.requests("delete")] == [
        "/api/v1/namespaces/shop/configmaps/meshdemo-m"
    ]
    assert "stay in shop" in notes.pop()
    assert down._remove_handouts(server.cluster(patience_s=0), found, notes) == []
    assert "not you" in notes.pop()


def test_a_namespace_that_takes_nothing_keeps_nothing_from_the_others(
    server: ApiServer, tmp_path: Path
) -> None:
    (tmp_path / "trust.pem").write_text("root")
    server.answer(
        "patch /api/v1/namespaces/a/configmaps/meshdemo-m", Refusal(403, "Forbidden", "it is going")
    )
    server.answer("patch /api/v1/namespaces/b/configmaps/meshdemo-m")
    handouts = Handouts(server.cluster(patience_s=0), "m", lambda: {"a", "b"}, dict, tmp_path / "trust.pem")
    for _ in range(2):
        with pytest.raises(Failed, match=r"meshdemo-m in a: .*it is going"):
            handouts.save()
    assert [str(one.url.path) for one in server.requests("patch")].count(
        "/api/v1/namespaces/b/configmaps/meshdemo-m"
    ) == 1


# -- tokens ------------------------------------------------------------------------------------------------


class _Pods:
    def pod(self, name: str) -> dict[str, Any] | None:
        return {"metadata": {"name": name, "uid": f"uid-{name}"}} if name.startswith("b-") else None

    def user(self, instance: Any, pod: dict[str, Any]) -> str:
        return f"system:serviceaccount:n:{instance.service}"


REVIEWS = "post /apis/authentication.k8s.io/v1/tokenreviews"
MESH = MeshState(
    mesh="m", namespace="n", app=PAIR,
    instances=mesh_state("m", "n", PAIR, [app_pod("b-1"), app_pod("b-2")], [], []).instances,
)  # fmt: skip


def review(
    pod_name: str = "b-1",
    *,
    user: str = "system:serviceaccount:n:service-b",
    uid: str = "",
    audience: str = "meshdemo",
) -> dict[str, Any]:
    extra = {
        "authentication.kubernetes.io/pod-name": [pod_name],
        "authentication.kubernetes.io/pod-uid": [uid or f"uid-{pod_name}"],
    }
    return {
        "status": {"authenticated": True, "audiences": [audience], "user": {"username": user, "extra": extra}}
    }


def whose(server: ApiServer, token: str, reviews: TokenReviews | None = None) -> str | None:
    reviews = reviews or TokenReviews(server.cluster(patience_s=0), _Pods())  # type: ignore[arg-type]
    found = asyncio.run(reviews.instance(token, MESH))
    return found.id if found else None


def test_a_token_proves_its_pod(server: ApiServer) -> None:
    server.answer(REVIEWS, review())
    assert whose(server, "t") == "b-1"
    (request,) = server.requests("post")
    assert request.data["spec"] == {"token": "t", "audiences": ["meshdemo"]}


@pytest.mark.parametrize(
    "answer",
    [
        {"status": {"authenticated": False}},
        review(audience="https://kubernetes.default.svc"),
        review(uid="of-a-pod-of-the-same-name-before"),
        review("gone-1"),
        review(user="system:serviceaccount:n:default"),  # whoever labels a pod service-b is not yet service-b
        review(user="system:serviceaccount:other:service-b"),
        {"status": {"authenticated": True, "audiences": ["meshdemo"], "user": {"username": "eve"}}},
    ],
)
def test_no_other_token_proves_anything(server: ApiServer, answer: dict[str, Any]) -> None:
    server.answer(REVIEWS, answer)
    assert whose(server, "t") is None


def test_a_token_that_is_none_is_refused(server: ApiServer) -> None:
    assert whose(server, "") is None
    assert not server.requests("post")
    server.answer(REVIEWS, Refusal(400, "BadRequest", "token is required"))
    assert whose(server, "?") is None


def test_a_review_holds_for_a_while_and_outlives_an_absent_server(server: ApiServer) -> None:
    server.answer(REVIEWS, review(), times=1)
    server.answer(REVIEWS, status=503)
    now = [0.0]
    reviews = TokenReviews(
        server.cluster(patience_s=0),
        _Pods(),
        holds_s=60,
        clock=lambda: now[0],  # type: ignore[arg-type]
    )
    assert [whose(server, "t", reviews) for _ in range(3)] == ["b-1"] * 3
    now[0] += 59
    assert whose(server, "t", reviews) == "b-1"
    assert len(server.requests("post")) == 1
    now[0] += 2
    assert whose(server, "t", reviews) == "b-1"  # asked again, and nobody answered
    assert len(server.requests("post")) == 2
    assert whose(server, "unknown", reviews) is None


# -- what is kept ------------------------------------------------------------------------------------------


def test_the_intent_survives_and_two_writers_cannot_overwrite_each_other(server: ApiServer) -> None:
    stored = Stored(server, "meshdemo-intent")
    one, two = (IntentMap(server.cluster(), "n") for _ in range(2))
    assert one.load() == two.load() == Intent()
    changed = Intent(revision=2, access={"a>b": True})
    one.save(changed)
    for _ in range(2):
        with pytest.raises(Overtaken, match="changed by somebody else"):
            two.save(Intent(revision=2))
    assert two.load() == changed
    two.save(Intent(revision=3))
    assert Intent.model_validate_json(stored.object["data"]["intent.json"]).revision == 3


def test_who_asks_again_since_the_answer_was_lost_has_not_overtaken_himself(server: ApiServer) -> None:
    stored = Stored(server, "meshdemo-intent")
    kept = IntentMap(server.cluster(), "n")
    kept.load()
    stored.loses_answers = 1
    kept.save(Intent(revision=2))
    kept.save(Intent(revision=3))
    assert Intent.model_validate_json(stored.object["data"]["intent.json"]).revision == 3


def test_an_intent_that_somebody_else_changed_is_in_force_and_changes_go_on_from_it(
    server: ApiServer, tmp_path: Path
) -> None:
    stored = Stored(server, "meshdemo-intent")
    mesh = mesh_state("m", "n", PAIR, [app_pod("b-1"), app_pod("b-2")], [], [])

    def deny(intent: Intent, mesh: MeshState) -> Intent:
        return set_access(intent, mesh, "service-a", "service-b", False)

    async def work() -> None:
        intents = IntentMap(server.cluster(), "n")
        plane = ControlPlane(tmp_path, mesh, journal=lambda _: None, intents=intents)
        await plane.change(lambda i, m: eject(i, m, "b-1", reason="r", by="test", now=1))
        # By hand, with kubectl.
        theirs = plane.intent.model_copy(update={"load_rps": 7.0})
        stored.write({"data": {"intent.json": theirs.model_dump_json()}})
        with pytest.raises(Overtaken, match="theirs is in force, yours is not"):
            await plane.change(deny)
        assert plane.intent == theirs
        await plane.change(deny)
        assert (plane.intent.load_rps, plane.intent.access) == (7.0, {"service-a>service-b": False})
        # Who is there is followed whatever becomes of the intent: here the pod b-1 goes, ejection and all.
        stored.write(
            {"data": {"intent.json": plane.intent.model_copy(update={"load_rps": 8.0}).model_dump_json()}}
        )
        gone = mesh.model_copy(update={"instances": mesh.instances[1:]})
        await plane.refresh(gone)
        assert (plane.mesh, plane.intent.load_rps, plane.intent.ejections) == (gone, 8.0, ())
        await plane.change(lambda i, m: eject(i, m, "b-2", reason="r", by="test", now=1))
        stored.refusal = Refusal(403, "Forbidden", "configmaps is forbidden")
        await plane.refresh(gone.model_copy(update={"instances": ()}))
        assert (plane.mesh.instances, plane.intent.ejections) == ((), ())

    asyncio.run(work())


def test_an_intent_that_is_none_is_told(server: ApiServer) -> None:
    Stored(server, "meshdemo-intent").write({"data": {"intent.json": '{"revision": "x"}'}})
    with pytest.raises(Failed, match="does not hold an intent"):
        IntentMap(server.cluster(), "n").load()


def test_files_are_carried_back_and_found_again(server: ApiServer, tmp_path: Path) -> None:
    stored = Stored(server, "meshdemo-ca", secret=True)
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()

    def keeper(folder: Path) -> Keeper:
        return Keeper(
            server.cluster(), "Secret", "meshdemo-ca", "n", folder, ("ca.pem", "next.pem"), at_most=100
        )

    kept = keeper(first)
    kept.restore()
    assert not list(first.iterdir())
    (first / "ca.pem").write_bytes(b"root")
    (first / "next.pem").write_bytes(b"".join(b"line %d\n" % n for n in range(30)))
    assert kept.save()
    assert not kept.save()  # nothing has changed since
    assert stored.writes == 1
    (first / "ca.pem").write_bytes(b"root 2")
    assert kept.save()
    keeper(second).restore()
    assert (second / "ca.pem").read_bytes() == b"root 2"
    cut = (second / "next.pem").read_bytes()
    assert cut.startswith(b"line ") and cut.endswith(b"line 29\n") and len(cut) <= 100
    (first / "next.pem").unlink()
    assert kept.save()
    assert "next.pem.gz" not in stored.object["data"]


def test_a_spec_is_changed_on_top_of_what_others_made_of_it(server: ApiServer) -> None:
    stored = Stored(server, "meshdemo-spec")
    specs = SpecMap(server.cluster(), "m", "n")
    assert specs.find() is None
    with pytest.raises(Missing, match="no mesh 'm'"):
        specs.load()
    specs.store(wanted(UpOptions(name="m", app=PAIR), None, now=1.0))
    others = iter([7.0])

    def change(spec: Any) -> Any:
        if rate := next(others, None):  # somebody is faster, the first time
            SpecMap(server.cluster(), "m", "n").change(lambda s: s.model_copy(update={"rps": rate}))
        return spec.model_copy(update={"cwd": "/changed"})

    assert specs.change(change).rps == 7.0
    assert json.loads(stored.object["data"]["spec.json"])["cwd"] == "/changed"


# -- applying and waiting ----------------------------------------------------------------------------------


def deployment(
    name: str = "service-b-v1",
    *,
    wanted: int = 2,
    updated: int = 2,
    ready: int = 2,
    all_: int = 2,
    **status_fields: Any,
) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "namespace": "n", "generation": 4},
        "spec": {"replicas": wanted, "selector": {"matchLabels": {"app": name}}},
        "status": {"observedGeneration": 4, "updatedReplicas": updated, "readyReplicas": ready, "replicas": all_, **status_fields},
    }  # fmt: skip


def test_what_is_rolled_out() -> None:
    assert apply.rolled_out(deployment())
    assert apply.rolled_out(deployment(wanted=0, updated=0, ready=0, all_=0))
    assert not apply.rolled_out(deployment(updated=1))
    assert not apply.rolled_out(deployment(ready=1))
    assert not apply.rolled_out(deployment(all_=3))  # an old pod is still there
    assert not apply.rolled_out(deployment(observedGeneration=3))


def waiting(container: str, reason: str, message: str = "", **fields: Any) -> dict[str, Any]:
    state = {"waiting": {"reason": reason, "message": message}}
    return {"name": container, "state": state, "restartCount": 0, **fields}


def listing(*items: Any) -> dict[str, Any]:
    return {"metadata": {"resourceVersion": "1"}, "items": list(items)}


def test_a_part_without_image_is_said_in_place_of_its_url(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MESHDEMO_HOME", str(tmp_path))
    record.save(record.Record(kind="kind", mesh="n", cluster="n", ports={"prometheus": 9, "grafana": 3}))
    for name in ("prometheus", "grafana"):
        server.answer(f"get /api/v1/namespaces/n/services/{name}", {"metadata": {"name": name}})
    apps = "/apis/apps/v1/namespaces/n/deployments"
    server.answer(f"get {apps}/prometheus", deployment("prometheus"))
    server.answer(f"get {apps}/grafana", deployment("grafana", ready=0))
    stuck = waiting("grafana", "ImagePullBackOff", 'Back-off pulling image "g/g:12"\n[twice]')
    server.answer(
        f"get {PODS}", listing({"metadata": {"name": "grafana-1"}, "status": {"containerStatuses": [stuck]}})
    )
    runtime = KubernetesRuntime("n", "kind")
    runtime.__dict__["cluster"] = server.cluster()
    assert runtime.endpoints() == {
        "gateway": None, "dashboard": None, "prometheus": "http://127.0.0.1:9/", "grafana": None,
    }  # fmt: skip
    assert runtime.unavailable() == {
        "grafana": 'image not available (ImagePullBackOff: Back-off pulling image "g/g:12" [twice])'
    }


@pytest.mark.parametrize("of_the_user", [True, False])
def test_what_is_forgotten_leaves_a_home_that_the_user_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_the_user: bool
) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("MESHDEMO_HOME", str(home))
    if of_the_user:
        home.mkdir()
    record.save(record.Record(kind="kubernetes", mesh="m"))
    record.forget("m")
    assert home.exists() is of_the_user
    assert list(tmp_path.rglob("home/*")) == []


OF_B = {"labels": {"app": "service-b-v1"}}


def await_it(
    server: ApiServer, pod_status: dict[str, Any], *, timeout_s: float = 1.0, **of_deployment: Any
) -> Failed:
    server.answer("get /apis/apps/v1/namespaces/n/deployments", listing(deployment(ready=0, **of_deployment)))
    server.answer(f"get {PODS}", listing({"metadata": {"name": "b-1", **OF_B}, "status": pod_status}))
    server.answer(
        "get /api/v1/namespaces/n/events", listing({"reason": "Failed", "message": "an event's words"})
    )
    server.answer(
        "get /api/v1/nodes", listing({"status": {"conditions": [{"type": "Ready", "status": "True"}]}})
    )
    with pytest.raises(Failed) as caught:
        apply.await_rollout(server.cluster(), "n", ["service-b-v1"], timeout_s=timeout_s)
    return caught.value


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apply, "_GRACE_S", dict.fromkeys(apply._GRACE_S, 0.0))


def test_an_image_that_cannot_be_pulled_is_the_reason(server: ApiServer, impatient: None) -> None:
    failed = await_it(
        server,
        {"containerStatuses": [waiting("app", "ImagePullBackOff", 'Back-off pulling "x:1"')]},
        timeout_s=60,
    )
    assert 'b-1 (app): ImagePullBackOff: Back-off pulling "x:1"' in failed.message
    assert "an event's words" in failed.message
    assert "--registry" in failed.remedy


def test_reasons_that_take_turns_are_one_trouble(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kubelet says ErrImagePull after each attempt, and ImagePullBackOff in between."""
    monkeypatch.setattr(apply, "_GRACE_S", dict.fromkeys(apply._GRACE_S, 1.0))
    turns = itertools.cycle(["ErrImagePull", "ImagePullBackOff"])

    def pods() -> dict[str, Any]:
        status = {"containerStatuses": [waiting("app", next(turns), "no such host")]}
        return listing({"metadata": {"name": "b-1", **OF_B}, "status": status})

    server.answer(f"get {PODS}", pods)
    began = time.monotonic()
    assert "no such host" in await_it(server, {}, timeout_s=60).message
    assert time.monotonic() - began < 30


def test_a_crash_loop_shows_why_and_the_last_lines(server: ApiServer, impatient: None) -> None:
    server.answer(f"get {PODS}/b-1/log", b"Traceback\nLAT_MS=abc is no number\n")
    ended = {"terminated": {"exitCode": 3, "reason": "Error"}}
    failed = await_it(
        server, {"containerStatuses": [waiting("app", "CrashLoopBackOff", lastState=ended, restartCount=2)]}
    )
    assert "b-1 (app): CrashLoopBackOff: Error with exit status 3, 2 times" in failed.message
    assert "| LAT_MS=abc is no number" in failed.message


def test_a_container_that_the_node_failed_to_start_is_no_program_that_ends() -> None:
    """A node that was frozen for a while; the kubelet is about to try again, and is given time for it."""
    said = "context deadline exceeded"
    started = {"terminated": {"exitCode": 128, "reason": "StartError", "message": said}}
    crashed = {"terminated": {"exitCode": 1, "reason": "Error"}}

    def trouble(reason: str, **of_container: Any) -> apply.Trouble:
        status = {"initContainerStatuses": [waiting("meshdemo-sidecar", reason, **of_container)]}
        (found,) = apply.pod_troubles({"metadata": {"name": "b-1"}, "status": status})
        return found

    again = trouble("CrashLoopBackOff", lastState=started)
    assert (again.reason, again.family) == ("StartError", trouble("RunContainerError").family)
    assert said in again.message
    assert "why the program ends" not in again.remedy
    assert trouble("CrashLoopBackOff", lastState=crashed).reason == "CrashLoopBackOff"
    assert apply._GRACE_S["StartError"] > 10 + 20 > apply._GRACE_S["CrashLoopBackOff"]


def test_what_was_wrong_before_is_no_reason(server: ApiServer, impatient: None) -> None:
    """A pod of the version before still crash-loops while its successor starts."""

    def pod(name: str, of: str, second: int, *containers: dict[str, Any]) -> dict[str, Any]:
        meta = {
            "name": name,
            "labels": {"pod-template-hash": of},
            "creationTimestamp": f"2026-01-01T00:00:0{second}Z",
        }
        return {"metadata": meta, "status": {"containerStatuses": list(containers)}}

    before, now = pod("b-1", "h1", 1, waiting("app", "CrashLoopBackOff")), pod("b-2", "h2", 5)
    assert [one["metadata"]["name"] for one in apply.newest([now, before])] == ["b-2"]
    server.answer(f"get {PODS}", listing(before, now))
    assert "not ready within" in await_it(server, {}, timeout_s=0.5).message


def test_an_init_container_that_fails_is_the_reason(server: ApiServer, impatient: None) -> None:
    server.answer(f"get {PODS}/b-1/log", b"iptables-restore: not permitted\n")
    ended = {"terminated": {"exitCode": 1, "reason": "Error"}}
    failed = await_it(
        server, {"initContainerStatuses": [waiting("meshdemo-redirect", "CrashLoopBackOff", lastState=ended)]}
    )
    assert "b-1 (meshdemo-redirect)" in failed.message
    assert "not permitted" in failed.message


def test_a_pod_without_room_is_the_reason(server: ApiServer, impatient: None) -> None:
    said = "0/1 nodes are available: 1 Insufficient memory."
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": said}
    failed = await_it(server, {"conditions": [condition]})
    assert said in failed.message
    assert "--replicas" in failed.remedy


def test_a_volume_that_is_not_made_is_the_reason() -> None:
    said = "0/1 nodes are available: pod has unbound immediate PersistentVolumeClaims"
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": said}
    (trouble,) = apply.pod_troubles({"metadata": {"name": "voting"}, "status": {"conditions": [condition]}})
    assert (trouble.reason, trouble.message) == ("VolumePending", said)
    assert "StorageClass" in trouble.remedy


def test_pods_that_may_not_be_made_are_the_reason(server: ApiServer, impatient: None) -> None:
    said = 'pods "b-" is forbidden: exceeded quota: compute'
    failed = await_it(server, {}, conditions=[{"type": "ReplicaFailure", "status": "True", "message": said}])
    assert said in failed.message


def test_without_a_reason_the_time_is_over(server: ApiServer) -> None:
    failed = await_it(server, {}, timeout_s=0.3)
    assert "service-b-v1: not ready within 0 s" in failed.message
    assert "--timeout" in failed.remedy


def test_trouble_that_passes_is_none(server: ApiServer) -> None:
    server.answer("get /apis/apps/v1/namespaces/n/deployments", listing(deployment(ready=1)), times=2)
    server.answer("get /apis/apps/v1/namespaces/n/deployments", listing(deployment()))
    pulling = {
        "metadata": {"name": "b-1", **OF_B},
        "status": {"containerStatuses": [waiting("app", "ErrImagePull")]},
    }
    server.answer(f"get {PODS}", listing(pulling), times=2)
    going = {
        "metadata": {"name": "b-1", **OF_B, "deletionTimestamp": "2026-01-01T00:00:00Z"},
        "status": READY,
    }
    there = [{"metadata": {"name": name, **OF_B}, "status": READY} for name in ("b-2", "b-3")]
    server.answer(f"get {PODS}", listing(going, there[0]), times=1)  # the Deployment's status lags behind
    server.answer(f"get {PODS}", listing(going, *there))
    said: list[str] = []
    apply.await_rollout(server.cluster(), "n", ["service-b-v1"], timeout_s=20, tell=said.append)
    assert said[0] == "service-b-v1 1/2"


def test_who_waits_together_looks_once(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A booting cluster is not asked by each of them; and nobody is shown what was there before they came."""
    monkeypatch.setattr(apply, "_LOOK_S", 60.0)
    server.answer("get /apis/apps/v1/namespaces/n/deployments", listing(deployment(ready=1)))
    server.answer(f"get {PODS}", listing())
    view = apply.View(server.cluster(), "n")
    begun = time.monotonic()
    with ThreadPoolExecutor(8) as waiting_together:
        looks = [waiting_together.submit(view.look, after=begun) for _ in range(8)]
        assert {len(look.result()[0]) for look in looks} == {1}
    assert len(server.requests("get", "/deployments")) == 1
    view.look(after=time.monotonic())
    assert len(server.requests("get", "/deployments")) == 2


READY = {"conditions": [{"type": "Ready", "status": "True"}]}
NAMESPACE = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "n"}}


def test_a_namespace_on_its_way_out_is_waited_for(server: ApiServer) -> None:
    going = {"metadata": {"name": "n", "deletionTimestamp": "2026-01-01T00:00:00Z"}}
    server.answer("get /api/v1/namespaces/n", going, times=2)
    server.answer("get /api/v1/namespaces/n", Refusal(404, "NotFound", "no"))
    server.answer("patch /api/v1/namespaces/n", NAMESPACE)
    apply.apply(server.cluster(), [NAMESPACE], timeout_s=20)
    assert len(server.requests("patch")) == 1


def test_a_namespace_that_does_not_go_away_says_why(server: ApiServer) -> None:
    said = "Some content in the namespace has finalizers remaining: example.com/x in 1 resource instances"
    server.answer(
        "get /api/v1/namespaces/n",
        {
            "metadata": {"name": "n", "deletionTimestamp": "2026-01-01T00:00:00Z"},
            "status": {
                "conditions": [{"type": "NamespaceFinalizersRemaining", "status": "True", "message": said}]
            },
        },
    )
    with pytest.raises(Failed, match="is being deleted since") as caught:
        apply.apply(server.cluster(), [NAMESPACE], timeout_s=0.1)
    assert said in caught.value.message


def test_without_the_right_to_make_a_namespace_one_that_is_there_will_do(server: ApiServer) -> None:
    server.answer("patch /api/v1/namespaces/n", Refusal(403, "Forbidden", "cannot patch namespaces"))
    server.answer("get /api/v1/namespaces/n", NAMESPACE, times=2)
    server.answer("get /api/v1/namespaces/n", Refusal(404, "NotFound", "no"))
    apply.apply(server.cluster(), [NAMESPACE], timeout_s=5)
    with pytest.raises(Failed, match=r"may not create the namespace 'n'.*cannot patch namespaces") as caught:
        apply.apply(server.cluster(), [NAMESPACE], timeout_s=5)
    assert "administrator" in caught.value.remedy


def test_autoscalers_are_found_by_what_they_scale(server: ApiServer) -> None:
    target = {"kind": "Deployment", "name": "service-b-v1"}
    hpa = {"metadata": {"name": "busy"}, "spec": {"scaleTargetRef": target}}
    server.answer("get /apis/autoscaling/v2/namespaces/n/horizontalpodautoscalers", listing(hpa), times=1)
    server.answer(
        "get /apis/autoscaling/v2/namespaces/n/horizontalpodautoscalers", Refusal(403, "Forbidden", "no")
    )
    assert apply.autoscalers(server.cluster(), "n") == {"service-b-v1": "busy"}
    assert apply.autoscalers(server.cluster(), "n") == {}


def test_what_up_made_is_removed_from_a_cluster_without_the_gateway_api(server: ApiServer) -> None:
    of_mesh = {"name": "m", "labels": {MESH_LABEL: "m"}}
    there = {"namespace": True}

    def gone(request: kmock.Request) -> Any:
        there["namespace"] = False
        return {}

    rbac = "/apis/rbac.authorization.k8s.io/v1"
    for path in (f"{rbac}/clusterrolebindings", f"{rbac}/clusterroles"):
        server.answer(f"get {path}", listing({"metadata": of_mesh}))
        server.answer(f"delete {path}/m", {})
    server.answer("get /apis/networking.k8s.io/v1/ingressclasses", listing())
    # What there is no kind of is not there: the server knows no such path.
    missing = Refusal(404, "NotFound", "the server could not find the requested resource")
    server.answer("get /apis/gateway.networking.k8s.io/v1/gatewayclasses", missing)
    absent = Refusal(404, "NotFound", "namespaces not found")
    server.answer("get /api/v1/namespaces/m", lambda: {"metadata": of_mesh} if there["namespace"] else absent)
    server.answer("delete /api/v1/namespaces/m", gone)
    server.answer("get /api/v1/configmaps", listing())
    server.answer("get /api/v1/pods", listing())
    found = record.Record(kind="kubernetes", mesh="m")
    removed = down._remove_objects(server.cluster(), found, [])
    assert removed == ["ClusterRoleBinding m", "ClusterRole m", "namespace m"]


def test_an_event_is_left_on_what_it_is_about(server: ApiServer) -> None:
    server.answer("post /api/v1/namespaces/n/events", {})
    about = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "b-1", "namespace": "n", "uid": "u"}}
    server.cluster().event(about, "Restarted", "hung: 31 requests wait")
    (request,) = server.requests("post")
    assert request.data["involvedObject"] == {
        "apiVersion": "v1",
        "kind": "Pod",
        "name": "b-1",
        "namespace": "n",
        "uid": "u",
    }
    assert (request.data["reason"], request.data["message"]) == ("Restarted", "hung: 31 requests wait")


# -- the Lease ---------------------------------------------------------------------------------------------


LEASE = "/apis/coordination.k8s.io/v1/namespaces/n/leases"


class Leases:
    """The Lease of the mock, as the API server would keep it."""

    def __init__(self, server: ApiServer, spec: dict[str, Any] | None = None) -> None:
        self.object = (
            {"metadata": {"name": "w", "namespace": "n", "resourceVersion": "1"}, "spec": spec}
            if spec
            else None
        )
        server.answer(f"get {LEASE}/w", self.get)
        server.answer(f"post {LEASE}", self.create)
        server.answer(f"put {LEASE}/w", self.replace)

    def get(self) -> Any:
        return self.object or Refusal(404, "NotFound", "no lease")

    def create(self, request: kmock.Request) -> Any:
        if self.object:
            return Refusal(409, "AlreadyExists", "there is one")
        meta = {**request.data["metadata"], "namespace": "n", "resourceVersion": "1"}
        self.object = {**request.data, "metadata": meta}
        return self.object

    def replace(self, request: kmock.Request) -> Any:
        assert self.object
        if request.data["metadata"]["resourceVersion"] != self.object["metadata"]["resourceVersion"]:
            return Refusal(409, "Conflict", "modified")
        version = str(int(self.object["metadata"]["resourceVersion"]) + 1)
        self.object = {**request.data, "metadata": {**request.data["metadata"], "resourceVersion": version}}
        return self.object


def test_a_lease_is_held_by_one(server: ApiServer) -> None:
    kept = Leases(server)
    with lease.held(server.cluster(), "w", "n", "a watch"):
        assert kept.object
        assert "process" in kept.object["spec"]["holderIdentity"]
        with (
            pytest.raises(Failed, match=r"a watch runs already: .*process"),
            lease.held(server.cluster(), "w", "n", "a watch"),
        ):
            pass
    assert kept.object["spec"]["holderIdentity"] == ""
    with lease.held(server.cluster(), "w", "n", "a watch"):
        pass


def test_a_holder_that_is_gone_loses_its_lease(server: ApiServer) -> None:
    old = {"holderIdentity": "gone", "leaseDurationSeconds": 15, "renewTime": "2026-01-01T00:00:00.000000Z"}
    Leases(server, old)
    with lease.held(server.cluster(), "w", "n", "a watch"):
        pass


def test_a_lease_that_was_taken_away_interrupts(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Leases(server)
    monkeypatch.setattr(lease, "_RENEW_S", 0.05)
    with pytest.raises(KeyboardInterrupt), lease.held(server.cluster(), "w", "n", "a watch"):
        assert kept.object
        kept.object["metadata"]["resourceVersion"] = "99"  # somebody else has it now
        for _ in range(400):
            time.sleep(0.05)


def test_tokens_and_roots_are_packed_as_secrets_hold_them() -> None:
    import gzip

    assert gzip.decompress(base64.b64decode(pack(b"root"))) == b"root"
    assert pack(b"root") == pack(b"root")  # no time in it: equal content is no change


# -- which mesh it is -------------------------------------------------------------------------------------


def test_a_mesh_is_told_from_one_of_the_same_name(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MESHDEMO_HOME", str(tmp_path))
    monkeypatch.setattr(record.Record, "connect", lambda self, **_: server.cluster(0))
    runtime = KubernetesRuntime("n", "kubernetes")
    assert runtime.identity() is None, "nothing is remembered of it"
    record.save(record.Record(kind="kubernetes", mesh="n"))
    path = f"get /api/v1/namespaces/n/secrets/{API}"
    server.answer(path, {"metadata": {"uid": "first"}}, times=1)
    server.answer(path, {"metadata": {"uid": "second"}}, times=1)
    server.answer(path, Refusal(503, "ServiceUnavailable", "a moment"), times=1)
    server.answer(path, Refusal(404, "NotFound", "gone"))
    assert (runtime.identity(), runtime.identity()) == ("first", "second")
    with pytest.raises(MeshdemoError):
        runtime.identity()  # that it is gone has to be seen
    assert runtime.identity() is None
