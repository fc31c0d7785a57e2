"""Changes of a running mesh through the Runtime protocol, under load and without a lost request."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from local_harness import Cli, wait_for

from meshdemo.control.model import Instance
from meshdemo.errors import BadInput, Failed
from meshdemo.runtime.local.runtime import LocalRuntime


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    with Cli(tmp_path_factory.mktemp("home")).up("--rps", "40") as cli:
        yield cli


@pytest.fixture
def runtime(mesh: Cli, monkeypatch: pytest.MonkeyPatch) -> LocalRuntime:
    monkeypatch.setenv("MESHDEMO_HOME", str(mesh.home))
    runtime = LocalRuntime(mesh.name)
    wait_for("a healthy mesh", mesh.all_ready)
    return runtime


def _revisions(runtime: LocalRuntime) -> dict[str, int]:
    return {one.id: one.revision for one in runtime.instances() if one.service == "service-b"}


def _one(runtime: LocalRuntime, instance: str) -> Instance:
    return next(one for one in runtime.instances() if one.id == instance)


def _env(mesh: Cli, instance: str) -> dict[str, str]:
    return mesh.process(instance).environ()


def test_a_new_revision_and_back(mesh: Cli, runtime: LocalRuntime) -> None:
    first = runtime.revisions("service-b", "v1")[-1].revision

    def release(attempt: int) -> None:
        revision = runtime.set_env("service-b", None, {"LAT_MS": f"2{attempt}"}, reason="out")
        assert revision.revision > first
        assert revision.env["LAT_MS"] == f"2{attempt}"
        assert set(_revisions(runtime).values()) == {revision.revision}
        assert _env(mesh, "service-b-v1-1")["LAT_MS"] == f"2{attempt}"
        back = runtime.rollback("service-b", "v1", first, reason="back")
        assert back.revision > revision.revision
        assert "LAT_MS" not in _env(mesh, "service-b-v1-2")
        last = runtime.revisions("service-b", "v1")[-2:]
        assert [(one.revision, one.reason) for one in last] == [
            (revision.revision, "out"),
            (back.revision, "back"),
        ]

    mesh.loses_no_request(release)


def test_old_processes_end(mesh: Cli, runtime: LocalRuntime) -> None:
    old = mesh.process("service-b-v1-1")
    runtime.set_env("service-b", "v1", {"LAT_MS": "1"}, reason="test")
    wait_for("the end of the old process", lambda: not old.is_running())
    runtime.set_env("service-b", "v1", {"LAT_MS": None}, reason="test")


def test_only_one_instance(mesh: Cli, runtime: LocalRuntime) -> None:
    before = _revisions(runtime)
    runtime.set_env("service-b", "v1", {"LAT_MS": "1"}, reason="test", instance="service-b-v1-2")
    after = _revisions(runtime)
    assert after["service-b-v1-1"] == before["service-b-v1-1"]
    assert after["service-b-v1-2"] != before["service-b-v1-2"]
    assert "LAT_MS" not in _env(mesh, "service-b-v1-1")
    assert _env(mesh, "service-b-v1-2")["LAT_MS"] == "1"
    runtime.set_env("service-b", "v1", {"LAT_MS": None}, reason="test", instance="service-b-v1-2")
    assert _revisions(runtime) == before
    assert "LAT_MS" not in _env(mesh, "service-b-v1-2")


def test_a_bad_release_changes_nothing_and_says_why(mesh: Cli, runtime: LocalRuntime) -> None:
    before = (_revisions(runtime), runtime.revisions("service-b", "v1"), mesh.process("service-b-v1-1").pid)
    with pytest.raises(Failed) as caught:
        runtime.set_env("service-b", "v1", {"LAT_MS": "never"}, reason="test")
    assert "LAT_MS='never'" in caught.value.remedy
    after = (_revisions(runtime), runtime.revisions("service-b", "v1"), mesh.process("service-b-v1-1").pid)
    assert after == before


def test_a_change_for_a_while_ends_by_itself(mesh: Cli, runtime: LocalRuntime) -> None:
    control = runtime.control()
    fault = control.add_fault(at="app", service="service-b", lat_ms=1, for_s=600).fault
    revision = runtime.set_env(
        "service-b", "v1", {"LAT_MS": "1"}, reason="test", expires_at=time.time() + 1.5, fault_id=fault.id
    )
    assert revision.env["LAT_MS"] == "1"
    wait_for("its end", lambda: "LAT_MS" not in runtime.revisions("service-b", "v1")[-1].env)
    wait_for("the end of its record", lambda: fault.id not in {one.id for one in control.faults()})
    assert "LAT_MS" not in _env(mesh, "service-b-v1-1")


def test_restarting_one_that_works_loses_nothing(mesh: Cli, runtime: LocalRuntime) -> None:
    old = mesh.process("service-b-v1-1").pid
    mesh.loses_no_request(lambda _: runtime.restart("service-b-v1-1", reason="test"))
    assert mesh.process("service-b-v1-1").pid != old
    assert _one(runtime, "service-b-v1-1").ready


def test_restarting_one_that_hangs(mesh: Cli, runtime: LocalRuntime) -> None:
    old = mesh.process("service-b-v1-1")
    runtime.hang("service-b-v1-1")
    wait_for("it hangs", lambda: old.status() == "stopped")
    runtime.restart("service-b-v1-1", reason="test")
    assert mesh.process("service-b-v1-1").pid != old.pid
    assert _one(runtime, "service-b-v1-1").ready


def test_hanging_and_going_on(mesh: Cli, runtime: LocalRuntime) -> None:
    process = mesh.process("service-b-v1-2")
    runtime.hang("service-b-v1-2")
    wait_for("it hangs", lambda: process.status() == "stopped")
    runtime.unhang("service-b-v1-2")
    wait_for("it goes on", lambda: process.status() != "stopped")
    assert mesh.process("service-b-v1-2").pid == process.pid


def test_a_crash(mesh: Cli, runtime: LocalRuntime) -> None:
    old = mesh.process("service-b-v1-2").pid
    runtime.crash("service-b-v1-2")
    wait_for("another process", lambda: mesh.process("service-b-v1-2").pid != old)
    wait_for("it is ready", lambda: _one(runtime, "service-b-v1-2").ready)


def test_a_new_revision_replaces_one_that_hangs(mesh: Cli, runtime: LocalRuntime) -> None:
    old = mesh.process("service-b-v1-2")
    runtime.hang("service-b-v1-2")
    runtime.set_env("service-b", "v1", {"LAT_MS": "1"}, reason="test")
    wait_for("the end of the hung one", lambda: not old.is_running())
    runtime.set_env("service-b", "v1", {"LAT_MS": None}, reason="test")


def test_scaling_up_and_down_loses_nothing(mesh: Cli, runtime: LocalRuntime) -> None:
    def scale(_: int) -> None:
        runtime.scale("service-b", "v1", 3, reason="test")
        assert _one(runtime, "service-b-v1-3").ready
        assert mesh.paths.instance("service-b-v1-3").is_dir()
        runtime.scale("service-b", "v1", 2, reason="test")

    mesh.loses_no_request(scale)
    assert len(_revisions(runtime)) == 2
    assert not mesh.paths.instance("service-b-v1-3").exists()


def test_the_load_is_remembered_for_restarts(mesh: Cli, runtime: LocalRuntime) -> None:
    runtime.set_load(33)
    old = mesh.process("service-a-v1-1").pid
    runtime.crash("service-a-v1-1")
    wait_for("it has started again", lambda: mesh.process("service-a-v1-1").pid != old)
    assert _env(mesh, "service-a-v1-1")["RPS"] == "33"
    wait_for("it to be ready", lambda: _one(runtime, "service-a-v1-1").ready)
    runtime.set_load(40)
    with pytest.raises(BadInput, match="allowed is 0 to"):
        runtime.set_load(-1)


def test_what_is_not_there_is_named(runtime: LocalRuntime) -> None:
    for call in (runtime.crash, runtime.hang, runtime.unhang):
        with pytest.raises(BadInput, match="no instance 'nobody'; there are: service-a-v1-1"):
            call("nobody")
    with pytest.raises(BadInput, match="no service 'nobody'"):
        runtime.set_env("nobody", None, {}, reason="")
    with pytest.raises(BadInput, match="runs no version 'v9'"):
        runtime.set_env("service-b", "v9", {}, reason="")
    with pytest.raises(BadInput, match="is an instance of service-b"):
        runtime.set_env("service-a", None, {}, reason="", instance="service-b-v1-1")
    with pytest.raises(BadInput, match="no revision 99"):
        runtime.rollback("service-b", "v1", 99, reason="")
    with pytest.raises(BadInput, match="allowed is 0 to 1000"):
        runtime.scale("service-b", "v1", -1, reason="")


def test_what_happened_is_in_the_journal(mesh: Cli, runtime: LocalRuntime) -> None:
    runtime.crash("service-b-v1-1")
    runtime.set_env("service-b", "v1", {"LAT_MS": "2"}, reason="to see it")
    runtime.set_env("service-b", "v1", {"LAT_MS": None}, reason="to end it")
    runtime.restart("service-b-v1-2", reason="because")

    def journal() -> set[tuple[str, str]]:
        events = runtime.control().events().events
        return {(event["event"], event.get("reason", "")) for event in events}

    wanted = {
        ("died", "service-b-v1-1 ended: killed by SIGKILL"),
        ("rolled_out", "to see it"),
        ("rolled_out", "to end it"),
        ("restarted", "because"),
    }
    wait_for("the journal", lambda: journal() >= wanted)


def test_only_one_watch_at_a_time(runtime: LocalRuntime) -> None:
    with runtime.watch_lock(), pytest.raises(Failed, match="meshdemo watch"), runtime.watch_lock():
        pass
    with runtime.watch_lock():
        pass


def test_logs(mesh: Cli, runtime: LocalRuntime) -> None:
    sources = {source for source, _ in runtime.logs(None, follow=False)}
    assert {"control-plane", "service-a-v1-1", "service-b-v1-1"} <= sources
    lines = list(runtime.logs("service-b", follow=False))
    assert {source.split()[0] for source, _ in lines} <= {
        "service-b-v1-1",
        "service-b-v1-2",
        "service-b-v1-3",
    }
    with pytest.raises(BadInput, match="no service 'nobody'"):
        list(runtime.logs("nobody", follow=False))
    assert "service-b-v1-1: " in mesh.run("logs", "service-b")


def test_following_logs_shows_what_comes(mesh: Cli, runtime: LocalRuntime) -> None:
    process = mesh.start("logs", "service-b", "-f")
    lines: list[str] = []
    assert process.stdout is not None
    thread = threading.Thread(target=lambda: lines.extend(process.stdout or ()), daemon=True)
    thread.start()
    wait_for("the lines so far", lambda: lines)
    before = len(lines)
    runtime.crash("service-b-v1-1")
    wait_for("a new line", lambda: any("listens on" in line for line in lines[before:]))
    process.terminate()
    process.wait()
    thread.join()
    process.communicate()
