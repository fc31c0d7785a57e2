"""A Lease that one process holds at a time: whoever runs `watch`, on a user's machine or in the cluster.

As in client-go's leader election (tools/leaderelection), but for one try: it is free, or somebody else has
it. The holder renews it; one that is gone without a word loses it after `DURATION_S`.
"""

from __future__ import annotations

import _thread
import datetime as dt
import getpass
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from meshdemo.errors import Failed, MeshdemoError
from meshdemo.kube import ApiError, Cluster, Manifest

log = logging.getLogger(__name__)

DURATION_S = 15.0
_RENEW_S = 4.0
_TIME = "%Y-%m-%dT%H:%M:%S.%fZ"


@contextmanager
def held(cluster: Cluster, name: str, namespace: str, what: str) -> Iterator[None]:
    """Hold a Lease during the block. If it is lost meanwhile, the main thread is interrupted (as by Ctrl-C).

    Raises Failed naming the holder if somebody else has it. `what` names its purpose for that message.
    """
    identity = f"{_user()}@{socket.gethostname()} (process {os.getpid()})"
    lease = _take(cluster, name, namespace, identity, what)
    over = threading.Event()
    keeper = threading.Thread(target=_keep, args=(cluster, lease, over), name=f"lease {name}", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        over.set()
        keeper.join(_RENEW_S)
        with suppress(MeshdemoError):
            current = cluster.get("Lease", name, namespace)
            if current and current["spec"].get("holderIdentity") == identity:
                current["spec"]["holderIdentity"] = ""
                cluster.replace("Lease", current)


def _take(cluster: Cluster, name: str, namespace: str, identity: str, what: str) -> Manifest:
    for _ in range(3):
        found = cluster.get("Lease", name, namespace)
        spec = {
            "holderIdentity": identity, "leaseDurationSeconds": round(DURATION_S),
            "acquireTime": _now(), "renewTime": _now(),
        }  # fmt: skip
        try:
            if found is None:
                return cluster.create("Lease", {"metadata": {"name": name}, "spec": spec}, namespace)
            if holder := _holder(found):
                raise Failed(f"{what} runs already: {holder}", "stop that one first")
            return cluster.replace("Lease", {**found, "spec": spec})
        except ApiError as error:
            if error.status != 409:
                raise
    raise Failed(f"{what} is being started by several at once", "try again")


def _holder(lease: Manifest) -> str:
    """Who holds a Lease; empty if nobody does, or whoever did has not renewed it for too long."""
    spec = lease.get("spec", {})
    holder, renewed = spec.get("holderIdentity") or "", spec.get("renewTime")
    if not holder or not renewed:
        return ""
    age_s = (dt.datetime.now(dt.UTC) - _parsed(renewed)).total_seconds()
    return str(holder) if age_s < spec.get("leaseDurationSeconds", DURATION_S) else ""


def _keep(cluster: Cluster, lease: Manifest, over: threading.Event) -> None:
    renewed = time.monotonic()
    while not over.wait(_RENEW_S):
        lease["spec"]["renewTime"] = _now()
        try:
            lease = cluster.replace("Lease", lease)
            renewed = time.monotonic()
            continue
        except ApiError as error:
            taken = error.status in {404, 409}
        except MeshdemoError:
            taken = False
        if taken or time.monotonic() - renewed > DURATION_S:
            log.error("the Lease is lost to somebody else, or the API server is away; stopping")
            _thread.interrupt_main()
            return


def _now() -> str:
    return dt.datetime.now(dt.UTC).strftime(_TIME)


def _parsed(text: str) -> dt.datetime:
    return dt.datetime.strptime(text, _TIME).replace(tzinfo=dt.UTC)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user has no name
        return "meshdemo"
