"""The route tables of an instance: its service's declared routes, cut up where faults meet a part. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from meshdemo.apps.model import OTHER, FurtherPort, Route, Service, Spoken
from meshdemo.control.model import Fault


@dataclass(frozen=True, slots=True)
class Degradation:
    """What the sidecar does to requests: latency for a share of them, an error for a share of them."""

    lat_ms: float
    share: float
    err_rate: float


@dataclass(frozen=True, slots=True)
class InboundRoute:
    """One entry of an instance's route table; the first that matches a request takes it."""

    name: str
    kind: str  # "path" (exact) or "prefix"
    path: str
    method: str | None = None
    caller: str | None = None  # SPIFFE identity
    fault: Degradation | None = None
    # Only requests whose random number is below this share are taken; Envoy draws one number for a request
    # and compares it with every entry's share. 1: all of them.
    below: float = 1.0


def combine(faults: Iterable[Fault]) -> list[tuple[float, Degradation | None]]:
    """Several faults on the same requests, as parts of these: (share of them up to here, what they meet).

    Faults strike independently. Of the latencies that strike a request the longest counts, so where several
    have shares, requests are told apart: those with the longest latency first, and those with none at last.
    """
    faults = list(faults)
    spared = 1.0
    for fault in faults:
        spared *= 1 - fault.err_rate
    err_rate = round(1 - spared, 6)
    slow = sorted((one for one in faults if one.lat_ms and one.share), key=lambda one: -one.lat_ms)
    # What comes below a latency that all requests get never counts.
    last = next((number for number, one in enumerate(slow) if one.share == 1), len(slow))
    slow = slow[: last + 1]
    if len(slow) <= 1:
        lat_ms, share = (slow[0].lat_ms, slow[0].share) if slow else (0.0, 1.0)
        return [(1.0, Degradation(lat_ms, share, err_rate) if lat_ms or err_rate else None)]
    parts: list[tuple[float, Degradation | None]] = []
    quick = 1.0
    for one in slow:
        quick *= 1 - one.share
        parts.append((round(1 - quick, 6), Degradation(one.lat_ms, 1.0, err_rate)))
    if quick:
        parts.append((1.0, Degradation(0.0, 1.0, err_rate) if err_rate else None))
    return parts


def declared_routes(service: Service) -> list[Route]:
    """The service's routes, exact paths first and longer prefixes before shorter, and the rest."""
    ordered = sorted(
        service.routes,
        key=lambda route: (route.path is None, -len(route.prefix or ""), route.method is None),
    )
    return [*ordered, Route(name=OTHER, prefix="/")]


@dataclass(frozen=True, slots=True)
class Served:
    """A port of a service, as its sidecars and its callers have it."""

    number: int  # the instances'
    key: str  # of a further one
    spoken: Spoken
    routes: tuple[Route, ...]
    of: Service | FurtherPort

    @property
    def suffix(self) -> str:
        """What its clusters and route tables are called besides the service; '' for the first port."""
        return f"/{self.key}" if self.key else ""

    @property
    def within(self) -> str:
        """What the listeners, route tables and clusters of its own instances are called besides."""
        return f":{self.key}" if self.key else ""

    @property
    def part(self) -> bool:
        """Whether this is but a way to some of the instances."""
        return isinstance(self.of, FurtherPort) and bool(self.of.part)


def served(service: Service) -> tuple[Served, ...]:
    """The ports of a service, the first one first. All that comes by another is one route, called like it."""
    declared = tuple(declared_routes(service))

    def routes(port: FurtherPort) -> tuple[Route, ...]:
        # A way to some of the instances is no route of its own: they do not know of it.
        return declared if port.port == service.port else (Route(name=f"port-{port.called}", prefix="/"),)

    first = Served(service.port, "", service.spoken, declared, service)
    return (
        first,
        *(Served(one.port, one.key, one.spoken, routes(one), one) for one in service.further),
    )


def inbound_routes(
    routes: Iterable[Route], faults: Sequence[Fault], identity: Callable[[str], str]
) -> list[InboundRoute]:
    """The route table of an instance that these faults apply to, from its declared routes.

    A fault on a path prefix or a caller splits the routes that it meets; each part keeps its route's name, so
    that signals by route stay whole.
    """
    table: list[InboundRoute] = []
    for route in routes:
        for kind, path in _parts(route, faults):
            meeting = [fault for fault in faults if path.startswith(fault.route or "/")]
            anyone = [fault for fault in meeting if fault.caller is None]
            for caller in dict.fromkeys(fault.caller for fault in meeting if fault.caller):
                its = [*anyone, *(fault for fault in meeting if fault.caller == caller)]
                table += [
                    InboundRoute(route.name, kind, path, route.method, identity(caller), fault, below)
                    for below, fault in combine(its)
                ]
            table += [
                InboundRoute(route.name, kind, path, route.method, None, fault, below)
                for below, fault in combine(anyone)
            ]
    return table


def _parts(route: Route, faults: Sequence[Fault]) -> list[tuple[str, str]]:
    """A route as (kind, path), and before it the parts that faults on a longer prefix cut out of it."""
    if route.path is not None:
        return [("path", route.path)]
    prefix = route.prefix or "/"
    longer = {
        fault.route
        for fault in faults
        if fault.route and fault.route != prefix and fault.route.startswith(prefix)
    }
    return [("prefix", path) for path in (*sorted(longer, key=lambda path: (-len(path), path)), prefix)]
