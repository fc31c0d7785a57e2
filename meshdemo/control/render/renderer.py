"""Puts together what each sidecar should have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from envoy.service.runtime.v3.rtds_pb2 import Runtime

from meshdemo.apps.model import App
from meshdemo.control import xds
from meshdemo.control.intent import callers
from meshdemo.control.model import Instance, Intent, MeshState, Traffic
from meshdemo.control.render import edge, inbound, outbound, redirected
from meshdemo.control.render.cache import Cache
from meshdemo.control.render.inbound import ServiceParts
from meshdemo.control.render.outbound import Shared
from meshdemo.control.render.split import serving
from meshdemo.resources import TEMPLATES

_DEFAULT = Traffic()


class Renderer:
    """Renders snapshots; remembers what it rendered for as long as it is in use."""

    def __init__(self, templates: Path = TEMPLATES / "envoy", load_token: str | None = None) -> None:
        """`load_token`: who shows it may set the load of instances that make load; None: nobody."""
        self._load_token = load_token
        self._cache = Cache(templates)
        self._app: App | None = None

    def snapshots(self, mesh: MeshState, intent: Intent, *, tap: bool = False) -> dict[str, xds.Snapshot]:
        """What each instance's sidecar should have, by instance id; secrets are not in it.

        Raises:
            jinja2.TemplateError, yaml.YAMLError, json_format.ParseError: a template is broken.
        """
        # The runtime reports the same app again and again: as one object it is a cheap key.
        if self._app is None or mesh.app != self._app:
            self._app = mesh.app
        with self._cache.generation():
            return self._snapshots(mesh.model_copy(update={"app": self._app}), intent, tap)

    def _snapshots(self, mesh: MeshState, intent: Intent, tap: bool) -> dict[str, xds.Snapshot]:
        cache, traces = self._cache, intent.traces
        traffic = {name: intent.traffic.get(name, _DEFAULT) for name in mesh.app.services}
        splits, versions = serving(mesh, traffic, {ejection.instance for ejection in intent.ejections})
        shared = Shared(
            runtime=cache.bundle(xds.RUNTIME, [cache.made("runtime", Runtime, tap=tap)]),
            clusters=outbound.clusters(cache, mesh, versions, traffic, traces),
            endpoints=outbound.endpoints(cache, mesh, versions),
            routes=outbound.routes(cache, mesh, versions, splits, traffic),
            listeners=redirected.shared(cache, mesh, versions, splits, traces) if mesh.addresses else (),
        )
        services = self._services(mesh, intent)
        mirrors = {name: outbound.mirrors(rules) for name, rules in traffic.items()}
        found = {
            one.id: self._snapshot(shared, services[one.service], one, one.version in mirrors[one.service])
            for one in mesh.instances
        }
        if mesh.gateways:
            table = edge.routes(cache, mesh, versions, splits, traffic)
            found |= {one.id: edge.snapshot(cache, mesh, one, shared, table, traces) for one in mesh.gateways}
        return found

    def _services(self, mesh: MeshState, intent: Intent) -> Mapping[str, ServiceParts]:
        allowed = callers(intent, mesh)
        return {
            name: inbound.service_parts(
                self._cache,
                mesh,
                service,
                allowed=tuple(allowed.get(name, ())),
                faults=tuple(one for one in intent.faults if one.at == "mesh" and one.service == name),
                traced=None if intent.traces is None else name,
                load_token=self._load_token,
            )
            for name, service in mesh.app.services.items()
        }

    def _snapshot(self, shared: Shared, of: ServiceParts, instance: Instance, mirrored: bool) -> xds.Snapshot:
        routes = inbound.routes(self._cache, of, instance, mirrored=mirrored)
        # Asked for each time, so that they are still known when all else of the snapshot changes.
        own = self._own_listeners(shared, of, instance)
        endpoints = self._own_endpoints(shared, of, instance)
        return self._cache.once(
            ("snapshot", instance.id, shared, of, own, endpoints, routes),
            lambda: _assembled(shared, of, own, endpoints, routes),
        )

    def _own_listeners(self, shared: Shared, of: ServiceParts, instance: Instance) -> xds.Bundle:
        """The listeners that are the instance's own, or its service's."""
        if shared.listeners:
            return redirected.own(self._cache, of, instance.app_port)
        where = (instance.host, instance.inbound_port, instance.outbound_port, instance.metrics_port)
        return self._cache.once(
            ("own listeners", of.listeners, where),
            lambda: self._cache.interned(xds.LISTENERS, of.listeners.at(instance)),
        )

    def _own_endpoints(self, shared: Shared, of: ServiceParts, instance: Instance) -> xds.Bundle:
        """The endpoints of the app beside the sidecar."""
        cache = self._cache
        found = of.service.found if shared.listeners else None
        aside = found.aside if found else ()
        return cache.bundle(
            xds.ENDPOINTS,
            [
                cache.endpoints("app", ((instance.app_host, instance.app_port),)),
                *(
                    cache.endpoints(f"app:{one.port}", ((instance.app_host, one.port),))
                    for one in (found.ports if found else ())
                    if not one.part
                ),
                *(cache.endpoints(f"aside:{port}", ((instance.app_host, port),)) for port in aside),
            ],
        )


def _assembled(
    shared: Shared, of: ServiceParts, own: xds.Bundle, endpoints: xds.Bundle, routes: xds.Bundle
) -> xds.Snapshot:
    return {
        xds.RUNTIME: (shared.runtime,),
        xds.CLUSTERS: (shared.clusters, of.app),
        xds.ENDPOINTS: (shared.endpoints, endpoints),
        xds.LISTENERS: (*shared.listeners, own),
        xds.ROUTES: (shared.routes, routes),
    }
