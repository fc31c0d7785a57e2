"""What people look at: figures, tables and the watch screen, on made-up views, at every size."""

from __future__ import annotations

import io
import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from meshdemo.control.model import Fault, Traffic
from meshdemo.remediation.view import (
    IncidentView,
    InstanceView,
    LogLine,
    Numbers,
    ObjectiveView,
    ServiceView,
    Trend,
    WatchView,
)
from meshdemo.ui import format as fmt
from meshdemo.ui import live, tables
from meshdemo.ui.top import Top

NOW = 1_700_000_000.0


def numbers(rps: float = 100.0, success: float | None = 1.0, p50: float | None = 2.0) -> Numbers:
    return Numbers(rps, success, p50, p50 and p50 * 3, p50 and p50 * 6)


def trend(bad: float = 0.0) -> Trend:
    chance = random.Random(7)
    rps = tuple(chance.uniform(90, 110) for _ in range(60))
    shares = (0.0,) * 50 + (bad,) * 5 + (0.0,) * 5
    return Trend(rps, shares, tuple(chance.uniform(2, 5) for _ in range(60)))


def service(name: str, health: str = "ok", instances: int = 2, bad: float = 0.0) -> ServiceView:
    return ServiceView(
        name,
        health,  # type: ignore[arg-type]
        numbers(success=1 - bad),
        trend(bad),
        tuple(
            InstanceView(
                f"{name}-v1-{i}", "v1", 1, "bad" if bad and i == 0 else "serving", numbers(), trend(bad)
            )
            for i in range(instances)
        ),
        (
            ObjectiveView("success", "99 % answered well", health, 1 - bad, 0.99, 1 - 3 * bad),  # type: ignore[arg-type]
            ObjectiveView("latency", "95 % below 300 ms", "ok", 1.0, 0.95, 1.0),
        ),
    )


def view(
    services: tuple[ServiceView, ...] = (service("service-a", instances=1), service("service-b")),
    incidents: int = 0,
    events: int = 0,
    connected: bool = True,
) -> WatchView:
    return WatchView(
        mesh="mesh-demo", runtime="local", now=NOW, started_at=NOW - 60, policy="/etc/meshdemo/policy.yaml",
        dry_run=False, connected=connected, doing="verifying eject of service-b-v1-0", why="49 % of 98 failed",
        services=services,
        incidents=tuple(
            IncidentView(
                f"i{i}", "service-b", "success", "verifying" if i == 0 else "healed", NOW - i,
                None if i == 0 else NOW, "instance", "service-b-v1-0", ("eject service-b-v1-0",), "49 % bad",
                1.1, None if i == 0 else 4.2,
            )
            for i in range(incidents)
        ),
        log=tuple(LogLine(NOW + i, "acted", f"event {i}") for i in range(events)),
        actions_used=1, actions_allowed=6, faults=("50% errors on service-b-v1-0",),
    )  # fmt: skip


def text(watched: WatchView, width: int, height: int) -> str:
    return "\n".join(line.plain for line in live.lines(watched, width, height))


SICK = view(
    (service("service-a", instances=1), service("service-b", "healing", bad=0.5)), incidents=3, events=40
)


# -- the screen -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 50)])
def test_screen_shows_the_whole_story_at_both_sizes(width: int, height: int) -> None:
    shown = text(SICK, width, height)
    for expected in (
        "mesh-demo", "verifying eject of service-b-v1-0", "49 % of 98 failed", "service-a-v1-0",
        "✗   service-b-v1-0", "bad", "50.00%", "↻ service-b", "healing", "99 % answered well",
        "95 % below 300 ms", "1 open, 2 past", "✓ healed", "found 1.1s well 4.2s", "event 39", "actions 1/6",
        "50% errors on service-b-v1-0", "█",
    ):  # fmt: skip
        assert expected in shown


