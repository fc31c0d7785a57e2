"""How long `up` takes on kind, next to kind alone, and next to the same steps by hand.

By hand means: each image is built, the cluster is made and waited for, the images are loaded, one after
another; then everything is applied and waited for, and a request is sent. `up` does at the same time what
does not need each other. What is compared has its images built already (warm); how long `up` takes where they
are not, from a base image of which the engine has no layers, is a figure of its own (cold).
"""

from __future__ import annotations

import os
import secrets
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from meshdemo.apps import loader
from meshdemo.bench import machine
from meshdemo.bench.model import Bar, Figure, LeftOut
from meshdemo.bench.stage import Tell, uninterrupted
from meshdemo.errors import Failed, MeshdemoError
from meshdemo.runtime.base import UpOptions
from meshdemo.runtime.kubernetes import images, record
from meshdemo.runtime.kubernetes.kind import Kind
from meshdemo.runtime.kubernetes.runtime import KubernetesRuntime
from meshdemo.runtime.steps import run_steps

KIND, HAND, ALONE = "kind", "by hand", "kind create cluster --wait"
_MOST_S = 900.0
# At each file that it makes, ext4 passes over the inodes that were freed less than a minute ago, one by one
# (recently_deleted in fs/ext4/ialloc.c of Linux): to take in images right after a cluster was removed may
# take twice as long.
_FORGOTTEN_S = 65.0
_NAME = "{{.Repository}}:{{.Tag}}"


def missing() -> LeftOut | None:
    """Why there is no kind to measure; None if there is."""
    for name in ("docker", "kind"):
        if machine.tool(name) is None:
            return LeftOut(KIND, machine.missing(name))
    try:
        images.Builder()
    except MeshdemoError as error:
        return LeftOut(KIND, error.message)
    return None


def measure(rounds: int, tell: Tell) -> list[Figure]:
    """All of them in turn. Raises MeshdemoError."""
    cold, warm, hand, alone = list[float](), list[float](), list[float](), list[float]()
    steps: dict[str, list[float]] = {}
    for number in range(rounds):
        with options() as these:
            tell(f"kind, round {number + 1}: up, with no image built")
            cold.append(_timed(_up, these)[0])
            tell(f"kind, round {number + 1}: up")
            seconds, taken = _timed(_up, these, rested=True)
            warm.append(seconds)
            for title, step_s in taken.items():
                steps.setdefault(title, []).append(step_s)
            tell(f"kind, round {number + 1}: by hand")
            hand.append(_timed(_by_hand, these, rested=True)[0])
            tell(f"kind, round {number + 1}: {ALONE}")
            alone.append(_timed(_alone, these, rested=True)[0])
    longer = [ours - bare for ours, bare in zip(warm, alone, strict=True)]
    return [
        Figure(
            "up.kind", "`meshdemo up --runtime kind`, images built already", "s", "lower",
            {KIND: warm, HAND: hand, ALONE: alone}, KIND, [Bar(0.8, against=HAND)],
        ),
        Figure("up.kind.longer", f"... longer than `{ALONE}`", "s", "lower", {KIND: longer}, KIND, [Bar(10)]),
        Figure("up.kind.steps", "... by step", "s", "lower", steps),
        Figure("up.kind.cold", "... with no image built", "s", "lower", {KIND: cold}, KIND),
    ]  # fmt: skip


def _timed(
    run: Callable[[UpOptions], Mapping[str, float]], options: UpOptions, *, rested: bool = False
) -> tuple[float, Mapping[str, float]]:
    """How long something took (s), and each of its steps; the cluster that it made is gone afterwards.

    It begins when the file system has `rested` from what was removed before.
    """
    if rested:
        time.sleep(_FORGOTTEN_S)
    try:
        began = time.monotonic()
        steps = run(options)
        seconds = time.monotonic() - began
        _settle(options.name)
        return seconds, steps
    finally:
        with uninterrupted():
            Kind().delete(options.name, record.kubeconfig(options.name))
            record.forget(options.name)
            os.sync()  # what is yet to be written is remembered for longer


