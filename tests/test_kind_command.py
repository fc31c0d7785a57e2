"""How the `kind` command is run: a line of shell stands in for it, since what it tests is rare on a real one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from local_harness import wait_for

from meshdemo.errors import Failed
from meshdemo.runtime.base import Step
from meshdemo.runtime.kubernetes.kind import CLEAR_S, Kind
from meshdemo.runtime.steps import run_steps

# The daemon, in a session of its own, makes the container only after the first `kind delete cluster`.
_SLOW_DOCKER = """
case "$1 $2" in
  "version --quiet") echo 0.33.0;;
  "create cluster") touch asked; setsid sh -c 'while [ -e asked ]; do sleep 0.1; done; touch node made' & sleep 60;;
  "get nodes") [ ! -e node ] || echo node;;
  "delete cluster") rm -f node asked;;
esac
"""


@pytest.fixture
def kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the stand-ins run in; write what `kind` is to do."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    stand_in(tmp_path, "docker", "exit 0")
    return tmp_path


def stand_in(folder: Path, name: str, shell: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{shell}\n")
    (folder / name).chmod(0o755)


def test_a_container_that_comes_up_after_its_cluster_was_given_up_is_removed(kind: Path) -> None:
    stand_in(kind, "kind", _SLOW_DOCKER)

    def make() -> None:
        Kind().create("c", kind / "kubeconfig", "", None, 60, lambda _: None)

    def give_up() -> None:
        wait_for("kind to be at work", (kind / "asked").exists)
        raise Failed("no")

    with pytest.raises(Failed, match="no"):
        run_steps([Step("makes", make, settle_s=CLEAR_S), Step("fails", give_up)])
    assert (kind / "made").exists()  # later than the first `kind delete cluster`
    assert not (kind / "node").exists()
