"""Who is there: the mesh as the API server shows it, from copies of what is watched."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterable

from meshdemo.apps.model import GATEWAY, App
from meshdemo.control import ingress
from meshdemo.control.discovered import account_of, instance_of, namespace_of
from meshdemo.control.kubernetes.kept import SPEC
from meshdemo.control.kubernetes.reflector import Reflector
from meshdemo.control.kubernetes.state import mesh_state
from meshdemo.control.model import Instance, MeshState
from meshdemo.kube import Cluster, Manifest
from meshdemo.names import MESH, SERVICE

_ABSENT_S = 30.0  # until a kind that the cluster did not have is looked for again


class _Surroundings:
    """What is watched of a namespace besides its pods."""

    def __init__(self, make: Callable[..., Reflector], namespace: str) -> None:
        # Of injected pods, the Services are not ours and carry no label of ours.
        self.slices = make("EndpointSlice", namespace)
        self.services = make("Service", namespace)
        self.ingresses = make("Ingress", namespace)
        self.http_routes = make("HTTPRoute", namespace, absent_pause_s=_ABSENT_S)
        self.reflectors = (self.slices, self.services, self.ingresses, self.http_routes)

    def start(self) -> None:
        for reflector in self.reflectors:
            reflector.start()

    def stop(self) -> None:
        for reflector in self.reflectors:
            reflector.stop()

    @property
    def listed(self) -> bool:
        return all(reflector.listed.is_set() for reflector in self.reflectors)


class Source:
    """The mesh as the API server shows it, whenever it changes.

    Pods of the mesh are looked for everywhere, since anybody may inject theirs; all else is watched in the
    mesh's own namespace, and in others for as long as there are pods of the mesh in them.
    """

    def __init__(self, cluster: Cluster, mesh: str, namespace: str) -> None:
        self._mesh, self._namespace = mesh, namespace
        self._loop: asyncio.AbstractEventLoop | None = None
        self._event = asyncio.Event()

        def reflector(
            kind: str,
            within: str | None,
            *,
            labels: str = "",
            fields: str = "",
            absent_pause_s: float | None = None,
        ) -> Reflector:
            return Reflector(
                cluster, kind, within, self._changed, labels=labels, fields=fields,
                absent_pause_s=absent_pause_s,
            )  # fmt: skip

        self._pods = reflector("Pod", None, labels=f"{MESH}={mesh},{SERVICE}")
        self._spec = reflector("ConfigMap", namespace, fields=f"metadata.name={SPEC}")
        self._make = reflector
        self._around = {namespace: _Surroundings(reflector, namespace)}
        self._looking = threading.Lock()  # the loop and the API's threads ask for the mesh
        self._complete = False
        self.entrance = ingress.Entrance()

    async def start(self) -> MeshState:
        """Start watching; the mesh as it is once everything was listed."""
        self._loop = asyncio.get_running_loop()
        self._pods.start()
        self._spec.start()
        self._around[self._namespace].start()
        while (state := self.mesh()) is None:
            await self.change()
        return state

    def stop(self) -> None:
        """Stop watching."""
        for around in self._around.values():
            around.stop()
        self._pods.stop()
        self._spec.stop()

    def mesh(self) -> MeshState | None:
        """The mesh now; None while not everything was listed, or the app is not written down yet."""
        if not (self._pods.listed.is_set() and self._spec.listed.is_set()):
            return None
        surroundings = self._look_around()
        listed = {name: around for name, around in surroundings.items() if around.listed}
        # At first nobody may be missing: whoever was there before would be taken for gone. Later on, a new
        # namespace keeps nobody waiting.
        if not self._complete and len(listed) < len(surroundings):
            return None
        app = app_of(self._spec.objects)
        if app is None:
            return None
        self._complete = True
        services = [one for around in listed.values() for one in around.services.objects]
        state = mesh_state(
            self._mesh,
            self._namespace,
            app,
            [pod for pod in self._pods.objects if namespace_of(pod, self._namespace) in listed],
            [one for around in listed.values() for one in around.slices.objects],
            services,
        )
        self.entrance = ingress.translate(
            [one for around in listed.values() for one in around.ingresses.objects],
            [one for around in listed.values() for one in around.http_routes.objects],
            services,
            state.app,
            self._namespace,
            state.ports,
        )
        return state.model_copy(update={"entries": self.entrance.entries})

    def _look_around(self) -> dict[str, _Surroundings]:
        """Watch the namespaces that have pods of the mesh, and no others."""
        with self._looking:
            wanted = {self._namespace, *(namespace_of(pod, self._namespace) for pod in self._pods.objects)}
            for gone in self._around.keys() - wanted:
                self._around.pop(gone).stop()
            for new in wanted - self._around.keys():
                self._around[new] = _Surroundings(self._make, new)
                self._around[new].start()
            return dict(self._around)

    def guests(self) -> set[str]:
        """The namespaces with pods that were injected."""
        app = app_of(self._spec.objects)
        ours = {GATEWAY, *(app.services if app else ())}
        return {
            namespace
            for pod in self._pods.objects
            if (namespace := namespace_of(pod, self._namespace)) != self._namespace
            or pod["metadata"]["labels"].get(SERVICE) not in ours
        }

    async def change(self) -> None:
        """Returns when something has changed since the last call."""
        await self._event.wait()
        # What one cause changes (a rollout, a deleted pod) comes as several events: take them together.
        await asyncio.sleep(0.01)
        self._event.clear()

    @property
    def services(self) -> list[Manifest]:
        """The Services of the mesh's namespace."""
        return self._around[self._namespace].services.objects

    @property
    def spec(self) -> Manifest | None:
        """The ConfigMap that holds the mesh's spec."""
        return next(iter(self._spec.objects), None)

    def user(self, instance: Instance, pod: Manifest) -> str:
        """As whom (a service account) a pod must run to be this instance.

        A declared service has an account of its own, so that nobody is it who merely labels a pod so.
        Injected pods run under whatever account they had.
        """
        app = app_of(self._spec.objects)
        declared = instance.service == GATEWAY or (app is not None and instance.service in app.services)
        account = instance.service if declared else account_of(pod)
        return f"system:serviceaccount:{namespace_of(pod, self._namespace)}:{account}"

    def pod(self, instance: str) -> Manifest | None:
        """The pod of an instance."""
        return next(
            (pod for pod in self._pods.objects if instance_of(pod, self._namespace) == instance), None
        )

    def _changed(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._event.set)


def app_of(configmaps: Iterable[Manifest]) -> App | None:
    """The app that the spec's ConfigMap holds; None if it holds none that makes sense."""
    for one in configmaps:
        try:
            return App.model_validate(json.loads(one["data"]["spec.json"])["app"])
        except (KeyError, TypeError, ValueError):
            continue
    return None
