"""up, status and down through the command line: what they print, what they leave, and interruptions."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from local_harness import DEADLINE_S, Cli, kill, read_url, wait_for

from meshdemo.apps import loader
from meshdemo.errors import Failed
from meshdemo.runtime.base import UpOptions
from meshdemo.runtime.local.files import Lock
from meshdemo.runtime.local.leftovers import find
from meshdemo.runtime.local.paths import HOME_MARK, MeshPaths, claim
from meshdemo.runtime.local.runtime import LocalRuntime
from meshdemo.runtime.steps import run_steps


@pytest.fixture
def cli(tmp_path: Path) -> Iterator[Cli]:
    cli = Cli(tmp_path / "home")
    yield cli
    cli.run("down")
    assert cli.leftovers() == []


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    with Cli(tmp_path_factory.mktemp("home")).up() as cli:
        yield cli


# -- one mesh that runs ----------------------------------------------------------------------------------------


def test_status(mesh: Cli) -> None:
    status = mesh.json("status")
    assert status["name"] == "mesh-demo"
    assert status["runtime"] == "local"
    assert status["app"] == "pair"
    assert status["ready"] is True
    assert status["revision"] >= 1
    instances = {
        service["name"]: [one["id"] for version in service["versions"] for one in version["instances"]]
        for service in status["services"]
    }
    assert instances["service-a"] == ["service-a-v1-1"]
    assert instances["service-b"][:2] == ["service-b-v1-1", "service-b-v1-2"]
    assert status["endpoints"].keys() >= {"gateway", "dashboard", "prometheus", "grafana"}
    assert read_url(status["endpoints"]["dashboard"] + "healthz")
    assert "service-b-v1-1" in mesh.run("status")


def test_up_again_says_so_and_changes_nothing(mesh: Cli) -> None:
    wait_for("a ready mesh", mesh.all_ready)
    before = {one["name"]: one["pid"] for one in mesh.describe()["processes"]}
    said = mesh.at_terminal("up")
    assert "nothing to change" in said
    assert f"the app      {mesh.json('status')['endpoints']['gateway']}" in said
    assert "`meshdemo fault --at mesh --service service-b --err 0.2`" in said
    assert "break it" not in mesh.run("up")  # nobody looks on
    assert {one["name"]: one["pid"] for one in mesh.describe()["processes"]} == before


def test_up_again_adds_and_changes(mesh: Cli) -> None:
    before = {one["name"]: one["pid"] for one in mesh.describe()["processes"]}
    status = mesh.json("up", "--replicas", "service-b=3", "--version", "service-b=v2", "--rps", "30")
    (service_b,) = (one for one in status["services"] if one["name"] == "service-b")
    assert {version["version"]: len(version["instances"]) for version in service_b["versions"]} == {
        "v1": 3,
        "v2": 1,
    }
    after = {one["name"]: one["pid"] for one in mesh.describe()["processes"]}
    assert before.items() <= after.items(), "what ran already still runs"
    port = next(one["app_port"] for one in mesh.describe()["instances"] if one["service"] == "service-a")
    assert json.loads(read_url(f"http://127.0.0.1:{port}/load"))["rps"] == 30
    mesh.run("up", "--replicas", "service-b=2")
    assert len([one for one in mesh.describe()["instances"] if one["version"] == "v1"]) == 3  # with service-a


def test_another_app_under_this_name_is_refused(mesh: Cli, tmp_path: Path) -> None:
    app = tmp_path / "other.yaml"
    app.write_text("name: other\nfront: x\nservices: {x: {port: 80, versions: {v1: {program: service_b}}}}\n")
    assert "runs the app 'pair', not 'other'" in mesh.run("up", "--app", str(app), status=1)
    assert mesh.all_ready()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--replicas", "nobody=3"], "no service 'nobody'"),
        (["--replicas", "service-b"], "write it as SERVICE=N"),
        (["--replicas", "service-b=x"], "is a whole number"),
        (["--replicas", "service-b=1001"], "allowed is 0 to 1000"),
        (["--rps", "-5"], "allowed is 0 to 100000"),
        (["--version", "service-b=v7"], "no such version; there are: v1, v2"),
        (["--runtime", "nomad"], "allowed is auto, local, kind, kubernetes"),
        (["--app", "nowhere.yaml"], "neither a built-in one nor a file"),
        (["--timeout", "0"], "more than zero"),
        (["--timeout", "inf"], "more than zero and at most a day"),
    ],
)
def test_bad_input_changes_nothing(mesh: Cli, arguments: list[str], words: str) -> None:
    before = mesh.describe()["spec"]
    assert words in mesh.run("up", *arguments, status=2)
    assert mesh.describe()["spec"] == before


def test_two_meshes_side_by_side(mesh: Cli) -> None:
    other = Cli(mesh.home, "other")
    with other.up("--replicas", "service-b=1"):
        assert other.json("status")["name"] == "other"
        assert len(other.json("stat", "--by", "instance")) == 2
        assert mesh.all_ready()
    assert mesh.all_ready()
    assert mesh.paths.state.exists()


# -- coming up and going down ----------------------------------------------------------------------------------


def test_nothing_there(cli: Cli) -> None:
    assert cli.json("down") == {"removed": []}
    assert cli.json("down", "--all") == {"removed": []}
    assert "no mesh 'mesh-demo' is running" in cli.run("status", status=3)
    assert "no mesh 'mesh-demo' is running" in cli.run("logs", status=3)
    assert not cli.home.exists()


def test_folders_that_are_no_meshes_are_left_alone(tmp_path: Path) -> None:
    """A home that holds other things, too: nothing is removed from it, nothing written into them."""
    home = tmp_path / "home"
    for name in ("photos", "thesis", "empty"):
        (home / name).mkdir(parents=True)
    (home / "photos" / "summer.jpg").write_text("x")
    (home / "thesis.lock").write_text("my own")
    (home / "photos.lock").write_text("my own")

    def files() -> list[str]:
        return sorted(str(path.relative_to(home)) for path in home.rglob("*"))

    before = files()
    cli = Cli(home, "photos")
    assert cli.json("down", "--all") == {"removed": []}
    assert cli.json("down") == {"removed": []}
    said = cli.run("up", status=2)
    assert f"{home / 'photos'} holds files that are not a mesh's" in said
    assert len(said.splitlines()) == 1
    assert "holds files" in cli.run("up", "--runtime", "kubernetes", status=2)
    assert files() == before
    assert (home / "photos.lock").read_text() == "my own"


def test_a_home_that_the_user_made_stays(tmp_path: Path) -> None:
    home, app = tmp_path / "home", tmp_path / "broken.yaml"
    home.mkdir()
    with Cli(home).up("--replicas", "service-b=1"):
        pass
    assert list(home.iterdir()) == []
    app.write_text(BROKEN)
    Cli(home, "shop").run("up", "--app", str(app), status=1)
    assert list(home.iterdir()) == []


def test_an_up_that_fails_leaves_what_else_is_in_its_home(tmp_path: Path) -> None:
    home, app = tmp_path / "home", tmp_path / "broken.yaml"
    (home / "photos").mkdir(parents=True)
    (home / "photos" / "summer.jpg").write_text("x")
    app.write_text(BROKEN)
    Cli(home, "shop").run("up", "--app", str(app), status=1)
    assert [str(path.relative_to(home)) for path in home.rglob("*")] == ["photos", "photos/summer.jpg"]


def test_a_home_that_is_deep(tmp_path: Path) -> None:
    home = tmp_path / ("deep" * 20) / ("deeper" * 20)
    assert len(str(home)) > 200
    with Cli(home, "a-mesh-with-a-name-that-is-rather-long").up("--replicas", "service-b=1") as cli:
        assert cli.json("status")["ready"]
    assert not home.exists()


def test_down_all(tmp_path: Path) -> None:
    clis = [Cli(tmp_path / "home", name) for name in ("one", "two")]
    processes = [cli.start("up", "--replicas", "service-b=1") for cli in clis]
    for process in processes:
        _, err = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0, err
    removed = clis[0].json("down", "--all")["removed"]
    assert removed.count("service-b-v1-1") == 2
    assert clis[0].leftovers() == clis[1].leftovers() == []
    assert not (tmp_path / "home").exists()


def test_two_ups_at_once(cli: Cli) -> None:
    processes = [cli.start("up") for _ in range(2)]
    ends = [(process.communicate(timeout=DEADLINE_S), process.returncode) for process in processes]
    statuses = sorted(status for _, status in ends)
    if statuses == [0, 0]:
        # The second came when the first had done.
        assert any("nothing to change" in out for (out, _), _ in ends)
    else:
        assert statuses == [0, 1], ends
        said = "another `meshdemo up` (of mesh 'mesh-demo' \\(process|or `down` of mesh 'mesh-demo' has just)"
        assert any(re.search(said, err) for (_, err), _ in ends), ends
    assert cli.all_ready()


def test_an_up_that_was_planned_before_another_one_ended_changes_nothing(cli: Cli) -> None:
    runtime = LocalRuntime("mesh-demo")
    runtime.paths = runtime._supervisor._paths = cli.paths
    options = UpOptions(
        name="mesh-demo", app=loader.load("pair"), rps=20, extra={"cwd": str(loader.folder("pair"))}
    )
    planned = runtime.steps(options)
    cli.run("up", "--replicas", "service-b=1")
    before = cli.describe()["spec"]
    with pytest.raises(Failed, match="has just ended"):
        run_steps(planned)
    assert (cli.all_ready(), cli.describe()["spec"]) == (True, before)
    assert not cli.paths.lock.exists()


# What Python says, and ends with status 1, if it is interrupted before it has come to anything of ours.
_PYTHON_STARTS = ("Could not import runpy module", "Fatal Python error: init_")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_up_that_is_interrupted_leaves_nothing(cli: Cli, number: signal.Signals) -> None:
    moments = _moments(cli)
    for moment in moments if number is signal.SIGINT else moments[2:3]:
        process = cli.start("up")
        moment(process)
        process.send_signal(number)
        out, err = process.communicate(timeout=DEADLINE_S)
        if process.returncode == 0 or "is up" in out:  # it was done already
            cli.run("down")
        else:
            interrupted = 1 if err.startswith(_PYTHON_STARTS) else 130
            assert process.returncode in {interrupted, -number}, (out, err)
        wait_for("nothing left", lambda: cli.leftovers() == [])


def test_an_up_that_is_interrupted_twice_leaves_nothing(cli: Cli) -> None:
    """Nobody waits long between two Ctrl-C; the second must not end the undoing."""
    process = cli.start("up")
    wait_for("the supervisor", lambda: find(cli.paths.state) or process.poll() is not None)
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    assert err == "meshdemo: interrupted; undoing what was begun\n"
    assert cli.leftovers() == []


def test_down_all_goes_on_when_one_cannot_be_removed(tmp_path: Path) -> None:
    """The first one's lock is held by somebody who does not let go; the others are removed all the same."""
    home = tmp_path / "home"
    for name in ("one", "two", "zwei"):
        claim(home / name)
    held = MeshPaths(home / "two")
    lock = Lock.take(held.lock, "somebody")
    try:
        process = Cli(home).start("down", "--all", "-o", "json")
        out, err = process.communicate(timeout=DEADLINE_S)
    finally:
        lock.release(remove=True)
    assert process.returncode == 1
    assert json.loads(out)["removed"] == [str(home / "one"), str(home / "zwei")]
    assert "Mesh 'two': somebody" in err
    assert {path.name for path in home.iterdir()} == {HOME_MARK, "two"}
    Cli(home, "two").run("down")


