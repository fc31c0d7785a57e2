"""A kind cluster for tests, driven through the command line, and a look into it past meshdemo."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest
from local_harness import Cli

from meshdemo.errors import MeshdemoError, Missing
from meshdemo.kube import Cluster, Manifest
from meshdemo.runtime.kubernetes import images, kind
from meshdemo.runtime.kubernetes.forward import Forward, run
from meshdemo.runtime.kubernetes.runtime import KubernetesRuntime

T = TypeVar("T")
NODE_IMAGE = os.environ.get("MESHDEMO_KIND_IMAGE", "")
BASE_IMAGE = os.environ.get("MESHDEMO_BASE_IMAGE", "")
DEADLINE_S = 240.0


def require() -> None:
    """Skip, loudly, where no kind cluster can be made; fail where CI demands one."""
    try:
        kind.Kind()
        builder = images.Builder()
        for name, image in (("MESHDEMO_KIND_IMAGE", NODE_IMAGE), ("MESHDEMO_BASE_IMAGE", BASE_IMAGE)):
            if not image:
                raise Missing(f"{name} is not set")
            if not builder.has(image):
                raise Missing(f"{name}: Docker has no image {image}")
    except MeshdemoError as error:
        if os.environ.get("MESHDEMO_REQUIRE_KIND"):
            raise
        pytest.skip(f"THE STORY ON KIND WAS NOT TESTED: {error}")


def until(condition: Callable[[], T], what: str, deadline_s: float = DEADLINE_S) -> T:
    """What the condition gives once it is true; fails the test if it never is."""
    end = time.monotonic() + deadline_s
    problem: object = None
    while time.monotonic() < end:
        try:
            if found := condition():
                return found
            problem = found
        except (MeshdemoError, OSError, AssertionError) as error:
            problem = error
        time.sleep(0.2)
    raise AssertionError(f"not so after {deadline_s:g} s: {what} (last: {problem!r})")


class Mesh(Cli):
    """A mesh in a cluster: the command line, and what a test looks at past it."""

    deadline_s = DEADLINE_S

    def __init__(self, home: Path, name: str, user_config: Path) -> None:
        super().__init__(home, name)
        self.env["KUBECONFIG"] = str(user_config)
        self.env.pop("CI", None)

    @property
    def runtime(self) -> KubernetesRuntime:
        os.environ["MESHDEMO_HOME"] = str(self.home)
        os.environ["KUBECONFIG"] = self.env["KUBECONFIG"]
        return KubernetesRuntime(self.name, "kind")

    @property
    def cluster(self) -> Cluster:
        return self.runtime.cluster

    @property
    def kubeconfig(self) -> Path:
        return self.home / self.name / "kubeconfig"

    @property
    def nodes(self) -> list[str]:
        """The containers that are the cluster's nodes."""
        return kind.Kind().nodes(self.name)

    def ids(self, service: str = "service-b") -> list[str]:
        """The instances of a service."""
        status = self.json("status")
        versions = next(one["versions"] for one in status["services"] if one["name"] == service)
        return [one["id"] for version in versions for one in version["instances"]]

    def pod(self, name: str) -> Manifest:
        found = self.cluster.get("Pod", name, self.name)
        assert found is not None
        return found

    def python(self, pod: str, code: str, container: str = "app") -> str:
        """What a line of Python prints in a pod."""
        return run(self.cluster, self.name, pod, container, ["python3", "-c", code])

    def counts(self, instance: str = "") -> Counter[str]:
        """How many requests service-a has seen end, by code."""
        runtime = self.runtime
        caller = instance or next(one.id for one in runtime.instances() if one.service == "service-a")
        tunnel = Forward(runtime.cluster, self.name, lambda: caller, 15020)
        try:
            with urllib.request.urlopen(f"{tunnel.url}/metrics", timeout=20) as response:  # noqa: S310 - our own tunnel
                text = response.read().decode()
        finally:
            tunnel.close()
        found = re.findall(r'^service_a_requests_total\{code="([^"]+)"\} (\S+)', text, re.MULTILINE)
        return Counter({code: int(float(value)) for code, value in found})

    @contextmanager
    def no_request_lost(self, what: str) -> Iterator[None]:
        """Every request that service-a sent during the block, and for 3 s after it, came back with 200."""
        before = self.counts()
        yield
        time.sleep(3)
        counted = self.counts() - before
        lost = {code: n for code, n in counted.items() if code != "200"}
        say(f"{what}: {sum(lost.values())} of {sum(counted.values())} requests failed")
        assert not lost, f"{what}: {lost} of {counted.total()}"


def say(text: str) -> None:
    """Tell whoever runs the tests with -s what was seen."""
    print(f"\n    {text}", flush=True)


@contextmanager
def on_kind(folder: Path, *options: str) -> Iterator[Mesh]:
    """A mesh on a kind cluster of its own, which is gone afterwards. The user's kubeconfig stays as it is."""
    user_config = folder / "user-kubeconfig"
    content = "apiVersion: v1\nkind: Config\ncurrent-context: precious\n"
    user_config.write_text(content)
    mesh = Mesh(folder / "home", f"kindtest-{secrets.token_hex(3)}", user_config)
    try:
        mesh.run("up", "--runtime", "kind", "--timeout", str(DEADLINE_S), *options)
        yield mesh
    finally:
        mesh.run("down")
        assert user_config.read_text() == content
        assert mesh.name not in kind.Kind().clusters()
        assert not (mesh.home / mesh.name).exists()


@contextmanager
def api_server_away(mesh: Mesh, seconds: float) -> Iterator[None]:
    """The API server refuses connections for so long, from when the block begins."""
    rule = ["INPUT", "-p", "tcp", "--dport", "6443", "-j", "REJECT", "--reject-with", "tcp-reset"]
    node = ["exec", f"{mesh.name}-control-plane", "iptables"]
    with _for_a_while([*node, "-I", *rule], [*node, "-D", *rule], seconds):
        yield


@contextmanager
def nodes_frozen(mesh: Mesh, seconds: float) -> Iterator[None]:
    """The cluster's nodes stand still for so long: connections are taken, and nothing comes back."""
    with _for_a_while(["pause", *mesh.nodes], ["unpause", *mesh.nodes], seconds):
        yield


@contextmanager
def _for_a_while(begin: list[str], end: list[str], seconds: float) -> Iterator[None]:
    docker(*begin)
    over = threading.Timer(seconds, lambda: docker(*end))
    over.start()
    try:
        yield
    finally:
        over.join()


def docker(*words: str) -> str:
    """What a docker command prints."""
    command = [str(shutil.which("docker")), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
