"""One sidecar's ADS stream: the protocol alone, no I/O.

A stream compares what the sidecar should have with what it was sent, type by type in the order in which
configuration must change, and sends what differs; so one rule serves the first connection, a change, a
reconnection and a roll-back, in both encodings (`wire`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from meshdemo.control import xds
from meshdemo.control.model import Instance
from meshdemo.control.wire import EVERYTHING, Request, Response, Wire, shared
from meshdemo.names import parted

_NONE = frozenset[str]()
_MOST_NAMES = 50_000  # that a sidecar may ask for, of one type
_MOST_UNANSWERED = 100  # responses of one type that are remembered until they are answered


class Refused(Exception):
    """A sidecar asks for what its token does not entitle it to."""


Doubts = Mapping[str, frozenset[str]]
"""By type, names of which nobody knows what a sidecar has, whatever version it says that it has."""


class _Sent(NamedTuple):
    """A response that is neither ACKed nor rejected yet."""

    number: int  # among all of the stream
    names: frozenset[str]


@dataclass(slots=True)
class _Subscription:
    """One type on one stream.

    `names` are those that the sidecar asks for, `missing` those of them that it lacks whatever `sent` says;
    `sent` is what it should have by what it was sent; `nonce` is that of the last response, `unanswered` are
    the responses that wait for their answers, by nonce. `rejected` are names of which the sidecar has not
    taken the last that it was sent, with its words `nack` and the `number` of that response.
    """

    names: frozenset[str] = _NONE
    missing: frozenset[str] = _NONE
    sent: xds.Bundles = ()
    nonce: str = ""
    unanswered: dict[str, _Sent] = field(default_factory=dict)
    rejected: frozenset[str] = _NONE
    nack: str = ""
    number: int = 0

    def of(self, names: frozenset[str]) -> frozenset[str]:
        """Those of these names that the sidecar asks for."""
        return names if EVERYTHING in self.names or names <= self.names else names & self.names


class _Differences(NamedTuple):
    """How what a sidecar should have differs from what it was sent."""

    changed: frozenset[str]
    lapsed: frozenset[str]  # no longer there
    again: frozenset[str]  # there and perhaps the same, but rejected with something that differs


_ALIKE = _Differences(_NONE, _NONE, _NONE)


class _Due(NamedTuple):
    """What a sidecar is to be sent of a type."""

    target: xds.Bundles  # what it should have then
    names: frozenset[str]  # what of it is sent
    gone: frozenset[str]  # what is named as gone


class Stream:
    """One sidecar's ADS stream: the protocol alone, no I/O."""

    def __init__(
        self, instance: Instance, wanted: xds.Snapshot, wire: Wire, doubts: Doubts | None = None
    ) -> None:
        """`wanted` is what the sidecar should have; it is replaced when that changes.

        `doubts` are those that its stream before has left.
        """
        self.instance = instance
        self.wanted = wanted
        self.wire = wire
        self.responses = 0
        self.lagging = False  # it let a push time out, and has not caught up yet
        self._asked_all = False  # it has asked for all that there is for it, or had the time to
        self._subscriptions: dict[str, _Subscription] = {}
        self._owed = _NONE  # endpoints of changed clusters
        self._doubts = dict(doubts or {})

    # -- requests -----------------------------------------------------------------------------------------

    def receive(self, request: Request) -> None:
        """Take a request in: a subscription, an ACK or a NACK, and which names the sidecar wants now.

        Raises:
            Refused: it asks for a secret that is not its own, or claims to be another instance.
        """
        self._check(request)
        subscription = self._subscriptions.get(request.type_url)
        if subscription is None:
            self._subscriptions[request.type_url] = self._opened(request)
            return
        if request.nonce != subscription.nonce and not self.wire.incremental:
            return  # about what has been superseded; the answer to the last response will come
        answered = subscription.unanswered.pop(request.nonce, None)
        if answered is not None and request.error is not None:
            self._rejects(request, subscription, answered)
        if self.wire.incremental:
            if request.names or request.dropped:
                self._subscribe(request, subscription)
            return
        if request.names == subscription.names and answered is None:
            # It asks again for what it has: so it does for the endpoints of a cluster that was changed, and
            # that cluster serves nobody until it gets them.
            asked = request.names
        else:
            asked = request.names - subscription.names
        self._ask(subscription, request.type_url, request.names, asked)

    def _opened(self, request: Request) -> _Subscription:
        """The first request of a type."""
        type_url = request.type_url
        wanted = self.wanted.get(type_url, ())
        names = request.names
        if not names and type_url in xds.WHOLE:
            names = frozenset((EVERYTHING,))  # an incremental client may say so, too
        subscription = _Subscription()
        self._ask(subscription, type_url, names, names)
        doubts = self._doubts.pop(type_url, _NONE)
        # It is back, and has some of what it should have.
        if versions := _less_doubted(request.versions, doubts) if self.wire.incremental else None:
            subscription.sent = xds.held(wanted, versions)
        elif type_url in xds.WHOLE and request.version == xds.version(wanted) and not doubts:
            subscription.sent = wanted
        subscription.missing -= xds.among(wanted, xds.names(subscription.sent))
        if type_url == xds.ENDPOINTS:
            subscription.missing |= self._owed & subscription.names
        return subscription

    def _subscribe(self, request: Request, subscription: _Subscription) -> None:
        """Names that an incremental client asks for from now on, or no longer."""
        names = (subscription.names | request.names) - request.dropped
        # What it asks for again it may have forgotten.
        asked = request.names
        if EVERYTHING in names:
            # Of what it named, and names no longer, it cannot know whether it is part of everything.
            asked |= request.dropped & subscription.names
        self._ask(subscription, request.type_url, names, asked)

    def _ask(
        self, subscription: _Subscription, type_url: str, names: frozenset[str], asked: frozenset[str]
    ) -> None:
        """It asks for these names now, and has to be sent those `asked`."""
        if len(names) > _MOST_NAMES:
            raise Refused(f"asks for {len(names)} {xds.SHORT[type_url]}")
        if EVERYTHING in asked:
            asked = (asked | xds.names(self.wanted.get(type_url, ()))) - {EVERYTHING}
        subscription.names = shared(names)
        subscription.missing = subscription.of(subscription.missing) | asked
        subscription.rejected = subscription.of(subscription.rejected)

    def _rejects(self, request: Request, subscription: _Subscription, answered: _Sent) -> None:
        """It has rejected a response: all of it, some of it, nobody knows."""
        # What it has been sent since in place of this is still to be answered.
        since = [one.names for one in subscription.unanswered.values() if one.number > answered.number]
        if rejected := answered.names.difference(*since):
            subscription.rejected |= rejected
            subscription.nack, subscription.number = request.error or "", answered.number
            if rejected != answered.names:
                # Some of it is put right already: so is the rest.
                subscription.sent = xds.less(subscription.sent, rejected)
        if request.type_url == xds.CLUSTERS:
            self._owed -= answered.names

    def _check(self, request: Request) -> None:
        if request.type_url not in xds.ORDER:
            raise Refused(f"there is nothing of type '{request.type_url}'")
        # A pod knows its name, and not whether the mesh calls it by its namespace as well.
        if request.node and request.node not in (self.instance.id, parted(self.instance.id, "")[0]):
            raise Refused(f"says that it is '{request.node}'")
        if request.type_url == xds.SECRETS:
            named = request.names | {name for name, _ in request.versions}
            for name in sorted(named - xds.among(self.wanted.get(xds.SECRETS, ()), named)):
                raise Refused(f"asks for the secret '{name}'")

    # -- responses ----------------------------------------------------------------------------------------

    def next_response(self) -> bytes | None:
        """The next response that may be sent now, in the order of types; None if there is none."""
        for type_url in self._order():
            subscription = self._subscriptions.get(type_url)
            if subscription is None:
                continue
            if type_url in (xds.LISTENERS, xds.ROUTES) and self._clusters_unsettled():
                return None  # what these refer to must be there first
            due = self._due(type_url, subscription)
            if due is not None:
                return self._respond(type_url, subscription, due)
            wanted = self.wanted.get(type_url, ())
            if subscription.sent is not wanted:
                subscription.sent = wanted
                subscription.rejected = xds.among(wanted, subscription.rejected)
        return None

    def _order(self) -> Sequence[str]:
        clusters, wanted = self._subscriptions.get(xds.CLUSTERS), self.wanted.get(xds.CLUSTERS, ())
        if clusters is None or not xds.only_removes(clusters.sent, wanted):
            return xds.ORDER
        return xds.ORDER if self._differences(xds.CLUSTERS, clusters).again else _REMOVAL_ORDER

    def _clusters_unsettled(self) -> bool:
        """Are there clusters that the sidecar has not taken yet? (Envoy ACKs when they are warm.)"""
        clusters = self._subscriptions.get(xds.CLUSTERS)
        if clusters is None or not clusters.unanswered:
            return self._owes()
        # What is to go need not get warm.
        wanted = self.wanted.get(xds.CLUSTERS, ())
        return self._owes() or any(xds.among(wanted, one.names) for one in clusters.unanswered.values())

    def _owes(self) -> bool:
        """Are there endpoints that a changed cluster waits for?"""
        return bool(xds.among(self.wanted.get(xds.ENDPOINTS, ()), self._owed))

    def _differences(self, type_url: str, subscription: _Subscription) -> _Differences:
        wanted, sent = self.wanted.get(type_url, ()), subscription.sent
        if sent == wanted:
            return _ALIKE
        changed = subscription.of(xds.changed(sent, wanted))
        lapsed = subscription.of(xds.lapsed(sent, wanted))
        rejected = subscription.rejected
        if self._whole(type_url) or not rejected & (changed | lapsed):
            return _Differences(changed, lapsed, _NONE)
        # Nobody knows what the sidecar has taken of a response that it rejected: all of it is put right.
        there = xds.among(wanted, rejected)
        return _Differences(changed, lapsed | (rejected - there), there)

    def _whole(self, type_url: str) -> bool:
        """Does a response hold everything of this type, and what is not in it goes?"""
        return type_url in xds.WHOLE and not self.wire.incremental

    def _due(self, type_url: str, subscription: _Subscription) -> _Due | None:
        """What is to be sent now, None if nothing is."""
        wanted, sent = self.wanted.get(type_url, ()), subscription.sent
        if sent is wanted and not subscription.missing:
            return None  # as mostly
        changed, lapsed, again = self._differences(type_url, subscription)
        target = wanted
        if type_url == xds.CLUSTERS and (changed or again):
            # Those that go are kept until routes have moved on; then they alone are left to do.
            target = xds.with_gone(sent, wanted, subscription.rejected)
        if self._whole(type_url):
            return None if sent == target else _Due(target, xds.names(target), _NONE)
        names, gone = (changed | again if again else changed), _NONE
        if self.wire.incremental and lapsed and type_url in xds.WHOLE:
            # Of other types, a sidecar loses interest by itself: in the endpoints of a cluster that goes.
            gone = lapsed - xds.among(target, lapsed)
        if missing := subscription.missing:
            there = xds.among(wanted, missing)
            names |= there
            if self.wire.incremental and type_url in self.wanted:  # else it is to wait
                gone |= missing - there
        first = type_url in xds.WHOLE and not sent  # there may be nothing, and it waits for that word
        return _Due(target, shared(names), gone) if names or gone or first else None

    def _respond(self, type_url: str, subscription: _Subscription, due: _Due) -> bytes:
        if type_url == xds.CLUSTERS:
            # A changed cluster warms until its endpoints are sent again, asked for or not.
            whole = self._whole(type_url)
            self._owed |= xds.changed(subscription.sent, due.target) if whole else due.names
            # One that goes may be warming, if it is in doubt: until it is warm, nothing here is confirmed.
            self._owed |= xds.unknown(subscription.sent)
            if assigned := self._subscriptions.get(xds.ENDPOINTS):
                assigned.missing |= self._owed & assigned.names
        elif type_url == xds.ENDPOINTS:
            self._owed -= due.names | due.gone
        self.responses += 1
        # Counted by type: streams with the same past get the same bytes, nonce included.
        subscription.nonce = str(int(subscription.nonce or "0") + 1)
        subscription.sent = due.target
        about = due.names | due.gone if due.gone else due.names
        if self._whole(type_url):
            subscription.missing = subscription.rejected = _NONE
        else:
            subscription.missing = (subscription.missing - about) or _NONE
            subscription.rejected = (subscription.rejected - about) or _NONE
        unanswered = subscription.unanswered
        if not self.wire.incremental:
            unanswered.clear()  # only the last one will be answered
        elif len(unanswered) >= _MOST_UNANSWERED:
            del unanswered[next(iter(unanswered))]
        unanswered[subscription.nonce] = _Sent(self.responses, about)
        bundles = due.target
        if self.wire.incremental:
            # Without those that nothing is sent of: then it is the same for all who get the same.
            bundles = tuple(bundle for bundle in bundles if not due.names.isdisjoint(bundle.names))
        version = xds.version(bundles)
        return self.wire.write(Response(type_url, version, subscription.nonce, bundles, due.names, due.gone))

    # -- standing -----------------------------------------------------------------------------------------

    def settled(self) -> bool:
        """Has the sidecar answered everything, and is nothing left to send?"""
        if self._opening() or self._owes():
            return False
        if any(subscription.unanswered for subscription in self._subscriptions.values()):
            return False
        return all(
            self._due(type_url, subscription) is None
            for type_url, subscription in self._subscriptions.items()
        )

    def had_time_to_ask(self) -> None:
        """It need not ask for everything: what it has not asked for by now, it does not need."""
        self._asked_all = True

    def _opening(self) -> bool:
        """Is it yet to ask for types of which it has what was before? (It asks for one after the other.)"""
        if not self._asked_all:
            self._asked_all = all(
                type_url in self._subscriptions for type_url, bundles in self.wanted.items() if bundles
            )
        return not self._asked_all

    def nacks(self, after: int = 0) -> dict[str, str]:
        """What the sidecar rejected and still lacks: short type -> Envoy's words.

        Args:
            after: only of responses after this one (counted as `responses` does).
        """
        return {
            xds.SHORT[type_url]: subscription.nack
            for type_url, subscription in self._subscriptions.items()
            if subscription.rejected and subscription.number > after
        }

    def doubts(self) -> Doubts:
        """What it is not known to have taken or not, if the stream ends now."""
        # A sidecar takes some of a response that it rejects, and goes on saying that it has what was before.
        found = dict(self._doubts)
        for type_url, subscription in self._subscriptions.items():
            unanswered = [one.names for one in subscription.unanswered.values()]
            if names := (subscription.rejected | xds.unknown(subscription.sent)).union(*unanswered):
                found[type_url] = names
        return found


def _less_doubted(versions: frozenset[tuple[str, str]], doubts: frozenset[str]) -> frozenset[tuple[str, str]]:
    """The versions of which there is no doubt, and none where there is."""
    if not doubts:
        return versions
    known = {(name, version) for name, version in versions if name not in doubts}
    return frozenset(known | {(name, "") for name in doubts})


_REMOVAL_ORDER: Sequence[str] = (*(kind for kind in xds.ORDER if kind != xds.CLUSTERS), xds.CLUSTERS)
"""Clusters that go, go last: nothing may refer to them any more."""
