"""Ingress and HTTPRoute objects -> where the gateway leads. Pure.

Ingresses of the class `meshdemo` are obeyed, and HTTPRoutes whose parent is the Gateway `meshdemo` of the
mesh's namespace; they may name services of the mesh in their own namespace. What cannot be obeyed is said (a
`Problem`), and the rest goes on. Requests for what leads nowhere are answered with 503.

Ingress: https://kubernetes.io/docs/reference/kubernetes-api/service-resources/ingress-v1/
HTTPRoute: https://gateway-api.sigs.k8s.io/reference/spec/#httproute
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from meshdemo.apps.model import App
from meshdemo.control.model import Entry
from meshdemo.kube import Manifest
from meshdemo.names import PREFIX, parted, qualified

CLASS = "meshdemo"
"""The IngressClass, and the Gateway that HTTPRoutes name as their parent."""

CONTROLLER = PREFIX + "gateway"
_OLD_CLASS = "kubernetes.io/ingress.class"  # the annotation of before there were IngressClasses


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with an object. `reason`: for machines; `bad_reference`: it names what is not there."""

    reason: str
    message: str
    bad_reference: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Verdict:
    """An object that is ours to obey, and what is wrong with it."""

    manifest: Manifest
    problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True)
class Entrance:
    """What the objects of a cluster ask for."""

    entries: tuple[Entry, ...] = ()
    ingresses: tuple[Verdict, ...] = ()
    routes: tuple[Verdict, ...] = ()


def translate(
    ingresses: Iterable[Manifest],
    routes: Iterable[Manifest],
    services: Iterable[Manifest],
    app: App,
    home: str,
    ports: Mapping[str, int] = MappingProxyType({}),
) -> Entrance:
    """What these objects ask for, each of the services of its own namespace.

    Args:
        services: the Services there are.
        app: all services of the mesh.
        home: the mesh's namespace.
        ports: by service that was found the port of its name that leads to its first one.
    """
    known = _Known(app, {_named(one["metadata"]["name"], one, home): one for one in services}, home, ports)
    entries: list[Entry] = []
    found: dict[str, list[Verdict]] = {"Ingress": [], "HTTPRoute": []}
    for kind, objects, is_ours, read in (
        ("Ingress", ingresses, _is_ours, _of_ingress),
        ("HTTPRoute", routes, lambda one: bool(_our_parents(one, home)), _of_route),
    ):
        for one in sorted(objects, key=_age):
            if is_ours(one):
                problems: list[Problem] = []
                entries += read(one, known, problems)
                found[kind].append(Verdict(one, tuple(dict.fromkeys(problems))))
    return Entrance(tuple(entries), tuple(found["Ingress"]), tuple(found["HTTPRoute"]))


def _named(name: Any, of: Manifest, home: str) -> str:
    """What the mesh calls a service that an object names."""
    return qualified(str(name), _namespace(of, home), home)


def _namespace(of: Manifest, home: str) -> str:
    return str(of["metadata"].get("namespace") or home)


def _age(one: Manifest) -> tuple[str, str]:
    """Of objects that want the same the older one gets it."""
    return str(one["metadata"].get("creationTimestamp", "")), str(one["metadata"]["name"])


@dataclass(frozen=True, slots=True)
class _Known:
    app: App
    services: Mapping[str, Manifest]  # by what the mesh calls them
    home: str
    ports: Mapping[str, int]

    def backend(self, of: Manifest, named: str, port: int | str | None) -> str | Problem:
        """The backend that an object means, as an Entry has it, or why there is none."""
        name = _named(named, of, self.home)
        service = self.app.services.get(name)
        if service is None:
            where = _namespace(of, self.home)
            there = [other for other in self.app.services if parted(other, self.home)[1] == where]
            return Problem(
                "BackendNotFound",
                f"service '{name}' is not in the mesh; there are: {', '.join(there) or 'none'}",
                True,
            )
        ports = self.services.get(name, {}).get("spec", {}).get("ports") or ()
        protocol, found, by_port = service.protocol, name, ""
        if port is not None and ports:
            first = self.ports.get(name) if service.found else ports[0]["port"]
            further = {one.called: one for one in service.further if not one.part}
            number = next((one["port"] for one in ports if port in (one["port"], one.get("name"))), None)
            if number != first:
                other = further.get(number or 0)
                if other is None:
                    in_mesh = [one for one in ports if one["port"] in (first, *further)]
                    has = ", ".join(
                        str(one["port"]) + f" ({one.get('name')})" * ("name" in one) for one in in_mesh
                    )
                    some = "ports" if len(in_mesh) > 1 else "port"
                    message = f"service '{name}' is in the mesh by its {some} {has or 'none'}, not {port}"
                    return Problem("BackendNotFound", message, True)
                protocol, found, by_port = other.protocol, f"{name}:{other.port}", f" by its port {number}"
        if protocol == "tcp":
            return Problem("UnsupportedProtocol", f"service '{name}' does not speak HTTP{by_port}", True)
        return found


