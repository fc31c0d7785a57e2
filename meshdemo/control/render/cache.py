"""Templates rendered, parsed and encoded, once for each distinct input.

Templates render YAML, which becomes protobuf with unknown fields refused. That is slow, and most of it is
the same for everyone, so what was made is remembered for as long as it is in use.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic, TypeVar, cast
from weakref import WeakValueDictionary

import jinja2
import yaml
from envoy.config.endpoint.v3.endpoint_pb2 import ClusterLoadAssignment
from envoy.config.trace.v3 import opentelemetry_pb2 as _tracer
from envoy.extensions.access_loggers.grpc.v3 import als_pb2 as _als
from envoy.extensions.access_loggers.stats.v3 import stats_pb2 as _stats
from envoy.extensions.filters.http.fault.v3 import fault_pb2 as _fault
from envoy.extensions.filters.http.rbac.v3 import rbac_pb2 as _rbac
from envoy.extensions.filters.http.router.v3 import router_pb2 as _router
from envoy.extensions.filters.network.http_connection_manager.v3 import (
    http_connection_manager_pb2 as _hcm,
)
from envoy.extensions.filters.network.rbac.v3 import rbac_pb2 as _network_rbac
from envoy.extensions.filters.network.tcp_proxy.v3 import tcp_proxy_pb2 as _tcp_proxy
from envoy.extensions.retry.host.previous_hosts.v3 import previous_hosts_pb2 as _previous_hosts
from envoy.extensions.transport_sockets.tls.v3 import tls_pb2 as _tls
from envoy.extensions.upstreams.http.v3 import http_protocol_options_pb2 as _http_options
from google.protobuf import json_format
from google.protobuf.message import Message
from pydantic import BaseModel

from meshdemo.control import xds

# A message that a `typed_config` names must be known to protobuf; importing its module makes it known.
_KNOWN = (
    _als, _stats, _fault, _rbac, _router, _hcm, _network_rbac, _tcp_proxy, _previous_hosts, _tls,
    _http_options, _tracer,
)  # fmt: skip

_T = TypeVar("_T")
M = TypeVar("M", bound=Message)


class Made(Generic[M]):
    """A parsed message. Compared by identity, which is cheap: equal input gives the same object."""

    __slots__ = ("_encoded", "message")

    def __init__(self, message: M) -> None:
        self.message = message
        self._encoded: bytes | None = None

    def encoded(self, type_url: str) -> bytes:
        """As it stands in a response; once, for it is in many bundles one after the other."""
        if self._encoded is None:
            self._encoded = xds.encode(type_url, self.message)
        return self._encoded

    @property
    def name(self) -> str:
        """The name that xDS knows it by."""
        assigned = isinstance(self.message, ClusterLoadAssignment)
        return str(self.message.cluster_name if assigned else self.message.name)


class Is:
    """A value as a key, by identity: cheap, and it keeps the value alive."""

    __slots__ = ("it",)

    def __init__(self, it: object) -> None:
        self.it = it

    def __hash__(self) -> int:
        return id(self.it)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Is) and other.it is self.it


class Cache:
    """Makes messages and bundles of them; the same input gives the same object."""

    def __init__(self, templates: Path) -> None:
        self._environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(templates),
            undefined=jinja2.StrictUndefined,
            autoescape=False,  # noqa: S701 (YAML; values go through tojson)
        )
        self._used: dict[Hashable, Any] = {}
        self._before: dict[Hashable, Any] = {}
        self._bundles: WeakValueDictionary[tuple[str, str], xds.Bundle] = WeakValueDictionary()

    @contextmanager
    def generation(self) -> Iterator[None]:
        """One round of rendering. What it uses is kept for the next, the rest is forgotten."""
        self._before, self._used = self._used, {}
        try:
            yield
        except BaseException:
            self._used = {**self._before, **self._used}
            raise

    def once(self, key: Hashable, make: Callable[[], _T]) -> _T:
        """The value for this key, made if it is not remembered."""
        found = self._used.get(key)
        if found is None:
            found = self._before.get(key)
            if found is None:
                found = make()
            self._used[key] = found
        return cast(_T, found)

    def made(self, template: str, kind: type[M], **values: Any) -> Made[M]:
        """A template rendered and parsed, once for these values."""
        return self.once(
            (template, _frozen(values)),
            lambda: Made(parse(self._environment.get_template(f"{template}.yaml.j2").render(values), kind())),
        )

    def endpoints(self, name: str, addresses: tuple[tuple[str, int], ...]) -> Made[ClusterLoadAssignment]:
        """The endpoints (host, port) of a cluster: no template, for these differ most."""
        return self.once(("endpoints", name, addresses), lambda: Made(_assignment(name, addresses)))

    def bundle(self, type_url: str, made: Sequence[Made[Any]]) -> xds.Bundle:
        """These messages as one bundle: the same object for as long as they are the same."""
        return self.once(
            ("bundle", *made),
            lambda: self.interned(type_url, xds.Bundle({one.name: one.encoded(type_url) for one in made})),
        )

    def interned(self, type_url: str, bundle: xds.Bundle) -> xds.Bundle:
        """The bundle of this content that is in use already, if there is one: what is equal is identical."""
        return self._bundles.setdefault((type_url, bundle.version), bundle)


def parse(text: str, message: M) -> M:
    """YAML as this message; fields that it does not have are refused.

    Raises:
        yaml.YAMLError, json_format.ParseError
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    json_format.ParseDict(yaml.load(text, Loader=loader), message)  # noqa: S506 (both are safe loaders)
    return message


def _assignment(name: str, addresses: Iterable[tuple[str, int]]) -> ClusterLoadAssignment:
    assignment = ClusterLoadAssignment(cluster_name=name)
    locality = assignment.endpoints.add()
    for host, port in addresses:
        address = locality.lb_endpoints.add().endpoint.address.socket_address
        address.address, address.port_value = host, port
    return assignment


def _frozen(value: Any) -> Hashable:
    """A value as something that can be a key."""
    if isinstance(value, Mapping):
        return tuple((key, _frozen(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, BaseModel):
        return tuple((key, _frozen(item)) for key, item in value)
    return cast(Hashable, value)
