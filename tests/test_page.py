"""The page's server side: what a snapshot says, who may call, and how viewers are served."""

from __future__ import annotations

import base64
import hashlib
import http.client
import itertools
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, request
from page_harness import TOKEN, Place, made_up, place

from meshdemo.apps.model import App
from meshdemo.control import load, objectives, page
from meshdemo.control.goals import Goal, by_policy
from meshdemo.control.intent import add_fault, eject, new_fault, set_load, set_traffic
from meshdemo.control.model import Instance, Intent, MeshState
from meshdemo.control.session import KEY_HEADER, LIFETIME_S, SECURITY_HEADERS, Sessions
from meshdemo.control.signals import Cell, Histogram, Sample
from meshdemo.control.snapshot import snapshot
from meshdemo.errors import BadInput, Failed
from meshdemo.resources import DEFAULT_POLICY

NOW = 1_000.0


# -- what a snapshot says ---------------------------------------------------------------------------------


def sample(instance: Instance, *cells: Cell, **more: Any) -> Sample:
    return Sample(instance.id, instance.service, instance.version, 1, NOW - 1, NOW, cells=cells, **more)


def inbound(requests: int, failures: int = 0, **more: Any) -> Cell:
    known: dict[str, Any] = {"secured": requests, "latency": Histogram.of([20.0] * requests)}
    return Cell(True, "service-a", "work", requests, failures, **(known | more))


def seen(
    mesh: MeshState, *samples: Sample, intent: Intent | None = None, silent: tuple[str, ...] = ()
) -> dict[str, Any]:
    made = snapshot(mesh, intent or Intent(), samples, silent=lambda name: name in silent, now=NOW)
    assert json.loads(json.dumps(made)) == json.loads(json.dumps(made, allow_nan=False))
    return made


def of(made: dict[str, Any], service: str) -> dict[str, Any]:
    return next(one for one in made["services"] if one["name"] == service)


def test_an_instance_is_told_apart_from_its_service() -> None:
    mesh = made_up(2, 4)
    b1, b2 = (one for one in mesh.instances if one.service == "service-b")
    made = seen(mesh, sample(b1, inbound(30, 9)), sample(b2, inbound(30)))
    service = of(made, "service-b")
    assert service["success_rate"] == 0.85
    assert [one["success_rate"] for one in service["versions"][0]["instances"]] == [0.7, 1.0]
    assert [(edge["caller"], edge["service"], edge["secured"]) for edge in made["edges"]] == [
        ("service-a", "service-b", True)
    ]
    assert [(row["service"], row["route"], row["requests"]) for row in made["routes"]] == [
        ("service-b", "work", 60)
    ]


def test_a_failure_is_never_rounded_away() -> None:
    mesh = made_up(2, 2)
    made = seen(mesh, sample(mesh.instances[1], inbound(1_000_000, 1)))
    assert of(made, "service-b")["success_rate"] == 0.99999


def test_refused_and_denied_requests_stand_apart_from_failures() -> None:
    mesh = made_up(2, 2)
    a, b = mesh.instances
    outbound = Cell(False, "service-b", "work", 50, 10, refused=10, version="v1")
    service = of(seen(mesh, sample(a, outbound), sample(b, inbound(40, denied=5))), "service-b")
    assert (service["success_rate"], service["refused"], service["denied"]) == (1.0, 10.0, 5.0)
    assert service["effective_success_rate"] == 0.8


def test_ejected_silent_and_waiting_instances_say_so() -> None:
    mesh = made_up(2, 6)
    first, second, third = (one for one in mesh.instances if one.service == "service-b")
    intent = eject(Intent(), mesh, first.id, reason="", by="test", now=NOW)
    made = seen(mesh, sample(third, in_flight=3, waiting=((1.0, 2),)), intent=intent, silent=(second.id,))
    rows = {row["id"]: row for version in of(made, "service-b")["versions"] for row in version["instances"]}
    assert rows[first.id]["ejected"]
    assert rows[second.id]["silent"]
    assert (rows[third.id]["overdue"], rows[third.id]["requests"]) == (2, 0)


