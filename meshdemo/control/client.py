"""The client of the control plane's HTTP API: one method each, raising MeshdemoError.

Every command pays for importing this, so it imports nothing at its top but the errors: `http.client` and
the pydantic models come in when a call needs them. Each call opens its own connection: on loopback that
costs 0.1 ms, and in return a client may be used from several threads and outlives restarts of the server.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NotRequired, TypedDict
from urllib.parse import quote, urlencode, urlsplit

from meshdemo.errors import BadInput, Failed, MeshdemoError, Missing

if TYPE_CHECKING:
    from http.client import HTTPConnection, HTTPResponse

    from meshdemo.control.model import Effect, Fault, Intent, Traffic
    from meshdemo.control.signals import Sample


class InstanceRow(TypedDict):
    """How the control plane sees one instance."""

    id: str
    service: str
    version: str
    revision: int
    ready: bool
    restarts: int  # how often its app or its sidecar died and was started again by the runtime
    connected: bool  # its sidecar holds an ADS stream
    acked: bool  # ... and runs the current revision of the intent
    last_report_s: float | None  # seconds since its sidecar last reported; None: not yet
    silent: bool  # reported nothing for longer than it should: unknown, not healthy
    ejected: bool


class Nack(TypedDict):
    """A configuration that a sidecar rejected and still lacks."""

    instance: str
    type: str
    error: str


class StatusRow(TypedDict):
    """The mesh as the control plane sees it."""

    mesh: str
    revision: int
    instances: list[InstanceRow]
    nacks: list[Nack]
    trouble: str  # of the control plane itself, such as a full disk; usually empty


class SignalRow(TypedDict):
    """One line of `stat`. Rates are 0..1; quantiles are None without requests."""

    service: str
    version: NotRequired[str]
    instance: NotRequired[str]
    route: NotRequired[str]
    caller: NotRequired[str]
    rps: float
    success_rate: float | None
    effective_success_rate: float | None
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    requests: int
    failures: int
    overdue: int
    denied: int
    refused: int
    connections: int  # opened, of a TCP service; and the bytes from and to its callers
    received_bytes: int
    sent_bytes: int
    outlier_ejected: int  # instances that Envoy's outlier detection keeps out just now, at the callers
    mirrored: int  # copies of requests, which are in none of the other figures
    mirrored_failures: int
    silent: bool
    ejected: bool
    window_s: float  # seconds that the row is about; less than asked for in a mesh that has just started


class EdgeRow(TypedDict):
    """Who calls whom; `secured` is True if every request of the window came over mutual TLS."""

    caller: str
    service: str
    secured: bool
    identity: str  # of the caller, as the called saw it
    service_identity: str  # of the called, as its caller saw it
    rps: float
    success_rate: float | None
    p50_ms: float | None
    p99_ms: float | None
    requests: int
    denied: int
    connections: int


class RuleRow(TypedDict):
    """One traffic rule of a service, as it is in force."""

    value: Any
    origin: str  # set | default
    since: float | None  # when it was last changed; None: never


class LeaseRow(TypedDict):
    """Is the split of a service still held by whoever asked, and what is it."""

    held: bool
    ran_out: bool  # not held any more, since it was not renewed in time
    split: dict[str, int]


class AccessRow(TypedDict):
    """May `caller` call `service`; `explicit`: said by `access allow|deny`, not by the app file."""

    caller: str
    service: str
    allowed: bool
    explicit: bool


class TapEvent(TypedDict):
    """One request, as the sidecar of the called instance saw it; or, `at` caller, one that its caller's
    sidecar answered itself (a breaker, a timeout, nobody to connect to): its `instance` is then unknown."""

    time: float
    caller: str
    service: str
    version: str
    instance: str
    route: str
    method: str
    path: str
    status: int
    grpc_status: int | None
    flags: str
    latency_ms: float
    secured: bool
    mirrored: bool  # only the copy of a request
    at: str  # service | caller
    skipped: NotRequired[int]  # matching requests left out before this one: too many a second


class FaultResult(NamedTuple):
    """A fault and what putting it in force took."""

    fault: Fault
    effect: Effect


class ClearResult(NamedTuple):
    """The faults that were cleared."""

    faults: list[Fault]
    effect: Effect


class TrafficResult(NamedTuple):
    """The traffic rules of a service after a change."""

    traffic: Traffic
    effect: Effect


class SampleBatch(NamedTuple):
    """Samples after a sequence number; pass `seq` as `after` next time. `now` is the server's clock."""

    seq: int
    now: float
    samples: list[Sample]
    instances: list[InstanceRow]


