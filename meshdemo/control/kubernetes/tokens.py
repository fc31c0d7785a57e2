"""Whose token this is: the API server is asked, and what it said holds for a while."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from meshdemo.control.kubernetes.source import Source
from meshdemo.control.model import Instance, MeshState
from meshdemo.kube import ApiError, Cluster
from meshdemo.names import AUDIENCE, qualified

log = logging.getLogger(__name__)


class TokenReviews:
    """Tells whose token this is by asking the API server; what it said holds for a while.

    A sidecar reports twice a second with the same token, and each review costs the API server some
    milliseconds. A token is worth nothing once its pod is gone, whatever the review said before.
    """

    def __init__(
        self,
        cluster: Cluster,
        source: Source,
        *,
        holds_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster, self._source = cluster, source
        self._holds_s = holds_s
        self._clock = clock
        self._known: dict[str, tuple[float, _Proof | None]] = {}

    async def instance(self, token: str, mesh: MeshState) -> Instance | None:
        """The instance whose pod holds the token, under its own service's account; None if none."""
        proof = await self._proof(token)
        if proof is None:
            return None
        instance = qualified(proof.pod, proof.namespace, mesh.namespace)
        pod = self._source.pod(instance)
        if pod is None or pod["metadata"].get("uid") != proof.uid:
            return None
        found = next((one for one in mesh.sidecars if one.id == instance), None)
        return found if found is not None and proof.user == self._source.user(found, pod) else None

    async def _proof(self, token: str) -> _Proof | None:
        if not token:
            return None
        digest = hashlib.sha256(token.encode()).hexdigest()
        now = self._clock()
        until, proof = self._known.get(digest, (0.0, None))
        if now < until:
            return proof
        try:
            answer = await asyncio.to_thread(
                self._cluster.create, "TokenReview", {"spec": {"token": token, "audiences": [AUDIENCE]}}
            )
        except ApiError as error:
            if error.status == 400:
                return None
            # Whoever was known before stays so while the API server is away: its word has not changed.
            log.warning("cannot review a token: %s", error.message)
            return proof
        proof = _proven(answer.get("status", {}))
        if len(self._known) > 10_000:
            self._known.clear()
        # A refusal is remembered for a shorter time: the kubelet may just be renewing the token.
        self._known[digest] = (now + (self._holds_s if proof else 2.0), proof)
        return proof


class _Proof:
    """Whom a reviewed token belongs to."""

    __slots__ = ("namespace", "pod", "uid", "user")

    def __init__(self, user: str, pod: str, uid: str) -> None:
        self.user, self.pod, self.uid = user, pod, uid
        self.namespace = user.split(":")[2]  # system:serviceaccount:NAMESPACE:ACCOUNT


def _proven(status: Mapping[str, Any]) -> _Proof | None:
    if not status.get("authenticated") or AUDIENCE not in status.get("audiences", ()):
        return None
    user = status.get("user", {})
    name, extra = user.get("username", ""), user.get("extra", {})
    pod = extra.get("authentication.kubernetes.io/pod-name", [""])[0]
    uid = extra.get("authentication.kubernetes.io/pod-uid", [""])[0]
    return _Proof(name, pod, uid) if pod and uid and name.startswith("system:serviceaccount:") else None