def test_instances_that_envoy_ejected_are_counted_by_version() -> None:
    mesh = made_up(2, 4)
    first, b, second, _ = mesh.instances
    out = [Cell(False, "service-b", "", version="v1", ejected=n) for n in (1, 2)]
    made = seen(mesh, sample(first, out[1]), sample(first, out[0]), sample(second, out[0]), sample(b))
    assert of(made, "service-b")["versions"][0]["outliers"] == 1
    assert made["routes"] == []


def test_a_split_and_its_faults_are_shown() -> None:
    mesh = made_up(2, 6)  # the third instance of service-b is its v2
    intent = set_traffic(Intent(), mesh, "service-b", {"split": {"v1": 90, "v2": 10}}, NOW)
    fault = new_fault({"at": "mesh", "service": "service-b", "version": "v2", "err_rate": 0.3}, mesh, NOW)
    made = seen(mesh, intent=set_load(add_fault(intent, fault), mesh, 70))
    assert [(one["version"], one["weight"]) for one in of(made, "service-b")["versions"]] == [
        ("v1", 90), ("v2", 10),
    ]  # fmt: skip
    assert [(one["version"], one["err_rate"], one["kind"]) for one in made["faults"]] == [
        ("v2", 0.3, "degrade")
    ]
    assert made["load_rps"] == 70
    (last,) = [one.id for one in mesh.instances if (one.service, one.version) == ("service-b", "v2")]
    intent = eject(intent, mesh, last, reason="", by="watch", now=NOW)
    weights = {
        one["version"]: one["weight"] for one in of(seen(mesh, intent=intent), "service-b")["versions"]
    }
    assert weights == {"v1": 100, "v2": 0}  # as its callers split: nobody of v2 is left


def test_a_mesh_without_anything_has_a_snapshot() -> None:
    app = App.model_validate(
        {"name": "x", "front": "s", "services": {"s": {"port": 1, "versions": {"v1": {"command": ["x"]}}}}}
    )
    made = seen(MeshState(mesh="m", app=app))
    assert of(made, "s")["versions"] == [{"version": "v1", "weight": None, "instances": []}]
    assert made["edges"] == made["routes"] == []


# -- who may call -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served() -> Iterator[Place]:
    with place() as made:
        yield made


def call(
    served: Place, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=10)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None:
            named["Content-Type"] = "application/json"
        connection.request(method, path, None if body is None else json.dumps(body), named)
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    finally:
        connection.close()


@pytest.fixture
def session(served: Place) -> dict[str, str]:
    """The headers of a page that is signed in."""
    status, headers, body = call(served, "POST", "/v1/session", Authorization=f"Bearer {TOKEN}")
    assert status == 200
    cookie = headers["set-cookie"]
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= {part.strip() for part in cookie.split(";")}
    return {"Cookie": cookie.partition(";")[0], "X_Meshdemo": json.loads(body)["key"]}


FAULT = {"at": "mesh", "service": "service-b", "err_rate": 0.1}


def test_the_page_may_read_and_change(served: Place, session: dict[str, str]) -> None:
    assert call(served, "GET", "/v1/status", **session)[0] == 200
    origin = {"Origin": served.url, "Sec_Fetch_Site": "same-origin"}
    assert call(served, "POST", "/v1/faults", FAULT, **session, **origin)[0] == 200
    assert call(served, "DELETE", "/v1/faults", **session, **origin)[0] == 200


@pytest.mark.parametrize("lacking", ["Cookie", "X_Meshdemo"])
def test_half_a_session_is_none(served: Place, session: dict[str, str], lacking: str) -> None:
    half = {name: value for name, value in session.items() if name != lacking}
    for method, path, body in (
        ("GET", "/v1/status", None), ("GET", "/v1/stream", None), ("GET", "/v1/tap", None),
        ("POST", "/v1/faults", FAULT), ("PUT", "/v1/load", {"rps": 1}), ("DELETE", "/v1/faults", None),
    ):  # fmt: skip
        assert call(served, method, path, body, **half)[0] == 401