class EventBatch(NamedTuple):
    """Journal events after a sequence number; each has `seq` and `time` besides what was posted."""

    seq: int
    events: list[dict[str, Any]]


TAP_PER_S = (0.1, 1000.0)
"""The least and the most events a second of one tap."""
TAP_STATUS = r"0|[1-5](xx|[0-9][0-9])"
"""What a tap may ask for as a status (a regular expression)."""

_RETRY_PAUSE_S = 0.05


class ControlClient:
    """Speaks to the control plane of one mesh.

    Args:
        base_url: `http://127.0.0.1:PORT`.
        token: the API's bearer token.
        timeout_s: bound of one call; long polls and streams add what they wait for.
        retry_s: for so long a call that is safe to repeat is repeated while nothing answers (a control
            plane that is being restarted).

    Every method raises BadInput where the control plane refuses a value (400, 404), Failed where it tried
    and did not succeed (a NACK, a time-out), Missing where it does not answer.
    """

    def __init__(self, base_url: str, token: str, timeout_s: float = 15.0, retry_s: float = 1.0) -> None:
        self.base_url = base_url.rstrip("/")
        self._token = token
        self._timeout_s = timeout_s
        self._retry_s = retry_s
        parts = urlsplit(self.base_url)
        if parts.scheme != "http" or not parts.hostname:
            raise BadInput(f"control plane URL '{base_url}' is not http://HOST:PORT")
        self._host, self._port = parts.hostname, parts.port or 80

    def page_url(self) -> str:
        """Address of the web page. It signs in by its fragment, which browsers send to nobody."""
        return f"{self.base_url}/#token={quote(self._token, safe='')}"

    # -- state

    def healthy(self) -> bool:
        """Does the control plane answer? Never raises."""
        try:
            self._call("GET", "/healthz", retry=False)
        except MeshdemoError:
            return False
        return True

    def status(self) -> StatusRow:
        """The mesh as the control plane sees it."""
        row: StatusRow = self._call("GET", "/v1/status")
        return row

    def intent(self) -> Intent:
        """The desired state of the mesh."""
        from meshdemo.control.model import Intent

        return Intent.model_validate(self._call("GET", "/v1/intent"))

    def refresh_instances(self) -> None:
        """Tell the control plane to read the instances anew; returns when they are taken in."""
        self._call("POST", "/v1/instances/refresh", body={})

    # -- faults

    def add_fault(
        self,
        *,
        at: str,
        service: str,
        kind: str = "degrade",
        version: str | None = None,
        instance: str | None = None,
        route: str | None = None,
        caller: str | None = None,
        lat_ms: float = 0,
        err_rate: float = 0,
        share: float = 1,
        revision: int | None = None,
        started_at: float | None = None,
        for_s: float | None = None,
        fault_id: str | None = None,
        starting: bool = False,
    ) -> FaultResult:
        """Put a fault in force on the sidecars (`at` mesh), or record one made elsewhere (app, process).

        Args:
            lat_ms, err_rate, share: milliseconds; shares of requests, 0..1.
            started_at: when it began, for a recorded one; default: now.
            for_s: clears itself after so many seconds.
            fault_id: default: one is made up.
            starting: it is on its way (app, process); recorded again, with the same id, when it has begun.
        """
        from meshdemo.control.model import Effect, Fault

        body = {
            "id": fault_id, "at": at, "kind": kind, "service": service, "version": version,
            "instance": instance, "route": route, "caller": caller, "lat_ms": lat_ms, "err_rate": err_rate,
            "share": share, "revision": revision, "started_at": started_at, "for_s": for_s,
            "starting": starting or None,
        }  # fmt: skip
        answer = self._call("POST", "/v1/faults", body={k: v for k, v in body.items() if v is not None})
        return FaultResult(Fault.model_validate(answer["fault"]), Effect.model_validate(answer["effect"]))

    def faults(self) -> list[Fault]:
        """The faults in force."""
        from meshdemo.control.model import Fault

        return [Fault.model_validate(fault) for fault in self._call("GET", "/v1/faults")]

    def clear_fault(self, fault_id: str) -> ClearResult:
        """End one fault; of one at the app or process only the record is ended. BadInput if unknown."""
        return self._clear(f"/v1/faults/{quote(fault_id, safe='')}")

    def clear_faults(self) -> ClearResult:
        """End all faults, as `clear_fault` does."""
        return self._clear("/v1/faults")

    def _clear(self, path: str) -> ClearResult:
        from meshdemo.control.model import Effect, Fault

        answer = self._call("DELETE", path)
        faults = [Fault.model_validate(fault) for fault in answer["faults"]]
        return ClearResult(faults, Effect.model_validate(answer["effect"]))

    # -- traffic and access

    def traffic(self) -> dict[str, Traffic]:
        """Traffic rules by service; services without any are not in it."""
        from meshdemo.control.model import Traffic

        rules = self._call("GET", "/v1/traffic")
        return {service: Traffic.model_validate(rule) for service, rule in rules.items()}

    def set_traffic(self, service: str, changes: Mapping[str, Any]) -> TrafficResult:
        """Change fields of a service's `Traffic`; fields not named stay, None: back to the default."""
        from meshdemo.control.model import Effect, Traffic

        answer = self._call("PUT", f"/v1/traffic/{quote(service, safe='')}", body=dict(changes))
        return TrafficResult(
            Traffic.model_validate(answer["traffic"]), Effect.model_validate(answer["effect"])
        )

    def effective_traffic(self) -> dict[str, dict[str, RuleRow]]:
        """By service and field: what is in force, set or by default."""
        rows: dict[str, dict[str, RuleRow]] = self._call("GET", "/v1/traffic/effective")
        return rows

    def lease_split(self, service: str, split: Mapping[str, int], lease: Mapping[str, Any]) -> TrafficResult:
        """Set the split of a service that one holds, or begins to (`control.intent.lease_split`).

        Raises BadInput if somebody else holds it, Failed if it is not held any more.
        """
        return self.set_traffic(service, {"split": dict(split), "lease": dict(lease)})

    def renew_lease(self, service: str, owner: str) -> LeaseRow:
        """Go on holding the split of a service."""
        row: LeaseRow = self._call(
            "POST", f"/v1/traffic/{quote(service, safe='')}/lease", body={"owner": owner}, retry=False
        )
        return row

    def identities(self) -> dict[str, Any]:
        """Who each instance is and until when its certificate is valid; and how the root stands."""
        found: dict[str, Any] = self._call("GET", "/v1/identity")
        return found

    def set_certificate_lifetime(self, lifetime_s: float) -> Effect:
        """Have certificates live so long from now on; all are issued anew if that differs from before."""
        return self._effect("PUT", "/v1/identity", {"lifetime_s": lifetime_s})

    def rotate_identities(self, *, root: bool = False) -> Effect:
        """Give every sidecar a fresh key and certificate; with `root`, replace the root before."""
        # For the root, sidecars confirm three times, and both roots are trusted for a while.
        timeout_s = self._timeout_s + (20.0 if root else 0.0)
        return self._effect("POST", "/v1/identity/rotate", {"root": root}, timeout_s=timeout_s)

    def access(self) -> list[AccessRow]:
        """Who may call whom, every pair of services that an app file or a command speaks of."""
        rows: list[AccessRow] = self._call("GET", "/v1/access")
        return rows

    def set_access(self, caller: str, service: str, allowed: bool) -> Effect:
        """Allow or deny a caller."""
        return self._effect("PUT", "/v1/access", {"caller": caller, "service": service, "allowed": allowed})

    def eject(self, instance: str, *, reason: str, by: str) -> Effect:
        """Keep an instance out of load balancing until readmitted."""
        return self._effect("POST", "/v1/eject", {"instance": instance, "reason": reason, "by": by})

    def readmit(self, instance: str) -> Effect:
        """Undo `eject`."""
        return self._effect("POST", "/v1/readmit", {"instance": instance})

    def _effect(
        self, method: str, path: str, body: dict[str, Any], *, timeout_s: float | None = None
    ) -> Effect:
        from meshdemo.control.model import Effect

        return Effect.model_validate(self._call(method, path, body=body, timeout_s=timeout_s)["effect"])

    # -- load

    def set_load(self, rps: float) -> None:
        """Set the rate of every instance that makes load (requests/s each); it outlives their restarts."""
        self._call("PUT", "/v1/load", body={"rps": rps})

    # -- traces

    def set_traces(self, endpoint: str | None) -> Effect:
        """Have all sidecars send their spans to an OTLP collector (`http://HOST:PORT`, gRPC); None: stop."""
        return self._effect("PUT", "/v1/traces", {"endpoint": endpoint})

    # -- objectives

    def say_objectives(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Say how all objectives stand (`control/objectives.py`); it is forgotten after some seconds."""
        self._call("PUT", "/v1/objectives", body={"objectives": rows})

    # -- telemetry

    def signals(
        self, by: str = "service", window_s: float = 10.0, service: str | None = None
    ) -> list[SignalRow]:
        """Signals of the last `window_s` seconds, as plain rows; `by` as in `meshdemo stat`."""
        rows: list[SignalRow] = self._call(
            "GET", "/v1/signals", query={"by": by, "window_s": window_s, "service": service}
        )
        return rows

    def samples(self, after: int, wait_s: float = 1.0) -> SampleBatch:
        """Samples after sequence number `after` (0: all that are kept; -1: none of those, from now on).

        Waits up to `wait_s` for one to come. A control plane that was restarted counts from 1 again, and
        answers an `after` that it never gave with all that it has. Never repeated here: who polls wants to
        know at once that nobody answers, and asks again anyway.
        """
        from meshdemo.control.signals import sample_from_json

        answer = self._call(
            "GET", "/v1/samples", query={"after": after, "wait_s": wait_s},
            timeout_s=self._timeout_s + wait_s, retry=False,
        )  # fmt: skip
        samples = [sample_from_json(sample) for sample in answer["samples"]]
        return SampleBatch(answer["seq"], answer["now"], samples, answer["instances"])

    def edges(self, window_s: float = 10.0) -> list[EdgeRow]:
        """Who called whom in the last `window_s` seconds."""
        rows: list[EdgeRow] = self._call("GET", "/v1/edges", query={"window_s": window_s})
        return rows

    def tap(
        self,
        *,
        service: str | None = None,
        caller: str | None = None,
        route: str | None = None,
        status: str | None = None,
        instance: str | None = None,
        failed: bool = False,
        max_per_s: float | None = None,
    ) -> Iterator[TapEvent]:
        """Single requests as they happen, until the caller closes the iterator.

        Args:
            route: a route's name, or a path prefix (`/...`).
            status: `503`, or a class such as `5xx`, which a gRPC error status is part of.
            failed: only what counts as a failure.
            max_per_s: at most so many events a second (default: the server's).
        """
        query = {
            "service": service, "caller": caller, "route": route, "status": status, "instance": instance,
            "failed": "1" if failed else None, "max_per_s": max_per_s,
        }  # fmt: skip
        yield from self._stream("/v1/tap", query)

    # -- journal

    def post_event(self, event: Mapping[str, Any]) -> int:
        """Append an event to the journal; its sequence number. `time` is set if it has none."""
        seq: int = self._call("POST", "/v1/events", body=dict(event))["seq"]
        return seq

    def events(self, after: int = 0, wait_s: float = 0.0) -> EventBatch:
        """Journal events after a sequence number (0: all that are kept); waits up to `wait_s` for one."""
        answer = self._call(
            "GET", "/v1/events", query={"after": after, "wait_s": wait_s}, timeout_s=self._timeout_s + wait_s
        )
        return EventBatch(answer["seq"], answer["events"])

    # -- HTTP

    def _call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        body: Mapping[str, Any] | None = None,
        timeout_s: float | None = None,
        retry: bool = True,
    ) -> Any:
        """One request and its JSON answer, repeated where that is safe: while nothing accepts the
        connection (nothing was sent), and a GET also if the connection broke."""
        from http.client import HTTPException

        give_up = time.monotonic() + (self._retry_s if retry else 0)
        while True:
            try:
                connection, response = self._open(method, path, query, body, timeout_s or self._timeout_s)
                try:
                    return _answer(response, response.read())
                finally:
                    connection.close()
            except (OSError, HTTPException) as error:
                refused = isinstance(error, ConnectionRefusedError)
                safe = refused or (method == "GET" and not isinstance(error, TimeoutError))
                if not safe or time.monotonic() >= give_up:
                    raise self._unreachable(method, path, error) from error
                time.sleep(_RETRY_PAUSE_S)

    def _stream(self, path: str, query: Mapping[str, Any]) -> Iterator[Any]:
        """JSON lines as they come; empty lines are the server's heartbeat."""
        from http.client import HTTPException

        try:
            connection, response = self._open("GET", path, query, None, self._timeout_s)
        except (OSError, HTTPException) as error:
            raise self._unreachable("GET", path, error) from error
        try:
            if response.status != 200:
                _answer(response, response.read())
            while line := response.readline():
                if line.strip():
                    yield json.loads(line)
        except (OSError, HTTPException) as error:
            raise self._unreachable("GET", path, error) from error
        finally:
            connection.close()

    def _open(
        self,
        method: str,
        path: str,
        query: Mapping[str, Any] | None,
        body: Mapping[str, Any] | None,
        timeout_s: float,
    ) -> tuple[HTTPConnection, HTTPResponse]:
        from http.client import HTTPConnection

        asked = {name: value for name, value in (query or {}).items() if value is not None}
        headers = {"Authorization": f"Bearer {self._token}", "Connection": "close"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        connection = HTTPConnection(self._host, self._port, timeout=timeout_s)
        try:
            connection.request(
                method,
                f"{path}?{urlencode(asked)}" if asked else path,
                body=None if body is None else json.dumps(body),
                headers=headers,
            )
            return connection, connection.getresponse()
        except BaseException:
            connection.close()
            raise

    def _unreachable(self, method: str, path: str, error: Exception) -> MeshdemoError:
        if isinstance(error, TimeoutError):
            return Failed(
                f"the control plane at {self.base_url} did not answer {method} {path} in time",
                "see `meshdemo logs` for what it is doing",
            )
        cause = getattr(error, "strerror", None) or error
        return Missing(
            f"the control plane does not answer at {self.base_url}: {cause}",
            "`meshdemo status` says what runs; `meshdemo up` starts what is missing",
        )


def _answer(response: HTTPResponse, raw: bytes) -> Any:
    """The JSON of an answer; an error status as the exception that it stands for."""
    try:
        content = json.loads(raw)
    except ValueError:
        content = {"error": raw[:200].decode("utf-8", "replace").strip() or response.reason}
    if response.status < 400:
        return content
    error = str(content.get("error", response.reason)) if isinstance(content, dict) else str(content)
    remedy = str(content.get("remedy", "")) if isinstance(content, dict) else ""
    if response.status in {400, 404}:
        raise BadInput(error, remedy)
    raise Failed(error, remedy)
