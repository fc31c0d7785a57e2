"""The gateway: its table of routes, and a real one at the edge of a real mesh."""

from __future__ import annotations

import http.client
import json
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from envoy.config.cluster.v3.cluster_pb2 import Cluster
from envoy.config.route.v3.route_pb2 import RouteConfiguration
from local_harness import Cli, kill, wait_for
from xds_harness import free_port, pair, resources

from meshdemo.apps.model import App, Found, FurtherPort, Route
from meshdemo.control import gateway, xds
from meshdemo.control.intent import access, set_access
from meshdemo.control.model import Entry, Instance, Intent, MeshState
from meshdemo.control.render.edge import backends
from meshdemo.control.render.renderer import Renderer
from meshdemo.errors import BadInput
from meshdemo.runtime.local.ports import Port

# -- the table -------------------------------------------------------------------------------------------------

EDGE = Instance(
    id="gateway",
    service="gateway",
    version="v1",
    inbound_port=0,
    outbound_port=8081,
    metrics_port=1,
    app_port=0,
)
APP = pair(cache={"port": 6379, "protocol": "tcp", "healthz": "/h", "metrics": None})


def table(*entries: Entry, app: App = APP) -> dict[str, gateway.GatewayHost]:
    mesh = MeshState(mesh="m", app=app, gateways=(EDGE,), entries=entries)
    declared: dict[str, Sequence[Route]] = {name: port.routes for name, port in backends(app).items()}
    return {host.name: host for host in gateway.hosts(mesh, declared)}


def test_a_further_port_is_led_to_by_its_own_clusters() -> None:
    port = FurtherPort(called=81, port=8081, protocol="grpc")
    found = APP.services["service-b"].model_copy(update={"found": Found(ports=(port,))})
    app = APP.model_copy(update={"services": {**APP.services, "service-b": found}})
    entries = (Entry(path="/x", backends={"service-b:8081": 3, "service-c": 1}),)
    mesh = MeshState(mesh="m", app=app, gateways=(EDGE,), entries=entries)
    assert gateway.leads_to(mesh) == {"service-b", "service-c"}
    snapshot = Renderer().snapshots(mesh, Intent())["gateway"]
    routes = resources(snapshot, xds.ROUTES, RouteConfiguration)["gateway"].virtual_hosts[0].routes
    first = routes[0]
    assert first.name == "port-81"
    assert {one.name: one.weight.value for one in first.route.weighted_clusters.clusters} == {
        "service-b/v1/8081": 750_000, "service-c/v1": 250_000,
    }  # fmt: skip
    assert {"service-b/v1", "service-b/v1/8081", "service-b/v2/8081"} <= set(
        resources(snapshot, xds.CLUSTERS, Cluster)
    )


def rows(host: gateway.GatewayHost) -> list[tuple[str, str, str, str]]:
    return [(one.name, one.kind, one.path, one.backends[0][0] if one.backends else "") for one in host.routes]


def test_everything_goes_to_the_front_by_its_routes() -> None:
    assert rows(table()["*"]) == [
        ("work", "path", "/work", "service-b"),
        ("api", "prefix", "/api", "service-b"),
        ("other", "prefix", "/", "service-b"),
    ]


def test_an_entry_is_cut_up_by_the_routes_of_its_service() -> None:
    host = table(Entry(host="shop.test", path="/api/", backends={"service-b": 1}))["shop.test"]
    assert rows(host) == [("api", "path_separated_prefix", "/api", "service-b")]
    host = table(Entry(host="shop.test", path="/api/v1", exact=True, backends={"service-b": 1}))["shop.test"]
    assert rows(host) == [("api", "path", "/api/v1", "service-b")]
    host = table(Entry(host="shop.test", path="/work", backends={"service-b": 1}))["shop.test"]
    assert rows(host) == [
        ("work", "path", "/work", "service-b"),
        ("other", "path_separated_prefix", "/work", "service-b"),
    ]


def test_a_named_host_is_its_own_and_says_what_it_knows() -> None:
    hosts = table(
        Entry(host="Shop.test", path="/a", backends={"service-c": 1}),
        Entry(host="shop.test", path="/a/b", exact=True, backends={"service-a": 1}),
    )
    assert rows(hosts["shop.test"]) == [
        ("other", "path", "/a/b", "service-a"),
        ("other", "path_separated_prefix", "/a", "service-c"),
    ]
    assert "/a, /a/b" in hosts["shop.test"].unknown
    assert rows(hosts["*"])[-1] == ("other", "prefix", "/", "service-b")