# -- Ingress -----------------------------------------------------------------------------------------------


def _is_ours(ingress: Manifest) -> bool:
    named = ingress.get("spec", {}).get("ingressClassName")
    return bool((named or ingress["metadata"].get("annotations", {}).get(_OLD_CLASS)) == CLASS)


def _of_ingress(ingress: Manifest, known: _Known, problems: list[Problem]) -> Iterator[Entry]:
    spec = ingress.get("spec", {})
    if spec.get("tls"):
        problems.append(Problem("TLSIgnored", "this gateway speaks HTTP without TLS; `tls` has no effect"))
    for rule in spec.get("rules") or ():
        for path in (rule.get("http") or {}).get("paths") or ():
            where = path.get("path") or "/"
            if not where.startswith("/"):
                problems.append(Problem("InvalidPath", f"path '{where}' does not start with '/'"))
                continue
            yield Entry(
                host=rule.get("host") or "*",
                path=where,
                exact=path.get("pathType") == "Exact",
                backends=_ingress_backend(ingress, path.get("backend") or {}, known, problems),
            )
    if spec.get("defaultBackend"):
        yield Entry(default=True, backends=_ingress_backend(ingress, spec["defaultBackend"], known, problems))


def _ingress_backend(
    ingress: Manifest, backend: Mapping[str, Any], known: _Known, problems: list[Problem]
) -> dict[str, int]:
    service = backend.get("service")
    if not service:
        problems.append(Problem("UnsupportedBackend", "a backend must be a service"))
        return {}
    port = service.get("port") or {}
    found = known.backend(ingress, str(service.get("name")), port.get("number") or port.get("name"))
    if isinstance(found, Problem):
        problems.append(found)
        return {}
    return {found: 1}


def load_balancer(services: Iterable[Manifest]) -> list[dict[str, str]]:
    """Where the gateway is, for the status of Ingresses: as its own Service says, else that one's address."""
    for one in services:
        if one["metadata"]["name"] == "gateway":
            published = (one.get("status", {}).get("loadBalancer") or {}).get("ingress") or []
            address = one.get("spec", {}).get("clusterIP", "None")
            fallback = [{"ip": address}] if address not in ("None", "") else []
            return [
                {key: str(at[key]) for key in ("ip", "hostname") if at.get(key)} for at in published
            ] or fallback
    return []


def ingress_status(ingress: Manifest, at: Sequence[Mapping[str, str]]) -> dict[str, Any] | None:
    """The status that an Ingress should have; None if it has it."""
    now = (ingress.get("status", {}).get("loadBalancer") or {}).get("ingress") or []
    bare = [{key: one[key] for key in ("ip", "hostname") if one.get(key)} for one in now]
    return None if bare == list(at) else {"loadBalancer": {"ingress": [dict(one) for one in at]}}


# -- HTTPRoute ---------------------------------------------------------------------------------------------


def _our_parents(route: Manifest, home: str) -> list[dict[str, Any]]:
    return [
        parent
        for parent in route.get("spec", {}).get("parentRefs") or ()
        if parent.get("name") == CLASS
        and parent.get("kind", "Gateway") == "Gateway"
        and parent.get("namespace", _namespace(route, home)) == home
    ]


