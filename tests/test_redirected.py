"""Pods whose traffic is redirected, for real: network namespaces, the rules of the init container, two Envoys.

What stands for a cluster are two namespaces with a link between them; what stands for the injected app says
nothing of its first port, and speaks HTTP, gRPC and a protocol whose server speaks first on it. It has others:
of gRPC, of metrics, of that protocol, and one that is not in the mesh.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import http.client
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import pytest
from xds_harness import Member, Mesh, mesh_of, until

from meshdemo import names
from meshdemo.apps.model import App, Found, FurtherPort, Service, Workload
from meshdemo.control import telemetry
from meshdemo.control.bootstrap import Placement, bootstrap_files, envoy_arguments, find_envoy
from meshdemo.control.intent import set_access
from meshdemo.control.model import Instance, MeshState
from meshdemo.runtime.kubernetes.pieces import redirect_rules

T = TypeVar("T")
ADDRESS, PORT, APP_PORT, ASIDE = "198.19.0.1", 80, 8080, 9090
# What callers call the others by, and what they are in the pod.
METHODS, METRICS, MAIL = (9000, 19000), (9100, 19100), (25, 2525)
GREETING = b"220 I speak first\r\n"
_CLONE_NEWNET = 0x40000000


def _possible() -> bool:
    return os.geteuid() == 0 and all(map(shutil.which, ("ip", "iptables-restore", "setpriv")))


pytestmark = pytest.mark.skipif(
    not _possible() and not os.environ.get("CI"), reason="needs root, iproute2 and iptables"
)


def run(*words: str, stdin: str = "") -> str:
    done = subprocess.run(words, input=stdin, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    return done.stdout


@dataclass(frozen=True)
class Pod:
    """A network namespace. `address`: towards the other one; `outside`: of this machine, towards it."""

    name: str
    address: str
    outside: str

    def within(self, fn: Callable[[], T]) -> T:
        """Call something there: sockets that it makes are of that namespace."""

        def there() -> T:
            with open(f"/run/netns/{self.name}") as file:  # noqa: PTH123 - a descriptor is wanted
                assert ctypes.CDLL(None, use_errno=True).setns(file.fileno(), _CLONE_NEWNET) == 0
            return fn()

        with ThreadPoolExecutor(1) as pool:
            return pool.submit(there).result()

    def connect(self, address: str, port: int) -> socket.socket:
        return self.within(lambda: socket.create_connection((address, port), timeout=30))

    def listen(self, host: str, port: int) -> socket.socket:
        return self.within(lambda: socket.create_server((host, port)))


@contextlib.contextmanager
def two_pods() -> Iterator[tuple[Pod, Pod]]:
    tag = f"{os.getpid() % 0xFFFF:x}"
    # Of a network of its own on this machine: another run may be at it, too.
    net = 2 * (os.getpid() % 120)
    pods = [Pod(f"mx{tag}-{n}", f"198.18.0.{n}", f"198.18.{net + n}.1") for n in (1, 2)]
    try:
        for n, pod in enumerate(pods, 1):
            run("ip", "netns", "add", pod.name)
            run("ip", "link", "add", f"mx{tag}o{n}", "type", "veth", "peer", "name", "out", "netns", pod.name)
            run("ip", "address", "add", f"{pod.outside}/30", "dev", f"mx{tag}o{n}")
            run("ip", "link", "set", f"mx{tag}o{n}", "up")
            run("ip", "-n", pod.name, "address", "add", f"198.18.{net + n}.2/30", "dev", "out")
        one, two = (pod.name for pod in pods)
        run("ip", "-n", one, "link", "add", "eth", "type", "veth", "peer", "name", "eth", "netns", two)
        for pod in pods:
            run("ip", "-n", pod.name, "address", "add", f"{pod.address}/24", "dev", "eth")
            for link in ("lo", "out", "eth"):
                run("ip", "-n", pod.name, "link", "set", link, "up")
            run("ip", "-n", pod.name, "route", "add", "198.19.0.0/16", "dev", "eth")
            # The binaries may be where only root may read, so the sidecar is told by its group here.
            rules = redirect_rules().replace("--uid-owner", "--gid-owner")
            run("ip", "netns", "exec", pod.name, "iptables-restore", "--noflush", stdin=rules)
        yield pods[0], pods[1]
    finally:
        for n, pod in enumerate(pods, 1):
            # A socket that is open yet keeps a namespace alive, and with it the link.
            for words in (("link", "delete", f"mx{tag}o{n}"), ("netns", "delete", pod.name)):
                with contextlib.suppress(AssertionError):
                    run("ip", *words)


class Anything:
    """The app: on one port HTTP/1, gRPC, and to whom says nothing a greeting, and then an echo."""

    def __init__(self, pod: Pod) -> None:
        self._grpc = grpc.server(ThreadPoolExecutor(4))
        self._grpc.add_generic_rpc_handlers((_Methods(),))
        self._behind = self._grpc.add_insecure_port("127.0.0.1:0")
        self._grpc.start()
        self._listening = pod.listen("127.0.0.1", APP_PORT)
        self._aside = pod.listen("127.0.0.1", ASIDE)
        self._others = [pod.listen("127.0.0.1", port) for _, port in (METHODS, METRICS, MAIL)]
        for listening, serve in (
            (self._listening, self._serve),
            (self._aside, self._greet),
            *((other, self._serve) for other in self._others),
        ):
            threading.Thread(target=self._accept, args=(listening, serve), daemon=True).start()

    def close(self) -> None:
        self._listening.close()
        for other in (self._aside, *self._others):
            other.close()
        self._grpc.stop(None)

    @staticmethod
    def _accept(listening: socket.socket, serve: Callable[[socket.socket], None]) -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listening.accept()[0],), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(2)  # who says nothing for as long waits for the server to speak
        try:
            first = connection.recv(4, socket.MSG_PEEK)
        except TimeoutError:
            self._greet(connection)
            return
        connection.settimeout(None)
        with contextlib.suppress(OSError), connection:
            if first == b"PRI ":
                _relay(connection, self._behind)
            elif first.startswith(b"GET"):
                while b"\r\n\r\n" in connection.recv(65536):
                    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
            else:
                self._greet(connection)

    @staticmethod
    def _greet(connection: socket.socket) -> None:
        connection.settimeout(None)
        with contextlib.suppress(OSError), connection:
            connection.sendall(GREETING)
            while data := connection.recv(65536):
                connection.sendall(data)


class _Methods(grpc.GenericRpcHandler):
    def service(self, details: grpc.HandlerCallDetails) -> Any:
        def echo(request: bytes, context: grpc.ServicerContext) -> bytes:
            if details.method.endswith("Fail"):
                context.abort(grpc.StatusCode.INTERNAL, "as asked")
            return request

        return grpc.unary_unary_rpc_method_handler(echo)


def _relay(one: socket.socket, port: int) -> None:
    other = socket.create_connection(("127.0.0.1", port))

    def carry(source: socket.socket, to: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                to.sendall(data)
            to.shutdown(socket.SHUT_WR)

    back = threading.Thread(target=carry, args=(other, one), daemon=True)
    back.start()
    carry(one, other)
    back.join()
    other.close()


CALL = """
import sys, grpc
channel = grpc.insecure_channel(sys.argv[1])
call = channel.unary_unary(sys.argv[2])
try:
    print(call(b"hello", timeout=30).decode())