@pytest.mark.parametrize(
    "foreign",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "http://127.0.0.1:1"},  # another port: the same site, another origin
        {"Origin": "null"},
        {"Sec_Fetch_Site": "same-site"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "none"},
    ],
)
def test_a_session_is_the_pages_alone(
    served: Place, session: dict[str, str], foreign: dict[str, str]
) -> None:
    assert call(served, "GET", "/v1/status", **session, **foreign)[0] == 401
    assert call(served, "POST", "/v1/faults", FAULT, **session, **foreign)[0] == 401


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "localhost.evil.example", ""])
def test_another_name_is_refused_whatever_it_carries(
    served: Place, session: dict[str, str], host: str
) -> None:
    for headers in (session, {"Authorization": f"Bearer {TOKEN}"}, {}):
        for path in ("/", "/web/main.js", "/v1/status"):
            assert call(served, "GET", path, Host=host, **headers)[0] in (400, 403)


def test_there_is_no_cors(served: Place, session: dict[str, str]) -> None:
    asked = {"Origin": "http://evil.example", "Access_Control_Request_Method": "POST",
             "Access_Control_Request_Headers": "x-meshdemo,content-type"}  # fmt: skip
    for headers in (asked, {**asked, **session}):
        _, answered, _ = call(served, "OPTIONS", "/v1/faults", **headers)
        assert not [name for name in answered if name.startswith("access-control-")]


def test_a_session_is_opened_with_the_token_alone(served: Place, session: dict[str, str]) -> None:
    assert call(served, "POST", "/v1/session")[0] == 401
    assert call(served, "POST", "/v1/session", Authorization="Bearer wrong")[0] == 401
    assert call(served, "POST", "/v1/session", **session)[0] == 400  # or it would never end


def test_every_answer_keeps_browsers_strict(served: Place) -> None:
    for path in ("/", "/web/main.js", "/web/nothing.js", "/v1/status", "/healthz"):
        _, headers, _ = call(served, "GET", path)
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"


def test_only_the_pages_own_files_are_served(served: Place) -> None:
    assert call(served, "GET", "/")[0] == 200
    status, headers, _ = call(served, "GET", "/web/graph.js")
    assert (status, headers["content-type"].split(";")[0]) == (200, "text/javascript")
    for path in ("/web/../page.py", "/web/%2e%2e/page.py", "/web/page.py", "/web/", "/web/..%2f__init__.py"):
        assert call(served, "GET", path)[0] in (401, 404)


def test_the_page_holds_nothing_inline_but_one_named_script_and_nothing_from_outside() -> None:
    web = Path(page.__file__).parent.parent / "ui" / "web"
    for file in web.iterdir():
        text = file.read_text().replace("http://www.w3.org/", "")
        assert "://" not in text, file
        if file.suffix == ".html":
            assert " style=" not in text
            assert " onclick=" not in text
            assert "<style" not in text
            (inline,) = re.findall("<script>(.*?)</script>", text)
            digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
            assert f"'sha256-{digest}'" in SECURITY_HEADERS["Content-Security-Policy"]
            assert text.count("<script") == text.count('<script type="module" src="/web/') + 1
        if file.suffix == ".js":
            assert 'setAttribute("style"' not in text
            assert "innerHTML" not in text