@settings(deadline=None)
@given(
    width=st.integers(1, 260),
    height=st.integers(1, 80),
    services=st.integers(0, 40),
    instances=st.integers(0, 12),
    incidents=st.integers(0, 9),
    events=st.integers(0, 60),
    name=st.sampled_from(["b", "service-b", "a-service-with-quite-a-long-name-40-chars", "größe", "服务"]),
)
def test_screen_never_wraps_nor_overflows(
    width: int, height: int, services: int, instances: int, incidents: int, events: int, name: str
) -> None:
    many = tuple(
        service(f"{name}{i}", "violated" if i == 3 else "ok", instances, 0.4 if i == 3 else 0)
        for i in range(services)
    )
    drawn = live.lines(view(many, incidents, events), width, height)
    assert len(drawn) <= height
    assert all(line.cell_len <= width for line in drawn)
    assert all("\n" not in line.plain for line in drawn)


def test_what_is_sick_stays_when_there_is_no_room_for_all() -> None:
    many = tuple(service(f"svc-{i}", "violated" if i == 37 else "ok", 5, 0.4 * (i == 37)) for i in range(40))
    shown = text(view(many, incidents=1, events=5), 80, 24)
    assert "svc-37" in shown
    assert "svc-37-v1-0" in shown
    assert "more" in shown


def test_on_a_small_screen_a_service_that_nobody_calls_leaves_room_for_what_happened() -> None:
    idle = service("service-a", "unknown", instances=1)
    unknown = tuple(replace(one, health="unknown") for one in idle.objectives)
    idle = replace(idle, numbers=numbers(rps=0, success=None, p50=None), objectives=unknown)
    shown = text(view((idle, service("service-b", "healing", bad=0.5)), incidents=1, events=9), 80, 24)
    assert "? service-a" in shown
    assert "event 5" in shown
    assert "? unknown" not in shown.partition("OBJECTIVE")[2].partition("INCIDENTS")[0]


def test_what_breakers_refused_and_who_is_ejected_stands_below_the_service() -> None:
    one = service("service-b")
    out = replace(one.instances[0], state="ejected")
    sick = replace(
        one,
        numbers=replace(one.numbers, refused=12, outliers=2, overdue=3),
        instances=(out, one.instances[1]),
    )
    for width, height in ((80, 24), (200, 50)):
        shown = text(view((sick,)), width, height)
        assert "! 3 overdue, 12 refused, 1 ejected, 2 ejected by Envoy" in shown
    assert "!" not in text(view((one,)), 80, 24)


def test_the_dashboard_and_stat_write_the_same_figures() -> None:
    one = numbers(rps=123.4, success=0.9753, p50=2.0)
    row = signal(
        rps=one.rps, success_rate=one.success_rate, p50_ms=one.p50_ms, p95_ms=one.p95_ms, p99_ms=one.p99_ms
    )
    table = printed(tables.signals([row], "service")).splitlines()[1].split()[1:]
    screen = text(view((replace(service("service-b"), numbers=one),)), 100, 30)
    assert " ".join(table) in " ".join(screen.split())


def test_colour_is_never_the_only_carrier() -> None:
    signs = {(symbol, word) for symbol, word, _ in live.STATES.values()}
    assert len({word for _, word in signs}) == len(live.STATES)
    assert all(symbol.strip() and word.strip() for symbol, word in signs)


def test_a_lost_control_plane_is_said_and_not_hidden() -> None:
    assert "does not answer" in text(view(connected=False), 80, 24)


def test_a_service_that_nobody_calls_casts_no_doubt_on_the_rest() -> None:
    idle = service("service-a", "unknown")
    assert "✓ ok: verifying" in text(view((idle, service("service-b"))), 80, 24)
    assert "? unknown: verifying" in text(view((idle,)), 80, 24)
    assert "✗ violated: verifying" in text(view((idle, service("service-b", "violated"))), 80, 24)


def test_nothing_to_show_yet() -> None:
    shown = text(view(services=()), 80, 24)
    assert "no service yet" in shown
    assert "none so far" in shown


