"""The ADS protocol: one stream, without a network, against a model of a sidecar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from envoy.config.cluster.v3.cluster_pb2 import Cluster
from envoy.config.endpoint.v3.endpoint_pb2 import ClusterLoadAssignment
from envoy.config.listener.v3.listener_pb2 import Listener
from envoy.config.route.v3.route_pb2 import RouteConfiguration
from envoy.extensions.transport_sockets.tls.v3.secret_pb2 import Secret
from envoy.service.discovery.v3.discovery_pb2 import DiscoveryRequest, DiscoveryResponse
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from meshdemo.control import xds
from meshdemo.control.discovery import Refused, Request, Stream, envoys_words
from meshdemo.control.model import Instance

KINDS: Mapping[str, type[Message]] = {
    xds.CLUSTERS: Cluster,
    xds.ENDPOINTS: ClusterLoadAssignment,
    xds.LISTENERS: Listener,
    xds.ROUTES: RouteConfiguration,
    xds.SECRETS: Secret,
}
INSTANCE = Instance(
    id="i", service="s", version="v1", inbound_port=1, outbound_port=2, metrics_port=3, app_port=4
)


def bundle(type_url: str, **contents: str) -> xds.Bundle:
    """Resources by name; the content tells versions of one apart."""
    encoded = {}
    for name, content in contents.items():
        match type_url:
            case xds.CLUSTERS:
                resource: Message = Cluster(name=name, alt_stat_name=content)
            case xds.ENDPOINTS:
                resource = ClusterLoadAssignment(cluster_name=name, named_endpoints={content: {}})
            case xds.LISTENERS:
                resource = Listener(name=name, stat_prefix=content)
            case xds.ROUTES:  # which clusters it leads to
                resource = RouteConfiguration(name=name, internal_only_headers=content.split())
            case _:
                resource = Secret(name=name)
        encoded[name] = xds.encode(type_url, resource)
    return xds.Bundle(encoded)


def snapshot(clusters: Mapping[str, str], routes: Sequence[str] | None = None) -> xds.Snapshot:
    """Clusters by name and content, and one route table that leads to these (default: to all)."""
    return {
        xds.SECRETS: (bundle(xds.SECRETS, identity="", trust=""),),
        xds.CLUSTERS: (bundle(xds.CLUSTERS, **clusters),),
        xds.ENDPOINTS: (bundle(xds.ENDPOINTS, **clusters),),
        xds.LISTENERS: (bundle(xds.LISTENERS, inbound=""),),
        xds.ROUTES: (bundle(xds.ROUTES, outbound=" ".join(clusters if routes is None else routes)),),
    }


class Sidecar:
    """A model of Envoy on the other end: it warms clusters, asks for what it refers to, and answers."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.nonce: dict[str, str] = {}
        self.version: dict[str, str] = {}
        self.clusters: dict[str, str] = {}
        self.warming: dict[str, str] = {}
        self.endpoints: dict[str, str] = {}
        self.routes: list[str] | None = None
        self.listeners: list[str] = []
        self.received: list[str] = []
        self.reject = ""  # a type to reject
        self.broken: list[str] = []  # what should never happen
        self.ask(xds.CLUSTERS)

    def ask(self, type_url: str, error: str = "") -> None:
        names = {
            xds.ENDPOINTS: sorted({**self.clusters, **self.warming}),
            xds.ROUTES: ["outbound"],
            xds.SECRETS: ["identity", "trust"],
        }.get(type_url, [])
        request = DiscoveryRequest(
            type_url=type_url,
            resource_names=names,
            response_nonce=self.nonce.get(type_url, ""),
            version_info=self.version.get(type_url, ""),
        )
        if error:
            request.error_detail.message = error
        self.stream.receive(Request.read(request.SerializeToString()))

    def step(self) -> bool:
        """Take one response in and answer it."""
        data = self.stream.next_response()
        if data is None:
            return False
        response = DiscoveryResponse.FromString(data)
        kind = response.type_url
        self.received.append(xds.SHORT[kind])
        self.nonce[kind] = response.nonce
        if kind == self.reject:
            self.ask(kind, "no")
            return True
        self.version[kind] = response.version_info
        resources = [KINDS[kind].FromString(resource.value) for resource in response.resources]
        again = False
        match kind:
            case xds.CLUSTERS:
                sent = {cluster.name: cluster.alt_stat_name for cluster in resources}
                for gone in set(self.clusters) - set(sent):
                    del self.clusters[gone]
                    if gone in (self.routes or ()):
                        self.broken.append(f"cluster {gone} went while routes lead to it")
                self.warming = {
                    name: content
                    for name, content in sent.items()
                    if self.clusters.get(name) != content or name in self.warming
                }
                again = bool(self.warming) and xds.ENDPOINTS in self.nonce
            case xds.ENDPOINTS:
                for assignment in resources:
                    name = assignment.cluster_name
                    self.endpoints[name] = next(iter(assignment.named_endpoints))
                    if name in self.warming:
                        self.clusters[name] = self.warming.pop(name)
            case xds.LISTENERS:
                self.listeners = [listener.name for listener in resources]
            case xds.ROUTES:
                self.routes = list(resources[0].internal_only_headers)
                if missing := set(self.routes) - set(self.clusters):
                    self.broken.append(f"routes lead to {missing}, which is not there")
        old = dict(self.nonce)
        self.ask(kind)
        if kind == xds.CLUSTERS and (again or xds.ENDPOINTS not in old):
            self.ask(xds.ENDPOINTS)
        if kind == xds.ENDPOINTS and not self.warming:
            for further in (xds.LISTENERS, xds.SECRETS):
                if further not in self.nonce:
                    self.ask(further)
        if kind == xds.LISTENERS and xds.ROUTES not in self.nonce:
            self.ask(xds.ROUTES)
        return True

    def run(self) -> Sidecar:
        while self.step():
            assert len(self.received) < 1000, self.received[-20:]
        return self