def test_sessions_end_and_belong_to_one_mesh() -> None:
    now = [NOW]
    sessions = Sessions("secret", "mesh-a", clock=lambda: now[0])
    app = Flask("test")
    with app.test_request_context("/", headers={"Authorization": "Bearer secret"}):
        answer = sessions.open(request)
        assert answer is not None
        cookie, key = answer.headers["Set-Cookie"].partition(";")[0], answer.get_json()["key"]
    headers = {"Cookie": f"other=1; {cookie.partition('=')[0]}=9.9; {cookie}", KEY_HEADER: key}
    with app.test_request_context("/", headers=headers):
        assert sessions.authorize(request)
        assert not Sessions("secret", "mesh-b", clock=lambda: now[0]).authorize(request)
        assert not Sessions("another", "mesh-a", clock=lambda: now[0]).authorize(request)
        now[0] += LIFETIME_S
        assert not sessions.authorize(request)
    for bad in ("", ".", "x.y", "9" * 30 + ".a", "-1.a", "1e9.a", "²³.a"):
        with app.test_request_context("/", headers={"Cookie": f"meshdemo-mesh-a={bad}", KEY_HEADER: key}):
            assert not sessions.authorize(request)
    with pytest.raises(ValueError, match="everybody"):
        Sessions("", "mesh-a")


# -- viewers ----------------------------------------------------------------------------------------------


class Viewer:
    """Reads the stream as a browser does."""

    def __init__(self, served: Place) -> None:
        self.connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=20)
        self.connection.request("GET", "/v1/stream", headers={"Authorization": f"Bearer {TOKEN}"})
        self.answer = self.connection.getresponse()
        assert self.answer.status == 200

    def event(self) -> tuple[str, Any]:
        """The next event; heartbeats are passed over."""
        name = ""
        while True:
            line = self.answer.readline().decode().rstrip("\n")
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                return name, json.loads(line.removeprefix("data: "))

    def until(self, name: str) -> Any:
        """What the next event of this name carries."""
        while True:
            found, data = self.event()
            if found == name:
                return data

    def close(self) -> None:
        self.answer.close()
        self.connection.close()


def wait_for(condition: Any, seconds: float = 30.0) -> None:
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def test_viewers_share_the_snapshots_and_leave_nothing_behind(served: Place) -> None:
    viewers = [Viewer(served), Viewer(served)]
    assert [viewer.event()[0] for viewer in viewers] == ["journal", "journal"]
    seen: list[set[float]] = [set(), set()]
    while not seen[0] & seen[1]:
        assert len(seen[0]) < 20
        for times, viewer in zip(seen, viewers, strict=True):
            times.add(viewer.until("snapshot")["time"])
    served.journal.append({"event": "acted", "service": "service-b", "remedy": "eject"})
    assert viewers[0].until("journal")[-1]["remedy"] == "eject"
    for viewer in viewers:
        viewer.close()
    wait_for(lambda: served.broadcast._viewers == 0)


def test_what_happened_before_is_told_at_the_start(served: Place) -> None:
    seq = served.journal.append({"event": "violated", "service": "service-b"})["seq"]
    viewer = Viewer(served)
    assert viewer.until("journal")[-1]["seq"] == seq
    viewer.close()


def test_a_viewer_who_does_not_read_is_dropped() -> None:
    with place(50, 500) as served:
        backlog = [0]
        served.broadcast.enter()
        events = page.stream(served.control, served.broadcast, backlog=lambda: backlog[0])
        assert next(events).startswith("event: journal")
        assert "event: snapshot" in next(one for one in events if not one.startswith(":"))
        backlog[0] = 1 << 30
        assert list(events) == []
        served.broadcast.leave()


