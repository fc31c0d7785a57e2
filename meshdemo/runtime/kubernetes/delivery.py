"""Images, from this machine to where the pods of a mesh are started."""

from __future__ import annotations

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


class Nodes:
    """The nodes of a kind cluster, which have no registry to pull from.

    Args:
        fresh: the cluster is being made: its nodes lack everything, and are not there yet.
        expected: so many nodes there will be at least.
        made: the cluster's making is over.
        left_s: the seconds that are left.
    """

    def __init__(
        self,
        kind: Kind,
        builder: images.Builder,
        cluster: str,
        *,
        fresh: bool,
        expected: int,
        made: threading.Event,
        left_s: Callable[[], float],
    ) -> None:
        self._kind, self._builder, self._cluster = kind, builder, cluster
        self._fresh, self._expected, self._made, self._left_s = fresh, expected, made, left_s

    def load(self, wanted: Iterable[str]) -> Work:
        """Loads what the nodes lack, once the cluster is made.

        They would take images before. But a cluster that boots wants all processors, and then waits for ten
        seconds for kind's network (kindnetd finds its node at its second look), with nothing else to do.
        """
        images_wanted = list(wanted)

        def run(tell: Tell) -> None:
            with tempfile.TemporaryDirectory(prefix="meshdemo-") as folder:
                archive = Path(folder) / "images.tar"
                if self._fresh:
                    tell("saving")
                    self._builder.save(images_wanted, archive)
                tell("waiting for the cluster")
                while not self._made.is_set():
                    pause(0.1)
                lacking = self._lacking(images_wanted, tell)
                needed = sorted({image for images_of in lacking.values() for image in images_of})
                if not needed:
                    return
                if not archive.exists():
                    tell("saving")
                    self._builder.save(needed, archive)
                tell("loading")
                nodes = [node for node, images_of in lacking.items() if images_of]
                self._kind.load(self._cluster, archive, nodes)

        return run

    def _lacking(self, wanted: Sequence[str], tell: Tell) -> dict[str, list[str]]:
        """Which images each node lacks, once all of them can say so."""
        while True:
            nodes = self._kind.nodes(self._cluster)
            try:
                lacking = {node: self._kind.missing(node, wanted) for node in nodes}
                if len(nodes) >= self._expected:
                    return lacking
            except (Failed, ValueError):
                if self._left_s() <= 1:
                    raise
            tell("waiting for the nodes")
            pause(0.5)