except grpc.RpcError as error:
    print(error.code().name)
"""


class Redirected(Mesh):
    """A mesh of one instance in each pod."""

    pods: tuple[Pod, Pod]

    def join(self, pod: Pod, name: str, service: str, port: int) -> Member:
        member = self.add(service)
        fields = {
            "id": name, "host": pod.address, "inbound_port": port, "app_port": port,
            "outbound_port": names.PROXY_PORT, "metrics_port": names.PLAIN_PORT,
        }  # fmt: skip
        member.instance = Instance.model_validate({**member.instance.model_dump(), **fields})
        return member

    def mesh_state(self) -> MeshState:
        state = super().mesh_state()
        here = {
            "addresses": {"web.shop": ADDRESS}, "ports": {"web.shop": PORT}, "namespace": "m",
            "also": [("web.shop", ADDRESS, called, str(its)) for called, its in (METHODS, METRICS, MAIL)],
        }  # fmt: skip
        return state.model_copy(update=here)

    def start_sidecar(self, member: Member) -> None:
        pod = next(one for one in self.pods if one.address == member.instance.host)
        placement = Placement(
            folder=member.folder, trust=self.plane.trust_path, admin=member.admin,
            control_host=pod.outside, control_port=self.control_port,
        )  # fmt: skip
        (member.folder / "token").write_text(member.token)
        for name, content in bootstrap_files(member.instance, placement).items():
            (member.folder / name).write_text(content)
        as_sidecar = ["ip", "netns", "exec", pod.name, "setpriv", "--regid", "1337", "--clear-groups"]
        # A pod knows its name, and not what the mesh calls it.
        node = ("--service-node", member.instance.id.removesuffix(".shop"))
        with (member.folder / "envoy.log").open("wb") as log:
            member.process = subprocess.Popen(
                [*as_sidecar, *envoy_arguments(find_envoy(), member.folder / "bootstrap.yaml"), *node],
                stdout=log, stderr=log,
            )  # fmt: skip


@pytest.fixture(scope="module")
def mesh() -> Iterator[tuple[Redirected, telemetry.Store]]:
    assert _possible(), "CI has root, iproute2 and iptables"

    def service(**fields: Any) -> Service:
        return Service(metrics=None, versions={"v1": Workload(image="injected")}, **fields)

    others = (
        FurtherPort(called=METHODS[0], port=METHODS[1], protocol="grpc", grpc_probe=True),
        FurtherPort(
            called=METRICS[0], port=METRICS[1], open_paths={"/metrics": ["GET"], "/ready?x=1": ["GET"]}
        ),
        FurtherPort(called=MAIL[0], port=MAIL[1], protocol="tcp"),
    )
    web = service(port=APP_PORT, found=Found(detect=True, ports=others, aside=(ASIDE,)))
    caller = service(port=1, calls=[], found=Found())
    app = App.model_validate({"name": "shop", "front": "x", "services": {"x": service(port=1)}})
    app = app.model_copy(
        update={"services": {
            **app.services,
            "web.shop": web.model_copy(update={"calls": []}),
            "account-default.shop": caller.model_copy(update={"calls": ["web.shop"]}),
        }}
    )  # fmt: skip
    store = telemetry.Store()

    async def authenticate(metadata: Any) -> Instance | None:
        return await found.plane.authenticate(metadata)  # there is one by then

    calm = asyncio.Event()
    calm.set()

    with mesh_of(app) as plain, two_pods() as pods:
        plain.__class__ = Redirected
        found: Redirected = plain  # type: ignore[assignment]
        found.pods = pods
        found.folder.chmod(0o755)
        found.extra = (telemetry.handler(store, authenticate, lambda _: None, calm=calm, home="m"),)
        found.host = "0.0.0.0"  # noqa: S104 - the pods come by links of their own
        found.join(pods[0], "caller-1.shop", "account-default.shop", 1)
        its = found.join(pods[1], "web-1.shop", "web.shop", APP_PORT)
        its.instance = its.instance.model_copy(
            update={"further": tuple(str(port) for _, port in (METHODS, METRICS, MAIL))}
        )
        served = Anything(pods[1])
        try:
            found.start()
            yield found, store
        finally:
            served.close()


def counted(store: telemetry.Store, instance: str = "web-1.shop") -> Counter[str]:
    """What a sidecar reported, by what was counted and of whom."""
    found: Counter[str] = Counter()
    for sample in store.window(600):
        for cell in sample.cells:
            if sample.instance == instance:
                for what in ("requests", "failures", "connections", "received", "sent"):
                    found[f"{what} {cell.peer}".strip()] += getattr(cell, what)
    return found


def test_one_port_of_which_nothing_is_said_carries_all_three(
    mesh: tuple[Redirected, telemetry.Store],
) -> None:
    found, store = mesh
    caller = found.pods[0]
    # HTTP/1, kept alive.
    connection = http.client.HTTPConnection(ADDRESS, PORT)
    connection.sock = caller.connect(ADDRESS, PORT)
    for _ in range(5):
        connection.request("GET", "/")
        assert connection.getresponse().read() == b"ok"
    connection.close()
    # gRPC.
    python = ["ip", "netns", "exec", caller.name, sys.executable, "-c", CALL, f"{ADDRESS}:{PORT}"]
    assert run(*python, "/shop.Shop/Echo").strip() == "hello"
    assert run(*python, "/shop.Shop/Fail").strip() == "INTERNAL"
    # Whose server speaks first, and whose client does so with something else than HTTP.
    for says in (b"", b"\x00\x01hello"):
        with caller.connect(ADDRESS, PORT) as plain:
            plain.sendall(says)
            expected = GREETING + says
            got = b""
            while len(got) < len(expected):
                got += plain.recv(100)
            assert got == expected

    who = "account-default.shop"

    def all_there() -> bool:
        seen = counted(store)
        return seen[f"requests {who}"] >= 7 and seen[f"connections {who}"] >= 2 and seen["sent"] > 40

    until(all_there, "the counts")
    seen = counted(store)
    assert (seen[f"requests {who}"], seen[f"failures {who}"], seen[f"connections {who}"]) == (7, 1, 2)
    assert (seen["received"], seen["sent"]) == (7, 2 * len(GREETING) + 7)
    # The caller's side has them too, under the service's whole name.
    until(lambda: counted(store, "caller-1.shop")["requests web.shop"] == 7, "the caller's counts")


def test_other_ports_are_reached_as_before_and_the_mesh_s_own_only_by_the_mesh(
    mesh: tuple[Redirected, telemetry.Store],
) -> None:
    found, _ = mesh
    caller, called = found.pods
    with caller.connect(called.address, ASIDE) as plain:
        assert plain.recv(100) == GREETING
    for port in (APP_PORT, 15006, 7):
        with caller.connect(called.address, port) as refused, contextlib.suppress(ConnectionResetError):
            refused.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert refused.recv(100) == b"", port
    # Ready and metrics of the other pod, not of this one, through whose sidecar the way would lead.
    with caller.connect(called.address, names.READY_PORT) as ready:
        ready.sendall(b"GET /ready HTTP/1.1\r\nHost: x\r\n\r\n")
        assert ready.recv(100).startswith(b"HTTP/1.1 200")


def by_route(store: telemetry.Store, instance: str) -> Counter[str]:
    """Requests that a sidecar reported of one direction or the other, by route."""
    found: Counter[str] = Counter()
    for sample in store.window(600):
        for cell in sample.cells:
            if sample.instance == instance and cell.requests:
                found[cell.route] += cell.requests
    return found


def get(caller: Pod, port: int, path: str, address: str = ADDRESS) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(address, port)
    connection.sock = caller.connect(address, port)
    with contextlib.closing(connection):
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()


def test_every_port_of_a_service_is_in_the_mesh(mesh: tuple[Redirected, telemetry.Store]) -> None:
    found, store = mesh
    caller, called = found.pods
    before, tcp = by_route(store, "web-1.shop"), counted(store)
    python = ["ip", "netns", "exec", caller.name, sys.executable, "-c", CALL, f"{ADDRESS}:{METHODS[0]}"]
    assert run(*python, "/shop.Shop/Echo").strip() == "hello"
    assert run(*python, "/shop.Shop/Fail").strip() == "INTERNAL"
    assert get(caller, METRICS[0], "/anything") == (200, b"ok")
    with caller.connect(ADDRESS, MAIL[0]) as mail:
        assert mail.recv(100) == GREETING
        mail.sendall(b"HELO")
        assert mail.recv(100) == b"HELO"

    # All under the service's name, by both ends; which port it was is told as a route.
    def all_there() -> bool:
        now = by_route(store, "web-1.shop") - before
        there = now == {"port-9000": 2, "port-9100": 1}
        theirs = by_route(store, "caller-1.shop")
        seen = counted(store)
        who = "connections account-default.shop"
        return (
            there
            and theirs["port-9000"] == 2
            and theirs["port-9100"] == 1
            and seen[who] == tcp[who] + 1
            and seen["received"] == tcp["received"] + 4
        )

    until(all_there, "the counts")
    failures = "failures web.shop"
    until(lambda: counted(store, "caller-1.shop")[failures] >= 1, "the method that failed, at its caller")

    # Who has no certificate hears what is asked so by Prometheus, and nothing else.
    assert get(caller, METRICS[1], "/metrics", called.address) == (200, b"ok")
    assert get(caller, METRICS[1], "/ready?x=1", called.address) == (200, b"ok")
    for path in ("/anything", "/ready", "/ready?x=2", "/metrics/../anything"):
        assert get(caller, METRICS[1], path, called.address)[0] == 403, path
    with caller.connect(called.address, MAIL[1]) as refused, contextlib.suppress(ConnectionResetError):
        refused.sendall(b"HELO")
        assert refused.recv(100) == b""
    python[-1] = f"{called.address}:{METHODS[1]}"
    assert run(*python, "/shop.Shop/Echo").strip() == "PERMISSION_DENIED"
    assert run(*python, "/grpc.health.v1.Health/Check").strip() == "hello"


def test_who_may_not_call_a_service_may_not_by_any_of_its_ports(
    mesh: tuple[Redirected, telemetry.Store],
) -> None:
    found, _ = mesh
    caller = found.pods[0]
    pair = ("account-default.shop", "web.shop")
    found.change(lambda intent, mesh: set_access(intent, mesh, *pair, allowed=False))
    try:
        assert get(caller, METRICS[0], "/anything")[0] == 403
        with caller.connect(ADDRESS, MAIL[0]) as refused, contextlib.suppress(ConnectionResetError):
            assert refused.recv(100) == b""
    finally:
        found.change(lambda intent, mesh: set_access(intent, mesh, *pair, allowed=True))
    assert get(caller, METRICS[0], "/anything")[0] == 200