def _settle(cluster: str) -> None:
    """Wait until the node has made all of its pods.

    With cgroup v1, runc freezes a container that it sets up, and what is frozen cannot be killed: a node that
    is removed at that moment stays.
    """
    kubectl = ("kubectl", "--kubeconfig", "/etc/kubernetes/admin.conf")  # as it is in every node of kind
    condition = ("--for", "condition=Ready", "--timeout", "60s")
    _docker("exec", f"{cluster}-control-plane", *kubectl, "wait", "pods", "--all", "-A", *condition)


def _up(options: UpOptions) -> Mapping[str, float]:
    return run_steps(KubernetesRuntime(options.name, KIND).steps(options))


def _by_hand(options: UpOptions) -> Mapping[str, float]:
    builder, kind = images.Builder(), Kind()
    references = []
    for recipe in images.recipes(options.app, options.extra["base_image"]).values():
        references.append(recipe.reference(options.name))
        # Under another name, so that the engine is asked to build it, and finds all of it done.
        builder.build(recipe, recipe.reference(f"{options.name}/again"), lambda _: None)
    _create(options)
    with tempfile.TemporaryDirectory(prefix="meshdemo-") as folder:
        archive = Path(folder) / "images.tar"
        builder.save(references, archive)
        kind.load_by_kind(options.name, archive, kind.nodes(options.name))
    # What is left is to apply everything, to wait, and to send a request.
    return run_steps(KubernetesRuntime(options.name, KIND).steps(options))


def _alone(options: UpOptions) -> Mapping[str, float]:
    _create(options)
    return {}


def _create(options: UpOptions) -> None:
    """Make a kind cluster, and wait until it is ready."""
    command = [machine.tool("kind") or "kind", "create", "cluster", "--name", options.name]
    command += ["--wait", f"{_MOST_S:g}s"]
    with tempfile.TemporaryDirectory(prefix="meshdemo-") as folder:
        command += ["--kubeconfig", f"{folder}/kubeconfig"]
        if image := options.extra["kind_image"]:
            command += ["--image", image]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"kind could not make a cluster: {done.stderr.strip()[-300:]}")


@contextmanager
def options(rps: float | None = None) -> Iterator[UpOptions]:
    """A mesh to be brought up, with a base image of its own; its images are gone afterwards."""
    name = f"bench-{secrets.token_hex(3)}"
    base = f"{name}/base/image:1"
    try:
        _make_base(base)
        yield UpOptions(
            name=name, app=loader.load("pair"), rps=rps, timeout_s=_MOST_S,
            extra={
                "registry": name, "observability": False, "base_image": base,
                "kind_image": os.environ.get("MESHDEMO_KIND_IMAGE"),
            },
        )  # fmt: skip
    finally:
        with uninterrupted():
            _remove_images(name)


def _make_base(reference: str) -> None:
    """The base image under another name, and different from it in nothing but a label."""
    of = os.environ.get("MESHDEMO_BASE_IMAGE") or images.BASE_IMAGE
    done = _docker("build", "--tag", reference, "-", given=f"FROM {of}\nLABEL meshdemo.bench={reference}\n")
    if done.returncode:
        raise Failed(f"cannot make an image from {of}: {done.stderr.strip()[-300:]}")


def _remove_images(prefix: str) -> None:
    filters = [word for depth in ("*/*", "*/*/*") for word in ("--filter", f"reference={prefix}/{depth}")]
    listed = _docker("image", "ls", *filters, "--format", _NAME).stdout.split()
    if listed:  # by name: the same image may have other names, which are not ours
        _docker("image", "rm", *listed)


def _docker(*arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    docker = machine.tool("docker") or "docker"
    return subprocess.run([docker, *arguments], input=given, capture_output=True, text=True, check=False)