def connected(wanted: xds.Snapshot) -> Sidecar:
    sidecar = Sidecar(Stream(INSTANCE, wanted)).run()
    assert sidecar.stream.settled()
    sidecar.received.clear()
    return sidecar


def test_a_new_sidecar_gets_everything_in_order_and_then_nothing() -> None:
    sidecar = Sidecar(Stream(INSTANCE, snapshot({"a": "1", "b": "1"})))
    assert not sidecar.stream.settled()
    sidecar.run()
    assert sidecar.received == ["clusters", "endpoints", "secrets", "listeners", "routes"]
    assert (sidecar.clusters, sidecar.routes) == ({"a": "1", "b": "1"}, ["a", "b"])
    assert sidecar.stream.settled()
    assert sidecar.stream.next_response() is None


def test_only_what_changed_is_sent() -> None:
    before = snapshot({"a": "1"}, ["a"])
    sidecar = connected(before)
    sidecar.stream.wanted = {**before, xds.ROUTES: (bundle(xds.ROUTES, outbound=""),)}
    sidecar.run()
    assert sidecar.received == ["routes"]
    sidecar.received.clear()
    # Resources that the sidecar did not ask for are not its business.
    sidecar.stream.wanted = {**sidecar.stream.wanted, xds.ENDPOINTS: (bundle(xds.ENDPOINTS, a="1", z="1"),)}
    assert sidecar.run().received == []
    assert sidecar.stream.settled()


def test_a_changed_cluster_gets_its_endpoints_again_before_routes_move() -> None:
    sidecar = connected(snapshot({"a": "1", "b": "1"}, ["a"]))
    sidecar.stream.wanted = snapshot({"a": "2", "b": "1", "c": "1"}, ["c"])
    sidecar.run()
    assert sidecar.received[-1] == "routes"
    assert sidecar.received[0] == "clusters"
    assert (sidecar.clusters, sidecar.warming) == ({"a": "2", "b": "1", "c": "1"}, {})
    assert sidecar.broken == []


def test_asking_again_without_answering_anything_is_answered() -> None:
    sidecar = connected(snapshot({"a": "1"}))
    sidecar.ask(xds.ENDPOINTS)
    assert not sidecar.stream.settled()
    assert sidecar.run().received == ["endpoints"]


def test_a_late_answer_to_a_superseded_response_changes_nothing() -> None:
    sidecar = connected(snapshot({"a": "1"}))
    sidecar.stream.wanted = {**sidecar.stream.wanted, xds.ROUTES: (bundle(xds.ROUTES, outbound=""),)}
    first = sidecar.stream.next_response()
    assert first
    names = frozenset(["outbound"])
    sidecar.stream.receive(Request(xds.ROUTES, names, nonce="1", error="about the one before"))
    assert not sidecar.stream.settled()
    assert sidecar.stream.nacks() == {}
    sidecar.nonce[xds.ROUTES] = DiscoveryResponse.FromString(first).nonce
    sidecar.ask(xds.ROUTES)
    assert sidecar.stream.settled()


