"""What the namespaces of injected pods are given."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from meshdemo.errors import Failed, MeshdemoError
from meshdemo.kube import Cluster, Manifest
from meshdemo.names import COMPONENT, MESH, handout

_AGAIN_S = 300.0  # until what was given is given anew: somebody may have removed it


class Handouts:
    """What sidecars of injected pods start from, as a ConfigMap in every namespace that has some.

    A pod can mount what is in its own namespace alone. It holds nothing secret: whom to trust, and where the
    control plane is.
    """

    def __init__(
        self,
        cluster: Cluster,
        mesh: str,
        guests: Callable[[], set[str]],
        files: Callable[[], Mapping[str, str]],
        trust: Path,
    ) -> None:
        """`guests`: the namespaces; `files`: by name, what is the same for all that start now; `trust`: the
        file of whom to trust."""
        self._cluster, self._mesh, self._guests = cluster, mesh, guests
        self._files, self._trust = files, trust
        # namespace -> what it was given, and when
        self._kept: dict[str, tuple[Mapping[str, str], float]] = {}

    def save(self) -> bool:
        """Give the namespaces what they lack, and now and then anew what somebody may have removed.

        Raises Failed, once all others have theirs, if a namespace does not take it.
        """
        now, data = time.monotonic(), {**self._files(), self._trust.name: self._trust.read_text()}
        guests = self._guests()
        self._kept = {namespace: kept for namespace, kept in self._kept.items() if namespace in guests}
        failures: list[MeshdemoError] = []
        due = [one for one in sorted(guests) if not self._has(one, data, now)]
        for namespace in due:
            try:
                self._cluster.apply(self._manifest(namespace, data))
                self._kept[namespace] = data, now
            except MeshdemoError as error:
                failures.append(Failed(f"{handout(self._mesh)} in {namespace}: {error.message}"))
        if failures:
            raise failures[0]
        return bool(due)

    def _has(self, namespace: str, data: Mapping[str, str], now: float) -> bool:
        kept, at = self._kept.get(namespace, ({}, 0.0))
        return kept == data and now - at < _AGAIN_S

    def _manifest(self, namespace: str, data: Mapping[str, str]) -> Manifest:
        labels = {MESH: self._mesh, COMPONENT: "handout", "app.kubernetes.io/managed-by": "meshdemo"}
        # By server-side apply, whose right to create can be given for one name; that of a POST cannot
        # (https://github.com/kubernetes/kubernetes/issues/80295).
        return {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": handout(self._mesh), "namespace": namespace, "labels": labels},
            "data": data,
        }
