"""kind: a Kubernetes cluster in Docker containers, made and removed with the `kind` command.

kind has no library for Python, so its command is run; what the images and nodes hold is asked of the nodes.
The user's own kubeconfig is never touched: a cluster's access is written to a file of the mesh's.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import shutil
import signal
import subprocess
import time
import tomllib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import BinaryIO

from meshdemo.errors import Failed, Missing
from meshdemo.runtime.steps import pause

OLDEST = (0, 23)  # its nodes run Kubernetes 1.30, the first with all that the manifests ask for
CLEAR_S = 30.0  # how long removing what a killed kind began may take
_QUIET_S = 3.0  # without a new container for so long, Docker is not at work on any

# Where kind's own network is to come, and has not. The file appears whole, and never in place of another.
_GIVE_NETWORK = """
grep -q kindnetd /kind/manifests/default-cni.yaml
for plugin in ptp host-local portmap; do test -x /opt/cni/bin/$plugin; done
timeout 20 sh -c "until curl -ksf --max-time 1 'https://$1/livez'; do sleep 0.1; done"
cd /etc/cni/net.d
printf %s "$2" > .meshdemo
mv -n .meshdemo 10-kindnet.conflist
rm -f .meshdemo
"""

Tell = Callable[[str], None]


class PortTaken(Failed):
    """The cluster could not be made, since a port of this machine that it was to have is somebody else's.

    Args:
        ports: the numbers in what Docker said of it, that port among them.
    """

    def __init__(self, message: str, remedy: str, ports: frozenset[int]) -> None:
        super().__init__(message, remedy)
        self.ports = ports


class Kind:
    """The kind command on this machine."""

    def __init__(self) -> None:
        """Find it; raises Missing where kind or Docker is not there, or kind is too old."""
        self._kind = _found("kind", "https://kind.sigs.k8s.io/docs/user/quick-start/#installation")
        self._docker = _found("docker", "https://docs.docker.com/get-docker/")
        self.version = _run([self._kind, "version", "--quiet"]).strip().removeprefix("v")
        if remedy := outdated(self.version):
            raise Missing(f"kind {self.version} is too old", f"{remedy}; found {self._kind}")

    def clusters(self) -> list[str]:
        """The names of all kind clusters here."""
        return [line for line in _run([self._kind, "get", "clusters", "--quiet"]).split() if line]

    def nodes(self, cluster: str) -> list[str]:
        """The containers that are a cluster's nodes."""
        return _run([self._kind, "get", "nodes", "--quiet", "--name", cluster]).split()

    def create(
        self, cluster: str, kubeconfig: Path, config: str, image: str | None, timeout_s: float, tell: Tell
    ) -> None:
        """Make a cluster; what was begun is removed if that fails or is given up.

        Raises Failed with kind's own words; PortTaken where that is what they say.
        """
        command = [self._kind, "create", "cluster", "--name", cluster, "--kubeconfig", str(kubeconfig)]
        command += ["--config", "-"] + (["--image", image] if image else [])
        log = kubeconfig.with_name("kind.log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True
            )
        if process.stdin is not None:
            process.stdin.write(config.encode())
            process.stdin.close()
        give_up = time.monotonic() + timeout_s
        try:
            while process.poll() is None:
                if time.monotonic() > give_up:
                    raise Failed(
                        f"kind did not make the cluster within {timeout_s:.0f} s: {_last(log)}",
                        "a higher --timeout gives it longer",
                    )
                tell(_last(log))
                pause(0.1)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            tell("removing what there is of it")
            self._clear(cluster, kubeconfig)
            raise
        if process.returncode:
            said = [line for line in _lines(log) if not re.match(r"\s*[✓•✗]", line)]
            message = "kind could not make the cluster:" + "".join(f"\n  | {line}" for line in said[-8:])
            remedy = (
                "`kind create cluster --retain` keeps the nodes for a look; --kind-image takes another image"
            )
            if ports := ports_taken(said):
                raise PortTaken(message, remedy, ports)
            raise Failed(message, remedy)

    def _clear(self, cluster: str, kubeconfig: Path) -> None:
        """Remove what a kind that was killed has begun.

        Docker makes a container that it was asked for even when whoever asked is gone, so one may come up
        after its cluster was deleted: it is looked for until none has come for a while.
        """
        give_up = time.monotonic() + CLEAR_S
        self.delete(cluster, kubeconfig)
        quiet_since = time.monotonic()
        while time.monotonic() < min(quiet_since + _QUIET_S, give_up):
            time.sleep(0.2)  # not `pause`: this is the giving up
            if self.nodes(cluster):
                self.delete(cluster, kubeconfig)
                quiet_since = time.monotonic()

    def export(self, cluster: str, kubeconfig: Path) -> None:
        """Write the access to a cluster to a file of ours."""
        _run([self._kind, "export", "kubeconfig", "--name", cluster, "--kubeconfig", str(kubeconfig)])

    def delete(self, cluster: str, kubeconfig: Path) -> None:
        """Remove a cluster, or what there is of it."""
        _run([self._kind, "delete", "cluster", "--name", cluster, "--kubeconfig", str(kubeconfig)])

    def missing(self, node: str, images: Iterable[str]) -> list[str]:
        """Which of these images a node lacks. Raises Failed while it cannot say (it is booting)."""
        said = _run([self._docker, "exec", node, "crictl", "images", "--output", "json"])
        there = {_bare(tag) for image in json.loads(said)["images"] for tag in image["repoTags"]}
        return [image for image in images if _bare(image) not in there]

    def give_network(self, node: str, ranges: Sequence[str], service: str) -> bool:
        """Give the pods of a node their network, of these address ranges; False where that is not for us.

        Not before the API server is reached at the address of its `service`, which is kube-proxy's work: a
        pod that finds no one there (the cluster's DNS is the first to look) waits for half a minute.

        It is what kind's own kindnetd does for its node, ten seconds later: its first look, at a cache that
        has yet to be filled, finds no node at all, and its second one comes after ten seconds
        (images/kindnetd of kind). It then writes the same once more. The routes to other nodes are left to
        it; so this is of use to a node that is the only one.
        """
        at_node = [self._docker, "exec", node]
        try:
            config = cni_config(ranges, mtu=int(_run([*at_node, "cat", "/sys/class/net/eth0/mtu"])))
            _run([*at_node, "sh", "-ec", _GIVE_NETWORK, "sh", service, config])
        except (Failed, ValueError):
            return False
        return True

    def load(self, cluster: str, archive: Path, nodes: Sequence[str]) -> None:
        """Load the images of an archive into nodes; those of this machine's platform, if there are more.

        `kind load` has containerd's transfer service take them in. Its client does the same in half the
        processor time. Nodes that cannot do so are left to kind.
        """
        if left := self.offer(archive, nodes):
            self.load_by_kind(cluster, archive, left)

    def offer(self, archive: Path, nodes: Sequence[str]) -> list[str]:
        """Load the images of an archive into nodes that can take them in; those that cannot."""
        with ThreadPoolExecutor(max(1, len(nodes))) as threads:
            loaded = list(threads.map(partial(self._import, archive), nodes))
        return [node for node, done in zip(nodes, loaded, strict=True) if not done]

    def _import(self, archive: Path, node: str) -> bool:
        at_node = [self._docker, "exec", "--interactive", node]
        try:
            snapshotter = snapshotter_of(_run([*at_node, "containerd", "config", "dump"]))
            command = [*at_node, "ctr", "--namespace", "k8s.io", "images", "import", "--local"]
            with archive.open("rb") as images:
                _run([*command, "--snapshotter", snapshotter, "-"], given=images)
        except (Failed, ValueError):
            return False
        return True

    def load_by_kind(self, cluster: str, archive: Path, nodes: Sequence[str]) -> None:
        """Load the images of an archive into nodes with kind's own command."""
        _run(
            [self._kind, "load", "image-archive", str(archive), "--name", cluster, "--nodes", ",".join(nodes)]
        )


