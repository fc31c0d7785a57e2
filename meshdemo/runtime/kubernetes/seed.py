"""What a mesh starts from, and nobody but it may know."""

from __future__ import annotations

import base64
import secrets
import tempfile
import time
from pathlib import Path

from meshdemo.control.kubernetes import kept
from meshdemo.control.kubernetes.kept import pack
from meshdemo.kube import ApiError, Cluster, Manifest


def make_once(cluster: Cluster, manifest: Manifest, namespace: str) -> None:
    """Make an object unless it is there. Raises ApiError."""
    try:
        cluster.create(manifest["kind"], manifest, namespace)
    except ApiError as error:
        if error.status != 409:
            raise


def fill(cluster: Cluster, mesh: str, namespace: str) -> None:
    """Make what the mesh starts from and nobody but it may know: its root certificate, the API's token."""
    from meshdemo.control.identity import Authority

    api = cluster.get("Secret", kept.API, namespace) or {}
    if "token" not in (api.get("data") or {}):
        token = base64.b64encode(secrets.token_urlsafe(32).encode()).decode()
        cluster.patch("Secret", kept.API, namespace, {"data": {"token": token}}, merge="merge")
    authority = cluster.get("Secret", kept.AUTHORITY, namespace) or {}
    if "ca.pem.gz" in (authority.get("data") or {}):
        return
    with tempfile.TemporaryDirectory(prefix="meshdemo-") as name:
        folder = Path(name)
        trust = Authority(folder, mesh, time.time()).trust
        made = {f"{path.name}.gz": pack(path.read_bytes()) for path in folder.iterdir()}
    cluster.patch("ConfigMap", kept.TRUST, namespace, {"data": {"trust.pem": trust.decode()}}, merge="merge")
    # Last: it says that all is there.
    cluster.patch("Secret", kept.AUTHORITY, namespace, {"data": made}, merge="merge")
