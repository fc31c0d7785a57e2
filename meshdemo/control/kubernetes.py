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
from meshdemo.control.discovered import account_of, discover, version_of
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
)

log = logging.getLogger(__name__)

_RESYNC_S = 300.0
_ABSENT_S = 30.0  # until a kind that the cluster did not have is looked for again
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
        namespace: str,
        changed: Callable[[], None],
        *,
        labels: str = "",
        fields: str = "",
        resync_s: float = _RESYNC_S,
        first_pause_s: float = 0.2,
        absent_pause_s: float | None = None,
    ) -> None:
        """`changed` is called in the reflector's thread after each change of `objects`.

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
        self._objects: dict[str, Manifest] = {}
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


def _key(manifest: Manifest) -> str:
    return str(manifest["metadata"]["name"])


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
        (one["metadata"].get("labels", {}).get("kubernetes.io/service-name"), endpoint["targetRef"]["name"])
        for one in slices
        for endpoint in one.get("endpoints") or ()
        if (endpoint.get("conditions") or {}).get("ready") and endpoint.get("targetRef")
    }
    services = list(services)
    at_the_edge, pods = _parted(pods)
    whole = discover(app, pods, slices, services)
    ours, app = app.services, whole.app
    addresses = {
        one["metadata"]["name"]: one["spec"]["clusterIP"]
        for one in services
        if one["metadata"]["name"] in app.services and one["spec"].get("clusterIP", "None") != "None"
    }
    instances = []
    for pod in sorted(pods, key=_key):
        meta, labels = pod["metadata"], pod["metadata"].get("labels", {})
        label = labels.get(SERVICE, "")
        # The label names a service of the app alone: for that the pod's token must be of its account.
        name = label if label in ours else whole.service_of.get(meta["name"], "")
        service = app.services.get(name)
        if service is None or pod.get("status", {}).get("phase") in _OVER:
            continue
        revision = meta.get("annotations", {}).get(REVISION, "1")
        instances.append(
            Instance(
                id=meta["name"],
                service=name,
                version=version_of(pod),
                revision=int(revision) if revision.isdigit() else 1,
                host=pod.get("status", {}).get("podIP", ""),
                inbound_port=service.port,
                outbound_port=PROXY_PORT,
                metrics_port=PLAIN_PORT,
                app_port=service.port,
                ready=_is_ready(pod, (name, meta["name"]) in serving, called=name in addresses),
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
    )


def _parted(pods: Iterable[Manifest]) -> tuple[list[Manifest], list[Manifest]]:
    """The gateway's pods, and the others; one that merely calls itself so is neither."""
    edge: list[Manifest] = []
    others: list[Manifest] = []
    for pod in pods:
        labels = pod["metadata"].get("labels", {})
        if labels.get(SERVICE) != GATEWAY:
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


def _is_ready(pod: Manifest, serves: bool, *, called: bool) -> bool:
    """May a pod be sent requests? Of one that no Service leads to (it only calls), its own state tells."""
    if "deletionTimestamp" in pod["metadata"]:
        return False
    conditions = pod.get("status", {}).get("conditions") or ()
    return serves or (not called and any(c["type"] == "Ready" and c["status"] == "True" for c in conditions))


