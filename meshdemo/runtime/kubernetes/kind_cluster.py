"""Making the kind cluster of a mesh, with ports of this machine for what people look at.

A port is found free long before Docker binds it, so that several `up` begun at the same moment would all find
the gateway's. Each keeps what it found for the others of its kind until its cluster is made; where any other
program was faster, other ports are tried.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

from meshdemo.apps.model import GATEWAY
from meshdemo.runtime.kubernetes import manifests, record
from meshdemo.runtime.kubernetes.kind import Kind, PortTaken, Tell
from meshdemo.runtime.kubernetes.record import Record
from meshdemo.runtime.local.ports import Port, gateway_port, taken

NODE_PORTS = {"gateway": 30081, "prometheus": 30090, "grafana": 30300}
_ATTEMPTS = 3


def make(
    kind: Kind,
    mesh: str,
    *,
    gateway: int | None,
    workers: int,
    image: str | None,
    remember: Callable[[Record], None],
    timeout_s: Callable[[], float],
    tell: Tell,
) -> None:
    """Make the cluster.

    Args:
        gateway: the gateway's port if the user named one; else it is the default one or any that is free.
        image: of the nodes; None: kind's own.
        remember: is given what `down` may remove before it is made.
        timeout_s: the seconds that are left.

    Raises:
        BadInput: the port that the user named is taken.
        Failed: kind's own words. What was begun is removed, and forgotten.
    """
    edge = gateway_port(gateway)
    for attempt in itertools.count(1):
        held = {name: Port() for name in NODE_PORTS if name != GATEWAY} | {GATEWAY: edge}
        ports = {name: port.number for name, port in held.items()}
        try:
            remember(Record(kind="kind", mesh=mesh, cluster=mesh, made_cluster=True, ports=ports))
            for port in held.values():
                port.hand_over()
            kind.create(mesh, record.kubeconfig(mesh), _config(workers, ports), image, timeout_s(), tell)
            return
        except BaseException as error:
            record.forget(mesh)
            if not isinstance(error, PortTaken):
                raise
            if gateway is not None and gateway in error.ports:
                raise taken(gateway) from error
            if attempt == _ATTEMPTS:
                raise
            found_free_again = edge.number not in error.ports
        finally:
            for port in held.values():
                port.release()
        edge = gateway_port(gateway) if found_free_again else Port()


def _config(workers: int, ports: Mapping[str, int]) -> str:
    return manifests.kind_config(
        workers=workers, ports={NODE_PORTS[name]: port for name, port in ports.items()}
    )