def _of_route(route: Manifest, known: _Known, problems: list[Problem]) -> Iterator[Entry]:
    spec = route.get("spec", {})
    for rule in spec.get("rules") or ():
        backends = _route_backends(route, rule, known, problems)
        for match in rule.get("matches") or [{}]:
            unsupported = _unsupported(match)
            if unsupported:
                problems.append(Problem("UnsupportedValue", unsupported))
                continue
            path = match.get("path") or {}
            for host in spec.get("hostnames") or ["*"]:
                yield Entry(
                    host=host,
                    path=path.get("value") or "/",
                    exact=path.get("type") == "Exact",
                    method=match.get("method"),
                    headers=tuple(
                        (header["name"].lower(), header["value"]) for header in match.get("headers") or ()
                    ),
                    backends=backends,
                )


def _unsupported(match: Mapping[str, Any]) -> str:
    kinds = [match.get("path") or {}, *(match.get("headers") or ())]
    if any(one.get("type") == "RegularExpression" for one in kinds):
        return "this gateway matches no regular expressions"
    return "this gateway matches no query parameters" if match.get("queryParams") else ""


def _route_backends(
    route: Manifest, rule: Mapping[str, Any], known: _Known, problems: list[Problem]
) -> dict[str, int]:
    named = rule.get("backendRefs") or ()
    filters = [*(rule.get("filters") or ()), *(f for one in named for f in one.get("filters") or ())]
    if filters:
        # What a filter should do must not be left out in silence (a redirect, a header that is to go).
        kinds = ", ".join(str(one.get("type")) for one in filters)
        problems.append(Problem("UnsupportedValue", f"this gateway has no filters: {kinds}"))
        return {}
    if rule.get("timeouts"):
        problems.append(Problem("UnsupportedValue", "`timeouts` has no effect; see `meshdemo traffic set`"))
    backends: dict[str, int] = {}
    where = _namespace(route, known.home)
    for one in named:
        if one.get("kind", "Service") != "Service" or one.get("group"):
            problems.append(
                Problem("InvalidKind", f"a backend must be a Service, not {one.get('kind')}", True)
            )
            continue
        if one.get("namespace", where) != where:
            message = f"service '{one['name']}' is in another namespace: {one['namespace']}"
            problems.append(Problem("RefNotPermitted", message, True))
            continue
        found = known.backend(route, str(one.get("name")), one.get("port"))
        if isinstance(found, Problem):
            problems.append(found)
        else:
            backends[found] = backends.get(found, 0) + int(one.get("weight", 1))
    return backends


def route_status(verdict: Verdict, home: str, now: str) -> dict[str, Any] | None:
    """The status that an HTTPRoute should have; None if it has it.

    Args:
        home: the mesh's namespace.
        now: RFC 3339.
    """
    route = verdict.manifest
    before = route.get("status", {}).get("parents") or []
    ours = [
        {
            "parentRef": parent,
            "controllerName": CONTROLLER,
            "conditions": _conditions(verdict, before, parent, now),
        }
        for parent in _our_parents(route, home)
    ]
    mine = [one for one in before if one.get("controllerName") == CONTROLLER]
    if mine == ours:
        return None
    return {"parents": [*(one for one in before if one.get("controllerName") != CONTROLLER), *ours]}


def _conditions(
    verdict: Verdict, before: Iterable[Mapping[str, Any]], parent: Mapping[str, Any], now: str
) -> list[dict[str, Any]]:
    rejected = [one for one in verdict.problems if not one.bad_reference]
    unresolved = [one for one in verdict.problems if one.bad_reference]
    former = {
        one["type"]: one
        for of in before
        if of.get("controllerName") == CONTROLLER and of.get("parentRef") == parent
        for one in of.get("conditions") or ()
    }
    made = []
    for kind, problems, well in (
        ("Accepted", rejected, "Accepted"),
        ("ResolvedRefs", unresolved, "ResolvedRefs"),
    ):
        condition = {
            "type": kind,
            "status": "False" if problems else "True",
            "reason": problems[0].reason if problems else well,
            "message": "; ".join(one.message for one in problems)[:32768],
            "observedGeneration": verdict.manifest["metadata"].get("generation", 0),
            "lastTransitionTime": now,
        }
        old = former.get(kind)
        if old is not None and old.get("status") == condition["status"]:
            condition["lastTransitionTime"] = old.get("lastTransitionTime", now)
        made.append(condition)
    return made
