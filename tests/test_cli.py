"""The frame of the command line: options, exit status, output, and what a command may import."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from meshdemo import __version__
from meshdemo.cli import main
from meshdemo.cli._context import Context

# What `stat` has no time for: it may take 300 ms in all, most of which is Python itself.
HEAVY = {
    "pydantic", "grpc", "google.protobuf", "yaml", "jinja2", "flask", "requests", "docker", "kubernetes",
    "cryptography", "asyncio", "gevent", "psutil", "urllib3",
}  # fmt: skip


def meshdemo(
    *args: str, home: Path, env: dict[str, str] | None = None, code: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    command = [sys.executable, *(["-c", code] if code else ["-m", "meshdemo"]), *args]
    environment = {**os.environ, "MESHDEMO_HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)}
    for variable in ("COLUMNS", "NO_COLOR", "FORCE_COLOR"):
        environment.pop(variable, None)
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={**environment, **(env or {})}, check=False
    )


ROW = {
    "service": "service-b", "rps": 50.0, "success_rate": 0.5, "effective_success_rate": 0.9, "p50_ms": 1.0,
    "p95_ms": 2.0, "p99_ms": 3.0, "requests": 500, "failures": 250, "overdue": 0, "denied": 0, "refused": 0, "outlier_ejected": 0, "mirrored": 0, "mirrored_failures": 0,
    "silent": False, "ejected": False, "window_s": 10.0,
}  # fmt: skip
TAPPED = {
    "time": 1e9, "caller": "service-a", "service": "service-b", "version": "v1", "instance": "service-b-v1-1",
    "route": "work", "method": "GET", "path": "/work?x=1", "status": 200, "grpc_status": None, "flags": "",
    "latency_ms": 1.5, "secured": True, "mirrored": False, "at": "service",
}  # fmt: skip
EFFECT = {"revision": 7, "effective_ms": 3.21, "sidecars": 3}
ANSWERS: dict[str, Any] = {
    "GET /v1/signals": [ROW],
    "GET /v1/edges": [
        {"caller": "service-a", "service": "service-b", "secured": True, "identity": "spiffe://m/a", "service_identity": "spiffe://m/b", "rps": 5.0,
         "success_rate": 1.0, "p50_ms": 1.0, "p99_ms": 2.0, "requests": 50, "denied": 0}
    ],
    "GET /v1/access": [{"caller": "service-a", "service": "service-b", "allowed": True, "explicit": False}],
    "PUT /v1/access": {"effect": EFFECT},
    "GET /v1/traffic": {"service-b": {"split": {"v1": 90, "v2": 10}, "since": 1e9}},
    "GET /v1/traffic/effective": {
        "service-b": {"split": {"value": {"v1": 90, "v2": 10}, "origin": "set", "since": 1e9}},
    },
    "PUT /v1/traffic/service-b": {"traffic": {"split": {"v1": 90, "v2": 10}}, "effect": EFFECT},
    "GET /v1/faults": [
        {"id": "f-1", "at": "mesh", "service": "service-b", "lat_ms": 200.0, "started_at": 1e9}
    ],
}  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    """Answers as a control plane would, from `ANSWERS`."""

    asked: list[tuple[str, Any]]

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        length = int(self.headers.get("Content-Length", 0))
        self.asked.append((f"{self.command} {self.path}", json.loads(self.rfile.read(length) or "null")))
        if path == "/v1/tap":
            return self.answer(200, b"".join(json.dumps(TAPPED).encode() + b"\n\n" for _ in range(20)))
        if path == "/v1/traffic/nowhere":
            wrong = {"error": "unknown service 'nowhere'", "remedy": "services: service-b"}
            return self.answer(400, json.dumps(wrong).encode())
        return self.answer(200, json.dumps(ANSWERS[f"{self.command} {path}"]).encode())

    do_PUT = do_POST = do_DELETE = do_GET

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


class Mesh:
    """A state folder that leads to a control plane which answers from a table."""

    def __init__(self, home: Path, asked: list[tuple[str, Any]]) -> None:
        self.home = home
        self.asked = asked

    def __call__(self, *args: str, **more: Any) -> subprocess.CompletedProcess[str]:
        return meshdemo(*args, home=self.home, **more)

    def json(self, *args: str) -> Any:
        done = self(*args, "-o", "json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[Mesh]:
    asked: list[tuple[str, Any]] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answers", (Handler,), {"asked": asked}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state = tmp_path / "mesh-demo"
    (state / "control").mkdir(parents=True)
    (state / "spec.json").write_text("{}")
    (state / "supervisor.json").write_text(json.dumps({"http_port": server.server_address[1]}))
    (state / "control" / "api-token").write_text("secret\n")
    yield Mesh(tmp_path, asked)
    server.shutdown()
    server.server_close()


# -- cold start -------------------------------------------------------------------------------------------

_RUN = """
import atexit, sys
from meshdemo.cli import main
atexit.register(lambda: print("\\n".join(sys.modules), file=sys.stderr))
main.run(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "args", [["stat"], ["stat", "-o", "json"], ["edges", "--window", "5s"], ["--help"], ["--version"]]
)
def test_quick_commands_import_nothing_heavy(mesh: Mesh, args: list[str]) -> None:
    done = mesh(*args, code=_RUN)
    assert done.returncode == 0, done.stderr
    assert not HEAVY & set(done.stderr.split())
    if "json" in args:
        assert "rich.console" not in done.stderr.split()


