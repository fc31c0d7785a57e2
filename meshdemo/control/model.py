"""The plain data that the control plane, its clients and the runtimes exchange.

Everything here is a value: frozen, JSON in and out, no I/O. Times are seconds since the epoch (UTC)
unless the name says otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from meshdemo.apps.model import App

HOME = "default"
"""The namespace of a mesh that is not in a cluster."""


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Instance(_Value):
    """One running copy of a workload, with its sidecar, as the runtime reports it."""

    id: str
    service: str
    version: str
    revision: int = Field(default=1, description="revision of the workload that it runs")
    further: tuple[str, ...] = Field(default=(), description="keys of its service's further ports it has")
    host: str = "127.0.0.1"
    inbound_port: int = Field(description="where the sidecar accepts mutual TLS for this instance")
    outbound_port: int = Field(description="where the sidecar accepts what this instance calls")
    metrics_port: int = Field(description="plain: Prometheus stats of the sidecar, probes, open paths")
    app_host: str = "127.0.0.1"
    app_port: int
    ready: bool = Field(default=False, description="takes traffic; false while starting or draining")
    restarts: int = Field(
        default=0, description="how often its app or its sidecar died and was started again by the runtime"
    )
    leaving: bool = Field(
        default=False, description="on its way out for good: still configured, but no one's to judge or show"
    )
    token_sha256: str = Field(default="", description="hex; of the bearer token (local runtime)")


class Entry(_Value):
    """Requests from outside that the gateway leads to services of the mesh."""

    host: str = Field(default="*", description="a name, *.SUFFIX, or * for all")
    path: str = "/"
    exact: bool = Field(default=False, description="this path alone; else whatever is below it, too")
    method: str | None = None
    headers: tuple[tuple[str, str], ...] = Field(default=(), description="name and exact value")
    backends: dict[str, int] = Field(
        default_factory=dict,
        description="service -> weight, and SERVICE:PORT -> weight for a further port; none: an error",
    )
    default: bool = Field(default=False, description="takes what nothing else takes, on every host")


class MeshState(_Value):
    """What a runtime tells the control plane: the app and its instances (`instances.json` locally)."""

    mesh: str
    namespace: str = HOME
    app: App
    instances: tuple[Instance, ...] = ()
    gateways: tuple[Instance, ...] = Field(
        default=(), description="the Envoys at the edge: sidecars without an app, of the service `gateway`"
    )
    entries: tuple[Entry, ...] = Field(default=(), description="where they lead besides the app's front")
    addresses: dict[str, str] = Field(
        default_factory=dict,
        description="service -> address of its name, where the sidecars' traffic is redirected to them "
        "(Kubernetes); empty where they are the apps' HTTP proxy",
    )
    ports: dict[str, int] = Field(
        default_factory=dict, description="service -> port of its name, where that is not its instances' own"
    )

    also: tuple[tuple[str, str, int, str], ...] = Field(
        default=(),
        description="service, address, port, and the key of the further port (none: the first): other ways "
        "to its instances than by its own name and first port",
    )

    def places(self, service: str) -> list[tuple[str, str, int, str]]:
        """Where a service is called: what the place is called, its address and port, and the further port."""
        port = self.ports.get(service, self.app.services[service].port)
        found = [(service, self.addresses[service], port, "")] if service in self.addresses else []
        return found + [
            (f"{service}@{address}:{port}", address, port, key)
            for name, address, port, key in self.also
            if name == service
        ]

    def ready_by_version(self, service: str, ejected: Collection[str]) -> dict[str, int]:
        """Version -> the number of a service's instances that are ready and not ejected."""
        return Counter(
            one.version
            for one in self.instances
            if one.service == service and one.ready and one.id not in ejected
        )

    @property
    def sidecars(self) -> tuple[Instance, ...]:
        """All that the control plane configures."""
        return (*self.instances, *self.gateways)


