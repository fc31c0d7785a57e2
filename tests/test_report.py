"""The report: incidents from the journal, as text, JSON and a page."""

from __future__ import annotations

import itertools
import json
from html.parser import HTMLParser
from typing import Any

import pytest
from rich.console import Console
from simmesh import Run, SimMesh

from meshdemo.cli.report import _parts
from meshdemo.remediation import report as reports
from meshdemo.remediation.core import Core
from meshdemo.remediation.page import _marks, _words, render
from meshdemo.remediation.policyfile import load
from meshdemo.resources import DEFAULT_POLICY


def journal() -> list[dict[str, Any]]:
    """What the journal holds after one instance was broken, a release was bad, and nothing helped once."""
    run = Run(SimMesh(1, background=0.001), Core(load(DEFAULT_POLICY), "w1"))
    rows: list[dict[str, Any]] = []

    def put(fault_id: str, at: float) -> None:
        rows.append(
            {"event": "fault", "fault": fault_id, "service": "service-b", "started_at": at, "time": at}
        )

    run.run(10)
    run.mesh.mesh_fault(instance="service-b-2", err_rate=0.5)
    put("f1", run.mesh.now)
    run.run(20, run.healed)
    run.mesh.faults.clear()
    run.mesh.ejected.clear()
    rows.append({"event": "fault_cleared", "fault": "f1", "service": "service-b", "time": run.mesh.now})
    run.run(15)
    run.mesh.broken.update({"service-b-1": 0.4, "service-b-2": 0.4})
    run.run(30, lambda: bool(run.of("gave_up")))
    rows += [{"by": "watch", "seq": n, **event.to_json()} for n, event in enumerate(run.events)]
    return sorted(rows, key=lambda row: row["time"])


@pytest.fixture(scope="module")
def report() -> reports.Report:
    rows = journal()
    # Posted twice after a broken connection, by somebody else, of a dry run: none of it counts.
    noise = [rows[3], {**rows[3], "id": "other", "by": "canary"}, {**rows[3], "id": "d", "dry_run": True}]
    return reports.make("m", [*rows, *noise, {"event": "traffic", "time": 1.0}])


def test_incidents_have_cause_remedies_and_times(report: reports.Report) -> None:
    first, second = report.incidents
    assert (first.state, first.scope, first.target) == ("healed", "instance", "service-b-2")
    assert first.faults == ["f1"]
    assert [(tried.remedy, tried.outcome) for tried in first.remedies] == [("eject", "worked")]
    assert first.detect_s is not None and 0 < first.detect_s < 2
    assert first.recover_s is not None and first.detect_s < first.recover_s < 6
    assert first.bad_requests and first.budget_spent
    assert first.evidence["surely_above"] > 0.01
    assert second.state == "gave_up"
    assert [(tried.remedy, tried.outcome) for tried in second.remedies] == [("restart", "did not help")]
    assert not second.faults


def test_totals_are_over_all_incidents(report: reports.Report) -> None:
    totals = report.to_json()["totals"]
    assert (totals["incidents"], totals["healed"], totals["gave_up"], totals["open"]) == (2, 1, 1, 0)
    assert totals["detect_s"]["worst"] == report.incidents[0].detect_s
    assert set(totals["budget_spent"]) == {"service-b/success"}
    json.dumps(report.to_json())


def test_an_empty_journal_is_an_empty_report() -> None:
    empty = reports.make("m", [])
    assert empty.to_json()["totals"]["detect_s"] is None
    assert "No incidents" in render(empty)


def test_the_text_says_it_all_at_eighty_columns(report: reports.Report) -> None:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    for part in _parts(report):
        console.print(part)
    text = console.export_text()
    for words in (
        "✓ healed",
        "✗ gave up",
        "eject service-b-2: worked",
        "f1, put there on purpose",
        "error budget",
    ):
        assert words in text


def test_the_page_tells_what_happened_in_words(report: reports.Report) -> None:
    page = render(report)
    for one in report.incidents:
        assert "None" not in page
        begin = one.opened_at
        marks = _marks(one)
        assert sum(len(mark["names"]) for mark in marks) == len(one.timeline)  # none is lost
        assert all(f"{mark['label']}</text>" in page for mark in marks)
        assert marks[0]["x"] < marks[-1]["x"] <= 100
        assert all(b["x"] - a["x"] >= 4 for a, b in itertools.pairwise(marks))
        assert marks[-1]["after"] <= one.timeline[-1]["time"] - begin


def test_evidence_is_put_in_words() -> None:
    evidence = {"bad": 88, "requests": 191, "bad_share": 0.4607, "allowed": 0.25, "window_s": 10.0, "overdue": 0,
                "instance": None, "p95_ms": 312.34}  # fmt: skip
    assert _words(evidence) == (
        "bad 88, requests 191, bad share 46.07 %, allowed 25 %, window 10 s, p95 312.3 ms"
    )


def test_the_page_is_one_file_that_asks_for_nothing(report: reports.Report) -> None:
    page = render(reports.Report("<m>", report.incidents))
    assert "<m>" not in page and "&lt;m&gt;" in page

    class Parser(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.tags: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.tags.append(tag)
            assert not any(name in ("src", "onclick") for name, _ in attrs)
            assert all((value or "").startswith("#") for name, value in attrs if name == "href")

    parser = Parser()
    parser.feed(page)
    assert "script" not in parser.tags and parser.tags.count("section") == 2