@pytest.mark.parametrize("no_color", [True, False])
def test_screen_renders_in_a_terminal(no_color: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    console = Console(
        file=io.StringIO(), force_terminal=True, width=80, height=24, color_system="standard", record=True
    )
    with live.LiveDisplay(console) as display:
        display.show(SICK)
        display.show(SICK)
    written: str = console.file.getvalue()  # type: ignore[attr-defined]
    assert "service-b-v1-0" in written
    assert ("\x1b[32m" in written) is not no_color


def test_a_terminal_without_unicode_gets_ascii() -> None:
    raw = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console = Console(file=raw, width=80, height=24, force_terminal=False)
    console.print(live.Screen(SICK))
    raw.flush()
    shown = raw.buffer.getvalue().decode("ascii")
    assert "x   service-b-v1-0" in shown


def test_plain_prints_each_event_once() -> None:
    printed: list[str] = []
    with live.PlainDisplay(printed.append) as display:
        display.show(view(events=2))
        display.show(view(events=2))
        display.show(view(events=3))
        display.show(view(events=3, connected=False))
    assert [line.partition(" ")[2] for line in printed] == [
        "acted      event 0",
        "acted      event 1",
        "acted      event 2",
        "the control plane does not answer",
    ]


# -- figures ----------------------------------------------------------------------------------------------


@given(st.floats(0, 1))
def test_a_share_is_never_shown_better_than_it_is(share: float) -> None:
    shown = fmt.percent(share)
    assert (shown == "100%") == (share >= 1)
    assert float(shown.rstrip("%")) <= share * 100 + 1e-6
    assert float(shown.rstrip("%")) >= share * 100 - 0.0101
    assert len(shown) <= 6


@pytest.mark.parametrize(
    ("share", "shown"), [(None, "-"), (0, "0.00%"), (0.29, "29.00%"), (0.99999, "99.99%"), (1, "100%")]
)
def test_percent(share: float | None, shown: str) -> None:
    assert fmt.percent(share) == shown


@pytest.mark.parametrize(
    ("rps", "shown"),
    [(None, "-"), (0, "0"), (0.44, "0.4"), (99.94, "99.9"), (99.96, "100"), (999.4, "999"), (1234, "1.2k"),
     (12_345, "12k")],
)  # fmt: skip
def test_rate(rps: float | None, shown: str) -> None:
    assert fmt.rate(rps) == shown


@given(st.floats(0, 999_000))
def test_figures_keep_within_their_columns(value: float) -> None:
    assert len(fmt.rate(value)) <= 5
    assert len(fmt.latency(value)) <= 6


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(None, "-"), (0.04, "0.0s"), (9.94, "9.9s"), (9.96, "10s"), (59.6, "1m00s"), (125, "2m05s"),
     (10_920, "3h02m")],
)  # fmt: skip
def test_duration(seconds: float | None, shown: str) -> None:
    assert fmt.duration(seconds) == shown


def test_sparkline() -> None:
    assert fmt.sparkline([0, 0.001, 0.5, 1, None], 6) == " ▁▂▅█ "
    assert fmt.sparkline([], 3) == "   "
    assert fmt.sparkline([0, 0], 2) == "▁▁"
    assert fmt.sparkline([1, 2, 3], 0) == ""


@given(st.lists(st.none() | st.floats(0, 1e6), max_size=50), st.integers(0, 40))
def test_sparkline_has_its_width(values: list[float | None], width: int) -> None:
    assert len(fmt.sparkline(values, width)) == width


# -- tables -----------------------------------------------------------------------------------------------


def printed(renderable: object) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def signal(**changes: object) -> Any:
    return {
        "service": "service-b", "rps": 50.0, "success_rate": 0.9, "effective_success_rate": None,
        "p50_ms": 1.2, "p95_ms": 3.4, "p99_ms": 5.6, "requests": 500, "failures": 50, "overdue": 0,
        "denied": 0, "refused": 0, "outlier_ejected": 0, "mirrored": 0, "mirrored_failures": 0, "silent": False, "ejected": False,
        "window_s": 10.0, **changes,
    }  # fmt: skip


def test_stat_by_instance() -> None:
    shown = printed(
        tables.signals(
            [
                signal(version="v1", instance="service-b-v1-1", silent=True),
                signal(version="v1", instance="service-b-v1-2", overdue=3, denied=2),
            ],
            "instance",
        )
    )
    assert "INSTANCE" in shown
    assert "EFFECTIVE" not in shown
    assert "90.00%" in shown
    assert "? silent" in shown
    assert "! 3 overdue, 2 denied" in shown