def test_after_an_up_that_was_killed_down_leaves_nothing(cli: Cli) -> None:
    for moment in _moments(cli):
        process = cli.start("up")
        moment(process)
        process.kill()
        process.communicate()
        cli.run("down")
        assert cli.leftovers() == []


def test_after_an_up_that_was_killed_up_works(cli: Cli) -> None:
    process = cli.start("up")
    wait_for("the supervisor", lambda: find(cli.paths.state) or process.poll() is not None)
    process.kill()
    process.communicate()
    cli.run("up")
    assert cli.all_ready()


Moment = Callable[[subprocess.Popen[str]], None]


def _moments(cli: Cli) -> list[Moment]:
    """Waits for moments in the course of an `up`: events that are seen from outside, and a random one."""

    def at(condition: Callable[[], object]) -> Moment:
        def wait(process: subprocess.Popen[str]) -> None:
            wait_for("the moment", lambda: process.poll() is not None or condition())

        return wait

    seconds = random.Random().uniform(0, 3)
    return [
        at(cli.paths.spec.exists),
        at(lambda: find(cli.paths.state)),
        at(cli.paths.api.exists),
        at((cli.paths.control / "trust.pem").exists),
        lambda _: time.sleep(seconds),
    ]


@pytest.mark.parametrize("then", ["up", "down"])
def test_a_killed_supervisor_takes_everything_with_it(cli: Cli, then: str) -> None:
    cli.run("up", "--replicas", "service-b=1")
    kill(cli.process("supervisor"))
    wait_for("everything gone", lambda: not find(cli.paths.state))
    assert "its supervisor is gone" in cli.run("status", status=3)
    cli.run(then)
    if then == "up":
        assert cli.all_ready()
        assert len(cli.describe()["instances"]) == 2, "it comes back as it was"
    else:
        assert cli.leftovers() == []


