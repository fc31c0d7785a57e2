"""The control plane's side of Kubernetes: who is there, whose token this is, and where things are kept.

Pods, EndpointSlices and Services become a `MeshState` (pure, `mesh_state`).
"""

from __future__ import annotations

# Ports of a sidecar in its pod, and of the control plane.
OUTBOUND_PORT = 15001
INBOUND_PORT = 15006
PLAIN_PORT = 15020
READY_PORT = 15021
XDS_PORT = 15010
API_PORT = 8080

AUDIENCE = "meshdemo"
"""What sidecars' tokens are good for; the API server refuses to review a token for anybody else."""