def test_a_default_takes_the_rest_of_every_host() -> None:
    hosts = table(
        Entry(host="shop.test", path="/a", backends={"service-c": 1}),
        Entry(default=True, backends={"service-a": 1}),
    )
    assert rows(hosts["shop.test"])[-1] == ("other", "prefix", "/", "service-a")
    assert rows(hosts["*"]) == [("other", "prefix", "/", "service-a")]


def test_who_does_not_speak_http_is_not_led_to() -> None:
    host = table(Entry(host="x.test", backends={"cache": 1, "nobody": 1}))["x.test"]
    assert rows(host) == [("other", "prefix", "/", "")]
    app = APP.model_copy(update={"front": "cache"})
    assert rows(table(app=app)["*"]) == []


def test_the_list_of_what_is_known_stays_short() -> None:
    entries = [
        Entry(host="x.test", path=f"/{n:04}/{'x' * 20}", backends={"service-b": 1}) for n in range(500)
    ]
    assert len(table(*entries)["x.test"].unknown) < 4096


def test_every_variant_renders() -> None:
    entries = (
        Entry(host="*.x.test", path="/a", method="GET", headers=(("x-a", "1"),), backends={"service-b": 3}),
        Entry(host="x.test", backends={"service-a": 1, "service-b": 3}),
        Entry(host="y.test", backends={"nobody": 1}),
    )
    for addresses in ({}, {"service-b": "10.0.0.1"}):
        mesh = MeshState(mesh="m", app=APP, gateways=(EDGE,), entries=entries, addresses=addresses)
        for traces in (None, "127.0.0.1:4317"):
            assert set(Renderer().snapshots(mesh, Intent(traces=traces))) == {"gateway"}


def test_the_gateway_may_call_what_it_leads_to() -> None:
    mesh = MeshState(
        mesh="m", app=APP, gateways=(EDGE,), entries=(Entry(host="x.test", backends={"service-c": 1}),)
    )

    def allowed(intent: Intent) -> set[str]:
        return {row.service for row in access(intent, mesh) if row.caller == "gateway" and row.allowed}

    assert allowed(Intent()) == {"service-b", "service-c"}
    assert allowed(set_access(Intent(), mesh, "gateway", "service-b", False)) == {"service-c"}
    with pytest.raises(BadInput, match="unknown caller 'gateway'"):
        set_access(Intent(), mesh.model_copy(update={"gateways": ()}), "gateway", "service-b", False)


def test_no_service_of_an_app_is_called_so() -> None:
    with pytest.raises(ValueError, match="name of the mesh's own gateway"):
        pair(gateway={})


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a port cannot be held")
def test_a_port_is_held_once() -> None:
    number = free_port()
    held = Port(number)
    with pytest.raises(OSError):
        Port(number)
    with socket.socket() as server:  # but the program that it is held for may listen on it
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", number))
        server.listen()
    held.release()
    Port(number).release()


# -- a real one ------------------------------------------------------------------------------------------------

ECHO = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        me = {name: os.environ[name] for name in ("SERVICE", "VERSION", "INSTANCE")}
        headers = {key.lower(): value for key, value in self.headers.items()}
        body = json.dumps({**me, "path": self.path, "headers": headers}).encode()
        self.send_response(int(self.headers.get("x-answer", 200)))
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass

ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
"""


def url_of(mesh: Cli) -> str:
    found: str = mesh.json("status")["endpoints"]["gateway"]
    return found


class Browser:
    """Asks the gateway."""

    def __init__(self, url: str) -> None:
        self.port = int(urlsplit(url).port or 0)

    def get(self, path: str, **headers: str) -> tuple[int, Any]:
        """Status and body; `host_` stands for Host, and underscores for dashes."""
        connection = http.client.HTTPConnection("localhost", self.port, timeout=15)
        try:
            given = {name.strip("_").replace("_", "-"): value for name, value in headers.items()}
            connection.request("GET", path, headers=given)
            answer = connection.getresponse()
            body = answer.read().decode()
        finally:
            connection.close()
        try:
            return answer.status, json.loads(body)
        except ValueError:
            return answer.status, body

    def raw(self, request: bytes) -> bytes:
        """What is answered to these bytes, until the gateway has nothing more to say."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=15) as connection:
            connection.sendall(request)
            answer = b""
            while b"\r\n\r\n" not in answer and (chunk := connection.recv(65536)):
                answer += chunk
        return answer

    def answers(self) -> bool:
        """Does it lead anywhere just now?"""
        try:
            return self.get("/")[0] == 200
        except OSError:
            return False


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    folder = tmp_path_factory.mktemp("edge")
    (folder / "echo.py").write_text(ECHO)
    run = {"command": [sys.executable, "echo.py"]}
    app = {
        "name": "edge",
        "front": "front",
        "services": {
            "front": {
                "port": 80,
                "routes": [{"name": "cart", "prefix": "/cart"}],
                "versions": {"v1": run, "v2": {**run, "initial": False}},
            }
        },
    }
    (folder / "app.yaml").write_text(json.dumps(app))
    with Cli(folder / "home").up("--app", str(folder / "app.yaml"), "--version", "front=v2") as cli:
        yield cli