def test_a_supervisor_that_is_told_to_end_keeps_the_state(cli: Cli) -> None:
    """As when the machine shuts down."""
    cli.run("up", "--replicas", "service-b=1", "--rps", "30")
    kill(cli.process("supervisor"), signal.SIGTERM)
    wait_for("everything gone", lambda: not find(cli.paths.state))
    assert not cli.paths.sockets.exists()
    cli.run("up")
    assert len(cli.describe()["instances"]) == 2
    assert cli.describe()["spec"]["rps"] == 30


def test_a_killed_group_is_cleaned_up_by_the_next(cli: Cli) -> None:
    """Supervisor and guard at once: nobody is left to clean up, but the next command."""
    cli.run("up", "--replicas", "service-b=1")
    both = (cli.process("supervisor"), cli.process("guard"))
    for process in both:
        process.suspend()
    for process in both:
        kill(process)
    assert find(cli.paths.state)
    cli.run("up")
    assert cli.all_ready()


def test_a_supervisor_that_does_not_answer_is_ended(cli: Cli) -> None:
    cli.run("up", "--replicas", "service-b=1")
    cli.process("supervisor").suspend()
    cli.run("down")
    assert cli.leftovers() == []


# -- what goes wrong -------------------------------------------------------------------------------------------

BROKEN = """
name: broken
front: shop
services:
  shop:
    port: 8080
    versions:
      v1:
        command: [sh, -c, "echo cannot find my database; exit 7"]
"""


