"""A cluster as its API server shows it: manifests in and out as plain dicts.

The official client does the connection (kubeconfig, exec plugins, in-cluster tokens, TLS) and the retries;
its thousand model classes are left alone, because what meshdemo sends is rendered from templates and what
it reads is a handful of fields. Both the Kubernetes runtime and the control plane in the cluster use this.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshdemo.errors import BadInput, Failed, Missing

# The client takes most of a second to load: it is loaded by whoever connects, not by whoever has to do with
# manifests.
if TYPE_CHECKING:
    from kubernetes import client as api
    from kubernetes.dynamic import DynamicClient
    from kubernetes.dynamic.exceptions import DynamicApiError

FIELD_MANAGER = "meshdemo"

Manifest = dict[str, Any]

# So long an API server may be away in the middle of things (it is being upgraded, or very busy).
PATIENCE_S = 30.0
_CONNECT_S, _READ_S = 5.0, 30.0
_PAUSES_S = (0.0, 0.5, 1.0, 2.0)  # between one attempt and the next; the last one again and again
_BUSY = {429, 500, 502, 503, 504}


@dataclass(frozen=True, slots=True)
class Kind:
    """Where objects of one kind live in the API."""

    api_version: str
    plural: str
    namespaced: bool = True

    def path(self, namespace: str | None, name: str | None = None, sub: str | None = None) -> str:
        """The URL path of one object, or of all of a namespace (None: of the whole cluster)."""
        prefix = f"/api/{self.api_version}" if "/" not in self.api_version else f"/apis/{self.api_version}"
        scope = f"/namespaces/{namespace}" if self.namespaced and namespace else ""
        return prefix + scope + f"/{self.plural}" + (f"/{name}" if name else "") + (f"/{sub}" if sub else "")


_RBAC = "rbac.authorization.k8s.io/v1"
KINDS: Mapping[str, Kind] = {
    "Namespace": Kind("v1", "namespaces", namespaced=False),
    "Node": Kind("v1", "nodes", namespaced=False),
    "Pod": Kind("v1", "pods"),
    "Service": Kind("v1", "services"),
    "ServiceAccount": Kind("v1", "serviceaccounts"),
    "ConfigMap": Kind("v1", "configmaps"),
    "PersistentVolumeClaim": Kind("v1", "persistentvolumeclaims"),
    "StorageClass": Kind("storage.k8s.io/v1", "storageclasses", namespaced=False),
    "Secret": Kind("v1", "secrets"),
    "Event": Kind("v1", "events"),
    "Deployment": Kind("apps/v1", "deployments"),
    "ReplicaSet": Kind("apps/v1", "replicasets"),
    "EndpointSlice": Kind("discovery.k8s.io/v1", "endpointslices"),
    "PodDisruptionBudget": Kind("policy/v1", "poddisruptionbudgets"),
    "HorizontalPodAutoscaler": Kind("autoscaling/v2", "horizontalpodautoscalers"),
    "Ingress": Kind("networking.k8s.io/v1", "ingresses"),
    "IngressClass": Kind("networking.k8s.io/v1", "ingressclasses", namespaced=False),
    "Lease": Kind("coordination.k8s.io/v1", "leases"),
    "Role": Kind(_RBAC, "roles"),
    "RoleBinding": Kind(_RBAC, "rolebindings"),
    "ClusterRole": Kind(_RBAC, "clusterroles", namespaced=False),
    "ClusterRoleBinding": Kind(_RBAC, "clusterrolebindings", namespaced=False),
    "TokenReview": Kind("authentication.k8s.io/v1", "tokenreviews", namespaced=False),
    "SelfSubjectAccessReview": Kind("authorization.k8s.io/v1", "selfsubjectaccessreviews", namespaced=False),
    "ServiceMonitor": Kind("monitoring.coreos.com/v1", "servicemonitors"),
    "PrometheusRule": Kind("monitoring.coreos.com/v1", "prometheusrules"),
    "GatewayClass": Kind("gateway.networking.k8s.io/v1", "gatewayclasses", namespaced=False),
    "Gateway": Kind("gateway.networking.k8s.io/v1", "gateways"),
    "HTTPRoute": Kind("gateway.networking.k8s.io/v1", "httproutes"),
}


class ApiError(Failed):
    """The API server refused a request.

    Attributes:
        status: the HTTP status; 0 if the server could not be reached.
        reason: its machine-readable reason, such as `Conflict`.
    """

    def __init__(self, status: int, reason: str, message: str, remedy: str = "") -> None:
        super().__init__(message, remedy)
        self.status = status
        self.reason = reason


class _NoDiscovery:
    """The kinds are known above; asking the server for them would cost every command five requests."""

    def __init__(self, client: DynamicClient, cache_file: str | None) -> None:
        pass


class Cluster:
    """One cluster. Methods raise ApiError, with the server's own words.

    A request that meets a busy server (429, 5xx) or none at all is repeated for `patience_s`, after the time
    that the server's Retry-After asks for, where it says so.
    """

    def __init__(self, configuration: api.Configuration, *, patience_s: float = PATIENCE_S) -> None:
        from kubernetes import client as api
        from kubernetes.dynamic import DynamicClient

        self.configuration = configuration
        self.url: str = configuration.host
        self._patience_s = patience_s
        self.deadline = math.inf  # `time.monotonic()` after which nothing is repeated any more
        configuration.retries = False  # `request` repeats, by the clock and not by the count
        self.client = api.ApiClient(configuration)
        self._dynamic = DynamicClient(self.client, discoverer=_NoDiscovery)

    @staticmethod
    def from_kubeconfig(
        path: Path | None = None, context: str | None = None, *, patience_s: float = PATIENCE_S
    ) -> Cluster:
        """The cluster of a kubeconfig (default: the user's, as kubectl finds it) and a context (current)."""
        from kubernetes import client as api
        from kubernetes import config as api_config

        configuration = api.Configuration()
        try:
            api_config.load_kube_config(
                config_file=str(path) if path else None, context=context, client_configuration=configuration
            )
        except (api_config.ConfigException, OSError) as error:
            where = str(path) if path else "the kubeconfig"
            known = _contexts(path)
            if context and known and context not in known:
                raise BadInput(
                    f"no context '{context}' in {where}", f"there are: {', '.join(known)}"
                ) from error
            raise Missing(
                f"{where} names no cluster to use: {error}",
                "set KUBECONFIG, or give --context; `--runtime kind` makes a cluster of its own",
            ) from error
        return Cluster(configuration, patience_s=patience_s)

    @staticmethod
    def inside(*, patience_s: float = PATIENCE_S) -> Cluster:
        """The cluster that this process runs in, as its service account."""
        from kubernetes import client as api
        from kubernetes import config as api_config

        configuration = api.Configuration()
        api_config.load_incluster_config(client_configuration=configuration)
        return Cluster(configuration, patience_s=patience_s)

    # -- requests ------------------------------------------------------------------------------------------
    def request(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        content_type: str = "application/json",
        query: Mapping[str, Any] | None = None,
        stream: bool = False,
        read_timeout_s: float | None = _READ_S,
    ) -> Any:
        """One request; its JSON answer, or with `stream` the response itself, to be read as it comes.

        What is asked may be asked twice: it applies, or names what it creates.
        """
        import urllib3
        from kubernetes.dynamic.exceptions import DynamicApiError

        give_up = min(time.monotonic() + self._patience_s, self.deadline)
        pauses = chain(_PAUSES_S, repeat(_PAUSES_S[-1]))
        if read_timeout_s is not None:
            read_timeout_s = min(read_timeout_s, max(_CONNECT_S, self.deadline - time.monotonic()))
        while True:
            wait_s = next(pauses)
            try:
                # urllib3 reads (connect, None) as: wait for as long as it takes.
                response = self._dynamic.request(
                    method,
                    path,
                    body=body,
                    content_type=content_type,
                    query_params=list((query or {}).items()),
                    _request_timeout=(_CONNECT_S, read_timeout_s),
                    serialize=False,
                )
                return response if stream else json.loads(response.data or b"{}")
            except DynamicApiError as error:
                wait_s = _retry_after_s(error) or wait_s
                late = time.monotonic() + wait_s >= give_up
                if error.status == 0:  # the client's word for TLS that broke off
                    if late:
                        raise self._unreachable(str(error.reason).splitlines()[-1]) from None
                elif late or error.status not in _BUSY:
                    raise _api_error(method, path, error) from None
            except urllib3.exceptions.HTTPError as error:
                if time.monotonic() + wait_s >= give_up:
                    raise self._unreachable(_cause(error)) from None
            time.sleep(wait_s)

    def _unreachable(self, why: str) -> ApiError:
        return ApiError(
            0,
            "Unreachable",
            f"the API server at {self.url} does not answer: {why}",
            "is the cluster running, and does the kubeconfig name the right one?",
        )

    def version(self) -> tuple[int, int]:
        """Major and minor version of the API server; a failure here means that it cannot be used at all."""
        answer = self.request("GET", "/version", read_timeout_s=_CONNECT_S)
        return int(answer["major"]), int("".join(c for c in answer["minor"] if c.isdigit()))

    def serves(self, kind: str) -> bool:
        """Does the cluster have this kind (a CustomResourceDefinition that may be installed or not)?"""
        known = KINDS[kind]
        try:
            listed = self.request("GET", f"/apis/{known.api_version}")
        except ApiError as error:
            if error.status in {403, 404}:
                return False
            raise
        return any(resource["name"] == known.plural for resource in listed["resources"])

    # -- objects -------------------------------------------------------------------------------------------
    def get(self, kind: str, name: str, namespace: str | None = None) -> Manifest | None:
        """One object; None if there is none."""
        try:
            found: Manifest = self.request("GET", KINDS[kind].path(namespace, name))
        except ApiError as error:
            if error.status == 404:
                return None
            raise
        return found

    def find(
        self, kind: str, namespace: str | None = None, *, labels: str = "", fields: str = ""
    ) -> list[Manifest]:
        """All objects that match the selectors."""
        return self.listing(kind, namespace, labels=labels, fields=fields)[0]

    def listing(
        self, kind: str, namespace: str | None = None, *, labels: str = "", fields: str = ""
    ) -> tuple[list[Manifest], str]:
        """All objects that match, and the resource version to watch from."""
        query = {"labelSelector": labels, "fieldSelector": fields}
        answer = self.request("GET", KINDS[kind].path(namespace), query={k: v for k, v in query.items() if v})
        return answer.get("items") or [], answer.get("metadata", {}).get("resourceVersion", "")

    def watch(
        self,
        kind: str,
        namespace: str | None,
        resource_version: str,
        *,
        labels: str = "",
        fields: str = "",
        timeout_s: float,
    ) -> Iterator[tuple[str, Manifest]]:
        """Changes after a resource version as (`ADDED|MODIFIED|DELETED|BOOKMARK`, object), for `timeout_s`.

        Ends when the time is over or the connection drops. Raises ApiError 410 when the version is too old:
        list again.
        """
        query = {
            "watch": "true", "resourceVersion": resource_version, "allowWatchBookmarks": "true",
            "timeoutSeconds": str(max(1, round(timeout_s))), "labelSelector": labels, "fieldSelector": fields,
        }  # fmt: skip
        import urllib3

        response = self.request(
            "GET",
            KINDS[kind].path(namespace),
            query={k: v for k, v in query.items() if v},
            stream=True,
            read_timeout_s=timeout_s + _CONNECT_S,
        )
        try:
            for line in lines(response):
                event = json.loads(line)
                if event["type"] == "ERROR":
                    status = event["object"]
                    message = status.get("message", "watch error")
                    raise ApiError(status.get("code", 500), status.get("reason", ""), message)
                yield event["type"], event["object"]
        except (urllib3.exceptions.HTTPError, OSError, ValueError):
            return  # dropped, cut in the middle of a line, or closed by us: watch again
        finally:
            response.close()

    def apply(self, manifest: Manifest, *, manager: str = FIELD_MANAGER) -> Manifest:
        """Server-side apply: the server merges, and the fields named here belong to `manager`."""
        meta = manifest["metadata"]
        applied: Manifest = self.request(
            "PATCH",
            KINDS[manifest["kind"]].path(meta.get("namespace"), meta["name"]),
            body=json.dumps(manifest),
            content_type="application/apply-patch+yaml",
            query={"fieldManager": manager, "force": "true"},
        )
        return applied

    def create(self, kind: str, body: Manifest, namespace: str | None = None) -> Manifest:
        """Create an object (or ask a review)."""
        body = {"apiVersion": KINDS[kind].api_version, "kind": kind, **body}
        created: Manifest = self.request(
            "POST", KINDS[kind].path(namespace), body=body, query={"fieldManager": FIELD_MANAGER}
        )
        return created

    def replace(self, kind: str, body: Manifest) -> Manifest:
        """Replace an object; its `resourceVersion` must be the current one (else ApiError 409)."""
        meta = body["metadata"]
        body = {"apiVersion": KINDS[kind].api_version, "kind": kind, **body}
        replaced: Manifest = self.request(
            "PUT",
            KINDS[kind].path(meta.get("namespace"), meta["name"]),
            body=body,
            query={"fieldManager": FIELD_MANAGER},
        )
        return replaced

    def patch(
        self,
        kind: str,
        name: str,
        namespace: str | None,
        body: Manifest,
        *,
        merge: str = "strategic-merge",
        sub: str | None = None,
    ) -> Manifest:
        """Patch an object; `merge`: `strategic-merge` or `merge` (RFC 7386), `sub`: a part, as `status`."""
        patched: Manifest = self.request(
            "PATCH",
            KINDS[kind].path(namespace, name, sub),
            body=body,
            content_type=f"application/{merge}-patch+json",
            query={"fieldManager": FIELD_MANAGER},
        )
        return patched

    def delete(
        self, kind: str, name: str, namespace: str | None = None, *, grace_s: int | None = None
    ) -> bool:
        """Delete an object and what it owns; False if there was none."""
        body: Manifest = {"propagationPolicy": "Background"}
        if grace_s is not None:
            body["gracePeriodSeconds"] = grace_s
        try:
            self.request("DELETE", KINDS[kind].path(namespace, name), body=body)
        except ApiError as error:
            if error.status == 404:
                return False
            raise
        return True

    def event(
        self,
        about: Manifest,
        reason: str,
        message: str,
        *,
        component: str = "meshdemo",
        warning: bool = False,
    ) -> None:
        """Leave an Event on an object, so that `kubectl describe` tells what meshdemo did and why."""
        meta = about["metadata"]
        namespace = meta.get("namespace", "default")
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.create(
            "Event",
            {
                "metadata": {"generateName": f"{meta['name']}.", "namespace": namespace},
                "involvedObject": {
                    "apiVersion": about["apiVersion"],
                    "kind": about["kind"],
                    "name": meta["name"],
                    "namespace": namespace,
                    "uid": meta.get("uid", ""),
                },
                "type": "Warning" if warning else "Normal",
                "reason": reason,
                "message": message[:1024],
                "source": {"component": component},
                "firstTimestamp": now,
                "lastTimestamp": now,
                "count": 1,
            },
            namespace,
        )

    def logs(
        self,
        namespace: str,
        pod: str,
        container: str,
        *,
        tail: int | None = None,
        follow: bool = False,
        previous: bool = False,
        times: bool = False,
    ) -> Iterator[str]:
        """Log lines of a container; with `follow` until it ends. A container without logs has none.

        `times`: each line begins with when it was written (RFC 3339) and a space.
        """
        query = {
            "container": container,
            "timestamps": "true" if times else None,
            "tailLines": None if tail is None else str(tail),
            "follow": "true" if follow else None,
            "previous": "true" if previous else None,
        }
        import urllib3

        try:
            response = self.request(
                "GET",
                KINDS["Pod"].path(namespace, pod, "log"),
                query={k: v for k, v in query.items() if v},
                stream=True,
                read_timeout_s=None if follow else _READ_S,
            )
        except ApiError as error:
            if error.status in {400, 404}:  # not started yet, or gone
                return
            raise
        try:
            for line in lines(response):
                yield line.decode("utf-8", "replace")
        except (urllib3.exceptions.HTTPError, OSError):
            return
        finally:
            response.close()


def key_of(manifest: Manifest) -> tuple[str, str]:
    """What tells an object from others of its kind: its namespace and its name."""
    meta = manifest["metadata"]
    return str(meta.get("namespace", "")), str(meta["name"])


def lines(response: Any) -> Iterator[bytes]:
    """The non-empty lines of a response as they arrive. What follows the last newline was cut off."""
    rest = b""
    for chunk in response.stream(amt=None, decode_content=False):
        *whole, rest = (rest + chunk).split(b"\n")
        yield from (line for line in whole if line)


def _contexts(path: Path | None) -> list[str]:
    from kubernetes import config as api_config

    try:
        contexts, _ = api_config.list_kube_config_contexts(config_file=str(path) if path else None)
    except (api_config.ConfigException, OSError):
        return []
    return [context["name"] for context in contexts]


_REMEDIES = {
    401: "log in to the cluster again; the kubeconfig's credentials are not accepted",
    403: "ask the cluster's administrator for that right, or use another --context",
}


def _retry_after_s(error: DynamicApiError) -> float:
    """What a busy server asks for; 0 if it says nothing (API servers say seconds, never a date)."""
    said = (error.headers or {}).get("Retry-After", "")
    return float(said) if said.isdigit() else 0.0


def _api_error(method: str, path: str, error: DynamicApiError) -> ApiError:
    try:
        status = json.loads(error.body)
    except (TypeError, ValueError):
        status = {}
    message = status.get("message") or f"{method} {path}: {error.status} {error.reason}"
    remedy = _REMEDIES.get(error.status, "")
    return ApiError(error.status, status.get("reason", ""), f"the API server refuses: {message}", remedy)


def _cause(error: BaseException) -> str:
    """The innermost reason, in one line (urllib3 wraps it several times)."""
    import urllib3

    while isinstance(reason := getattr(error, "reason", None), BaseException):
        error = reason
    text = str(error)
    if isinstance(error, urllib3.exceptions.ReadTimeoutError):
        return "it takes connections and says nothing"
    return text.split(": ", 1)[1] if text.startswith("<") or "object at 0x" in text else text