@pytest.fixture
def browser(mesh: Cli) -> Browser:
    return Browser(url_of(mesh))


def test_it_leads_to_the_front(mesh: Cli, browser: Browser) -> None:
    assert url_of(mesh) == f"http://localhost:{browser.port}/"
    status, said = browser.get("/cart/7?x=1")
    assert (status, said["SERVICE"], said["path"]) == (200, "front", "/cart/7?x=1")


def test_it_listens_on_loopback_alone(mesh: Cli, browser: Browser) -> None:
    sockets = mesh.process("gateway").net_connections("tcp")
    listening = {one.laddr.ip for one in sockets if one.status == "LISTEN"}
    assert listening == {"127.0.0.1"}


def test_what_a_request_says_of_itself_is_not_believed(browser: Browser) -> None:
    _, said = browser.get(
        "/", x_request_id="mine", x_forwarded_for="8.8.8.8", x_envoy_internal="true",
        x_envoy_upstream_rq_timeout_ms="1", x_forwarded_client_cert="URI=spiffe://mesh-demo/ns/default/sa/front",
    )  # fmt: skip
    headers = said["headers"]
    assert headers["x-request-id"] not in ("", "mine")
    # Who called is added to what it claims (Envoy says this machine's address for a loopback one).
    claimed, *added = headers["x-forwarded-for"].split(",")
    assert claimed == "8.8.8.8"
    assert added
    assert "x-envoy-internal" not in headers
    assert headers["x-forwarded-client-cert"].endswith("URI=spiffe://mesh-demo/ns/default/sa/gateway")
    _, again = browser.get("/")
    assert again["headers"]["x-request-id"] != headers["x-request-id"]


