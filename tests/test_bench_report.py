"""What the benchmark says, from made-up measurements: as values, as JSON, as a table and as a page."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from meshdemo.bench import page, runner, tables, up_kind
from meshdemo.bench.machine import TOOLS
from meshdemo.bench.model import (
    Bar,
    Curves,
    Figure,
    Findings,
    LeftOut,
    Machine,
    Quiet,
    Report,
    SuiteResult,
)
from meshdemo.bench.page import Axis
from meshdemo.bench.scale import Scale
from meshdemo.bench.stats import UNMEASURED
from meshdemo.errors import BadInput

CALM, BUSY = Quiet((0.1, 0.2, 0.3), 0.01), Quiet((3.0, 2.0, 1.0), 0.6)
LATENCY = Figure(
    "overhead.one.p50", "Median latency, one connection", "µs", "lower",
    {"direct": [20, 21, 20], "mesh": [66, 70, 68], "envoy": [60, 62, 61]}, "mesh", [Bar(1.15, against="envoy")],
)  # fmt: skip
RATE = Figure(
    "overhead.rps", "Requests/s", "requests/s", "higher", {"mesh": [90, 80, 85], "envoy": [100, 100, 100]}, "mesh",
    [Bar(0.87, against="envoy")],
)  # fmt: skip
HEALED = Figure(
    "heal.hang.healthy", "Healthy again: one instance <hangs>", "s", "lower",
    {"watch": [3.1, 3.3], "nothing": [math.inf, math.inf]}, "watch", [Bar(6), Bar(6, of="worst")], observed=20.0,
)  # fmt: skip


def result(**changes: object) -> SuiteResult:
    curves = Curves("c", "Growth", "sidecars", "ms", {"ms": [(10, 1), (1000, 90)]}, log_x=True, log_y=True)
    findings = Findings(
        [LATENCY, RATE, HEALED],
        [curves],
        [LeftOut("nginx", "nginx is not installed (apt install nginx)")],
        ["A note."],
    )
    return replace(SuiteResult("overhead", "What it costs", 12.0, CALM, CALM, 0.0, findings), **changes)  # type: ignore[arg-type]


def report(*suites: SuiteResult, load: float = 0.1) -> Report:
    machine = Machine("A Processor", 2, 8.0, "Linux 6", {"meshdemo": "0.1", "Envoy": "1.40.0"})
    return Report(1_700_000_000.0, (load, load, load), False, machine, suites or (result(),))


def printed(of: Report, width: int = 200) -> str:
    console = Console(width=width, no_color=True, record=True, file=None, force_terminal=False)
    with console.capture() as capture:
        for part in (
            *tables.head(of),
            *(part for one in of.suites for part in tables.suite(one)),
            *tables.foot(of),
        ):
            console.print(part)
    return capture.get()


# -- verdicts ---------------------------------------------------------------------------------------------


def test_a_ratio_is_taken_pair_by_pair() -> None:
    ratio = LATENCY.ratio("envoy")
    assert ratio is not None
    assert ratio.median == pytest.approx(68 / 61)
    assert (ratio.low, ratio.high) == pytest.approx((66 / 60, 70 / 62))
    assert LATENCY.ratio("mesh") is None


def test_bars_are_met_or_missed_in_the_direction_of_the_figure() -> None:
    assert LATENCY.verdict(Bar(1.15, against="envoy")) == "met"
    assert LATENCY.verdict(Bar(1.05, against="envoy")) == "missed"
    assert RATE.verdict(Bar(0.8, against="envoy")) == "met"
    assert RATE.verdict(Bar(0.87, against="envoy")) == "missed"
    assert RATE.verdict(Bar(0.87, against="haproxy")) is None  # not measured


def test_the_worst_round_counts_where_the_bar_says_so() -> None:
    detect = Figure("d", "Found", "s", "lower", {"watch": [0.9, 1.0, 1.0, 1.1, 2.5]}, "watch")
    assert detect.verdict(Bar(1.2)) == "met"
    assert detect.verdict(Bar(2.0, of="worst")) == "missed"
    rate = Figure("r", "Rate", "1/s", "higher", {"mesh": [5, 9, 9]}, "mesh")
    assert rate.verdict(Bar(6, of="worst")) == "missed"


def test_a_noisy_figure_around_its_bar_is_unclear() -> None:
    noisy = Figure("n", "Noisy", "s", "lower", {"watch": [1, 2, 4, 8, 16]}, "watch")
    assert noisy.verdict(Bar(5)) == "unclear"
    assert noisy.verdict(Bar(50)) == "met"
    assert noisy.verdict(Bar(0.5)) == "missed"
    assert noisy.noisy("watch")
    varies = replace(noisy, varies=True)  # when in a second a fault falls is no noise
    assert varies.verdict(Bar(5)) == "met"
    assert not varies.noisy("watch")


def test_a_bar_may_be_about_another_alternative() -> None:
    sizes = Figure("s", "Last ACK", "ms", "lower", {"1,000": [300], "5,000": [2500]}, "1,000")
    assert sizes.verdict(Bar(500)) == "met"
    assert sizes.verdict(Bar(2000, alternative="5,000")) == "missed"
    assert sizes.verdict(Bar(2000, alternative="10,000")) is None


def test_a_round_that_could_not_be_measured_keeps_its_place() -> None:
    lost = Figure(
        "l",
        "Healthy again",
        "s",
        "lower",
        {"watch": [1, UNMEASURED, 3], "none": [2, 4, 6]},
        "watch",
        varies=True,
    )
    ratio = lost.ratio("none")
    assert ratio is not None and (ratio.count, ratio.low, ratio.high) == (2, 0.5, 0.5)
    assert lost.spread("watch").count == 2
    # It may have been the one that misses the bar.
    assert lost.verdict(Bar(3)) == "met"
    assert lost.verdict(Bar(3, of="worst")) == "unclear"
    assert lost.verdict(Bar(1.5)) == "missed"
    assert lost.verdict(Bar(2.5)) == "unclear"
    assert lost.to_json()["alternatives"][0]["values"] == [1, None, 3]
    assert Findings([replace(lost, values={"watch": [UNMEASURED]})]).measured().figures == []


def test_there_is_no_verdict_on_what_was_not_measured() -> None:
    rate = Figure("r", "Rate", "", "higher", {"wrk": [900]}, "mesh", [Bar(800), Bar(0.5, against="wrk")])
    assert [rate.verdict(bar) for bar in rate.bars] == [None, None]
    assert replace(rate, ours="").verdict(Bar(800)) == "met"


def test_what_failed_in_every_round_takes_nothing_else_along() -> None:
    half = Figure("a", "A", "s", "lower", {"mesh": [1.0], "wrk": []}, "mesh", [Bar(2)])
    findings = Findings([half, Figure("b", "B", "s", "lower", {"mesh": []}, "mesh")], notes=["not measured"])
    measured = findings.measured()
    assert {one.key: dict(one.values) for one in measured.figures} == {"a": {"mesh": [1.0]}}
    assert measured.notes == ["not measured"]
    assert "✓ at most 2 s" in printed(report(replace(result(), findings=measured)))


def test_a_bar_of_another_says_whose_it_is() -> None:
    sizes = Figure("s", "Last ACK", "ms", "lower", {"1,000": [300], "5,000": [2500]}, "1,000")
    assert tables.bar_words(sizes, Bar(2000, alternative="5,000")) == "5,000: at most 2000 ms"


# -- doubts -----------------------------------------------------------------------------------------------


def test_a_busy_machine_is_not_believed() -> None:
    assert result().doubts == []
    assert result(before=BUSY).doubts == ["others used 60% of the processors before it"]
    assert result(stolen=0.1).doubts == ["the hypervisor took 10% of the processors' time"]
    assert report(load=1.4).doubts == []
    assert report(load=1.6).doubts == ["the load average was 1.6 when it began"]


# -- JSON -------------------------------------------------------------------------------------------------


def test_json_holds_every_value_and_what_never_came_is_null() -> None:
    (suite,) = json.loads(json.dumps(report().to_json(), allow_nan=False))["suites"]
    latency, _, healed = suite["figures"]
    mesh = latency["alternatives"][1]
    assert (mesh["alternative"], mesh["ours"], mesh["values"]) == ("mesh", True, [66, 70, 68])
    assert latency["alternatives"][2]["ratio_ours_to_this"]["median"] == pytest.approx(68 / 61, rel=1e-5)
    assert latency["bars"] == [
        {
            "alternative": "mesh",
            "limit": 1.15,
            "against": "envoy",
            "of": "median",
            "at": "most",
            "verdict": "met",
        }
    ]
    assert healed["observed_s"] == 20.0
    assert healed["alternatives"][1]["values"] == [None, None]
    assert healed["alternatives"][1]["median"] is None
    assert suite["left_out"] == [{"name": "nginx", "why": "nginx is not installed (apt install nginx)"}]


def test_json_says_the_machine_and_why_not_to_believe() -> None:
    row = report(result(before=BUSY, error="it broke"), load=9.0).to_json()
    assert row["machine"]["processors"] == 2
    assert row["noisy"]
    assert row["suites"][0]["noisy"]
    assert row["suites"][0]["load_before"] == [3.0, 2.0, 1.0]
    assert row["suites"][0]["error"] == "it broke"


# -- table ------------------------------------------------------------------------------------------------


def test_the_table_shows_figures_ratios_and_verdicts() -> None:
    text = printed(report())
    assert "Median latency, one connection, µs  ✓ at most 1.15 x envoy\n" in text
    assert re.search(r"mesh +68\.0 +66\.0\.\.70\.0 +- +-", text)
    assert re.search(r"envoy +61\.0 +60\.0\.\.62\.0 +1\.11", text)
    assert "Requests/s, requests/s  ✗ at least 0.87 x envoy\n" in text
    assert re.search(r"mesh +85\.0 ", text)
    assert re.search(r"nothing +> 20 ", text)
    assert "left out: nginx: nginx is not installed (apt install nginx)" in text
    assert "A note." in text
    assert "too noisy to believe:" not in text


def test_nothing_is_cut_on_a_terminal_of_80_columns() -> None:
    wide, narrow = printed(report()), printed(report(), 80)
    assert max(map(len, narrow.splitlines())) <= 80
    assert "…" not in narrow
    assert narrow.split() == wide.split()


def test_the_table_says_what_speaks_against_it() -> None:
    text = printed(report(result(after=BUSY, error="it broke")))
    assert "! too noisy to believe: others used 60% of the processors after it" in text
    assert "✗ it ended early: it broke" in text


@given(st.floats(1e-9, 1e12))
def test_figures_have_three_digits_that_count(number: float) -> None:
    shown = tables.value(number)
    assert float(shown.replace(",", "")) == pytest.approx(number, rel=0.0051)
    assert len(re.sub(r"^[0.,]+|[.,]", "", shown)) >= 3 or number >= 100


# -- page -------------------------------------------------------------------------------------------------


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.shapes: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        self.links += [value for name in ("src", "href") if (value := values.get(name))]
        if tag in {"circle", "line", "rect"}:
            self.shapes.append(values)


def test_the_page_is_whole_and_needs_nothing_else() -> None:
    text = page.render(report())
    reader = Reader()
    reader.feed(text)
    assert "script" not in reader.tags
    assert reader.links == []
    assert "https://" not in text
    assert reader.tags.count("svg") == 4
    # a dot for each round of each alternative, and one for each point of the curve
    assert reader.tags.count("circle") == 9 + 6 + 4 + 2
    assert "one instance &lt;hangs&gt;" in text
    assert "Left out: nginx" in text
    for shape in reader.shapes:
        for name in ("x1", "x2", "cx", "x"):
            if name in shape:
                assert 0 <= float(shape[name] or "nan") <= 760


def test_the_page_says_what_speaks_against_it() -> None:
    text = page.render(report(result(before=BUSY, error="it broke"), load=9))
    assert "others used 60% of the processors before it" in text
    assert "It ended early: it broke" in text
    assert "the load average was 9.0 when it began" in text


@given(
    st.lists(st.floats(1e-9, 1e9) | st.floats(-1e9, -1e-9) | st.sampled_from([0.0, math.inf]), min_size=1),
    st.booleans() | st.none(),
)
def test_every_value_has_a_place_on_the_axis(values: list[float], log: bool | None) -> None:
    axis = Axis.of(values, 100, 500, log=log)
    for value in values:
        if math.isfinite(value):
            assert 99.9 <= axis.place(value) <= 600.1
    assert all(99.9 <= place <= 600.1 for place, _ in axis.ticks())


# -- what is asked for ------------------------------------------------------------------------------------


def test_suites_run_in_their_own_order_and_all_means_all() -> None:
    assert runner.chosen([]) == list(runner.SUITES)
    assert runner.chosen(["load", "all"]) == list(runner.SUITES)
    assert runner.chosen(["load", "fault"]) == ["fault", "load"]
    with pytest.raises(BadInput, match="no suite 'speed'; there are: overhead, fault"):
        runner.chosen(["speed"])


def test_what_was_asked_for_wins() -> None:
    assert Scale().rounds(10, quick=1) == 10
    assert Scale(quick=True).rounds(10, quick=1) == 1
    assert Scale(quick=True, runs=4).rounds(10, quick=1) == 4
    assert Scale(quick=True, runs=4).seconds(10, quick=2) == 2


@pytest.mark.parametrize(
    ("names", "scale", "kind", "expected"),
    [
        (["up"], Scale(), False, 2),
        (["up"], Scale(), True, 17),
        (["up"], Scale(quick=True), True, 0.5),
        (["fault", "up"], Scale(runs=1), True, 0.2 + 0.4 + 7.5),
        (["controlplane"], Scale(large=True), True, 8),
        (["heal"], Scale(alone=True), True, 18),
        (["heal"], Scale(runs=2), True, 13.2 + 26),
        (["heal"], Scale(alone=True, runs=5), True, 9),
    ],
)
def test_it_is_said_before_how_long_it_takes(
    names: list[str], scale: Scale, kind: bool, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(up_kind, "missing", lambda: None if kind else LeftOut("kind", "not installed"))
    assert runner.minutes(names, scale) == pytest.approx(expected)


def test_every_tool_says_how_to_get_it() -> None:
    assert all(how for _, how in TOOLS.values())
