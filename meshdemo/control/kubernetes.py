"""The control plane's side of Kubernetes: who is there, whose token this is, and where things are kept.

A reflector keeps a copy of the objects of one kind (list, watch, list again). Pods, EndpointSlices and
Services together are the instances of the mesh (`mesh_state`, pure). What the control plane must not forget
stands in ConfigMaps and a Secret; none of it is in the pod, which may go at any moment.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import json
import logging
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from meshdemo.apps.model import GATEWAY, App
from meshdemo.control import ingress
from meshdemo.control.discovered import account_of, discover, instance_of, namespace_of, version_of
from meshdemo.control.intent import Overtaken
from meshdemo.control.model import Instance, Intent, MeshState
from meshdemo.errors import Failed, MeshdemoError
from meshdemo.files import write_atomic
from meshdemo.kube import ApiError, Cluster, Manifest
from meshdemo.names import (
    AUDIENCE,
    COMPONENT,
    GATEWAY_PORT,
    MESH,
    PLAIN_PORT,
    PROXY_PORT,
    REVISION,
    SERVICE,
    handout,
    qualified,
)

log = logging.getLogger(__name__)

_RESYNC_S = 300.0
_ABSENT_S = 30.0  # until a kind that the cluster did not have is looked for again
_OF_SERVICE = "kubernetes.io/service-name"  # the label of an EndpointSlice
_OVER = frozenset(("Succeeded", "Failed"))  # phases of pods that do not come back


# -- who is there ------------------------------------------------------------------------------------------


class Reflector:
    """A copy of the objects of one kind, kept up to date by a thread.

    It lists, watches from there, and lists anew when the API server no longer knows where it was (410),
    when `resync_s` have passed, and after errors, with growing pauses. While the API server is away, the
    copy stays.
    """

    def __init__(
        self,
        cluster: Cluster,
        kind: str,
        namespace: str | None,
        changed: Callable[[], None],
        *,
        labels: str = "",
        fields: str = "",
        resync_s: float = _RESYNC_S,
        first_pause_s: float = 0.2,
        absent_pause_s: float | None = None,
    ) -> None:
        """`changed` is called in the reflector's thread after each change of `objects`.

        `namespace`: None for all of them.

        `absent_pause_s`: the cluster may not have the kind; then there are no objects, and it is looked for
        again after so long.
        """
        self.listed = threading.Event()
        self._cluster, self._kind, self._namespace = cluster, kind, namespace
        self._labels, self._fields = labels, fields
        self._changed = changed
        self._resync_s = resync_s
        self._first_pause_s = first_pause_s
        self._absent_pause_s = absent_pause_s
        self._objects: dict[tuple[str, str], Manifest] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"reflector of {kind}", daemon=True)

    @property
    def objects(self) -> list[Manifest]:
        """The objects as last heard of."""
        return list(self._objects.values())

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread, when it next hears from the network; it does not keep the process."""
        self._stopping.set()

    def _run(self) -> None:
        version, listed_at, pause_s = "", 0.0, self._first_pause_s
        while not self._stopping.is_set():
            try:
                if not version or time.monotonic() - listed_at >= self._resync_s:
                    version, listed_at = self._list(), time.monotonic()
                version = self._watch(version, self._resync_s)
                pause_s = self._first_pause_s
                continue
            except ApiError as error:
                version = ""
                if error.status == 410:
                    continue
                if error.status == 404 and self._absent_pause_s is not None:
                    self._take([])
                    self._stopping.wait(self._absent_pause_s)
                    continue
                log.warning("watching %s: %s", self._kind, error.message)
            except Exception:
                version = ""
                log.exception("watching %s", self._kind)
            self._stopping.wait(pause_s * random.uniform(0.8, 1.2))  # noqa: S311 - not a secret
            pause_s = min(pause_s * 2, 10.0)

    def _list(self) -> str:
        objects, version = self._cluster.listing(
            self._kind, self._namespace, labels=self._labels, fields=self._fields
        )
        self._take(objects)
        return version

    def _take(self, objects: Iterable[Manifest]) -> None:
        self._objects = {_key(one): one for one in objects}
        self.listed.set()
        self._changed()

    def _watch(self, version: str, timeout_s: float) -> str:
        for event, one in self._cluster.watch(
            self._kind, self._namespace, version, labels=self._labels, fields=self._fields,
            timeout_s=timeout_s,
        ):  # fmt: skip
            if self._stopping.is_set():
                break
            version = one["metadata"]["resourceVersion"]
            if event == "BOOKMARK":
                continue
            objects = dict(self._objects)
            if event == "DELETED":
                objects.pop(_key(one), None)
            else:
                objects[_key(one)] = one
            self._objects = objects
            self._changed()
        return version


