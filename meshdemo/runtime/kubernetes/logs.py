"""Log lines of many containers as one stream, in the order in which they were written."""

from __future__ import annotations

import heapq
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from meshdemo.kube import Cluster, Manifest
from meshdemo.names import qualified

_TAIL = 500  # lines of each container, where it is not followed
_SETTLE_S = 0.3  # lines of different containers arrive in some order; so long one waits for an earlier one
_LOOK_S = 2.0  # how soon a new pod is noticed


def read(
    cluster: Cluster, home: str, pods: Callable[[], list[Manifest]], follow: bool
) -> Iterator[tuple[str, str]]:
    """(source, line) of these pods; with `follow` for ever, new pods included.

    Args:
        home: the mesh's namespace.
    """
    yield from _follow(cluster, home, pods) if follow else _all(cluster, home, pods)


_Of = tuple[str, str, str, str]  # source, namespace, pod, container


def _containers(home: str, pods: list[Manifest]) -> list[_Of]:
    """All that has something to say."""
    found = []
    for pod in pods:
        name, namespace = pod["metadata"]["name"], pod["metadata"].get("namespace", home)
        called = qualified(name, namespace, home)
        for container in _names(pod):
            source = f"{called} sidecar" if container == "meshdemo-sidecar" else called
            found.append((source, namespace, name, container))
    return found


def _names(pod: Manifest) -> list[str]:
    spec = pod["spec"]
    sidecars = [one for one in spec.get("initContainers", []) if one.get("restartPolicy") == "Always"]
    return [one["name"] for one in (*spec["containers"], *sidecars)]


def _split(source: str, line: str) -> tuple[str, str, str]:
    when, _, text = line.partition(" ")
    return when, source, text


def _all(cluster: Cluster, home: str, pods: Callable[[], list[Manifest]]) -> Iterator[tuple[str, str]]:
    def lines(of: _Of) -> list[tuple[str, str, str]]:
        source, namespace, pod, container = of
        said = cluster.logs(namespace, pod, container, tail=_TAIL, times=True)
        return [_split(source, line) for line in said]

    with ThreadPoolExecutor(8) as pool:
        every = list(pool.map(lines, _containers(home, pods())))
    for _, source, text in heapq.merge(*every):
        yield source, text


def _follow(cluster: Cluster, home: str, pods: Callable[[], list[Manifest]]) -> Iterator[tuple[str, str]]:
    arrived: queue.SimpleQueue[tuple[str, str, str]] = queue.SimpleQueue()
    followed: set[_Of] = set()

    def carry(of: _Of) -> None:
        source, namespace, pod, container = of
        for line in cluster.logs(namespace, pod, container, tail=20, follow=True, times=True):
            arrived.put(_split(source, line))
        followed.discard(of)  # it ended; if its container is started again, it is followed again

    waiting: list[tuple[float, tuple[str, str, str]]] = []
    looked = 0.0
    while True:
        if time.monotonic() - looked > _LOOK_S:
            looked = time.monotonic()
            for of in _containers(home, pods()):
                if of not in followed:
                    followed.add(of)
                    threading.Thread(target=carry, args=(of,), daemon=True).start()
        with suppress(queue.Empty):
            waiting.append((time.monotonic(), arrived.get(timeout=_SETTLE_S / 3)))
        now = time.monotonic()
        due = sorted(line for since, line in waiting if now - since >= _SETTLE_S)
        waiting = [entry for entry in waiting if now - entry[0] < _SETTLE_S]
        for _, source, text in due:
            yield source, text
