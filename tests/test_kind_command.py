"""How the `kind` command is run: a line of shell stands in for it, since what it tests is rare on a real one."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from local_harness import wait_for

from meshdemo.errors import BadInput, Failed
from meshdemo.runtime.base import Step
from meshdemo.runtime.kubernetes import images, kind_cluster, record
from meshdemo.runtime.kubernetes.delivery import Loading
from meshdemo.runtime.kubernetes.kind import CLEAR_S, Kind
from meshdemo.runtime.local.ports import Port
from meshdemo.runtime.steps import run_steps

# The daemon, in a session of its own, makes the container only after the first `kind delete cluster`.
_SLOW_DOCKER = """
case "$1 $2" in
  "version --quiet") echo 0.33.0;;
  "create cluster") setsid sh -c 'touch asked; while [ -e asked ]; do sleep 0.1; done; touch node made' & sleep 60;;
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


# -- the gateway's port ------------------------------------------------------------------------------------

# What Docker says of the first port of those in the file `taken` that the cluster is to have.
_DOCKER_SAYS = """
case "$1 $2" in
  "version --quiet") echo 0.33.0;;
  "create cluster") cat > config
    echo x >> attempts
    for port in $(cat taken); do
      if grep -q "hostPort: $port," config; then
        echo "docker: Error response from daemon: driver failed programming external connectivity on endpoint" \\
          "c-control-plane (7f2a): Bind for 127.0.0.1:$port failed: port is already allocated."
        exit 1
      fi
    done
    if [ -p holding ] && mkdir first 2>/dev/null; then cat holding; fi;;
esac
"""


class Ups:
    """Makers of clusters, and with which port for the gateway."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, taken: str) -> None:
        monkeypatch.setenv("MESHDEMO_HOME", str(folder / "home"))
        stand_in(folder, "kind", _DOCKER_SAYS)
        (folder / "taken").write_text(taken)

    def make(self, mesh: str, gateway: int | None = None) -> int:
        kind_cluster.make(
            Kind(), mesh, gateway=gateway, workers=0, image=None, remember=record.save,
            timeout_s=lambda: 60, tell=lambda _: None,
        )  # fmt: skip
        return self.port(mesh)

    @staticmethod
    def port(mesh: str) -> int:
        found = record.load(mesh)
        return found.ports["gateway"] if found else 0


def test_a_port_that_was_taken_meanwhile_is_left_for_another(
    kind: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = Port()  # held, so that nobody else is given it
    monkeypatch.setattr("meshdemo.runtime.local.ports.GATEWAY_PORT", port.number)
    ups = Ups(kind, monkeypatch, str(port.number))
    assert ups.make("m") not in {0, port.number}
    (kind / "attempts").unlink()
    with pytest.raises(BadInput, match=f"--gateway-port {port.number}: the port is taken") as caught:
        ups.make("n", port.number)
    assert "without --gateway-port a free one is found" in caught.value.remedy
    assert (kind / "attempts").read_text() == "x\n"
    assert record.load("n") is None
    port.release()


def test_two_begun_at_the_same_moment_choose_different_ports(
    kind: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = Port()  # held, so that nobody else is given it
    monkeypatch.setattr("meshdemo.runtime.local.ports.GATEWAY_PORT", port.number)
    ups = Ups(kind, monkeypatch, "")
    os.mkfifo(kind / "holding")
    first = threading.Thread(target=ups.make, args=("m",))
    first.start()
    wait_for("the first to be at work", (kind / "first").exists)
    try:
        assert ups.port("m") == port.number
        assert ups.make("n") not in {0, port.number}
        with pytest.raises(BadInput, match="the port is taken"):
            ups.make("o", port.number)
    finally:
        (kind / "holding").write_text("")
        first.join()
    assert ups.port("m") == port.number
    port.release()


# -- the pods' network -------------------------------------------------------------------------------------


def test_the_network_is_given_in_one_piece(kind: Path) -> None:
    stand_in(kind, "docker", _NODE)
    stand_in(kind, "kind", _KIND_LOADS)
    assert Kind().give_network("node", ["10.244.0.0/24", "fd00:10:244::/64"], "10.96.0.1")
    ptp = json.loads((kind / "config-given").read_text())["plugins"][0]
    assert ptp["mtu"] == 1450
    assert ptp["ipam"]["ranges"] == [[{"subnet": "10.244.0.0/24"}], [{"subnet": "fd00:10:244::/64"}]]
    assert ptp["ipam"]["routes"] == [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]


def test_a_network_that_is_not_ours_to_give_is_left_to_kind(kind: Path) -> None:
    stand_in(kind, "docker", _NODE)
    stand_in(kind, "kind", _KIND_LOADS)
    (kind / "old").touch()
    assert not Kind().give_network("node", ["10.244.0.0/24"], "10.96.0.1")
    assert not (kind / "config-given").exists()


# -- loading images ----------------------------------------------------------------------------------------

# A node whose containerd has this configuration in the file `config`, and whose client takes what it is given,
# or does not know how where there is a file `old`; its network then is another one, too. What images it has is in
# a file of its own, and it does not answer before there is one. kind writes down what it was asked for.
_NODE = """
case "$*" in
  *"crictl images --output json") cat "images-of-$2";;
  *"cat /sys/class/net/eth0/mtu") echo 1450;;
  *"grep -q kindnetd"*) [ ! -e old ] || exit 1; for last; do :; done; printf %s "$last" > config-given;;
  *"containerd config dump") cat config;;
  *"images import --local --snapshotter"*) [ ! -e old ] || { echo "flag provided but not defined" >&2; exit 1; }
    echo "$*" >> imported; cat > given;;