# -- help and completion ------------------------------------------------------------------------------------


def test_help_shows_every_command_on_one_line(tmp_path: Path) -> None:
    shown = meshdemo("--help", home=tmp_path).stdout
    for name, (heading, _, line) in main.COMMANDS.items():
        assert any(name in row and line in row for row in shown.splitlines()), name
        assert heading in shown


def test_completion_knows_every_command(tmp_path: Path) -> None:
    env = {"_MESHDEMO_COMPLETE": "complete_bash", "COMP_WORDS": "meshdemo sta", "COMP_CWORD": "1"}
    done = meshdemo(home=tmp_path, env=env, code="from meshdemo.cli.main import run; run()")
    assert set(done.stdout.split()) == {"stat", "status"}


@pytest.mark.parametrize("name", list(main.COMMANDS))
def test_every_command_has_help_and_the_global_options(name: str, tmp_path: Path) -> None:
    done = meshdemo(name, "--help", home=tmp_path, env={"COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    for option in ("--name", "--output", "--verbose"):
        assert option in done.stdout


@pytest.mark.parametrize("name", list(main.COMMANDS))
def test_every_command_has_examples_that_can_be_typed(name: str) -> None:
    loaded = main.load(name)
    below = [loaded.epilog, *(one.epilog for one in getattr(loaded, "commands", {}).values())]
    assert below[0]
    for line in "\n".join(filter(None, below)).splitlines():
        if not line.startswith("meshdemo "):
            continue
        first, *rest = shlex.split(line.partition(" | ")[0])[1:]
        frame = main.load(first).make_context(first, rest)  # complains of what it does not know
        if child := [*frame._protected_args, *frame.args]:
            frame.command.commands[child[0]].make_context(child[0], child[1:])


def test_version(tmp_path: Path) -> None:
    assert meshdemo("--version", home=tmp_path).stdout == f"meshdemo {__version__}\n"


# -- global options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args",
    [
        ["-o", "json", "stat"],
        ["stat", "-o", "json"],
        ["stat", "--output=json"],
        ["-o", "text", "stat", "-o", "json"],
    ],
)
def test_global_options_stand_before_or_after_the_command(mesh: Mesh, args: list[str]) -> None:
    done = mesh(*args)
    assert json.loads(done.stdout) == [ROW]
    assert done.stderr == ""


@pytest.mark.parametrize("args", [["--name", "other", "stat"], ["stat", "--name", "other"]])
def test_another_mesh_is_not_there(mesh: Mesh, args: list[str]) -> None:
    done = mesh(*args)
    assert done.returncode == 3
    assert "'other'" in done.stderr
    assert "`meshdemo up --name other`" in done.stderr


def test_commands_that_are_named_are_of_this_mesh() -> None:
    said = "`meshdemo up --version b=v2` starts it, `meshdemo check` looks, `meshdemo down --name x` ends it"
    context = Context()
    assert context.naming(said) == said
    context.name = "other"
    assert context.naming(said) == (
        "`meshdemo up --version b=v2 --name other` starts it, `meshdemo check` looks, "
        "`meshdemo down --name x` ends it"
    )


@pytest.mark.parametrize("name", ["Mesh", "1mesh", "mesh-", "a" * 41, "me_sh", "", "../etc", "-"])
def test_a_name_that_is_none(name: str, tmp_path: Path) -> None:
    done = meshdemo("stat", "--name", name, home=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1


# -- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["statt"], "Did you mean 'stat', 'status'?"),
        (["stat", "-o", "xml"], "--output 'xml': allowed is text, json, jsonl"),
        (["stat", "--by", "planet"], "allowed is service, version, instance, route, caller"),
        (["stat", "--window", "10"], "--window '10': give a duration"),
        (["stat", "--window", "1h"], "allowed is 1 to 600 s"),
        (["stat", "--bogus"], "No such option: --bogus"),
        (["load"], "Missing option '--rps'"),
        (["load", "--rps", "-1"], "--rps -1: allowed is 0 to 100000"),
        (["load", "--rps", "nan"], "--rps nan: allowed is 0 to 100000"),
        (["fault"], "nothing to break"),
        (["fault", "--lat", "-5"], "a latency is 0 to"),
        (["fault", "--lat", "fast"], "--lat 'fast': give a number (see"),
        (["fault", "--err", "1.5"], "an error share is 0 to 1"),
        (["fault", "--err", "0.5", "--for", "soon"], "--for 'soon': give a duration"),
        (["fault", "--crash", "--lat", "5"], "--crash with --lat"),
        (["fault", "mend"], "No such command 'mend'"),
        (["traffic", "set", "service-b"], "nothing to set"),
        (["traffic", "set", "service-b", "--split", "v1=90"], "sum to 90, not to 100"),
        (["traffic", "set", "service-b", "--outlier", "maybe"], "allowed is on or off"),
        (["traffic", "set", "service-b", "--timeout", "500"], "--timeout '500': give a duration"),
        (["tap", "--max", "0"], "--max 0: allowed is 1 or more"),
        (["tap", "--max", "x"], "--max 'x': give a whole number"),
        (["dashboard", "--port", "70000"], "--port 70000: allowed is 0 to 65535"),
        (["access", "allow", "service-a"], "Missing argument"),
        (["render", "envoy", "--app", "nonsense"], "nonsense"),
    ],
)
def test_bad_input_is_one_line_and_status_2(args: list[str], complaint: str, tmp_path: Path) -> None:
    done = meshdemo(*args, home=tmp_path)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_what_the_control_plane_refuses_is_bad_input(mesh: Mesh) -> None:
    done = mesh("traffic", "set", "nowhere", "--retries", "1")
    assert done.returncode == 2
    assert done.stderr == "meshdemo: unknown service 'nowhere' (services: service-b)\n"