def outdated(version: str) -> str:
    """What to do about a version of kind (`0.20.0`) that is too old; empty if it is not."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None or (int(match[1]), int(match[2])) >= OLDEST:
        return ""
    return f"install kind {'.'.join(map(str, OLDEST))} or newer"


def cni_config(ranges: Iterable[str], mtu: int) -> str:
    """How pods are connected, as kindnetd writes it (`cniConfigTemplate` in cmd/kindnetd/cni.go of kind).

    Args:
        ranges: of addresses, for the pods of one node.
        mtu: of the node's own interface (bytes).
    """
    networks = [ipaddress.ip_network(one) for one in ranges]
    addresses = {
        "type": "host-local",
        "dataDir": "/run/cni-ipam-state",
        "routes": [{"dst": "0.0.0.0/0" if one.version == 4 else "::/0"} for one in networks],
        "ranges": [[{"subnet": str(one)}] for one in networks],
    }
    plugins = [
        {"type": "ptp", "ipMasq": False, "ipam": addresses, "mtu": mtu},
        {"type": "portmap", "capabilities": {"portMappings": True}},
    ]
    return json.dumps({"cniVersion": "0.3.1", "name": "kindnet", "plugins": plugins})


def snapshotter_of(config: str) -> str:
    """How the containerd of this configuration keeps the file systems of images for Kubernetes.

    Raises ValueError if it does not say.
    """
    plugins = tomllib.loads(config).get("plugins", {})
    old = plugins.get("io.containerd.grpc.v1.cri", {}).get("containerd", {})  # up to containerd 1.7
    found = plugins.get("io.containerd.cri.v1.images", old).get("snapshotter")
    if not isinstance(found, str):
        raise ValueError("no snapshotter")
    return found


def ports_taken(said: Iterable[str]) -> frozenset[int]:
    """The numbers that may be ports in the lines in which Docker says that it cannot bind one."""
    about = [line for line in said if re.search(r"port is already allocated|address already in use", line)]
    return frozenset(int(number) for line in about for number in re.findall(r":(\d+)\b", line))


def _bare(reference: str) -> str:
    """A reference as Docker users write it; container runtimes add the default registry."""
    return reference.removeprefix("docker.io/").removeprefix("library/")


def _found(command: str, where: str) -> str:
    path = shutil.which(command)
    if path is None:
        raise Missing(
            f"no `{command}` on the PATH",
            f"install it ({where}); `meshdemo up --runtime local` needs neither kind nor Docker",
        )
    return path


def _run(command: Sequence[str], given: BinaryIO | None = None) -> str:
    """The output of a command; raises Failed with what it said if it fails. `given`: what it reads."""
    stdin = subprocess.DEVNULL if given is None else given
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=stdin)
    if done.returncode:
        said = " ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-3:])
        name = Path(command[0]).name
        if "permission denied" in said.lower() and "docker" in said.lower():
            raise Missing(
                f"you may not use Docker: {said}", "add yourself to the group `docker`, or use sudo"
            )
        if "Cannot connect to the Docker daemon" in said:
            raise Missing("no Docker daemon answers", "start Docker (or set DOCKER_HOST)")
        raise Failed(f"`{name} {' '.join(command[1:3])}` failed: {said}")
    return done.stdout


def _lines(log: Path) -> list[str]:
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", log.read_text(errors="replace"))
    return [line.rstrip() for line in text.replace("\r", "\n").splitlines() if line.strip()]


def _last(log: Path) -> str:
    lines = _lines(log)
    return lines[-1].strip(" ✓•✗.…") if lines else "starting"
