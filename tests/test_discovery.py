"""The ADS protocol: one stream, without a network, against a model of a sidecar that speaks either encoding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from envoy.config.cluster.v3.cluster_pb2 import Cluster
from envoy.config.endpoint.v3.endpoint_pb2 import ClusterLoadAssignment
from envoy.config.listener.v3.listener_pb2 import Listener
from envoy.config.route.v3.route_pb2 import RouteConfiguration
from envoy.extensions.transport_sockets.tls.v3.secret_pb2 import Secret
from envoy.service.discovery.v3.discovery_pb2 import (
    DeltaDiscoveryRequest,
    DeltaDiscoveryResponse,
    DiscoveryRequest,
    DiscoveryResponse,
)
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from meshdemo.control import xds
from meshdemo.control.model import Instance
from meshdemo.control.stream import Refused, Stream
from meshdemo.control.wire import INCREMENTAL, STATE_OF_THE_WORLD, WIRES, Request, Wire, envoys_words

KINDS: Mapping[str, type[Message]] = {
    xds.CLUSTERS: Cluster,
    xds.ENDPOINTS: ClusterLoadAssignment,
    xds.LISTENERS: Listener,
    xds.ROUTES: RouteConfiguration,
    xds.SECRETS: Secret,
}
BOTH = pytest.mark.parametrize("wire", WIRES, ids=["state of the world", "incremental"])
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
        xds.ENDPOINTS: (bundle(xds.ENDPOINTS, **{one: clusters[one].replace(BAD, "") for one in clusters}),),
        xds.LISTENERS: (bundle(xds.LISTENERS, inbound=""),),
        xds.ROUTES: (bundle(xds.ROUTES, outbound=" ".join(clusters if routes is None else routes)),),
    }


class Sidecar:
    """A model of Envoy on the other end: it warms clusters, asks for what it refers to, and answers.

    A response with something of `BAD` content it rejects, and takes the rest of it all the same.
    """

    def __init__(self, stream: Stream) -> None:
        self.clusters: dict[str, str] = {}
        self.warming: dict[str, str] = {}
        self.endpoints: dict[str, str] = {}
        self.routes: list[str] | None = None
        self.listeners: set[str] = set()
        self.received: list[str] = []
        self.held: dict[str, dict[str, str]] = {}  # kind -> name -> version
        self.version: dict[str, str] = {}
        self.broken: list[str] = []  # what should never happen
        self.reject = ""  # a type to reject
        self.connect(stream)
        self.ask(xds.CLUSTERS)

    def connect(self, stream: Stream) -> None:
        """Speak on this stream from now on."""
        self.stream = stream
        self.delta = stream.wire.incremental
        self.nonce: dict[str, str] = {}
        self.subscribed: dict[str, set[str]] = {}
        self.withheld: list[tuple[str, str]] = []

    def reconnect(self, stream: Stream) -> None:
        """Go on with another stream, and say what there is of the past."""
        asked = list(self.subscribed)
        self.connect(stream)
        for kind in asked:
            self.ask(kind)

    def names(self, kind: str) -> set[str]:
        """What it asks for."""
        if kind == xds.ENDPOINTS:
            return {*self.clusters, *self.warming}
        return {xds.ROUTES: {"outbound"}, xds.SECRETS: {"identity", "trust"}}.get(kind, set())

    def ask(self, kind: str, error: str = "", nonce: str = "", again: Sequence[str] = ()) -> None:
        """Send a request; `nonce` is that of the response it is about, if it answers one."""
        names, had = self.names(kind), self.subscribed.get(kind)
        self.subscribed[kind] = names
        if self.delta:
            request = DeltaDiscoveryRequest(
                type_url=kind,
                response_nonce=nonce,
                resource_names_subscribe=sorted({*names, *again} - (had or set()) | {*again}),
                resource_names_unsubscribe=sorted((had or set()) - names),
                initial_resource_versions=self.held.get(kind, {}) if had is None else {},
            )
        else:
            request = DiscoveryRequest(
                type_url=kind,
                resource_names=sorted(names),
                response_nonce=nonce or self.nonce.get(kind, ""),
                version_info=self.version.get(kind, ""),
            )
        if error:
            request.error_detail.message = error
        self.stream.receive(self.stream.wire.read(request.SerializeToString()))

    def read(self, data: bytes) -> tuple[str, str, dict[str, str], set[str]]:
        """A response: its type and nonce, what is in it by name, and what is gone."""
        if self.delta:
            response = DeltaDiscoveryResponse.FromString(data)
            kind, versions = response.type_url, {one.name: one.version for one in response.resources}
            found = [KINDS[kind].FromString(one.resource.value) for one in response.resources]
            assert [name_of(one) for one in found] == [one.name for one in response.resources]
            gone = set(response.removed_resources)
        else:
            state = DiscoveryResponse.FromString(data)
            response, kind = state, state.type_url
            found = [KINDS[kind].FromString(one.value) for one in state.resources]
            versions = {name_of(one): state.version_info for one in found}
            gone = set(self.held.get(kind, {})) - set(versions) if kind in xds.WHOLE else set()
        resources = {name_of(one): content_of(one) for one in found}
        self.said = versions
        return kind, response.nonce, resources, gone

    def step(self) -> bool:
        """Take one response in and answer it."""
        data = self.stream.next_response()
        if data is None:
            return False
        kind, nonce, resources, gone = self.read(data)
        self.received.append(xds.SHORT[kind])
        self.nonce[kind] = nonce
        bad = kind == self.reject or BAD in resources.values()
        if kind == self.reject:
            resources, gone = {}, set()
        elif bad:
            resources = {name: content for name, content in resources.items() if content != BAD}
        self.take(kind, resources, gone)
        if not bad:
            # Which versions it has, it says of what it has taken as a whole.
            held = self.held.setdefault(kind, {})
            held.update(self.said)
            for name in gone:
                held.pop(name, None)
            self.version[kind] = next(iter(self.said.values()), "")
        self.withheld.append((kind, nonce if not bad else f"{nonce} no"))
        self.answer()
        if kind == xds.CLUSTERS and (
            self.subscribed.get(xds.ENDPOINTS) != self.names(xds.ENDPOINTS)
            if self.delta  # of what is new, only
            else self.warming or xds.ENDPOINTS not in self.subscribed
        ):
            self.ask(xds.ENDPOINTS)
        if xds.ENDPOINTS in self.subscribed and not self.warming:
            for further in (xds.LISTENERS, xds.SECRETS):
                if further not in self.subscribed:
                    self.ask(further)
        if kind == xds.LISTENERS and xds.ROUTES not in self.subscribed:
            self.ask(xds.ROUTES)
        return True

    def answer(self) -> None:
        """ACK and NACK what may be answered by now: while a cluster warms, Envoy keeps that of clusters back."""
        withheld, self.withheld = self.withheld, []
        for kind, nonce in withheld:
            if self.delta and kind == xds.CLUSTERS and self.warming:
                self.withheld.append((kind, nonce))
            else:
                of, _, bad = nonce.partition(" ")
                self.ask(kind, bad, of)

    def take(self, kind: str, resources: Mapping[str, str], gone: set[str]) -> None:
        match kind:
            case xds.CLUSTERS:
                for name in gone:
                    self.clusters.pop(name, None)
                    self.warming.pop(name, None)
                    if name in (self.routes or ()):
                        self.broken.append(f"cluster {name} went while routes lead to it")
                for name, content in resources.items():
                    if self.clusters.get(name) != content:
                        self.warming[name] = content
                    else:
                        self.warming.pop(name, None)
            case xds.ENDPOINTS:
                self.endpoints.update(resources)
                for name in {*resources, *gone} & set(self.warming):
                    self.clusters[name] = self.warming.pop(name)
            case xds.LISTENERS:
                self.listeners = (self.listeners - gone) | set(resources)
            case xds.ROUTES if resources:
                self.routes = resources["outbound"].split()
                if missing := set(self.routes) - set(self.clusters):
                    self.broken.append(f"routes lead to {missing}, which is not there")

    def run(self) -> Sidecar:
        while self.step():
            assert len(self.received) < 1000, self.received[-20:]
        return self


BAD = "bad"


def name_of(resource: Message) -> str:
    return resource.cluster_name if isinstance(resource, ClusterLoadAssignment) else resource.name  # type: ignore[attr-defined]


def content_of(resource: Message) -> str:
    match resource:
        case Cluster():
            return resource.alt_stat_name
        case ClusterLoadAssignment():
            return next(iter(resource.named_endpoints))
        case RouteConfiguration():
            return " ".join(resource.internal_only_headers)
    return ""


def connected(wanted: xds.Snapshot, wire: Wire = INCREMENTAL) -> Sidecar:
    sidecar = Sidecar(Stream(INSTANCE, wanted, wire)).run()
    assert sidecar.stream.settled()
    sidecar.received.clear()
    return sidecar


def response(stream: Stream) -> DeltaDiscoveryResponse:
    """The next response of an incremental stream."""
    data = stream.next_response()
    assert data is not None
    return DeltaDiscoveryResponse.FromString(data)


def sent(response: DeltaDiscoveryResponse) -> list[str]:
    return [resource.name for resource in response.resources]


def routes(*clusters: str) -> tuple[xds.Bundle, ...]:
    return (bundle(xds.ROUTES, outbound=" ".join(clusters)),)


@BOTH
def test_a_new_sidecar_gets_everything_in_order_and_then_nothing(wire: Wire) -> None:
    sidecar = Sidecar(Stream(INSTANCE, snapshot({"a": "1", "b": "1"}), wire))
    assert not sidecar.stream.settled()
    sidecar.run()
    assert sidecar.received == ["clusters", "endpoints", "secrets", "listeners", "routes"]
    assert (sidecar.clusters, sidecar.routes) == ({"a": "1", "b": "1"}, ["a", "b"])
    assert sidecar.stream.settled()
    assert sidecar.stream.next_response() is None


@BOTH
def test_only_what_changed_is_sent(wire: Wire) -> None:
    before = snapshot({"a": "1"}, ["a"])
    sidecar = connected(before, wire)
    sidecar.stream.wanted = {**before, xds.ROUTES: routes()}
    sidecar.run()
    assert sidecar.received == ["routes"]
    sidecar.received.clear()
    # Resources that the sidecar did not ask for are not its business.
    sidecar.stream.wanted = {**sidecar.stream.wanted, xds.ENDPOINTS: (bundle(xds.ENDPOINTS, a="1", z="1"),)}
    assert sidecar.run().received == []
    assert sidecar.stream.settled()


@BOTH
def test_a_changed_cluster_gets_its_endpoints_again_before_routes_move(wire: Wire) -> None:
    sidecar = connected(snapshot({"a": "1", "b": "1"}, ["a"]), wire)
    sidecar.stream.wanted = snapshot({"a": "2", "b": "1", "c": "1"}, ["c"])
    sidecar.run()
    assert sidecar.received[-1] == "routes"
    assert sidecar.received[0] == "clusters"
    assert (sidecar.clusters, sidecar.warming) == ({"a": "2", "b": "1", "c": "1"}, {})
    assert sidecar.broken == []


def test_asking_again_without_answering_anything_is_answered() -> None:
    sidecar = connected(snapshot({"a": "1"}), STATE_OF_THE_WORLD)
    sidecar.ask(xds.ENDPOINTS)
    assert not sidecar.stream.settled()
    assert sidecar.run().received == ["endpoints"]


def test_a_late_answer_to_a_superseded_response_changes_nothing() -> None:
    sidecar = connected(snapshot({"a": "1"}), STATE_OF_THE_WORLD)
    sidecar.stream.wanted = {**sidecar.stream.wanted, xds.ROUTES: routes()}
    first = sidecar.stream.next_response()
    assert first
    names = frozenset(["outbound"])
    sidecar.stream.receive(Request(xds.ROUTES, names, nonce="1", error="about the one before"))
    assert not sidecar.stream.settled()
    assert sidecar.stream.nacks() == {}
    sidecar.ask(xds.ROUTES, nonce=DiscoveryResponse.FromString(first).nonce)
    assert sidecar.stream.settled()


@BOTH
@pytest.mark.parametrize("kind", [xds.CLUSTERS, xds.ROUTES])
def test_what_was_rejected_is_not_sent_again_until_something_else_is_wanted(kind: str, wire: Wire) -> None:
    good = snapshot({"a": "1"})
    sidecar = connected(good, wire)
    before = sidecar.stream.responses
    sidecar.reject = kind
    other = {xds.CLUSTERS: bundle(xds.CLUSTERS, a="2"), xds.ROUTES: bundle(xds.ROUTES, outbound="z")}[kind]
    sidecar.stream.wanted = {**good, kind: (other,)}
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
    sidecar = connected(snapshot({"a": "1"}), STATE_OF_THE_WORLD)
    sidecar.reconnect(Stream(INSTANCE, snapshot({"a": "1"}), STATE_OF_THE_WORLD))
    sidecar.run()
    # Clusters and listeners are known whole by their version. Of the others it may lack something.
    assert sorted(sidecar.received) == ["endpoints", "routes", "secrets"]


@BOTH
def test_a_sidecar_that_comes_back_is_brought_up_to_date(wire: Wire) -> None:
    sidecar = connected(snapshot({"a": "1", "b": "1", "c": "1"}, ["a"]), wire)
    sidecar.reconnect(Stream(INSTANCE, snapshot({"a": "2", "b": "1", "d": "1"}, ["d"]), wire))
    sidecar.run()
    assert sidecar.stream.settled()
    assert (sidecar.clusters, sidecar.warming) == ({"a": "2", "b": "1", "d": "1"}, {})
    assert (sidecar.routes, sidecar.broken) == (["d"], [])


@BOTH
def test_a_sidecar_that_comes_back_is_waited_for_until_it_has_asked_for_everything(wire: Wire) -> None:
    sidecar = connected(snapshot({"a": "1"}), wire)
    asked = list(sidecar.subscribed)
    assert len(asked) == len(KINDS)
    sidecar.connect(Stream(INSTANCE, snapshot({"a": "1"}), wire))
    for kind in asked:
        # It would be said to have what is yet to be sent to it.
        assert not sidecar.stream.settled()
        sidecar.ask(kind)
        sidecar.run()
    assert sidecar.stream.settled()


def test_a_sidecar_need_not_ask_for_everything() -> None:
    def asked(wanted: xds.Snapshot) -> Stream:
        stream = Stream(INSTANCE, wanted, INCREMENTAL)
        for nonce in ("", "1"):
            request = DeltaDiscoveryRequest(type_url=xds.CLUSTERS, response_nonce=nonce)
            stream.receive(INCREMENTAL.read(request.SerializeToString()))
            assert (stream.next_response() is None) is (nonce == "1")
        return stream

    clusters = {xds.CLUSTERS: (bundle(xds.CLUSTERS, a="1"),)}
    assert asked({**clusters, xds.ROUTES: ()}).settled()  # there is nothing else for it
    stream = asked({**clusters, xds.ROUTES: (bundle(xds.ROUTES, outbound="a"),)})
    assert not stream.settled()
    stream.had_time_to_ask()
    assert stream.settled()


@BOTH
def test_nobody_gets_what_is_not_theirs(wire: Wire) -> None:
    stream = Stream(INSTANCE, snapshot({"a": "1"}), wire)
    others = "spiffe://m/ns/default/sa/other"
    with pytest.raises(Refused, match=f"asks for the secret '{others}'"):
        stream.receive(Request(xds.SECRETS, frozenset(["identity", others])))
    with pytest.raises(Refused, match=f"asks for the secret '{others}'"):
        stream.receive(Request(xds.SECRETS, versions=frozenset([(others, "1")])))
    with pytest.raises(Refused, match=r"asks for the secret '\*'"):
        stream.receive(Request(xds.SECRETS, frozenset("*")))
    claim = Request(xds.CLUSTERS, node="j")
    with pytest.raises(Refused, match="says that it is 'j'"):
        stream.receive(claim)
    elsewhere = Stream(INSTANCE.model_copy(update={"id": "j.shop"}), snapshot({"a": "1"}), wire)
    elsewhere.receive(claim)  # a pod knows its name alone
    with pytest.raises(Refused, match="says that it is 'shop'"):
        elsewhere.receive(replace(claim, node="shop"))
    with pytest.raises(Refused, match=r"nothing of type 'x\.y'"):
        stream.receive(Request("x.y"))
    with pytest.raises(Refused, match="asks for 50001 endpoints"):
        stream.receive(Request(xds.ENDPOINTS, frozenset(map(str, range(50_001)))))


@BOTH
def test_requests_are_read(wire: Wire) -> None:
    message = (DeltaDiscoveryRequest if wire.incremental else DiscoveryRequest)(
        type_url=xds.CLUSTERS, response_nonce="7"
    )
    message.node.id = "i"
    message.error_detail.message = "no\n way"
    read = wire.read(message.SerializeToString())
    assert (read.type_url, read.nonce, read.node, read.error) == (xds.CLUSTERS, "7", "i", "no way")
    assert wire.read(message.SerializeToString()) is read


# -- incremental ------------------------------------------------------------------------------------------


def test_a_change_of_one_cluster_sends_one_cluster_and_its_endpoints() -> None:
    sidecar = connected(snapshot({"a": "1", "b": "1", "c": "1"}))
    sidecar.stream.wanted = snapshot({"a": "1", "b": "2", "c": "1"})
    for kind in (xds.CLUSTERS, xds.ENDPOINTS):
        one = response(sidecar.stream)
        assert (one.type_url, sent(one), list(one.removed_resources)) == (kind, ["b"], [])
        sidecar.ask(kind, nonce=one.nonce)
    assert sidecar.stream.next_response() is None
    assert sidecar.stream.settled()


def test_what_a_sidecar_has_is_not_sent_again_after_a_restart_of_the_control_plane() -> None:
    sidecar = connected(snapshot({"a": "1", "b": "1"}))
    # Another process encodes the same anew.
    sidecar.reconnect(Stream(INSTANCE, snapshot({"a": "1", "b": "1"}), INCREMENTAL))
    assert sidecar.stream.next_response() is None
    assert sidecar.stream.settled()
    sidecar.reconnect(Stream(INSTANCE, snapshot({"a": "1", "b": "2"}), INCREMENTAL))
    # Its endpoints are the same, but the changed cluster warms until they come.
    assert sidecar.run().received == ["clusters", "endpoints"]
    assert (sidecar.clusters, sidecar.warming) == ({"a": "1", "b": "2"}, {})


def test_what_is_subscribed_to_again_is_sent_again() -> None:
    sidecar = connected(snapshot({"a": "1", "b": "1"}))
    sidecar.ask(xds.ENDPOINTS, again=["b"])
    assert not sidecar.stream.settled()
    one = response(sidecar.stream)
    assert (one.type_url, sent(one)) == (xds.ENDPOINTS, ["b"])
    # So it may say while it answers, whatever it answers.
    sidecar.ask(xds.ENDPOINTS, nonce="no longer known", again=["a"])
    assert sent(response(sidecar.stream)) == ["a"]
    sidecar.ask(xds.CLUSTERS, again=["*"])
    assert sent(response(sidecar.stream)) == ["a", "b"]


def test_what_a_sidecar_no_longer_asks_for_is_not_sent() -> None:
    sidecar = connected(snapshot({"a": "1", "b": "1"}))
    stream = sidecar.stream
    stream.receive(Request(xds.ENDPOINTS, dropped=frozenset(["b", "never asked for"])))
    changed = (bundle(xds.ENDPOINTS, a="1", b="2"),)
    stream.wanted = {**stream.wanted, xds.ENDPOINTS: changed}
    assert stream.next_response() is None
    assert stream.settled()
    stream.receive(Request(xds.ENDPOINTS, frozenset("b")))
    assert sent(response(stream)) == ["b"]


def test_a_name_that_there_is_nothing_of_is_said_to_be_gone_and_sent_when_there_is() -> None:
    sidecar = connected(snapshot({"a": "1"}))
    stream = sidecar.stream
    stream.receive(Request(xds.ENDPOINTS, frozenset("z")))
    one = response(stream)
    assert (sent(one), list(one.removed_resources)) == ([], ["z"])
    stream.receive(Request(xds.ENDPOINTS, nonce=one.nonce))
    assert stream.settled()
    stream.wanted = {**stream.wanted, xds.ENDPOINTS: (bundle(xds.ENDPOINTS, a="1", z="1"),)}
    assert sent(response(stream)) == ["z"]


def test_a_sidecar_that_nothing_is_rendered_for_yet_waits() -> None:
    stream = Stream(INSTANCE, {}, INCREMENTAL)
    for kind in (xds.RUNTIME, xds.CLUSTERS, xds.ENDPOINTS):
        stream.receive(Request(kind, frozenset("x") if kind not in xds.WHOLE else frozenset()))
    assert stream.next_response() is None
    # That there is no cluster at all is an answer, too.
    stream.wanted = {xds.CLUSTERS: (xds.Bundle({}),)}
    one = response(stream)
    assert (one.type_url, sent(one)) == (xds.CLUSTERS, [])
    stream.receive(Request(xds.CLUSTERS, nonce=one.nonce))
    assert stream.next_response() is None


def test_clusters_go_last_and_are_named() -> None:
    sidecar = connected(snapshot({"a": "1", "b": "1"}, ["b"]))
    stream = sidecar.stream
    stream.wanted = snapshot({"a": "2", "c": "1"}, ["c"])
    seen = []
    while (data := stream.next_response()) is not None or sidecar.withheld:
        assert data is not None
        one = DeltaDiscoveryResponse.FromString(data)
        seen.append((xds.SHORT[one.type_url], sent(one), list(one.removed_resources)))
        new = frozenset("c") if len(seen) == 1 else frozenset[str]()
        if new:
            stream.receive(Request(xds.ENDPOINTS, new))
        stream.receive(Request(one.type_url, nonce=one.nonce))
    assert seen == [
        ("clusters", ["a", "c"], []),
        ("endpoints", ["a", "c"], []),
        ("routes", ["outbound"], []),
        ("clusters", [], ["b"]),
    ]
    assert stream.settled()


def test_everything_may_be_asked_for_by_name_and_taken_back() -> None:
    stream = Stream(INSTANCE, snapshot({"a": "1", "b": "1"}), INCREMENTAL)
    stream.receive(Request(xds.CLUSTERS, frozenset(["*", "a", "z"])))
    one = response(stream)
    assert (sent(one), list(one.removed_resources)) == (["a", "b"], ["z"])
    # Whether what it named is part of everything, it cannot know.
    stream.receive(Request(xds.CLUSTERS, dropped=frozenset(["a", "z"]), nonce=one.nonce))
    one = response(stream)
    assert (sent(one), list(one.removed_resources)) == (["a"], ["z"])
    stream.receive(Request(xds.CLUSTERS, frozenset("b"), dropped=frozenset("*"), nonce=one.nonce))
    assert sent(response(stream)) == ["b"]
    stream.wanted = snapshot({"a": "2", "b": "1"})
    assert stream.next_response() is None


def test_a_rejection_counts_also_when_more_was_sent_meanwhile() -> None:
    sidecar = connected(snapshot({"a": "1", "b": "1"}))
    stream, clusters = sidecar.stream, sidecar.stream.wanted
    before = stream.responses
    endpoints = {"1": clusters[xds.ENDPOINTS]}
    stream.wanted = {**clusters, xds.ENDPOINTS: (bundle(xds.ENDPOINTS, a="2", b="1"),)}
    first = response(stream)
    stream.wanted = {**clusters, xds.ENDPOINTS: (bundle(xds.ENDPOINTS, a="2", b="2"),)}
    second = response(stream)
    assert (sent(first), sent(second)) == (["a"], ["b"])
    stream.receive(Request(xds.ENDPOINTS, nonce=first.nonce, error="no"))
    assert not stream.settled()
    stream.receive(Request(xds.ENDPOINTS, nonce=second.nonce))
    assert stream.settled()
    assert stream.nacks(after=before) == {"endpoints": "no"}
    stream.wanted = {**clusters, xds.ENDPOINTS: endpoints["1"]}
    last = response(stream)
    assert sent(last) == ["a", "b"]
    assert stream.nacks() == {}
    # What was put right already is not rejected by an answer that comes late.
    stream.wanted = {**clusters, xds.ENDPOINTS: (bundle(xds.ENDPOINTS, a="3", b="1"),)}
    third = response(stream)
    stream.wanted = clusters
    response(stream)
    stream.receive(Request(xds.ENDPOINTS, nonce=third.nonce, error="no"))
    assert stream.nacks() == {}


def test_all_of_a_response_that_was_rejected_is_put_right() -> None:
    sidecar = connected(snapshot({"a": "1", "b": "1"}))
    stream, good = sidecar.stream, sidecar.stream.wanted
    # a has to be sent again, b is what is bad: whether a was taken, nobody knows.
    stream.receive(Request(xds.ENDPOINTS, frozenset("a")))
    stream.wanted = {**good, xds.ENDPOINTS: (bundle(xds.ENDPOINTS, a="1", b="2"),)}
    one = response(stream)
    stream.receive(Request(xds.ENDPOINTS, nonce=one.nonce, error="no"))
    assert stream.next_response() is None
    assert stream.settled()
    stream.wanted = good
    assert sent(response(stream)) == ["a", "b"]
    assert stream.nacks() == {}


@BOTH
def test_what_a_sidecar_took_of_a_response_that_it_rejected_is_put_right_after_a_reconnection_too(
    wire: Wire,
) -> None:
    good = snapshot({"a": "1", "b": "1"}, ["a"])
    sidecar = connected(good, wire)
    sidecar.stream.wanted = {**good, xds.CLUSTERS: (bundle(xds.CLUSTERS, a="2", b=BAD),)}
    sidecar.run()
    assert sidecar.clusters == {"a": "2", "b": "1"}
    sidecar.reconnect(Stream(INSTANCE, good, wire, sidecar.stream.doubts()))
    sidecar.run()
    assert sidecar.clusters == {"a": "1", "b": "1"}
    assert sidecar.stream.doubts() == {}


def test_a_cluster_that_goes_while_it_warms_holds_up_nothing_after_a_reconnection() -> None:
    sidecar = connected(snapshot({"b": "2"}), INCREMENTAL)
    wanted = snapshot({"a": "1", "b": "1"})
    sidecar.stream.wanted = wanted
    sidecar.step()
    assert sidecar.warming == {"a": "1", "b": "1"}
    sidecar.reconnect(Stream(INSTANCE, wanted, INCREMENTAL, sidecar.stream.doubts()))
    sidecar.stream.wanted = snapshot({"a": "1"})
    sidecar.run()
    # It confirms a only when b has got endpoints, or the word that there are none.
    assert sidecar.stream.settled()
    assert (sidecar.clusters, sidecar.warming, sidecar.routes) == ({"a": "1"}, {}, ["a"])


CLUSTER_SETS = st.dictionaries(st.sampled_from("abcd"), st.sampled_from("12"), min_size=1)


@BOTH
@settings(deadline=None)
@given(data=st.data())
def test_whatever_happens_when_the_sidecar_ends_up_with_what_it_should_have_and_no_route_ever_dangles(
    data: st.DataObject, wire: Wire
) -> None:
    first = data.draw(CLUSTER_SETS)
    sidecar = Sidecar(Stream(INSTANCE, snapshot(first), wire))
    wanted = first
    for _ in range(data.draw(st.integers(0, 5))):
        for _ in range(data.draw(st.integers(0, 8))):  # a change may come at any moment
            sidecar.step()
        before, wanted = wanted, data.draw(CLUSTER_SETS)
        asked_for = snapshot(wanted, sorted(wanted)[:2])
        # State of the world cannot name what may stay till routes have moved, if nobody knows what the sidecar has.
        further = ["reconnect", "roll back"] if wire.incremental else []
        match data.draw(st.sampled_from(["change", *further])):
            case "change":
                sidecar.stream.wanted = asked_for
            case "reconnect":
                sidecar.reconnect(Stream(INSTANCE, asked_for, wire, sidecar.stream.doubts()))
            case "roll back":
                # Something bad among the clusters, and then what is right.
                bad = {**before, **data.draw(CLUSTER_SETS), data.draw(st.sampled_from("abcd")): BAD}
                sound = sorted(name for name in before if bad[name] != BAD)
                sidecar.stream.wanted = snapshot(bad, sound[:2])
                for _ in range(data.draw(st.integers(0, 3))):
                    sidecar.step()
                sidecar.stream.wanted = asked_for
    sidecar.run()
    assert sidecar.stream.settled()
    assert sidecar.stream.nacks() == {}
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
