"""A copy of the objects of one kind, kept up to date: list, watch, list again."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterable

from meshdemo.kube import ApiError, Cluster, Manifest, key_of

log = logging.getLogger(__name__)

_RESYNC_S = 300.0


class Reflector:
    """A copy of the objects of one kind, kept up to date by a thread.

    It lists, watches from there, and lists anew when the API server no longer knows where it was (410),
    when `resync_s` have passed, and after errors, with growing pauses. While the API server is away, the
    copy stays.
    """

    def __init__(
        self,
        cluster: Cluster,
        kind: str,
        namespace: str | None,
        changed: Callable[[], None],
        *,
        labels: str = "",
        fields: str = "",
        resync_s: float = _RESYNC_S,
        first_pause_s: float = 0.2,
        absent_pause_s: float | None = None,
    ) -> None:
        """`changed` is called in the reflector's thread after each change of `objects`.

        `namespace`: None for all of them.

        `absent_pause_s`: the cluster may not have the kind; then there are no objects, and it is looked for
        again after so long.
        """
        self.listed = threading.Event()
        self._cluster, self._kind, self._namespace = cluster, kind, namespace
        self._labels, self._fields = labels, fields
        self._changed = changed
        self._resync_s = resync_s
        self._first_pause_s = first_pause_s
        self._absent_pause_s = absent_pause_s
        self._objects: dict[tuple[str, str], Manifest] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"reflector of {kind}", daemon=True)

    @property
    def objects(self) -> list[Manifest]:
        """The objects as last heard of."""
        return list(self._objects.values())

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread, when it next hears from the network; it does not keep the process."""
        self._stopping.set()

    def _run(self) -> None:
        version, listed_at, pause_s = "", 0.0, self._first_pause_s
        while not self._stopping.is_set():
            try:
                if not version or time.monotonic() - listed_at >= self._resync_s:
                    version, listed_at = self._list(), time.monotonic()
                version = self._watch(version, self._resync_s)
                pause_s = self._first_pause_s
                continue
            except ApiError as error:
                version = ""
                if error.status == 410:
                    continue
                if error.status == 404 and self._absent_pause_s is not None:
                    self._take([])
                    self._stopping.wait(self._absent_pause_s)
                    continue
                log.warning("watching %s: %s", self._kind, error.message)
            except Exception:
                version = ""
                log.exception("watching %s", self._kind)
            self._stopping.wait(pause_s * random.uniform(0.8, 1.2))  # noqa: S311 - not a secret
            pause_s = min(pause_s * 2, 10.0)

    def _list(self) -> str:
        objects, version = self._cluster.listing(
            self._kind, self._namespace, labels=self._labels, fields=self._fields
        )
        self._take(objects)
        return version

    def _take(self, objects: Iterable[Manifest]) -> None:
        self._objects = {key_of(one): one for one in objects}
        self.listed.set()
        self._changed()

    def _watch(self, version: str, timeout_s: float) -> str:
        for event, one in self._cluster.watch(
            self._kind, self._namespace, version, labels=self._labels, fields=self._fields,
            timeout_s=timeout_s,
        ):  # fmt: skip
            if self._stopping.is_set():
                break
            version = one["metadata"]["resourceVersion"]
            if event == "BOOKMARK":
                continue
            objects = dict(self._objects)
            if event == "DELETED":
                objects.pop(key_of(one), None)
            else:
                objects[key_of(one)] = one
            self._objects = objects
            self._changed()
        return version