def test_a_workload_that_does_not_start_ends_up_with_its_words(cli: Cli, tmp_path: Path) -> None:
    app = tmp_path / "broken.yaml"
    app.write_text(BROKEN)
    said = cli.run("up", "--app", str(app), status=1)
    assert "shop-v1-1 does not start: exit status 7" in said
    assert "cannot find my database" in said
    assert cli.leftovers() == []


def test_a_change_that_fails_leaves_the_mesh_as_it_was(mesh: Cli, tmp_path: Path) -> None:
    wait_for("a ready mesh", mesh.all_ready)
    app = tmp_path / "pair.yaml"
    text = (Path(loader.__file__).parent / "pair.yaml").read_text()
    app.write_text(text.replace("v2: {program: service_b,", "v2: {program: service_b, env: {ERR_RATE: '7'},"))
    before = mesh.describe()
    running = {one["name"] for one in before["processes"]}
    if "service-b-v2-1" in running:
        said = mesh.run("up", "--app", str(app), status=1)
    else:
        said = mesh.run("up", "--app", str(app), "--version", "service-b=v2", status=1)
    assert "service-b-v2-1 does not start: exit status 2" in said
    assert "ERR_RATE='7' makes no sense" in said
    after = mesh.describe()
    assert {one["name"]: one["pid"] for one in after["processes"]} == {
        one["name"]: one["pid"] for one in before["processes"]
    }
    assert after["spec"]["app"] == before["spec"]["app"]


