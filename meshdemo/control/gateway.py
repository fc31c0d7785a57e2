"""Where the gateway leads: hosts and paths from outside -> services of the mesh. Pure.

Without anything said, everything goes to the app's front. Entries (on Kubernetes: Ingress and HTTPRoute) take
requests before that, by host, path, method and headers. A host that entries name belongs to them alone: what
they do not know there is answered with 404 and the paths that they know.

A service's declared routes are kept apart within an entry: signals by route are the same whoever calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from meshdemo.apps.model import GATEWAY, App, Route
from meshdemo.control.model import Entry, MeshState

_MAX_BODY = 3500  # bytes; Envoy's limit of such an answer is 4096


@dataclass(frozen=True, slots=True)
class GatewayRoute:
    """One entry of the gateway's table; the first that matches a request takes it."""

    name: str
    kind: str  # "path" (exact), "prefix" (of the text), or "path_separated_prefix" (of whole segments)
    path: str
    method: str | None
    headers: tuple[tuple[str, str], ...]
    backends: tuple[tuple[str, int], ...]  # as an Entry names them, weight; none: there is nobody to answer


@dataclass(frozen=True, slots=True)
class GatewayHost:
    """What the gateway does with requests for one host; `unknown`: what is said when no route takes one."""

    name: str
    routes: tuple[GatewayRoute, ...]
    unknown: str


def hosts(mesh: MeshState, declared: Mapping[str, Sequence[Route]]) -> list[GatewayHost]:
    """The gateway's table. `declared`: the routes of each backend, in the order in which they are tried; whom
    it does not know cannot be led to."""
    app = mesh.app
    rest = [entry for entry in mesh.entries if entry.default]
    by_host: dict[str, list[Entry]] = {}
    for entry in mesh.entries:
        if not entry.default:
            by_host.setdefault(entry.host.lower(), []).append(entry)
    anywhere = [*by_host.pop("*", ()), *(rest or _front(app))]
    return [
        _host(name, entries, declared)
        for name, entries in [*((name, [*its, *rest]) for name, its in by_host.items()), ("*", anywhere)]
    ]


def leads_to(mesh: MeshState) -> set[str]:
    """The services that the gateway sends requests to: it may call them, unless somebody says otherwise."""
    if not mesh.gateways:
        return set()
    named = {service_of(backend) for entry in mesh.entries for backend in entry.backends}
    return ({mesh.app.front} | named) & mesh.app.services.keys()


def pairs(mesh: MeshState) -> set[str]:
    """The same as `caller>service`."""
    return {f"{GATEWAY}>{service}" for service in leads_to(mesh)}


def service_of(backend: str) -> str:
    """The service of a backend, which may name one of its further ports."""
    return backend.partition(":")[0]


def _front(app: App) -> list[Entry]:
    front = app.services.get(app.front)
    return [Entry(backends={app.front: 1})] if front is not None and front.protocol != "tcp" else []


def _host(name: str, entries: Sequence[Entry], declared: Mapping[str, Sequence[Route]]) -> GatewayHost:
    routes: list[GatewayRoute] = []
    for entry in sorted(entries, key=_rank):
        backends = tuple(
            (backend, weight) for backend, weight in entry.backends.items() if weight and backend in declared
        )
        routes += _routes(entry, backends, declared.get(backends[0][0], ()) if backends else ())
    return GatewayHost(name, tuple(routes), _unknown(name, entries))


def _rank(entry: Entry) -> tuple[bool, bool, int, bool, int]:
    """Exact paths first, longer ones before shorter, and the more that is asked of a request the sooner
    (https://gateway-api.sigs.k8s.io/reference/spec/#httprouterule); the order given decides what is equal."""
    return entry.default, not entry.exact, -len(entry.path), entry.method is None, -len(entry.headers)


def _routes(
    entry: Entry, backends: tuple[tuple[str, int], ...], declared: Sequence[Route]
) -> Iterator[GatewayRoute]:
    """An entry, cut up by the declared routes of the service that it leads to."""
    path = entry.path if entry.exact else entry.path.rstrip("/")

    def route(name: str, kind: str, of: str, method: str | None) -> GatewayRoute:
        return GatewayRoute(name, kind, of, entry.method or method, entry.headers, backends)

    whole = ("path", path) if entry.exact else ("path_separated_prefix", path) if path else ("prefix", "/")
    for one in declared:
        if entry.method and one.method and entry.method != one.method:
            continue
        if entry.exact:
            covers, within = _matches(one, path), False
        else:
            within = _below(one.path or one.prefix or "/", path)
            covers = one.path is None and (path or "/").startswith(one.prefix or "/")
        if within and not covers:
            yield route(one.name, "path" if one.path else "prefix", one.path or one.prefix or "/", one.method)
        elif covers:
            yield route(one.name, *whole, one.method)
            if one.method is None:
                return
    yield route("other", *whole, None)


def _matches(route: Route, path: str) -> bool:
    return route.path == path if route.path is not None else path.startswith(route.prefix or "/")


def _below(path: str, prefix: str) -> bool:
    """Is a path (or all that begins with it) below a prefix, as whole segments count?"""
    return path == prefix or path.startswith(f"{prefix}/")


def _unknown(host: str, entries: Sequence[Entry]) -> str:
    """What a request is told that nothing takes."""
    known = ", ".join(dict.fromkeys(entry.path for entry in entries)) or "none"
    of = "this gateway" if host == "*" else host
    text = f"nothing here by this path; paths of {of}: {known}"
    return f"{text[:_MAX_BODY]} ...\n" if len(text) > _MAX_BODY else f"{text}\n"