def test_a_browser_that_stopped_reading_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tab that the browser froze: the connection stands, and nobody takes anything out of it."""
    monkeypatch.setattr(page, "_MAX_BACKLOG", 100_000)
    with place(50, 500) as served:
        served.broadcast._every_s = 0.01
        port = int(served.url.rsplit(":", 1)[1])
        with socket.socket() as frozen:
            frozen.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            frozen.connect(("127.0.0.1", port))
            frozen.sendall(
                f"GET /v1/stream HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode()
            )
            assert frozen.recv(1)  # it is a viewer
            wait_for(lambda: served.broadcast._viewers == 0, seconds=120)


def test_there_may_not_be_any_number_of_viewers(tmp_path: Path) -> None:
    broadcast = Place(made_up(2, 3), tmp_path).broadcast
    for _ in range(16):
        broadcast.enter()
    with pytest.raises(Failed, match="open already"):
        broadcast.enter()
    broadcast.leave()
    broadcast.enter()


def test_the_history_is_kept_whether_or_not_anybody_watches(tmp_path: Path) -> None:
    now = [time.time()]
    made = Place(made_up(2, 3), tmp_path)
    broadcast = page.Broadcast(made.control, kept_s=60, clock=lambda: now[0])
    for _ in range(200):
        broadcast.tick()
        now[0] += 0.5
    points = broadcast.history("service-b")
    assert len(points) == 60
    steps = {round(b[0] - a[0], 2) for a, b in itertools.pairwise(points)}
    assert steps == {1.0}
    assert broadcast.newest == 0  # nobody watched


def test_a_broken_snapshot_does_not_end_the_stream(served: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    viewer = Viewer(served)
    viewer.until("snapshot")
    real, broken = page.snapshot, threading.Event()

    def fails(*given: Any, **more: Any) -> Any:
        if not broken.is_set():
            broken.set()
            raise RuntimeError("a bug")
        return real(*given, **more)

    monkeypatch.setattr(page, "snapshot", fails)
    assert broken.wait(10)
    viewer.until("snapshot")
    viewer.close()


def test_the_history_is_asked_for_by_service(served: Place) -> None:
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    wait_for(lambda: served.broadcast.history("service-b"))
    status, _, body = call(served, "GET", "/v1/history?service=service-b", **bearer)
    answer = json.loads(body)
    assert status == 200
    assert len(answer["points"][0]) == len(answer["columns"])
    assert call(served, "GET", "/v1/history?service=nobody", **bearer)[0] == 400


# -- objectives -------------------------------------------------------------------------------------------

STANDING = {"service": "service-b", "objective": "success", "text": "99% answered well", "health": "ok",
            "good_share": 0.999, "wanted_share": 0.99, "budget_left": 0.87, "kind": "success",
            "below_ms": None, "effective": False}  # fmt: skip


def test_objectives_are_shown_while_somebody_watches(served: Place) -> None:
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    assert call(served, "PUT", "/v1/objectives", {"objectives": [STANDING]}, **bearer)[0] == 200
    assert json.loads(call(served, "GET", "/v1/objectives", **bearer)[2])["objectives"] == [STANDING]
    text = call(served, "GET", "/metrics")[2].decode()
    assert 'meshdemo_objective_error_budget{objective="success",service="service-b"} 0.87' in text
    viewer = Viewer(served)
    assert viewer.until("snapshot")["objectives"] == [STANDING]
    viewer.close()
    for bad in ([STANDING], {"objectives": [{**STANDING, "budget_left": "much"}]}, {}, None):
        assert call(served, "PUT", "/v1/objectives", bad, **bearer)[0] == 400


def test_what_no_watch_confirms_is_forgotten() -> None:
    now = [0.0]
    standings = objectives.Standings(clock=lambda: now[0])
    standings.say([objectives.Standing.model_validate(STANDING)])
    assert len(standings.now()) == 1
    now[0] += objectives.FORGOTTEN_AFTER_S
    assert standings.now() == ()


# -- the load ---------------------------------------------------------------------------------------------


class _Maker(BaseHTTPRequestHandler):
    """An instance that makes load, as far as the control plane sees it."""

    rps = 50.0

    def do_GET(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        type(self).rps = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["rps"]
        self._answer()

    def _answer(self) -> None:
        content = json.dumps({"rps": self.rps}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def test_the_load_is_kept_up_over_a_restart(tmp_path: Path) -> None:
    maker = ThreadingHTTPServer(("127.0.0.1", 0), _Maker)
    threading.Thread(target=maker.serve_forever, daemon=True).start()
    mesh = made_up(2, 2)
    port = maker.server_address[1]
    instances = [one.model_copy(update={"metrics_port": port}) for one in mesh.instances]
    control = Place(mesh.model_copy(update={"instances": tuple(instances)}), tmp_path).control
    keeper = load.LoadKeeper(control, every_s=0.05)
    keeper.start()
    assert keeper.set(80)["instances"] == ["service-a-v1-0"]
    assert _Maker.rps == 80
    _Maker.rps = 50.0  # it was restarted
    wait_for(lambda: _Maker.rps == 80)
    maker.shutdown()
    maker.server_close()
    with pytest.raises(Failed, match="service-a-v1-0 does not take the load"):
        keeper.set(10)
    assert control.intent.load_rps == 10
    control.plane.intent = Intent()  # the keeper has nothing more to do


def test_who_asks_while_it_ends_is_told_so(tmp_path: Path) -> None:
    made = Place(made_up(2, 2), tmp_path)
    made.loop.call_soon_threadsafe(made.loop.stop)
    wait_for(lambda: not made.loop.is_running())
    made.loop.close()
    with pytest.raises(Failed, match="the control plane is stopping"):
        made.control.run(made.plane.set_tap(True))


@pytest.mark.parametrize("rps", [-1, 1e9, float("nan"), "50", None, True])
def test_a_load_that_makes_no_sense_is_refused(rps: Any) -> None:
    with pytest.raises(BadInput):
        set_load(Intent(), made_up(2, 2), rps)


def test_an_app_that_makes_no_load_says_so() -> None:
    mesh = made_up(2, 2)
    app = mesh.app.model_copy(
        update={"services": {n: s.model_copy(update={"load": False}) for n, s in mesh.app.services.items()}}
    )
    with pytest.raises(BadInput, match="makes load"):
        set_load(Intent(), mesh.model_copy(update={"app": app}), 10)


# -- by which objectives ----------------------------------------------------------------------------------


def _judged(goals: dict[str, list[Goal]], cell: Cell) -> tuple[str, str]:
    mesh = made_up(2, 2)
    made = snapshot(
        mesh, Intent(), [sample(mesh.instances[1], cell)], silent=lambda _: False, now=NOW, goals=goals
    )
    service, [edge] = of(made, "service-b"), made["edges"]
    instance = service["versions"][0]["instances"][0]
    assert instance.get("wrong") == service.get("wrong") == edge.get("wrong")
    return service.get("wrong", ""), service.get("why", "")


def test_figures_are_judged_by_the_objectives_of_their_service() -> None:
    slow = Histogram.of([310.0] * 6 + [20.0] * 94)
    latency = [Goal(0.05, 300.0)]
    assert _judged({"service-b": latency}, inbound(100, latency=slow)) == (
        "slow", "6 % take longer than 300 ms",
    )  # fmt: skip
    all_slow = Histogram.of([310.0] * 100)
    assert _judged({"service-b": latency}, inbound(100, latency=all_slow))[0] == "too_slow"
    assert _judged({"service-b": [Goal(0.1, 300.0)]}, inbound(100, latency=slow)) == ("", "")
    assert (
        _judged({"service-b": latency}, inbound(100, 2))[0] == "degraded"
    )  # no service may fail as it likes
    assert _judged({}, inbound(100, 2))[0] == "degraded"
    assert _judged({}, inbound(100, 6))[0] == "failing"
    assert _judged({"service-b": [Goal(0.25)]}, inbound(100, 20)) == ("", "")
    assert _judged({"service-b": [Goal(0.25)]}, inbound(100, 70))[0] == "failing"


def test_without_a_watch_the_default_policy_says_what_is_healthy() -> None:
    goals = by_policy(DEFAULT_POLICY)
    from meshdemo.apps.loader import load as app_of

    emojivoto = goals(app_of("emojivoto"))
    assert Goal(0.05, 300.0) in [Goal(round(goal.allowed, 6), goal.below_ms) for goal in emojivoto["emoji"]]
    assert [round(goal.allowed, 6) for goal in emojivoto["web"] if goal.below_ms is None] == [0.25]
    assert [round(goal.allowed, 6) for goal in goals(app_of("pair"))["service-b"]] == [0.01, 0.05]