class Fault(_Value):
    """A deliberate break. `at` app: LAT_MS/ERR_RATE of a workload revision; mesh: Envoy's fault filter;
    process: a crash or a hang."""

    id: str
    at: Literal["app", "mesh", "process"]
    kind: Literal["degrade", "crash", "hang"] = "degrade"
    service: str
    version: str | None = None
    instance: str | None = None
    route: str | None = Field(default=None, description="path prefix")
    caller: str | None = None
    lat_ms: float = Field(default=0, ge=0)
    err_rate: float = Field(default=0, ge=0, le=1)
    share: float = Field(default=1, ge=0, le=1, description="share of requests that get the latency")
    revision: int | None = Field(default=None, description="workload revision that carries it (at app)")
    started_at: float = Field(description="when the first request could feel it")
    starting: bool = Field(
        default=False, description="on its way (at app, process): recorded before anything is done"
    )
    expires_at: float | None = None


class Traffic(_Value):
    """How callers reach one service. None means: the default of templates/envoy."""

    split: dict[str, int] = Field(default_factory=dict, description="version -> weight, sums to 100")
    timeout_ms: int | None = None
    retries: int | None = None
    max_connections: int | None = None
    max_pending: int | None = None
    max_requests: int | None = None
    mirror: dict[str, float] = Field(default_factory=dict, description="version -> share 0..1")
    outlier: bool | None = None
    since: float | None = Field(default=None, description="when the last change came into force")
    field_since: dict[str, float] = Field(
        default_factory=dict, description="field -> when it was last changed"
    )


class SplitLease(_Value):
    """The split of a service belongs to somebody who is at work on it (a canary), for as long as they say so.

    The control plane gives the traffic back to `fallback` when it has not heard of them for `lasts_s`:
    whoever was killed cannot. Whoever else sets the split ends the lease. Renewing it changes no intent;
    after a restart of the control plane the time runs anew.
    """

    owner: str = Field(description="made up by whoever holds it")
    by: str = Field(description="what it is for, in words")
    lasts_s: float = Field(gt=0, le=60)
    fallback: dict[str, int] = Field(description="version -> weight, sums to 100")


class Ejection(_Value):
    """An instance that is kept out of load balancing on purpose."""

    instance: str
    reason: str
    by: str
    at: float


class Intent(_Value):
    """The desired state of the mesh, versioned. Changing it makes a new revision; nothing is edited."""

    revision: int = 1
    faults: tuple[Fault, ...] = ()
    traffic: dict[str, Traffic] = Field(default_factory=dict)
    access: dict[str, bool] = Field(
        default_factory=dict, description="'caller>service' -> allowed; absent: what the app file says"
    )
    leases: dict[str, SplitLease] = Field(default_factory=dict, description="by service")
    ejections: tuple[Ejection, ...] = ()
    load_rps: float | None = Field(
        default=None, description="requests/s of each instance that makes load; None: what it starts with"
    )
    traces: str | None = Field(default=None, description="HOST:PORT of the OTLP collector that gets spans")
    certificate_lifetime_s: float | None = Field(
        default=None, description="of each sidecar's certificate; None: as the control plane has it (an hour)"
    )

    @property
    def ejected(self) -> frozenset[str]:
        """The instances that are kept out of load balancing on purpose."""
        return frozenset(ejection.instance for ejection in self.ejections)


class Effect(_Value):
    """What a change of the intent did: in force on `sidecars` sidecars after `effective_ms`."""

    revision: int
    effective_ms: float
    sidecars: int
    unconfirmed: tuple[str, ...] = Field(default=(), description="connected, but did not answer in time")


class WorkloadRevision(_Value):
    """One revision of a workload: what it runs with, and since when."""

    service: str
    version: str
    revision: int
    env: dict[str, str] = Field(default_factory=dict)
    faults: tuple[str, ...] = Field(default=(), description="the faults that it carries")
    base: dict[str, str] | None = Field(
        default=None, description="its env without them, where it carries any"
    )
    created_at: float
    reason: str = ""
    instance: str | None = Field(
        default=None, description="the one instance that runs it, where that had to be made anew for it"
    )