def test_nothing_runs(tmp_path: Path) -> None:
    done = meshdemo("stat", "-o", "json", home=tmp_path)
    assert done.returncode == 3
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    message, remedy = done.stderr.splitlines()
    assert "no mesh 'mesh-demo'" in message
    assert "meshdemo up" in remedy


def test_a_bug_shows_its_traceback_only_when_asked(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def broken(_: object) -> None:
        raise KeyError("oops")

    for args, shown in ((["stat"], False), (["stat", "--verbose"], True)):
        monkeypatch.setattr(Context, "client", property(broken))
        with pytest.raises(SystemExit) as caught:
            main.run(args)
        said = capsys.readouterr().err
        assert caught.value.code == 1
        assert "internal error: KeyError: 'oops'" in said
        assert ("Traceback" in said) is shown


def test_ctrl_c_ends_with_130_and_says_nothing(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Context, "client", property(interrupted))
    with pytest.raises(SystemExit) as caught:
        main.run(["stat"])
    assert caught.value.code == 130
    assert "Traceback" not in capsys.readouterr().err


def test_ctrl_c_while_modules_load_says_nothing_either(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'typer': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "from meshdemo.__main__ import run\n"
        "run()"
    )
    done = meshdemo("stat", home=tmp_path, code=code)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_ctrl_c_when_all_is_said_says_nothing_either(tmp_path: Path) -> None:
    code = (
        "import atexit, sys, time\n"
        "sys.argv = ['meshdemo', '--version']\n"
        "atexit.register(lambda: (print('over', flush=True), time.sleep(60)))\n"
        "from meshdemo.__main__ import run\n"
        "run()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert [process.stdout.readline()[:8], process.stdout.readline()] == ["meshdemo", "over\n"]
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30)[1] == ""
        assert process.returncode == -signal.SIGINT


def test_a_closed_pipe_is_no_error_worth_a_word(mesh: Mesh) -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", f"{sys.executable} -m meshdemo tap | head -1"],
        capture_output=True, text=True, timeout=60, check=True,
        env={**os.environ, "MESHDEMO_HOME": str(mesh.home), "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""


# -- commands -----------------------------------------------------------------------------------------------


def test_stat(mesh: Mesh) -> None:
    shown = mesh("stat", "service-b", "--by", "caller", "--window", "30s").stdout
    assert mesh.asked[-1][0] == "GET /v1/signals?by=caller&window_s=30.0&service=service-b"
    assert "service-b" in shown
    assert "50.00%" in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize("command", ["stat", "edges"])
def test_no_name_is_left_out_on_a_narrow_terminal(mesh: Mesh, command: str) -> None:
    shown = mesh(command, env={"COLUMNS": "30"}).stdout
    assert "service-b" in shown
    assert "…" not in shown


def test_edges_access_traffic_and_faults(mesh: Mesh) -> None:
    assert mesh.json("edges")[0]["secured"] is True
    assert "✓ mTLS" in mesh("edges").stdout
    assert mesh.json("access", "show") == ANSWERS["GET /v1/access"]
    assert mesh.json("access", "deny", "service-a", "service-b") == {
        "caller": "service-a", "service": "service-b", "allowed": False, **EFFECT, "unconfirmed": [],
    }  # fmt: skip
    assert mesh.asked[-1][1] == {"caller": "service-a", "service": "service-b", "allowed": False}
    assert "v1 90%, v2 10%" in mesh("traffic", "show").stdout
    made = mesh.json(
        "traffic", "set", "service-b", "--split", "v1=90,v2=10", "--timeout", "1.5s", "--outlier", "off",
        "--retries", "0",
    )  # fmt: skip
    assert made["effective_ms"] == 3.21
    assert mesh.asked[-1][1] == {
        "split": {"v1": 90, "v2": 10}, "timeout_ms": 1500, "outlier": False, "retries": 0,
    }  # fmt: skip
    assert mesh.json("fault", "list")[0]["id"] == "f-1"
    assert "200 ms" in mesh("fault", "list").stdout


def test_tap_and_top(mesh: Mesh) -> None:
    done = mesh("tap", "--route", "/work", "--status", "5xx", "--max", "3", "-o", "json")
    assert [json.loads(line) for line in done.stdout.splitlines()] == [TAPPED] * 3
    assert "status=5xx" in mesh.asked[-1][0]
    rows = mesh.json("top")
    assert rows[0]["requests"] == 20
    assert rows[0]["path"] == "/work"
    assert rows[0]["success_rate"] == 1


def test_dashboard_prints_where_it_is(mesh: Mesh) -> None:
    url = mesh.json("dashboard", "--no-open")["url"]
    assert url.startswith("http://127.0.0.1:")
    assert url.endswith("/#token=secret")


def test_dashboard_on_another_port(mesh: Mesh) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "meshdemo", "dashboard", "--port", "0", "--no-open", "-o", "jsonl"],
        stdout=subprocess.PIPE, text=True,
        env={**os.environ, "MESHDEMO_HOME": str(mesh.home), "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            url = urlsplit(json.loads(process.stdout.readline())["url"])
            assert url.port is not None
            for _ in range(2):
                connection = HTTPConnection("127.0.0.1", url.port, timeout=20)
                connection.request("GET", "/v1/signals")
                assert json.loads(connection.getresponse().read()) == [ROW]
                connection.close()
            taken = mesh("dashboard", "--port", str(url.port), "--no-open")
            assert taken.returncode == 2
            assert "choose another one" in taken.stderr
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130


def test_render_envoy_needs_no_mesh(tmp_path: Path) -> None:
    done = meshdemo("render", "envoy", "--service", "service-b", "-o", "json", home=tmp_path)
    assert done.returncode == 0, done.stderr
    rendered = json.loads(done.stdout)["service-b"]
    assert {"clusters", "listeners", "routes", "endpoints"} <= set(rendered)
    assert "service-b" in meshdemo("render", "envoy", "--app", "pair", home=tmp_path).stdout


# -- where it prints to -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("redirect", "words"),
    [("> /dev/full", "cannot write to stdout: No space left on device"), (">&-", "stdout is closed")],
)
def test_a_stdout_that_takes_nothing(mesh: Mesh, redirect: str, words: str) -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", f"{sys.executable} -m meshdemo fault list -o json {redirect}"],
        env={**os.environ, "MESHDEMO_HOME": str(mesh.home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert words in done.stderr
    assert "internal error" not in done.stderr
    assert "Traceback" not in done.stderr


# -- what would be applied ----------------------------------------------------------------------------------


def rendered(tmp_path: Path, *args: str) -> Any:
    done = meshdemo("render", *args, "-o", "json", home=tmp_path)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_manifests_of_one_service(tmp_path: Path) -> None:
    every = rendered(tmp_path, "kubernetes", "--app", "emojivoto")
    mine = rendered(tmp_path, "kubernetes", "--app", "emojivoto", "--service", "voting")
    assert {one["kind"] for one in mine} >= {"Deployment", "Service"}
    assert {one["metadata"]["labels"]["meshdemo.dev/service"] for one in mine} == {"voting"}
    assert all(one in every for one in mine)


def test_rules_of_one_service(tmp_path: Path) -> None:
    rules = rendered(tmp_path, "prometheus", "--app", "emojivoto", "--service", "voting")
    (text,) = [json.dumps(value) for name, value in rules.items() if name != "prometheus.yml"]
    assert 'service=~\\"voting\\"' in text or 'service=\\"voting\\"' in text


def test_a_dashboard_that_shows_one_service(tmp_path: Path) -> None:
    files = rendered(tmp_path, "grafana", "--service", "service-b")
    (chosen,) = files["dashboards/service.json"]["templating"]["list"]
    assert chosen["current"]["value"] == "service-b"


@pytest.mark.parametrize("what", ["kubernetes", "envoy", "prometheus", "grafana"])
def test_a_service_that_there_is_not(tmp_path: Path, what: str) -> None:
    done = meshdemo("render", what, "--app", "pair", "--service", "nobody", home=tmp_path)
    assert done.returncode == 2
    assert "no service 'nobody'; there are: service-a, service-b" in done.stderr