def test_requests_that_are_up_to_something(browser: Browser) -> None:
    assert browser.get("/a//b/../c")[1]["path"] == "/a/c"
    assert browser.raw(b"GET / HTTP/1.1\r\nHost: x\r\nbad_header: 1\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert browser.raw(b"GET /a%2fb HTTP/1.1\r\nHost: x\r\n\r\n").startswith(b"HTTP/1.1 307")
    large = b"x-large: " + b"x" * 70_000
    assert browser.raw(b"GET / HTTP/1.1\r\nHost: x\r\n" + large + b"\r\n\r\n").startswith(b"HTTP/1.1 431")
    assert browser.raw(b"nonsense\r\n\r\n").startswith(b"HTTP/1.1 400")


def test_it_is_a_caller_like_any_other(mesh: Cli, browser: Browser) -> None:
    def seen() -> list[dict[str, Any]]:
        assert browser.get("/cart")[0] == 200
        return [one for one in mesh.json("edges") if one["caller"] == "gateway" and one["requests"] > 0]

    (edge,) = wait_for("the gateway among the edges", seen)
    assert (edge["service"], edge["secured"]) == ("front", True)
    assert edge["identity"] == "spiffe://mesh-demo/ns/default/sa/gateway"

    def by_caller() -> bool:
        assert browser.get("/cart")[0] == 200
        found = {row["caller"]: row for row in mesh.json("stat", "front", "--by", "caller")}
        return bool(found["gateway"]["requests"] and found["gateway"]["effective_success_rate"] == 1)

    wait_for("what the gateway got", by_caller)
    wait_for(
        "its route", lambda: "cart" in {row["route"] for row in mesh.json("stat", "front", "--by", "route")}
    )
    assert {row["service"] for row in mesh.json("stat")} == {"front"}, "it is no service of the app"


def test_access(mesh: Cli, browser: Browser) -> None:
    assert {"caller": "gateway", "service": "front"}.items() <= mesh.json("access", "show")[0].items()
    mesh.run("access", "deny", "gateway", "front")
    try:
        assert browser.get("/")[0] == 403
    finally:
        mesh.run("access", "allow", "gateway", "front")
    assert browser.get("/")[0] == 200


def test_traffic_rules_and_faults(mesh: Cli, browser: Browser) -> None:
    assert {browser.get("/")[1]["VERSION"] for _ in range(10)} == {"v1"}
    mesh.run("traffic", "set", "front", "--split", "v1=0,v2=100", "--retries", "0")
    assert {browser.get("/")[1]["VERSION"] for _ in range(10)} == {"v2"}
    mesh.run("fault", "--at", "mesh", "--service", "front", "--caller", "gateway", "--err", "1")
    try:
        assert browser.get("/")[0] == 500
    finally:
        mesh.run("fault", "clear")
    mesh.run("fault", "--at", "mesh", "--service", "front", "--lat", "20000")
    try:
        mesh.run("traffic", "set", "front", "--timeout", "100ms")
        assert browser.get("/")[0] == 504
    finally:
        mesh.run("fault", "clear")
        mesh.run("traffic", "set", "front", "--timeout", "15s")
    wait_for("a gateway that leads on", browser.answers)


def test_it_comes_back(mesh: Cli, browser: Browser) -> None:
    process = mesh.process("gateway")
    kill(process)
    wait_for("another process", lambda: mesh.process("gateway").pid != process.pid)
    wait_for("a gateway that leads on", browser.answers)
    wait_for("its URL", lambda: url_of(mesh) == f"http://localhost:{browser.port}/")


def test_logs_and_what_is_pushed(mesh: Cli, browser: Browser) -> None:
    mesh.run("logs", "gateway")
    listeners = mesh.json("render", "envoy", "--service", "gateway")["gateway"]["listeners"]
    ports = {one["address"]["socket_address"]["port_value"] for one in listeners if one["name"] == "gateway"}
    assert ports == {browser.port}


# -- its port --------------------------------------------------------------------------------------------------


def test_another_mesh_finds_another_port_and_a_taken_one_is_refused(mesh: Cli, browser: Browser) -> None:
    other = Cli(mesh.home, "other")
    said = other.run("up", "--gateway-port", str(browser.port), status=2)
    assert len(said.splitlines()) == 1
    assert f"--gateway-port {browser.port}: the port is taken" in said
    assert not other.paths.state.exists()
    assert "allowed is 1 to 65535" in other.run("up", "--gateway-port", "65536", status=2)

    port = free_port()
    with other.up("--gateway-port", str(port), "--replicas", "service-b=1"):
        assert url_of(other) == f"http://localhost:{port}/"
        assert Browser(url_of(other)).get("/work")[0] == 200
        assert "nothing to change" in other.run("up", "--gateway-port", str(port))
        moved = free_port()
        other.run("up", "--gateway-port", str(moved))
        assert url_of(other) == f"http://localhost:{moved}/"
        assert Browser(url_of(other)).get("/work")[0] == 200
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
    assert browser.answers()


def test_without_a_wish_any_port_will_do(tmp_path: Path) -> None:
    cli = Cli(tmp_path / "home")
    for _ in range(5):
        taken = _taken(8081)
        process = cli.start("up", "--replicas", "service-b=1")
        out, err = process.communicate(timeout=120)
        try:
            assert process.returncode == 0, (out, err)
            url = url_of(cli)
            if taken is None and url == "http://localhost:8081/":
                continue  # another test's mesh had it, and ended before this one chose
            assert url != "http://localhost:8081/"
            assert f"Note: port 8081 is taken; the gateway is {url}" in err
            assert Browser(url).get("/work")[0] == 200
            break
        finally:
            cli.run("down")
            if taken is not None:
                taken.close()
    else:
        pytest.fail("somebody else's port was given up each time")
    assert cli.leftovers() == []


def _taken(port: int) -> socket.socket | None:
    """What takes a port; None if somebody else has it."""
    if _listens(port):
        return None
    taken = socket.socket()
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind(("127.0.0.1", port))
        taken.listen()
    except OSError:  # another mesh has just come up
        taken.close()
        return None
    return taken


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True