def test_stat_without_requests() -> None:
    shown = printed(
        tables.signals(
            [signal(success_rate=None, p50_ms=None, p95_ms=None, p99_ms=None, effective_success_rate=0.99)],
            "service",
        )
    )
    assert "-" in shown
    assert "EFFECTIVE" in shown
    assert "STATE" not in shown


def test_edges_and_access_say_it_in_words() -> None:
    edge: Any = {
        "caller": "service-a", "service": "service-b", "secured": True, "identity": "spiffe://m/service-a",
        "service_identity": "spiffe://m/service-b",
        "rps": 50.0, "success_rate": 1.0, "p50_ms": 1.0, "p99_ms": 2.0, "requests": 500, "denied": 0,
    }  # fmt: skip
    unknown: Any = {**edge, "caller": "", "secured": False}
    shown = printed(tables.edges([edge, unknown]))
    assert "✓ mTLS" in shown
    assert "✗ no" in shown
    assert "(unknown)" in shown
    row: Any = {"caller": "service-a", "service": "service-b", "allowed": False, "explicit": True}
    assert "✗ denied" in printed(tables.access([row]))


def test_tap_line() -> None:
    request: Any = {
        "time": NOW, "caller": "service-a", "service": "service-b", "version": "v1",
        "instance": "service-b-v1-1", "route": "work", "method": "GET", "path": "/work", "status": 503,
        "grpc_status": None, "flags": "UF", "latency_ms": 1.25, "secured": True,
    }  # fmt: skip
    shown = tables.tap_line(request).plain
    assert "service-a → service-b-v1-1  GET /work  503  1.2ms  UF (no connection)" in shown


def test_top_tells_what_was_never_sent_apart() -> None:
    def request(**fields: Any) -> Any:
        return {
            "time": NOW, "caller": "service-a", "service": "service-b", "method": "GET", "route": "work",
            "path": "/work?x=1", "status": 200, "grpc_status": None, "flags": "", "latency_ms": 2.0,
            "at": "service", **fields,
        }  # fmt: skip

    top = Top()
    top.add(request(status=503, flags="UO", at="caller"))
    (row,) = top.rows()
    assert (row["requests"], row["not_sent"], row["success_rate"], row["best_ms"]) == (0, 1, None, None)
    assert "NOT SENT" in printed(top.table())
    top.add(request())
    top.add(request(status=504, flags="UT", at="caller"))  # the service has told of it itself
    (row,) = top.rows()
    assert (row["requests"], row["not_sent"], row["success_rate"], row["best_ms"]) == (1, 1, 1.0, 2.0)
    quiet = Top()
    quiet.add(request())
    assert "NOT SENT" not in printed(quiet.table())


def test_fault_words() -> None:
    fault = Fault(
        id="f-1", at="mesh", service="service-b", version="v2", route="/work", caller="service-a", lat_ms=200,
        err_rate=0.2, share=0.5, started_at=NOW,
    )  # fmt: skip
    assert tables.fault_words(fault) == (
        "200 ms for 50% and 20% errors on service-b v2 /work for service-a in the sidecars"
    )
    hang = Fault(id="f-2", at="process", kind="hang", service="service-b", instance="b-1", started_at=NOW)
    assert tables.fault_words(hang) == "hang on b-1"
    assert "f-2" in printed(tables.faults([fault, hang]))


def test_traffic_words() -> None:
    rule = Traffic(split={"v1": 90, "v2": 10}, timeout_ms=500, retries=2, mirror={"v2": 0.1}, outlier=False)
    assert tables.traffic_words(rule) == (
        "split v1 90%, v2 10%; mirror v2 10%; timeout 500 ms; retries 2; outlier detection off"
    )
    assert tables.traffic_words(Traffic()) == "defaults"
    rules: Any = {
        "split": {"value": {"v1": 90, "v2": 10}, "origin": "set", "since": 1e9},
        "timeout_ms": {"value": 15000, "origin": "default", "since": None},
    }
    shown = printed(tables.traffic({"service-b": rules}))
    assert "v1 90%, v2 10%" in shown
    assert "15000 ms" in shown
