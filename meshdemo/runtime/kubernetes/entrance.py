"""Tells on Ingresses and HTTPRoutes what became of them: their status, and an Event for what is wrong.

What they ask for is worked out elsewhere (`control.ingress`); this writes it down. Nothing depends on it: an
API server that refuses is heard of in the log, and asked again at the next change.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

from meshdemo.control import ingress
from meshdemo.kube import ApiError, Cluster, Manifest

log = logging.getLogger(__name__)


class Reporter:
    """Writes what has changed, and says each problem once for as long as it lasts."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self._cluster, self._namespace = cluster, namespace
        self._said: set[tuple[str, ingress.Problem]] = set()

    def report(self, entrance: ingress.Entrance, services: Iterable[Manifest]) -> None:
        """Bring the objects up to date. Takes as long as the API server does."""
        at = ingress.load_balancer(services)
        present: set[tuple[str, ingress.Problem]] = set()
        for verdict in entrance.ingresses:
            self._write("Ingress", verdict.manifest, ingress.ingress_status(verdict.manifest, at))
            present |= self._tell("networking.k8s.io/v1", "Ingress", verdict)
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        for verdict in entrance.routes:
            status = ingress.route_status(verdict, self._namespace, now)
            self._write("HTTPRoute", verdict.manifest, status)
            present |= self._tell("gateway.networking.k8s.io/v1", "HTTPRoute", verdict)
        self._said = present

    def _write(self, kind: str, manifest: Manifest, status: Manifest | None) -> None:
        if status is None:
            return
        name, namespace = manifest["metadata"]["name"], manifest["metadata"].get("namespace", self._namespace)
        try:
            self._cluster.patch(kind, name, namespace, {"status": status}, merge="merge", sub="status")
        except ApiError as error:
            if error.status != 404:  # it is gone again
                log.warning("cannot write the status of %s %s: %s", kind, name, error.message)

    def _tell(self, version: str, kind: str, verdict: ingress.Verdict) -> set[tuple[str, ingress.Problem]]:
        uid = str(verdict.manifest["metadata"].get("uid", verdict.manifest["metadata"]["name"]))
        about = {"apiVersion": version, "kind": kind, **verdict.manifest}
        for problem in verdict.problems:
            if (uid, problem) in self._said:
                continue
            try:
                self._cluster.event(about, problem.reason, problem.message, warning=True)
            except ApiError as error:
                log.warning("cannot leave an Event: %s", error.message)
        return {(uid, problem) for problem in verdict.problems}