def _key(manifest: Manifest) -> tuple[str, str]:
    meta = manifest["metadata"]
    return str(meta.get("namespace", "")), str(meta["name"])


def mesh_state(
    mesh: str,
    namespace: str,
    app: App,
    pods: Iterable[Manifest],
    slices: Iterable[Manifest],
    services: Iterable[Manifest],
) -> MeshState:
    """What the control plane is told of the mesh: the declared app, and what was injected besides it.

    An instance is ready when its service's EndpointSlice says so and its pod is not on its way out: the pod
    shows the latter at once, the EndpointSlice a moment later, and each such moment costs requests.
    """
    slices = list(slices)
    serving = {
        (
            _called(one["metadata"].get("labels", {}).get(_OF_SERVICE), one, namespace),
            endpoint["targetRef"]["name"],
        )
        for one in slices
        for endpoint in one.get("endpoints") or ()
        if (endpoint.get("conditions") or {}).get("ready") and endpoint.get("targetRef")
    }
    services = list(services)
    at_the_edge, pods = _parted(pods, namespace)
    whole = discover(app, pods, slices, services, namespace)
    ours, app = app.services, whole.app
    addresses = {
        name: one["spec"]["clusterIP"]
        for one in services
        if (name := _called(one["metadata"]["name"], one, namespace)) in app.services
        and one["spec"].get("clusterIP", "None") != "None"
    }
    instances = []
    for pod in sorted(pods, key=_key):
        meta, labels = pod["metadata"], pod["metadata"].get("labels", {})
        label, pod_id = labels.get(SERVICE, ""), instance_of(pod, namespace)
        # The label names a service of the app alone: for that the pod's token must be of its account.
        at_home = namespace_of(pod, namespace) == namespace
        name = label if at_home and label in ours else whole.service_of.get(pod_id, "")
        service = app.services.get(name)
        if service is None or pod.get("status", {}).get("phase") in _OVER:
            continue
        revision = meta.get("annotations", {}).get(REVISION, "1")
        instances.append(
            Instance(
                id=pod_id,
                service=name,
                version=version_of(pod),
                revision=int(revision) if revision.isdigit() else 1,
                host=pod.get("status", {}).get("podIP", ""),
                inbound_port=service.port,
                outbound_port=PROXY_PORT,
                metrics_port=PLAIN_PORT,
                app_port=service.port,
                ready=_is_ready(pod, (name, meta["name"]) in serving, called=name in addresses),
                restarts=_restarts(pod),
                leaving="deletionTimestamp" in meta,
            )
        )
    return MeshState(
        mesh=mesh,
        namespace=namespace,
        app=app,
        instances=tuple(instances),
        gateways=tuple(_gateway(pod) for pod in sorted(at_the_edge, key=_key)),
        addresses=addresses,
        ports=dict(whole.ports),
        also=whole.also,
    )


def _called(name: Any, of: Manifest, home: str) -> str:
    """What the mesh calls a service that an object of its namespace names."""
    return qualified(str(name), namespace_of(of, home), home)


def _parted(pods: Iterable[Manifest], home: str) -> tuple[list[Manifest], list[Manifest]]:
    """The gateway's pods, and the others; one that merely calls itself so is neither."""
    edge: list[Manifest] = []
    others: list[Manifest] = []
    for pod in pods:
        labels = pod["metadata"].get("labels", {})
        if labels.get(SERVICE) != GATEWAY or namespace_of(pod, home) != home:
            others.append(pod)
        elif labels.get(COMPONENT) == GATEWAY and pod.get("status", {}).get("phase") not in _OVER:
            edge.append(pod)
    return edge, others


