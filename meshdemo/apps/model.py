"""What an app file may say, and what it means.

An app is a set of services; a service has versions, each a workload. The file is data written by people,
so it is validated whole (pydantic) before anything is started.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

NAME_PATTERN = r"^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$"
PATH_PATTERN = r"^/"

# RFC 1123 label: service names become DNS names and parts of SPIFFE paths.
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
Protocol = Literal["http", "grpc", "tcp"]
Spoken = Literal["http", "grpc", "tcp", "any"]
"""What a port speaks; `any` where that is found out by looking at each connection."""

OTHER = "other"
"""The name of the route that takes what no declared route takes."""

GATEWAY = "gateway"
"""The caller that is the mesh's edge. No service of an app has this name."""


# The programs that honour LAT_MS and ERR_RATE (meshdemo.workloads.breakable).
_BREAKABLE = {"service_b", "emojivoto.web", "emojivoto.emoji", "emojivoto.voting"}


class Misplaced(ValueError):
    """Something wrong with the app as a whole, and the path of keys to where it stands in the file."""

    def __init__(self, message: str, *path: str | int) -> None:
        super().__init__(message)
        self.path = path


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Route(_Strict):
    """A named group of requests of a service, told apart by path (and method where given).

    For gRPC the path is `/package.Service/Method`.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_.\-]{1,60}$")
    path: str | None = Field(default=None, pattern=PATH_PATTERN, description="exact path")
    prefix: str | None = Field(default=None, pattern=PATH_PATTERN, description="path prefix")
    method: str | None = None

    @model_validator(mode="after")
    def _one_of(self) -> Route:
        if (self.path is None) == (self.prefix is None):
            raise ValueError("a route has either a path or a prefix")
        return self


class Workload(_Strict):
    """One program at one version with N instances.

    `program` names a module of `meshdemo.workloads`; `command` runs anything else on the local runtime
    (it gets HOST and PORT in its environment); `image` is what Kubernetes runs where `program` is not set.
    """

    program: str | None = None
    command: list[str] | None = None
    image: str | None = None
    instances: int = Field(default=1, ge=0, le=1000)
    env: dict[str, str] = Field(default_factory=dict)
    initial: bool = Field(default=True, description="started by `up`; false: only with --version")
    faults: bool | None = Field(
        default=None,
        description="it honours LAT_MS (ms) and ERR_RATE (0 to 1) in its environment, so that "
        "`fault --at app` can break it; null: so it is if it is a built-in program that does",
    )

    @property
    def honours_faults(self) -> bool:
        """Whether LAT_MS and ERR_RATE in its environment make it slow and faulty."""
        return self.program in _BREAKABLE if self.faults is None else self.faults

    @model_validator(mode="after")
    def _something_to_run(self) -> Workload:
        if not (self.program or self.command or self.image):
            raise ValueError("a workload needs a program, a command or an image")
        return self


def further_key(port: int, part: str = "") -> str:
    """What tells a way to a service's instances from its others: the port, and whose instances alone."""
    return f"{port}/{part}" if part else str(port)


class FurtherPort(_Strict):
    """A port of a service's instances that is in the mesh besides its first one, under the same name."""

    port: int = Field(ge=1, le=65535)
    called: int = Field(ge=1, le=65535, description="what callers call it by")
    protocol: Protocol = "http"
    detect: bool = Field(default=False, description="as `Found.detect`")
    grpc_probe: bool = Field(default=False, description="as `Found.grpc_probe`")
    open_paths: dict[str, list[Literal["GET"]]] = Field(default_factory=dict)
    part: str = Field(
        default="", description="the way to it of this Service, which leads to some of the instances alone"
    )

    @property
    def key(self) -> str:
        """What tells it from the service's others."""
        return further_key(self.port, self.part)

    @property
    def spoken(self) -> Spoken:
        """What it speaks."""
        return "any" if self.detect else self.protocol


class Found(_Strict):
    """What the cluster shows of a service that no app file declares."""

    detect: bool = Field(
        default=False,
        description="nothing says what its port speaks: each connection is looked at, and passes as HTTP "
        "(or gRPC) if it is that, else as bytes",
    )
    grpc_probe: bool = Field(default=False, description="the kubelet asks by gRPC's health protocol")
    ports: tuple[FurtherPort, ...] = Field(default=(), description="besides the first")
    aside: tuple[int, ...] = Field(default=(), description="its pods' other ports, which are not in the mesh")


class Service(_Strict):
    """The name others call; its workloads are its versions."""

    port: int = Field(ge=1, le=65535)
    protocol: Protocol = "http"
    calls: list[Name] = Field(default_factory=list, description="services this one may call")
    routes: list[Route] = Field(default_factory=list)
    healthz: str = "/healthz"
    metrics: str | None = "/metrics"
    # Paths a non-mesh client (kubelet, Prometheus, the CLI) may reach in plain text, by exact path.
    # They prove no identity, so nothing is to be changed there: GET alone.
    open_paths: dict[str, list[Literal["GET"]]] = Field(
        default_factory=dict, description="exact path -> methods, besides GET of healthz and metrics"
    )
    load: bool = Field(default=False, description="its instances make load and answer GET/PUT /load")
    keeps: bool = Field(
        default=False,
        description="what its instances write to STATE_DIR must outlive them; on Kubernetes they share it",
    )
    versions: dict[Name, Workload] = Field(min_length=1)
    found: Found | None = Field(default=None, description="of a service that is not declared")

    @property
    def spoken(self) -> Spoken:
        """What its port, the first where there are more, speaks."""
        return "any" if self.found is not None and self.found.detect else self.protocol

    @property
    def further(self) -> tuple[FurtherPort, ...]:
        """Its other ports."""
        return self.found.ports if self.found is not None else ()

    @property
    def without_requests(self) -> bool:
        """Whether all its ports carry bytes, and none requests."""
        return {self.protocol, *(one.protocol for one in self.further)} == {"tcp"}


class App(_Strict):
    """What runs in the mesh."""

    name: Name
    front: Name = Field(description="the service that the gateway leads to")
    services: dict[Name, Service] = Field(min_length=1)

    @model_validator(mode="after")
    def _routes_are_told_apart(self) -> App:
        for name, service in self.services.items():
            names = [route.name for route in service.routes]
            for index, one in enumerate(names):
                place = ("services", name, "routes", index, "name")
                if one == OTHER:
                    raise Misplaced(
                        f"{name}: a route may not be named '{OTHER}': that is what no route takes", *place
                    )
                if one in names[:index]:
                    raise Misplaced(f"{name}: two routes are named '{one}'", *place)
        return self

    @model_validator(mode="after")
    def _names_exist(self) -> App:
        known = ", ".join(self.services)
        if GATEWAY in self.services:
            raise Misplaced(
                f"'{GATEWAY}' is the name of the mesh's own gateway; call the service otherwise",
                "services", GATEWAY,
            )  # fmt: skip
        if self.front not in self.services:
            raise Misplaced(f"front: no service '{self.front}'; there are: {known}", "front")
        for name, service in self.services.items():
            for index, callee in enumerate(service.calls):
                if callee not in self.services:
                    raise Misplaced(
                        f"{name}: calls unknown service '{callee}'; there are: {known}",
                        "services", name, "calls", index,
                    )  # fmt: skip
        return self