@pytest.mark.parametrize("kind", [xds.CLUSTERS, xds.ROUTES])
def test_what_was_rejected_is_not_sent_again_until_something_else_is_wanted(kind: str) -> None:
    good = snapshot({"a": "1"})
    sidecar = connected(good)
    before = sidecar.stream.responses
    sidecar.reject = kind
    bad = {xds.CLUSTERS: bundle(xds.CLUSTERS, a="bad"), xds.ROUTES: bundle(xds.ROUTES, outbound="bad")}[kind]
    sidecar.stream.wanted = {**good, kind: (bad,)}
    sidecar.run()
    assert sidecar.received.count(xds.SHORT[kind]) == 1
    assert sidecar.stream.settled()
    assert sidecar.stream.nacks(after=before) == {xds.SHORT[kind]: "no"}
    sidecar.reject = ""
    sidecar.stream.wanted = good
    sidecar.run()
    assert sidecar.stream.nacks() == {}
    assert sidecar.stream.settled()
    # A rejection of the past is no rejection of what comes later.
    assert sidecar.stream.nacks(after=sidecar.stream.responses) == {}


def test_a_sidecar_that_comes_back_up_to_date_is_sent_little() -> None:
    wanted = snapshot({"a": "1"})
    old = connected(wanted)
    back = Sidecar.__new__(Sidecar)
    back.__dict__.update(old.__dict__)
    back.stream, back.nonce = Stream(INSTANCE, wanted), {}
    for kind in (xds.CLUSTERS, xds.ENDPOINTS, xds.LISTENERS, xds.ROUTES, xds.SECRETS):
        back.ask(kind)
    back.run()
    # Clusters and listeners are known whole by their version. Of the others it may lack something.
    assert sorted(back.received) == ["endpoints", "routes", "secrets"]
    newer = Stream(INSTANCE, snapshot({"a": "2"}))
    back.stream, back.nonce = newer, {}
    for kind in (xds.CLUSTERS, xds.ENDPOINTS, xds.LISTENERS, xds.ROUTES):
        back.ask(kind)
    back.run()
    assert (back.clusters, back.warming) == ({"a": "2"}, {})


def test_nobody_gets_what_is_not_theirs() -> None:
    stream = Stream(INSTANCE, snapshot({"a": "1"}))
    with pytest.raises(Refused, match="asks for the secret 'spiffe://m/ns/default/sa/other'"):
        stream.receive(Request(xds.SECRETS, frozenset(["identity", "spiffe://m/ns/default/sa/other"])))
    claim = DiscoveryRequest(type_url=xds.CLUSTERS)
    claim.node.id = "j"
    with pytest.raises(Refused, match="says that it is 'j'"):
        stream.receive(Request.read(claim.SerializeToString()))
    elsewhere = Stream(INSTANCE.model_copy(update={"id": "j.shop"}), snapshot({"a": "1"}))
    elsewhere.receive(Request.read(claim.SerializeToString()))  # a pod knows its name alone
    claim.node.id = "shop"
    with pytest.raises(Refused, match="says that it is 'shop'"):
        elsewhere.receive(Request.read(claim.SerializeToString()))
    with pytest.raises(Refused, match=r"nothing of type 'x\.y'"):
        stream.receive(Request("x.y"))


CLUSTER_SETS = st.dictionaries(st.sampled_from("abcd"), st.sampled_from("12"), min_size=1)


@settings(deadline=None)
@given(st.data())
def test_whatever_changes_when_the_sidecar_ends_up_with_it_and_no_route_ever_dangles(
    data: st.DataObject,
) -> None:
    first = data.draw(CLUSTER_SETS)
    sidecar = Sidecar(Stream(INSTANCE, snapshot(first)))
    wanted = first
    for _ in range(data.draw(st.integers(0, 5))):
        for _ in range(data.draw(st.integers(0, 8))):  # a change may come at any moment
            sidecar.step()
        wanted = data.draw(CLUSTER_SETS)
        sidecar.stream.wanted = snapshot(wanted, sorted(wanted)[:2])
    sidecar.run()
    assert sidecar.stream.settled()
    assert sidecar.clusters == wanted
    assert sidecar.warming == {}
    assert {name: sidecar.endpoints[name] for name in wanted} == wanted
    assert set(sidecar.routes or ()) <= set(wanted)
    assert sidecar.broken == []


def test_envoys_words_are_short() -> None:
    dump = 'goo.gle/debugstr \nname: "x"\n: Proto constraint validation failed (A.B: value must be greater)'
    assert envoys_words(dump) == "Proto constraint validation failed (A.B: value must be greater)"
    assert envoys_words("Error adding listener(s)\n  inbound: no") == "Error adding listener(s) inbound: no"
    assert envoys_words("") == "no reason given"
