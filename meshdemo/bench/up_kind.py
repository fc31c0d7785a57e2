"""How long `up` takes on kind, next to the same steps by hand.

By hand means: the cluster is made, each image is built, the images are loaded, the namespace is prepared, one
after another; then everything is applied and waited for. `up` does at the same time what does not need each
other. Both build all images anew, as on a machine that has never seen them: from a base image of their own,
of which the engine has no layers.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from meshdemo.apps import loader
from meshdemo.bench import machine
from meshdemo.bench.model import Bar, Figure, LeftOut
from meshdemo.bench.stage import Tell
from meshdemo.errors import Failed, MeshdemoError
from meshdemo.runtime.base import Step, UpOptions
from meshdemo.runtime.kubernetes import images
from meshdemo.runtime.kubernetes.runtime import KubernetesRuntime
from meshdemo.runtime.steps import run_steps

KIND, HAND = "kind", "by hand"
_TOGETHER = "Starting "  # what these steps apply is applied at once, and then waited for
_MOST_S = 900.0
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
    """Both in turn. Raises MeshdemoError."""
    total: dict[str, list[float]] = {KIND: [], HAND: []}
    steps: dict[str, list[float]] = {}
    for number in range(rounds):
        tell(f"kind, round {number + 1}")
        with _mesh() as (runtime, options):
            began = time.monotonic()
            for title, seconds in run_steps(runtime.steps(options)).items():
                steps.setdefault(title, []).append(seconds)
            total[KIND].append(time.monotonic() - began)
        tell(f"kind, round {number + 1}, by hand")
        with _mesh() as (runtime, options):
            began = time.monotonic()
            for step in _one_after_another(runtime.steps(options)):
                step()
            total[HAND].append(time.monotonic() - began)
    bar = Bar(0.8, against=HAND)
    return [
        Figure("up.kind", "`meshdemo up --runtime kind`", "s", "lower", total, KIND, [bar]),
        Figure("up.kind.steps", "... of this, by step", "s", "lower", steps),
    ]


@contextmanager
def _mesh() -> Iterator[tuple[KubernetesRuntime, UpOptions]]:
    """A mesh to be brought up on a kind cluster of its own; both are gone afterwards, and its images."""
    name = f"bench-{secrets.token_hex(3)}"
    runtime = KubernetesRuntime(name, KIND)
    base = f"{name}/base/image:1"
    options = UpOptions(
        name=name, app=loader.load("pair"), timeout_s=_MOST_S,
        extra={
            "registry": name, "observability": False, "base_image": base,
            "kind_image": os.environ.get("MESHDEMO_KIND_IMAGE"),
        },
    )  # fmt: skip
    try:
        _make_base(base)
        yield runtime, options
    finally:
        try:
            runtime.down()
        finally:
            _remove_images(name)


def _one_after_another(steps: Sequence[Step]) -> list[Callable[[], object]]:
    """The steps as somebody would take them by hand."""
    alone = [step for step in steps if not step.title.startswith(_TOGETHER)]
    starts = [replace(step, after=()) for step in steps if step.title.startswith(_TOGETHER)]
    last = len(alone) - 1  # a request through the mesh
    return [*(step.run for step in alone[:last]), lambda: run_steps(starts), alone[last].run]


def _make_base(reference: str) -> None:
    """The base image under another name, and different from it in nothing but a label."""
    of = os.environ.get("MESHDEMO_BASE_IMAGE") or images.BASE_IMAGE
    done = _docker("build", "--tag", reference, "-", given=f"FROM {of}\nLABEL meshdemo.bench={reference}\n")
    if done.returncode:
        raise Failed(f"cannot make an image from {of}: {done.stderr.strip()[-300:]}")


def _remove_images(prefix: str) -> None:
    listed = _docker("image", "ls", "--filter", f"reference={prefix}/*/*", "--format", _NAME).stdout.split()
    if listed:  # by name: the same image may have other names, which are not ours
        _docker("image", "rm", *listed)


def _docker(*arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    docker = machine.tool("docker") or "docker"
    return subprocess.run([docker, *arguments], input=given, capture_output=True, text=True, check=False)