class Source:
    """The mesh as the API server shows it, whenever it changes."""

    def __init__(self, cluster: Cluster, mesh: str, namespace: str) -> None:
        self._mesh, self._namespace = mesh, namespace
        self._loop: asyncio.AbstractEventLoop | None = None
        self._event = asyncio.Event()
        of_mesh = f"{MESH}={mesh}"

        def reflector(
            kind: str, *, labels: str = "", fields: str = "", absent_pause_s: float | None = None
        ) -> Reflector:
            return Reflector(
                cluster, kind, namespace, self._changed, labels=labels, fields=fields,
                absent_pause_s=absent_pause_s,
            )  # fmt: skip

        self._pods = reflector("Pod", labels=f"{of_mesh},{SERVICE}")
        # Of injected pods, the Services are not ours and carry no label of ours.
        self._slices = reflector("EndpointSlice")
        self._services = reflector("Service")
        self._spec = reflector("ConfigMap", fields=f"metadata.name={SPEC}")
        self._ingresses = reflector("Ingress")
        self._http_routes = reflector("HTTPRoute", absent_pause_s=_ABSENT_S)
        self._reflectors = (
            self._pods, self._slices, self._services, self._spec, self._ingresses, self._http_routes,
        )  # fmt: skip
        self.entrance = ingress.Entrance()

    async def start(self) -> MeshState:
        """Start watching; the mesh as it is once everything was listed."""
        self._loop = asyncio.get_running_loop()
        for reflector in self._reflectors:
            reflector.start()
        while (state := self.mesh()) is None:
            await self.change()
        return state

    def stop(self) -> None:
        """Stop watching."""
        for reflector in self._reflectors:
            reflector.stop()

    def mesh(self) -> MeshState | None:
        """The mesh now; None while not everything was listed, or the app is not written down yet."""
        if not all(reflector.listed.is_set() for reflector in self._reflectors):
            return None
        app = app_of(self._spec.objects)
        if app is None:
            return None
        services = self._services.objects
        state = mesh_state(
            self._mesh, self._namespace, app, self._pods.objects, self._slices.objects, services
        )
        self.entrance = ingress.translate(
            self._ingresses.objects, self._http_routes.objects, services, state.app, self._namespace
        )
        return state.model_copy(update={"entries": self.entrance.entries})

    async def change(self) -> None:
        """Returns when something has changed since the last call."""
        await self._event.wait()
        # What one cause changes (a rollout, a deleted pod) comes as several events: take them together.
        await asyncio.sleep(0.01)
        self._event.clear()

    @property
    def services(self) -> list[Manifest]:
        """The Services of the namespace."""
        return self._services.objects

    @property
    def spec(self) -> Manifest | None:
        """The ConfigMap that holds the mesh's spec."""
        return next(iter(self._spec.objects), None)

    def account(self, instance: Instance, pod: Manifest) -> str:
        """Under which service account an instance must run to be one of its service.

        A declared service has one of its own, so that nobody is it who merely labels a pod so. Injected pods
        run under whatever account they had.
        """
        app = app_of(self._spec.objects)
        if instance.service == GATEWAY or (app is not None and instance.service in app.services):
            return instance.service
        return account_of(pod)

    def pod(self, name: str) -> Manifest | None:
        """The pod of this name."""
        return next((pod for pod in self._pods.objects if _key(pod) == name), None)

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

    A sidecar reports once a second with the same token, and each review costs the API server some
    milliseconds. A token is worth nothing once its pod is gone, whatever the review said before.
    """

    def __init__(self, cluster: Cluster, source: Source, *, holds_s: float = 60.0) -> None:
        self._cluster, self._source = cluster, source
        self._holds_s = holds_s
        self._known: dict[str, tuple[float, _Proof | None]] = {}

    async def instance(self, token: str, mesh: MeshState) -> Instance | None:
        """The instance whose pod holds the token, under its own service's account; None if none."""
        proof = await self._proof(token)
        if proof is None:
            return None
        pod = self._source.pod(proof.pod)
        if pod is None or pod["metadata"].get("uid") != proof.uid:
            return None
        found = next((one for one in mesh.sidecars if one.id == proof.pod), None)
        if found is None:
            return None
        account = self._source.account(found, pod)
        return found if proof.user == f"system:serviceaccount:{mesh.namespace}:{account}" else None

    async def _proof(self, token: str) -> _Proof | None:
        if not token:
            return None
        digest = hashlib.sha256(token.encode()).hexdigest()
        now = time.monotonic()
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

    __slots__ = ("pod", "uid", "user")

    def __init__(self, user: str, pod: str, uid: str) -> None:
        self.user, self.pod, self.uid = user, pod, uid


def _proven(status: Mapping[str, Any]) -> _Proof | None:
    if not status.get("authenticated") or AUDIENCE not in status.get("audiences", ()):
        return None
    user = status.get("user", {})
    extra = user.get("extra", {})
    pod = extra.get("authentication.kubernetes.io/pod-name", [""])[0]
    uid = extra.get("authentication.kubernetes.io/pod-uid", [""])[0]
    return _Proof(user.get("username", ""), pod, uid) if pod and uid else None


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
