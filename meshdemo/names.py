"""Names and numbers that objects in a cluster, their sidecars and the control plane agree on.

They stand apart from the code that uses them, so that whoever only writes manifests (`inject` of a thousand)
need not load a control plane.
"""

from __future__ import annotations

PREFIX = "meshdemo.dev/"  # of the labels and annotations that are ours

# Labels of a meshed pod, and an annotation.
MESH, SERVICE, VERSION = PREFIX + "mesh", PREFIX + "service", PREFIX + "version"
COMPONENT = "app.kubernetes.io/component"
REVISION = PREFIX + "revision"

# What an injected pod speaks on its service's ports, and the ports whose traffic passes by its sidecar: as
# its owner says, and as `inject` carries that over from the workload to its pods.
PROTOCOL, TOLD_PROTOCOL = PREFIX + "protocol", PREFIX + "told-protocol"
PROTOCOLS = ("http", "grpc", "tcp")
SKIP_INBOUND, TOLD_SKIPPED = PREFIX + "skip-inbound-ports", PREFIX + "told-skipped-ports"
SKIP_OUTBOUND = PREFIX + "skip-outbound-ports"


def numbers(said: str) -> tuple[int, ...]:
    """The ports of an annotation such as `9090, 9100`.

    Raises:
        ValueError: with the word that is no port.
    """
    found = []
    for word in said.replace(",", " ").split():
        if not (word.isascii() and word.isdigit() and 1 <= int(word) <= 65535):
            raise ValueError(word)
        found.append(int(word))
    return tuple(found)


def protocols(said: str) -> dict[int | None, str]:
    """What an annotation such as `http, 9000=grpc` says: port of the pod -> protocol; None: the first port.

    Raises:
        ValueError: with the word that says no such thing.
    """
    found: dict[int | None, str] = {}
    for word in said.replace(",", " ").split():
        port, of_one, protocol = word.rpartition("=")
        if protocol.lower() not in PROTOCOLS or (of_one and len(numbers(port)) != 1):
            raise ValueError(word)
        found[numbers(port)[0] if of_one else None] = protocol.lower()
    return found


def qualified(name: str, namespace: str, home: str) -> str:
    """What the mesh calls something of a namespace: `web`, or `web.shop` where that is not the mesh's own."""
    # A pod's name may hold dots. A namespace's does not, so what follows the last dot is always one.
    return name if namespace == home and "." not in name else f"{name}.{namespace}"


def parted(name: str, home: str) -> tuple[str, str]:
    """The other way round: the name within its namespace, and the namespace."""
    own, dot, namespace = name.rpartition(".")
    return (own, namespace) if dot else (name, home)


def handout(mesh: str) -> str:
    """The ConfigMap from which the sidecars of injected pods start, in every namespace that has some."""
    return f"meshdemo-{mesh}"


AUDIENCE = "meshdemo"
"""What sidecars' tokens are good for; the API server calls a token for anything else invalid."""

# Where a sidecar listens in its pod.
OUTBOUND_PORT = 15001
PROXY_PORT = 15002
INBOUND_PORT = 15006
PLAIN_PORT = 15020
READY_PORT = 15021
GATEWAY_PORT = 8080  # the edge's, in its pod

# Where the control plane listens in its pod: for sidecars; for the API, on loopback alone (clients come
# through the API server's port forward); and what may be asked from outside without a token.
XDS_PORT = 15010
API_PORT = 8080
OPEN_PORT = 8081

RECORD = "kubernetes.json"
"""The file in a mesh's folder that says how to reach its cluster."""
