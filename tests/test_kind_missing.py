"""What `up --runtime kind` says where something that it needs is not there; no cluster is made for that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from local_harness import Cli

UP = ("up", "--runtime", "kind", "--timeout", "20")


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    return Cli(tmp_path / "home", "k3missing")


def tools(folder: Path, **says: str) -> str:
    """A PATH with these programs alone, each of which runs a line of shell."""
    folder.mkdir()
    for name, line in says.items():
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
    return str(folder)


def one_line(said: str) -> str:
    """One line, and below it what to do about it."""
    line, remedy = said.strip().splitlines()
    return f"{line} ({remedy.strip()})"


def test_without_kind_or_docker_it_says_what_to_install(cli: Cli, tmp_path: Path) -> None:
    said = one_line(cli.run(*UP, status=3, PATH="/nowhere"))
    assert "no `kind` on the PATH" in said
    assert "--runtime local" in said
    only_kind = tools(tmp_path / "bin", kind="echo 0.33.0")
    assert "no `docker` on the PATH" in one_line(cli.run(*UP, status=3, PATH=only_kind))
    assert not (cli.home / cli.name).exists()


def test_a_kind_that_is_too_old_is_named_with_the_version_that_is_needed(cli: Cli, tmp_path: Path) -> None:
    old = tools(
        tmp_path / "bin", docker="echo 28.0.0",
        kind='[ "$2" = --quiet ] && echo 0.20.0 || echo "kind v0.20.0 go1.20.4 linux/amd64"',
    )  # fmt: skip
    said = one_line(cli.run(*UP, status=3, PATH=old))
    assert "kind 0.20.0 is too old" in said
    assert "install kind 0.23 or newer" in said
    report = json.loads(cli.start("check", "--runtime", "kind", "-o", "json", PATH=old).communicate()[0])
    found = next(check for check in report["checks"] if check["name"] == "kind")
    assert (report["ok"], found["ok"], found["remedy"]) == (False, False, "install kind 0.23 or newer")


def test_without_a_docker_daemon_it_says_so(cli: Cli, tmp_path: Path) -> None:
    away = "echo 'ERROR: Cannot connect to the Docker daemon at unix:///x. Is it running?' >&2; exit 1"
    path = tools(tmp_path / "bin", docker=away, kind=f'[ "$1" = version ] && echo 0.33.0 && exit; {away}')
    said = one_line(cli.run(*UP, status=3, PATH=path, DOCKER_HOST="unix:///nonexistent"))
    assert "no Docker daemon answers" in said
    assert "start Docker" in said
    assert not (cli.home / cli.name).exists()