def test_a_workload_that_is_never_ready_ends_up_in_time(cli: Cli, tmp_path: Path) -> None:
    app = tmp_path / "slow.yaml"
    app.write_text(BROKEN.replace("exit 7", "sleep 600"))
    said = cli.run("up", "--app", str(app), "--timeout", "10", status=1)
    # The second is what a machine that was busy just then makes of it.
    assert "not ready after 10 s" in said or re.search(r"after 10 s .* is not done", said), said
    assert cli.leftovers() == []


def test_a_users_own_program(cli: Cli, tmp_path: Path) -> None:
    """A command that knows nothing of us, run in the folder of its app file."""
    (tmp_path / "healthz").write_text("fine")
    (tmp_path / "index.html").write_text("hello")
    app = tmp_path / "shop.yaml"
    command = "exec python3 -m http.server --bind $HOST $PORT"
    app.write_text(
        f"name: shop\nfront: shop\nservices:\n"
        f"  shop: {{port: 80, metrics: null, versions: {{v1: {{command: [sh, -c, '{command}']}}}}}}\n"
        f"  visitor: {{port: 80, metrics: null, calls: [shop], versions: {{v1: {{command: [sh, -c, '{command}']}}}}}}\n"
    )
    cli.run("up", "--app", str(app))
    assert cli.all_ready()


@contextmanager
def _small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    unmount = ["umount", "-l", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode != 0:
        pytest.skip("needs to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(unmount, check=True)


@pytest.mark.parametrize("size", ["8k", "32k"])
def test_a_full_disk(tmp_path: Path, size: str) -> None:
    with _small_disk(tmp_path / "tiny", size) as home:
        cli = Cli(home)
        assert "No space left on device" in cli.run("up", "--timeout", "20", status=1)
        assert cli.leftovers() == []


def test_a_disk_that_becomes_full(tmp_path: Path) -> None:
    """What cannot be stored is refused and changes nothing; traffic goes on; room makes it work again."""
    with _small_disk(tmp_path / "small", "64m") as home, Cli(home).up("--replicas", "service-b=1") as cli:
        filler = home / "filler"
        with filler.open("wb", buffering=0) as file:
            for size in (65536, 1):
                with suppress(OSError):
                    while True:
                        file.write(bytes(size))
        before = cli.counts()["200"]
        assert "No space left on device" in cli.run("fault", "--lat", "5", status=1)
        wait_for("traffic", lambda: cli.counts()["200"] > before + 20)
        assert {one["revision"] for one in cli.describe()["instances"]} == {1}
        filler.unlink()
        cli.run("fault", "--lat", "5")
        assert {one["revision"] for one in cli.describe()["instances"]} == {1, 2}


def test_a_home_that_cannot_be_written(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert "MESHDEMO_HOME" in cli.run("up", status=1, MESHDEMO_HOME=str(file / "home"))


def test_check(cli: Cli) -> None:
    report = cli.json("check", "--runtime", "local")
    assert report["ok"] is True
    assert {one["name"] for one in report["checks"]} >= {"python", "envoy", "prometheus", "state folder"}
    assert all(one.keys() == {"name", "ok", "required", "detail", "remedy"} for one in report["checks"])
    checking = ("check", "--runtime", "kind")
    assert json.loads(cli.start(*checking, "-o", "json", PATH="/nowhere").communicate()[0])["ok"] is False
    assert "required and missing: docker, kind" in cli.run(*checking, status=3, PATH="/nowhere")
    said = cli.run("check", PATH="/nowhere").splitlines()[-1]
    assert said == "`meshdemo up` takes the local runtime: `kind` is not installed"
    assert not cli.home.exists()


def test_a_socket_folder_that_is_not_ours(cli: Cli) -> None:
    if os.getuid() != 0:
        pytest.skip("needs to give a folder to somebody else")
    paths = MeshPaths(cli.paths.state)
    paths.sockets.mkdir()
    os.chown(paths.sockets, 1, 1)
    try:
        assert "is not a private folder of yours" in cli.run("up", status=1)
    finally:
        if paths.sockets.exists():
            paths.sockets.rmdir()
