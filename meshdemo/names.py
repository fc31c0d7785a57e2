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

# What an injected pod speaks on its service's port: as its owner says, and as `inject` carries that over from
# the workload to its pods.
PROTOCOL, TOLD_PROTOCOL = PREFIX + "protocol", PREFIX + "told-protocol"
PROTOCOLS = ("http", "grpc", "tcp")

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
