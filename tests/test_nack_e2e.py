"""What Envoy will not take: the user is told which sidecar rejects the change, in Envoy's words, and nothing
has changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from local_harness import Cli, wait_for

import meshdemo
from meshdemo.resources import ROOT


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A copy of meshdemo, in whose templates a fault answers with a status that HTTP does not have."""
    copy = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(meshdemo.__file__).parent, copy / "meshdemo", ignore=ignored)
    for name in ("templates", "policy.yaml"):
        source, target = ROOT / name, copy / name
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copy(source, target)
    template = copy / "templates" / "envoy" / "routes_inbound.yaml.j2"
    text = template.read_text()
    assert "http_status: 500" in text
    template.write_text(text.replace("http_status: 500", "http_status: 50"))
    return copy


def test_a_change_that_a_sidecar_rejects(broken: Path, tmp_path: Path) -> None:
    cli = Cli(tmp_path / "home")
    cli.env["PYTHONPATH"] = str(broken)
    with cli.up("--replicas", "service-b=1", "--rps", "20"):
        before = cli.json("status")["revision"]
        said = cli.run("fault", "--at", "mesh", "--err", "0.5", status=1)
        assert "the sidecar of service-b-v1-1 rejected its routes" in said
        assert "HttpStatus" in said, "Envoy's own words"
        assert cli.json("fault", "list") == []
        assert cli.json("status")["revision"] == before
        ok = cli.counts()["200"]
        wait_for("requests that succeed", lambda: cli.counts()["200"] > ok + 5)
        cli.run("fault", "--at", "mesh", "--lat", "1")  # what it takes, it still takes
