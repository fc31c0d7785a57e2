"""The parts of the local runtime on their own: files, locks, paths, ports, logs, probes, the request through."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from meshdemo.apps import loader
from meshdemo.control.model import Instance
from meshdemo.errors import BadInput, Failed, Missing
from meshdemo.files import write_atomic
from meshdemo.runtime import checks, select
from meshdemo.runtime.base import UpOptions
from meshdemo.runtime.local import prometheus, room
from meshdemo.runtime.local.client import SupervisorClient
from meshdemo.runtime.local.files import Lock, locked
from meshdemo.runtime.local.keeper import BoundedLog
from meshdemo.runtime.local.logs import read
from meshdemo.runtime.local.paths import MARK, MeshPaths, claim, home, names
from meshdemo.runtime.local.ports import Port
from meshdemo.runtime.local.probe import ask
from meshdemo.runtime.local.runtime import LocalRuntime
from meshdemo.runtime.local.through import request_through

# -- files and locks -------------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole_and_private(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_atomic(path, "one")
    write_atomic(path, "two")
    assert path.read_text() == "two"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_written_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_atomic(path, "one")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "\udcff")
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


def test_the_second_to_take_a_lock_hears_who_has_it(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "lock"
    lock = Lock.take(path, "the first")
    with pytest.raises(Failed, match=rf"the first \(process {os.getpid()}\)"):
        Lock.take(path, "the second")
    lock.release(remove=True)
    assert not path.exists()
    with locked(path, "the third"):
        assert path.exists()
    assert not path.exists()


def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    lock = Lock.take(path, "the first")
    threading.Timer(0.2, lambda: lock.release(remove=True)).start()
    Lock.take(path, "the second", wait_s=30).release()


def _hold_and_die(path: Path) -> None:
    Lock.take(path, "dies")
    os._exit(0)


def test_a_lock_ends_with_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    process = multiprocessing.get_context("spawn").Process(target=_hold_and_die, args=(path,))
    process.start()
    process.join(60)
    Lock.take(path, "next").release()


# -- paths -----------------------------------------------------------------------------------------------------


def test_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MESHDEMO_HOME", raising=False)
    assert home().name == "meshdemo"
    monkeypatch.setenv("MESHDEMO_HOME", str(tmp_path))
    assert home() == tmp_path
    assert list(names()) == []
    claim(tmp_path / "one")
    MeshPaths.of("two").lock.touch()
    (tmp_path / "photos").mkdir()
    (tmp_path / "thesis.lock").touch()
    assert list(names()) == ["one", "two"]


def test_sockets_have_short_paths_whatever_the_home() -> None:
    deep = MeshPaths(Path("/" + "/".join(["x" * 50] * 20)) / "mesh")
    assert len(os.fsencode(deep.api)) < 60
    assert len(os.fsencode(deep.admin(99_999))) < 60
    assert deep.sockets != MeshPaths(Path("/elsewhere/mesh")).sockets


def test_folders_are_private(tmp_path: Path) -> None:
    paths = MeshPaths(tmp_path / "m")
    try:
        paths.make()
        paths.make()
        assert {path.stat().st_mode & 0o777 for path in (paths.state, paths.control, paths.sockets)} == {
            0o700
        }
        paths.sockets.chmod(0o755)
        with pytest.raises(Failed, match="not a private folder"):
            paths.make()
    finally:
        paths.sockets.rmdir()


def test_a_folder_is_ours_from_its_first_moment(tmp_path: Path) -> None:
    """An `up` that is killed between making the folder and marking it has left nothing that nobody removes."""
    paths = MeshPaths(tmp_path / "m")
    paths.state.mkdir()
    assert not paths.ours
    paths.lock.touch()
    assert paths.ours
    (paths.state / "photo").touch()
    assert not paths.ours
    with pytest.raises(BadInput, match="files that are not a mesh's"):
        claim(paths.state)
    (paths.state / "photo").unlink()
    claim(paths.state)
    paths.lock.unlink()
    assert paths.ours
    assert [path.name for path in paths.state.iterdir()] == [MARK]


def test_a_home_that_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(Failed, match="cannot make"):
        MeshPaths(file / "m").make()
    with pytest.raises(Failed, match="cannot write"):
        Lock.take(file / "lock", "x")


# -- ports -----------------------------------------------------------------------------------------------------


def _server(port: int) -> socket.socket:
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind(("127.0.0.1", port))
    server.listen()
    return server


@pytest.mark.parametrize("hold", [True, False])
def test_a_port_can_be_served_on_and_its_loss_is_seen(hold: bool) -> None:
    port = Port(hold=hold)
    assert not port.lost()
    with closing(_server(port.number)):
        assert port.lost()
        old = port.number
        port.renew()
        assert port.number != old
        assert not port.lost()
    port.release()


# -- logs ------------------------------------------------------------------------------------------------------


def test_a_log_is_bounded_and_keeps_its_end(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    log = BoundedLog(path, limit=2_000)
    for number in range(1_000):
        log.write(f"line {number}\n".encode())
    log.write(b"not ended")
    log.close()
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 5_000
    assert log.tail[-1] == "line 999"
    lines = [line for _, line in read(tmp_path, None, follow=False)]
    assert lines[-1] == "line 999"
    assert lines == [f"line {number}" for number in range(1000 - len(lines), 1000)]


def test_a_log_on_a_full_disk_only_loses_lines(tmp_path: Path) -> None:
    log = BoundedLog(tmp_path / "nowhere" / "x.log")
    log.write(b"a\nb\n")
    assert list(log.tail) == ["a", "b"]


def test_lines_are_split_and_long_ones_cut(tmp_path: Path) -> None:
    log = BoundedLog(tmp_path / "x.log")
    for piece in (b"on", b"e\ntwo", b"\n", b"x" * 20_000, b"\n"):
        log.write(piece)
    log.close()
    lines = [line for _, line in read(tmp_path, None, follow=False)]
    assert lines[:2] == ["one", "two"]
    assert max(map(len, lines)) <= 8_192


def test_logs_come_by_time_and_by_service(tmp_path: Path) -> None:
    (tmp_path / "shop-v1-1.log").write_text("1.000 a\n3.000 c\nno time\n")
    (tmp_path / "shop-v1-1.sidecar.log").write_text("2.000 b\n")
    (tmp_path / "shop-window-v1-1.log").write_text("2.500 other\n")
    (tmp_path / "control-plane.log").write_text("1.500 cp\n")
    assert list(read(tmp_path, {"shop-v1"}, follow=False)) == [
        ("shop-v1-1", "a"),
        ("shop-v1-1 sidecar", "b"),
        ("shop-v1-1", "c"),
        ("shop-v1-1", "no time"),
    ]
    assert [line for _, line in read(tmp_path, None, follow=False)] == [
        "a",
        "cp",
        "b",
        "other",
        "c",
        "no time",
    ]


def test_following_crosses_a_rotation(tmp_path: Path) -> None:
    log = BoundedLog(tmp_path / "x.log", limit=200)
    log.write(b"first\n")
    following = read(tmp_path, None, follow=True)
    assert next(following) == ("x", "first")
    expected = [f"line {number}" for number in range(12)]
    for line in expected:
        log.write(line.encode() + b"\n")
    assert [next(following)[1] for _ in expected][-1] == "line 11"


# -- probes ----------------------------------------------------------------------------------------------------


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200 if self.path != "/bad" else 503)
        if self.path == "/chunked":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"4\r\nabcd\r\n3;x=y\r\nefg\r\n0\r\n\r\n")
            return
        body = json.dumps({"path": self.path, "host": self.headers["Host"]}).encode()
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[int]:
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield httpd.server_address[1]
    httpd.shutdown()
    httpd.server_close()


def test_a_probe_reads_status_and_body(server: int) -> None:
    assert asyncio.run(ask(server, "/bad")).status == 503
    answer = asyncio.run(ask(server, "/x"))
    assert json.loads(answer.body)["path"] == "/x"
    assert asyncio.run(ask(server, "/chunked")).body == b"abcdefg"


def test_a_probe_of_nobody(tmp_path: Path) -> None:
    port = Port()
    assert asyncio.run(ask(port.number, "/")).status == 0
    assert asyncio.run(ask(tmp_path / "no-socket", "/")).status == 0
    port.release()


def test_a_probe_of_somebody_who_says_nothing() -> None:
    port = Port()
    with closing(_server(port.number)):
        assert asyncio.run(ask(port.number, "/", timeout_s=0.1)).status == 0
    port.release()


# -- the request through -----------------------------------------------------------------------------------------


def _instance(service: str, outbound: int, *, ready: bool = True) -> Instance:
    return Instance(
        id=f"{service}-v1-1", service=service, version="v1", inbound_port=1, outbound_port=outbound,
        metrics_port=1, app_port=1, ready=ready,
    )  # fmt: skip


def test_the_request_goes_through_a_callers_sidecar(server: int) -> None:
    app = loader.load("pair")
    both = [_instance("service-a", server), _instance("service-b", 1)]
    assert request_through(app, both) == ""
    nobody = [_instance("service-a", 1), _instance("service-b", 1)]
    assert "no answer from service-b through the sidecar of service-a-v1-1" in request_through(app, nobody)


def test_an_app_without_calls_needs_no_request() -> None:
    assert request_through(loader.load("pair"), []) == ""


# -- Prometheus, the supervisor's client, choosing, checks -------------------------------------------------------


def test_what_prometheus_is_told(tmp_path: Path) -> None:
    import yaml

    text = prometheus.config(
        mesh="m", targets=tmp_path, control_plane="127.0.0.1:1", credentials=tmp_path / "token"
    )
    jobs = {job["job_name"]: job for job in yaml.safe_load(text)["scrape_configs"]}
    assert jobs.keys() == {"workloads", "sidecars", "control-plane"}
    prometheus.write_targets(tmp_path, loader.load("pair"), [_instance("service-b", 2)])
    (target,) = json.loads((tmp_path / "workloads.json").read_text())
    assert target["labels"]["__metrics_path__"] == "/metrics"
    assert target["targets"] == ["127.0.0.1:1"]


def test_a_supervisor_that_is_not_there(tmp_path: Path) -> None:
    paths = MeshPaths(tmp_path / "m")
    with pytest.raises(Missing, match="no mesh 'm' is running"):
        SupervisorClient(paths).call("describe")
    paths.state.mkdir()
    paths.spec.touch()
    with pytest.raises(Missing, match="its supervisor is gone"):
        SupervisorClient(paths).call("describe")


def test_choosing_a_runtime() -> None:
    assert select.choose("local", "m")[0].kind == "local"
    with pytest.raises(BadInput, match="allowed is auto, local, kind, kubernetes"):
        select.choose("nomad", "m")


def test_a_mesh_for_which_inotify_has_no_room_is_refused(tmp_path: Path) -> None:
    """In a user namespace, which has a limit of its own; Envoy aborts where it gets fewer than it needs."""
    limit = "/proc/sys/user/max_inotify_instances"
    enclosed = ["unshare", "--user", "--map-root-user", "sh", "-c"]
    try:
        subprocess.run([*enclosed, f"echo 9 > {limit}"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("INOTIFY WAS NOT TESTED: no user namespace can be made here")
    meshdemo = f"{sys.executable} -m meshdemo"
    done = subprocess.run(
        [*enclosed, f"echo 9 > {limit}; {meshdemo} up; echo $?; {meshdemo} check --runtime local -o json"],
        env={**os.environ, "MESHDEMO_HOME": str(tmp_path / "home")}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    status, _, report = done.stdout.partition("\n")
    assert status == "3"
    assert "more inotify instances, and you may have 9" in done.stderr
    assert "sysctl fs.inotify.max_user_instances=" in done.stderr
    found = {one["name"]: one for one in json.loads(report)["checks"]}
    assert (found["inotify"]["ok"], found["inotify"]["required"]) == (False, True)
    assert not (tmp_path / "home").exists()


def test_checks_touch_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESHDEMO_HOME", str(tmp_path / "home"))
    found = {one.name: one for one in checks.check("local")}
    assert checks.all_required(found.values())
    assert "Envoy 1." in found["envoy"].detail
    assert not (tmp_path / "home").exists()


def test_a_missing_part_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = {one.name: one for one in checks.check("kind")}
    assert not checks.all_required(found.values())
    assert found["kind"].required and found["kind"].remedy
    assert not found["prometheus"].required
    with pytest.raises(BadInput):
        checks.check("nomad")


# -- how many instances fit -----------------------------------------------------------------------------------


def test_a_machine_carries_so_many_instances() -> None:
    assert room.most(2, 24_000_000_000) == 64  # as the cores have it
    assert room.most(64, 4_000_000_000) == 40  # as the memory has it
    assert room.most(1, 1) == 1


def test_too_many_instances_are_refused_before_anything_begins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MESHDEMO_HOME", str(tmp_path / "home"))
    many = room.most(os.cpu_count() or 1, psutil.virtual_memory().total) + 1
    room.check(many, before=many)  # what runs already may go on
    with pytest.raises(BadInput, match=rf"{many} instances in all: this machine .* carries {many - 1}"):
        room.check(many, before=2)
    if many <= 1000:
        asked = UpOptions(name="m", app=loader.load("pair"), replicas={"service-b": many})
        with pytest.raises(BadInput, match="give fewer --replicas"):
            LocalRuntime("m").steps(asked)
    assert not (tmp_path / "home").exists()
