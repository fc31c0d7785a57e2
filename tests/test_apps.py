"""App files: the built-in ones are sound, and what is wrong with a file is told with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshdemo.apps import loader
from meshdemo.apps.model import App
from meshdemo.errors import BadInput

GOOD = """\
name: shop
front: web
services:
  web:
    port: 8080
    versions:
      v1: {command: [python, -m, http.server]}
"""


@pytest.mark.parametrize("name", loader.built_in())
def test_built_in_apps_are_sound(name: str) -> None:
    assert loader.load(name).name == name
    assert loader.folder(name) == Path.cwd()


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "shop.yaml"
    path.write_text(GOOD)
    app = loader.load(str(path))
    assert app.services["web"].versions["v1"].instances == 1
    assert loader.folder(str(path)) == tmp_path


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "port: 8080",
            "port: 80800",
            "5:11: 'services.web.port' is 80800: it should be less than or equal to",
        ),
        ("port: 8080", "prot: 8080", "5:5: unknown key 'prot'; did you mean 'port'? allowed: port, protocol"),
        ("command:", "comand:", "unknown key 'comand'; did you mean 'command'? allowed: program, command"),
        (
            "name: shop",
            "name: shop\nfornt: web",
            "2:1: unknown key 'fornt'; did you mean 'front'? allowed: name",
        ),
        ("    port: 8080\n", "", "'services.web.port' is missing"),
        ("front: web", "front: wbe", "2:8: front: no service 'wbe'; there are: web"),
        ("port: 8080", "port: 8080\n    calls: [nix]", "6:13: web: calls unknown service 'nix'"),
        ("port: 8080", "port: 8080\n    routes: [{name: other, path: /}]", "6:21: web: a route may not be"),
        (
            "port: 8080",
            "port: 8080\n    routes: [{name: x, paht: /}]",
            "unknown key 'paht'; did you mean 'path'?",
        ),
        ("port: 8080", "port: 8080\n    healthz: [x]", "6:14: 'services.web.healthz': it should be a valid"),
        ("{command: [python, -m, http.server]}", "{program: nix}", "no program 'nix' comes with meshdemo"),
        ("web:\n", "Web:\n", "4:3: 'services.Web' is 'Web': use up to 40 of a-z, 0-9 and '-'"),
        ("{command: [python, -m, http.server]}", "{}", "a workload needs a program, a command or an image"),
        ("http.server]}", "http.server], env: {N: 5}}", 'must be text: write "5" in quotes'),
        ("name: shop", "name: [shop", "not YAML"),
        ("name: shop", "name: shop\nname: other", "2:1: 'name' stands here twice"),
    ],
)
def test_problems_are_told_with_their_place(tmp_path: Path, old: str, new: str, expected: str) -> None:
    path = tmp_path / "shop.yaml"
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(BadInput) as caught:
        loader.load(str(path))
    assert expected in caught.value.message
    assert str(path) in caught.value.message


def test_all_problems_at_once(tmp_path: Path) -> None:
    path = tmp_path / "shop.yaml"
    path.write_text(GOOD.replace("8080", "0").replace("name: shop", "name: SHOP"))
    with pytest.raises(BadInput) as caught:
        loader.load(str(path))
    assert len(caught.value.message.splitlines()) == 2


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"", b"- a\n- b\n", b"5"])
def test_files_that_are_no_app(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(content)
    with pytest.raises(BadInput):
        loader.load(str(path))


def test_no_such_app(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="neither a built-in one nor a file"):
        loader.load(str(tmp_path / "nowhere.yaml"))
    with pytest.raises(BadInput, match="cannot read"):
        loader.load(str(tmp_path))


@pytest.mark.parametrize(
    ("routes", "words"),
    [
        ([{"name": "other", "path": "/x"}], "may not be named 'other'"),
        ([{"name": "x", "path": "/x"}, {"name": "x", "prefix": "/y"}], "two routes are named 'x'"),
    ],
)
def test_routes_have_names_of_their_own(routes: list[dict[str, str]], words: str) -> None:
    service = {"port": 1, "routes": routes, "versions": {"v1": {"command": ["x"]}}}
    with pytest.raises(ValueError, match=words):
        App.model_validate({"name": "a", "front": "b", "services": {"b": service}})


def test_nothing_can_be_changed_at_an_open_path() -> None:
    service = {"port": 1, "open_paths": {"/x": ["PUT"]}, "versions": {"v1": {"command": ["x"]}}}
    with pytest.raises(ValueError, match="GET"):
        App.model_validate({"name": "a", "front": "b", "services": {"b": service}})


def test_the_app_of_the_readme_is_sound(tmp_path: Path) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
    block = readme.partition("## An app of your own")[2].partition("```yaml\n")[2].partition("```")[0]
    path = tmp_path / "shop.yaml"
    path.write_text(block)
    app = loader.load(str(path))
    assert app.name == "shop"
    assert app.services["store"].versions["v1"].instances == 2
