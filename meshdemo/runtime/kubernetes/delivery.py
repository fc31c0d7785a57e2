"""Images, from this machine to where the pods of a mesh are started."""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from meshdemo.errors import Failed
from meshdemo.runtime.kubernetes import images, manifests
from meshdemo.runtime.kubernetes.kind import Kind, Tell
from meshdemo.runtime.steps import pause

Work = Callable[[Tell], None]
"""What a step does; it tells what it is doing right now."""


class Delivery:
    """Builds and pushes the images of one mesh. Made, it has a Docker Engine; raises Missing if none answers.

    Args:
        recipes: by the image's name.
        references: what each image is called, by its name.
    """

    def __init__(self, recipes: Mapping[str, images.Recipe], references: Mapping[str, str]) -> None:
        self.builder = images.Builder()
        self._recipes, self._references = recipes, references

    def groups(self) -> list[tuple[str, list[str]]]:
        """Images by what they share, and what to call them: those of one group are built one after another,
        since the second finds the requirements of the first installed."""
        programs = [name for name in self._recipes if name not in {images.CONTROL_PLANE, images.SIDECAR}]
        groups = [[images.CONTROL_PLANE], [images.SIDECAR], programs]
        return [(", ".join(group), group) for group in groups if group]

    def build(self, group: Sequence[str]) -> Work:
        """Builds the images of a group, where Docker lacks them."""

        def run(tell: Tell) -> None:
            for name in group:
                self.builder.build(self._recipes[name], self._references[name], tell)

        return run

    def push(self, name: str) -> Work:
        """Pushes an image to the registry that its reference names."""
        return partial(self.builder.push, self._references[name])

    def observability_at_hand(self) -> list[str]:
        """The images of Prometheus and Grafana that Docker has here; nodes pull the others."""
        wanted = (manifests.PROMETHEUS_IMAGE, manifests.GRAFANA_IMAGE)
        return [image for image in wanted if self.builder.has(image)]


class Loading:
    """The loading of images into the nodes of a kind cluster, which have no registry to pull from.

    Args:
        wanted: what the images are called.
    """

    def __init__(self, kind: Kind, builder: images.Builder, cluster: str, wanted: Iterable[str]) -> None:
        self._kind, self._builder, self._cluster = kind, builder, cluster
        self._wanted = list(wanted)
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def save(self, tell: Tell) -> None:
        """Save all of them to a file, for nodes that have yet to be made."""
        self._save(self._wanted)

    def offer(self, nodes: int, made: threading.Event, tell: Tell) -> None:
        """Have so many nodes take in the images while they boot, unless their cluster is `made` before.

        That comes for little: much of a boot is waiting. What it does not reach is left to `load`.
        """
        tell("waiting for the nodes")
        while not made.is_set():
            with contextlib.suppress(Failed):  # they are booting
                if len(there := self._lacking()) == nodes:
                    tell("loading")
                    self._kind.offer(self._archive, list(there))
                    return
            pause(0.5)

    def load(self, tell: Tell) -> None:
        """Load what the nodes lack."""
        try:
            lacking = self._lacking()
            needed = sorted({image for images_of in lacking.values() for image in images_of})
            if not needed:
                return
            if self._folder is None:
                tell("saving")
                self._save(needed)
            tell("loading")
            self._kind.load(self._cluster, self._archive, [node for node, some in lacking.items() if some])
        finally:
            self.remove()

    def _lacking(self) -> dict[str, list[str]]:
        """What each node lacks. Raises Failed while one cannot say."""
        return {node: self._kind.missing(node, self._wanted) for node in self._kind.nodes(self._cluster)}

    def remove(self) -> None:
        """Remove the file."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _save(self, images_needed: Sequence[str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="meshdemo-")
        self._builder.save(images_needed, self._archive)

    @property
    def _archive(self) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / "images.tar"