esac
"""
_KIND_LOADS = """
case "$1 $2" in
  "version --quiet") echo 0.33.0;;
  "get nodes") cat nodes;;
  "load image-archive") echo "$*" >> loaded;;
esac
"""
_CONFIGS = {
    "containerd 2": "[plugins.'io.containerd.cri.v1.images']\nsnapshotter = 'native'\n",
    "containerd 1.7": '[plugins."io.containerd.grpc.v1.cri".containerd]\nsnapshotter = "native"\n',
}


@pytest.mark.parametrize("config", _CONFIGS.values(), ids=_CONFIGS)
def test_images_are_loaded_as_the_node_keeps_them(kind: Path, config: str) -> None:
    stand_in(kind, "docker", _NODE)
    stand_in(kind, "kind", _KIND_LOADS)
    (kind / "config").write_text(config)
    (kind / "images.tar").write_text("images")
    Kind().load("c", kind / "images.tar", ["one", "two"])
    imported = (kind / "imported").read_text().splitlines()
    assert sorted(line.split()[2] for line in imported) == ["one", "two"]
    assert all(line.endswith("--local --snapshotter native -") for line in imported)
    assert (kind / "given").read_text() == "images"
    assert not (kind / "loaded").exists()


@pytest.mark.parametrize("config", [*_CONFIGS.values(), "", "not toml"])
def test_what_a_node_cannot_take_in_is_left_to_kind(kind: Path, config: str) -> None:
    stand_in(kind, "docker", _NODE)
    stand_in(kind, "kind", _KIND_LOADS)
    (kind / "old").touch()
    (kind / "config").write_text(config)
    (kind / "images.tar").write_text("images")
    Kind().load("c", kind / "images.tar", ["one", "two"])
    said = (kind / "loaded").read_text()
    assert said == f"load image-archive {kind / 'images.tar'} --name c --nodes one,two\n"


class Engine(images.Builder):
    """A Docker Engine, of which an archive is all that is wanted."""

    def __init__(self) -> None:
        pass

    def save(self, references: Sequence[str], archive: Path) -> None:
        archive.write_text(" ".join(references))


@pytest.fixture
def loading(kind: Path) -> Iterator[Loading]:
    """The loading of an image into a cluster with two nodes, of which one is there."""
    stand_in(kind, "docker", _NODE)
    stand_in(kind, "kind", _KIND_LOADS)
    (kind / "config").write_text(_CONFIGS["containerd 2"])
    (kind / "nodes").write_text("one")
    loading = Loading(Kind(), Engine(), "c", ["image:1"])
    loading.save(lambda _: None)
    yield loading
    loading.remove()


def holds(folder: Path, node: str, *images: str) -> None:
    """From now on a node says that it has these images."""
    (folder / "said").write_text(json.dumps({"images": [{"repoTags": [one]} for one in images]}))
    (folder / "said").rename(folder / f"images-of-{node}")  # all of it at once


def test_nodes_are_given_images_while_they_boot(kind: Path, loading: Loading) -> None:
    said: list[str] = []
    made = threading.Event()
    give = threading.Thread(target=loading.offer, args=(2, made, said.append))
    give.start()
    wait_for("it to look for the nodes", lambda: said == ["waiting for the nodes"])
    holds(kind, "one")
    (kind / "nodes").write_text("one two")
    assert not (kind / "imported").exists()  # the other one does not answer yet
    holds(kind, "two")
    give.join()
    assert len((kind / "imported").read_text().splitlines()) == 2
    assert (kind / "given").read_text() == "image:1"
    for node in ("one", "two"):
        holds(kind, node, "docker.io/library/image:1")
    loading.load(said.append)
    assert said == ["waiting for the nodes", "loading"]  # and not once more


def test_a_node_that_takes_none_while_it_boots_gets_them_when_its_cluster_is_made(
    kind: Path, loading: Loading
) -> None:
    made = threading.Event()
    give = threading.Thread(target=loading.offer, args=(2, made, lambda _: None))
    give.start()
    made.set()
    give.join()
    assert not (kind / "imported").exists()
    holds(kind, "one")
    loading.load(lambda _: None)
    assert (kind / "given").read_text() == "image:1"