def _gateway(pod: Manifest) -> Instance:
    return Instance(
        id=pod["metadata"]["name"],
        service=GATEWAY,
        version=version_of(pod),
        host=pod.get("status", {}).get("podIP", ""),
        inbound_port=0,
        outbound_port=GATEWAY_PORT,
        metrics_port=PLAIN_PORT,
        app_port=0,
        ready=_is_ready(pod, serves=False, called=False),
        leaving="deletionTimestamp" in pod["metadata"],
    )


def _restarts(pod: Manifest) -> int:
    """How often the kubelet has started a container of a pod again; its sidecar is an init container."""
    status = pod.get("status", {})
    containers = (*(status.get("containerStatuses") or ()), *(status.get("initContainerStatuses") or ()))
    return sum(one.get("restartCount", 0) for one in containers)


def _is_ready(pod: Manifest, serves: bool, *, called: bool) -> bool:
    """May a pod be sent requests? Of one that no Service leads to (it only calls), its own state tells."""
    if "deletionTimestamp" in pod["metadata"]:
        return False
    conditions = pod.get("status", {}).get("conditions") or ()
    return serves or (not called and any(c["type"] == "Ready" and c["status"] == "True" for c in conditions))


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


# -- whose token this is -----------------------------------------------------------------------------------


class TokenReviews:
    """Tells whose token this is by asking the API server; what it said holds for a while.

    A sidecar reports twice a second with the same token, and each review costs the API server some
    milliseconds. A token is worth nothing once its pod is gone, whatever the review said before.
    """

    def __init__(
        self,
        cluster: Cluster,
        source: Source,
        *,
        holds_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster, self._source = cluster, source
        self._holds_s = holds_s
        self._clock = clock
        self._known: dict[str, tuple[float, _Proof | None]] = {}

    async def instance(self, token: str, mesh: MeshState) -> Instance | None:
        """The instance whose pod holds the token, under its own service's account; None if none."""
        proof = await self._proof(token)
        if proof is None:
            return None
        instance = qualified(proof.pod, proof.namespace, mesh.namespace)
        pod = self._source.pod(instance)
        if pod is None or pod["metadata"].get("uid") != proof.uid:
            return None
        found = next((one for one in mesh.sidecars if one.id == instance), None)
        return found if found is not None and proof.user == self._source.user(found, pod) else None

    async def _proof(self, token: str) -> _Proof | None:
        if not token:
            return None
        digest = hashlib.sha256(token.encode()).hexdigest()
        now = self._clock()
        until, proof = self._known.get(digest, (0.0, None))
        if now < until:
            return proof
        try:
            answer = await asyncio.to_thread(
                self._cluster.create, "TokenReview", {"spec": {"token": token, "audiences": [AUDIENCE]}}
            )
        except ApiError as error:
            if error.status == 400:
                return None
            # Whoever was known before stays so while the API server is away: its word has not changed.
            log.warning("cannot review a token: %s", error.message)
            return proof
        proof = _proven(answer.get("status", {}))
        if len(self._known) > 10_000:
            self._known.clear()
        # A refusal is remembered for a shorter time: the kubelet may just be renewing the token.
        self._known[digest] = (now + (self._holds_s if proof else 2.0), proof)
        return proof


class _Proof:
    """Whom a reviewed token belongs to."""

    __slots__ = ("namespace", "pod", "uid", "user")

    def __init__(self, user: str, pod: str, uid: str) -> None:
        self.user, self.pod, self.uid = user, pod, uid
        self.namespace = user.split(":")[2]  # system:serviceaccount:NAMESPACE:ACCOUNT


def _proven(status: Mapping[str, Any]) -> _Proof | None:
    if not status.get("authenticated") or AUDIENCE not in status.get("audiences", ()):
        return None
    user = status.get("user", {})
    name, extra = user.get("username", ""), user.get("extra", {})
    pod = extra.get("authentication.kubernetes.io/pod-name", [""])[0]
    uid = extra.get("authentication.kubernetes.io/pod-uid", [""])[0]
    return _Proof(name, pod, uid) if pod and uid and name.startswith("system:serviceaccount:") else None


# -- where things are kept ---------------------------------------------------------------------------------

INTENT, JOURNAL, SPEC, TRUST, AUTHORITY, API = (
    "meshdemo-intent", "meshdemo-journal", "meshdemo-spec", "meshdemo-trust", "meshdemo-ca", "meshdemo-api"
)  # fmt: skip
AUTHORITY_FILES = ("ca.pem", "ca-next.pem", "trust.pem")


class IntentMap:
    """The intent in a ConfigMap. Two writers cannot overwrite each other: the second one is told."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self._cluster, self._namespace = cluster, namespace
        self._version = ""

    def load(self) -> Intent:
        """The stored intent, or a fresh one if none was stored yet. Raises Failed if it is none."""
        stored = self._cluster.get("ConfigMap", INTENT, self._namespace)
        if stored is None:
            raise Failed(f"the ConfigMap {INTENT} is gone", "run `meshdemo up` again")
        text = (stored.get("data") or {}).get("intent.json")
        try:
            found = Intent.model_validate_json(text) if text else Intent()
        except ValidationError as error:
            raise Failed(
                f"the ConfigMap {INTENT} does not hold an intent: {error.errors()[0]['msg']}",
                "repair its intent.json, or remove that key to start without faults, traffic or access rules",
            ) from error
        self._version = stored["metadata"]["resourceVersion"]
        return found

    def save(self, intent: Intent) -> None:
        """Store the intent; the one before stays if that fails. Raises Failed, Overtaken."""
        data = {"intent.json": intent.model_dump_json(indent=1)}
        body = {"metadata": {"resourceVersion": self._version}, "data": data}
        try:
            stored = self._cluster.patch("ConfigMap", INTENT, self._namespace, body, merge="merge")
        except ApiError as error:
            # Where an answer is lost, what is asked is asked again, and then overtakes itself.
            there = self._cluster.get("ConfigMap", INTENT, self._namespace) if error.status == 409 else None
            if there is None:
                raise
            if there.get("data") != data:
                raise Overtaken(
                    "the intent was changed by somebody else meanwhile; theirs is in force, yours is not",
                    "look at it (`meshdemo traffic show`, `fault list`, `access show`) and try again",
                ) from error
            stored = there
        self._version = stored["metadata"]["resourceVersion"]


class Keeper:
    """Files of a folder that are kept in a ConfigMap or a Secret, compressed.

    The control plane's parts write files, wherever it runs; in a cluster the folder is empty at each start,
    and this fills it and carries what changes back, within a second.
    """

    def __init__(
        self, cluster: Cluster, kind: str, name: str, namespace: str, folder: Path, files: Iterable[str],
        *, at_most: int = 700_000,
    ) -> None:  # fmt: skip
        """`at_most`: of a larger file the end is kept, in whole lines (objects hold 1 MiB at most)."""
        self._cluster, self._kind, self._name, self._namespace = cluster, kind, name, namespace
        self._folder, self._files, self._at_most = folder, tuple(files), at_most
        self._kept: dict[str, bytes | None] = {}
        self._field = "data" if kind == "Secret" else "binaryData"

    def restore(self) -> None:
        """Fill the folder. Raises Failed if the object cannot be read."""
        stored = self._cluster.get(self._kind, self._name, self._namespace)
        if stored is None:
            raise Failed(f"the {self._kind} {self._name} is gone", "run `meshdemo up` again")
        packed = stored.get(self._field) or {}
        for name in self._files:
            content = packed.get(f"{name}.gz")
            self._kept[name] = None if content is None else gzip.decompress(base64.b64decode(content))
            if (kept := self._kept[name]) is not None:
                write_atomic(self._folder / name, kept, durable=True)

    def save(self) -> bool:
        """Carry back what has changed; was there anything? Raises Failed."""
        now = {name: self._read(name) for name in self._files}
        if now == self._kept:
            return False
        changed = {name: content for name, content in now.items() if content != self._kept.get(name)}
        self._cluster.patch(
            self._kind, self._name, self._namespace,
            {self._field: {f"{name}.gz": _packed(content) for name, content in changed.items()}},
            merge="merge",
        )  # fmt: skip
        self._kept = now
        return True

    def _read(self, name: str) -> bytes | None:
        try:
            content = (self._folder / name).read_bytes()
        except FileNotFoundError:
            return None
        if len(content) > self._at_most:
            content = content[-self._at_most :].partition(b"\n")[2]
        return content


class AuthorityKeeper:
    """The certificate authority's files in a Secret, and what they trust in the ConfigMap that pods mount.

    Sidecars check the control plane by the latter. It reaches them when their kubelets see fit, which nobody
    waits for: see `meshdemo.control.identity`.
    """

    def __init__(self, cluster: Cluster, namespace: str, folder: Path) -> None:
        self._cluster, self._namespace = cluster, namespace
        self._files = Keeper(cluster, "Secret", AUTHORITY, namespace, folder, AUTHORITY_FILES)
        self._path = folder / "trust.pem"
        self._trusted = ""
        self._saving = threading.Lock()

    def restore(self) -> None:
        """Fill the folder. Raises Failed if the Secret cannot be read."""
        self._files.restore()

    def save(self) -> bool:
        """Carry back what has changed, the secret half first; was there anything? Raises Failed."""
        with self._saving:  # a replacement of the root does not wait for the one that looks each second
            changed = self._files.save()
            trusted = self._path.read_text()
            if trusted == self._trusted:
                return changed
            self._cluster.patch(
                "ConfigMap", TRUST, self._namespace, {"data": {self._path.name: trusted}}, merge="merge"
            )
            self._trusted = trusted
            return True


class Handouts:
    """What sidecars of injected pods start from, as a ConfigMap in every namespace that has some.

    A pod can mount what is in its own namespace alone. It holds nothing secret: whom to trust, and where the
    control plane is.
    """

    def __init__(
        self,
        cluster: Cluster,
        mesh: str,
        guests: Callable[[], set[str]],
        files: Mapping[str, str],
        trust: Path,
    ) -> None:
        """`guests`: the namespaces; `files`: by name, what is the same for all; `trust`: the file of whom to
        trust."""
        self._cluster, self._mesh, self._guests = cluster, mesh, guests
        self._files, self._trust = files, trust
        self._kept: dict[str, tuple[str, float]] = {}  # namespace -> what it was given, and when

    def save(self) -> bool:
        """Give the namespaces what they lack, and now and then anew what somebody may have removed.

        Raises Failed, once all others have theirs, if a namespace does not take it.
        """
        now, trust = time.monotonic(), self._trust.read_text()
        guests = self._guests()
        self._kept = {namespace: kept for namespace, kept in self._kept.items() if namespace in guests}
        failures: list[MeshdemoError] = []
        due = [one for one in sorted(guests) if not self._has(one, trust, now)]
        for namespace in due:
            try:
                self._cluster.apply(self._manifest(namespace, trust))
                self._kept[namespace] = trust, now
            except MeshdemoError as error:
                failures.append(Failed(f"{handout(self._mesh)} in {namespace}: {error.message}"))
        if failures:
            raise failures[0]
        return bool(due)

    def _has(self, namespace: str, trust: str, now: float) -> bool:
        kept, at = self._kept.get(namespace, ("", 0.0))
        return kept == trust and now - at < _RESYNC_S

    def _manifest(self, namespace: str, trust: str) -> Manifest:
        labels = {MESH: self._mesh, COMPONENT: "handout", "app.kubernetes.io/managed-by": "meshdemo"}
        # By server-side apply, whose right to create can be given for one name; that of a POST cannot
        # (https://github.com/kubernetes/kubernetes/issues/80295).
        return {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": handout(self._mesh), "namespace": namespace, "labels": labels},
            "data": {**self._files, self._trust.name: trust},
        }


class _Keeps(Protocol):
    def save(self) -> bool: ...


def pack(content: bytes) -> str:
    """A file as a Secret or a ConfigMap's `binaryData` holds it (see `Keeper`)."""
    return base64.b64encode(gzip.compress(content, 5, mtime=0)).decode()


def _packed(content: bytes | None) -> str | None:
    return None if content is None else pack(content)


async def keep(keepers: Iterable[_Keeps], *, every_s: float = 1.0) -> None:
    """Carry back what changes, for as long as the control plane runs."""
    keepers = tuple(keepers)
    while True:
        for keeper in keepers:
            await asyncio.to_thread(_save, keeper)
        await asyncio.sleep(every_s)


def _save(keeper: _Keeps) -> None:
    try:
        keeper.save()
    except MeshdemoError as error:
        log.warning("cannot store what has changed; trying again: %s", error.message)
