"""The exercise, as a user does it: from the command line alone, find what fails, and release the version without it."""

from __future__ import annotations

import json
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser_harness import chromium
from local_harness import Cli, kill, wait_for
from playwright.sync_api import expect

from meshdemo.resources import DEFAULT_POLICY
from meshdemo.workloads.emojivoto.catalogue import CATALOGUE
from meshdemo.workloads.emojivoto.voting import Votes


def test_the_catalogue_has_a_hundred_emoji() -> None:
    assert len(CATALOGUE) == len(set(CATALOGUE.values())) == 100


def test_votes_are_counted_and_kept(tmp_path: Path) -> None:
    votes = Votes(tmp_path / "votes.sqlite")
    assert [votes.add(":joy:"), votes.add(":cat:"), votes.add(":joy:")] == [1, 1, 2]
    assert Votes(tmp_path / "votes.sqlite").standings() == [(":joy:", 2), (":cat:", 1)]


def test_votings_that_share_a_folder_lose_no_vote(tmp_path: Path) -> None:
    """As pods of both versions do; they may find no database yet, all at once."""
    code = (
        "import sys, pathlib; from meshdemo.workloads.emojivoto.voting import Votes; sys.stdin.readline();"
        "votes = Votes(pathlib.Path(sys.argv[1])); [votes.add(':joy:') for _ in range(50)]"
    )
    path = tmp_path / "votes.sqlite"
    several = [
        subprocess.Popen([sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE) for _ in range(4)
    ]
    for one in several:
        assert one.stdin is not None
        one.stdin.close()  # go
    assert [one.wait(120) for one in several] == [0] * 4
    assert Votes(path).standings() == [(":joy:", 200)]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    with Cli(tmp_path_factory.mktemp("home")).up(
        "--runtime", "local", "--app", "emojivoto", "--rps", "40"
    ) as cli:
        yield cli


def success(mesh: Cli, service: str, *more: str) -> dict[str, float]:
    """Success rate by the last column asked for (service or route), once there is traffic enough."""
    rows = mesh.json("stat", service, *more)
    assert sum(row["requests"] for row in rows) > 100
    return {row.get("route", row["service"]): row["success_rate"] for row in rows if row["requests"]}


def board(mesh: Cli) -> dict[str, int]:
    """The votes that voting has stored."""
    path = mesh.paths.instance("voting-v1-1") / "votes.sqlite"
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as db:
        return dict(db.execute("SELECT choice, n FROM votes"))


@pytest.mark.browser
@pytest.mark.xdist_group("emojivoto")
def test_the_page_and_the_dashboard_in_a_browser(mesh: Cli) -> None:
    with chromium() as browser:
        context = browser.new_context()
        context.set_default_timeout(60_000)
        page = context.new_page()
        complaints: list[str] = []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(mesh.json("status")["endpoints"]["gateway"])  # as whoever comes from outside
        expect(page.locator("#choices button")).to_have_count(100, timeout=60_000)
        page.get_by_role("button", name="Vote for cat", exact=True).click()
        expect(page.get_by_role("status")).to_contain_text(re.compile(r"Thank you! .* votes? now"))
        expect(page.locator("#board li").first).to_be_visible()
        page.get_by_role("button", name="Vote for doughnut", exact=True).click()
        expect(page.get_by_role("status")).to_contain_text("That did not work", timeout=60_000)
        assert complaints == []
        # The dashboard shows who is not well, and which method fails.
        page.goto(mesh.json("dashboard", "--no-open")["url"])
        ill, well = (page.locator(f'.card[data-service="{name}"]') for name in ("voting", "emoji"))
        expect(ill).to_contain_text(re.compile(r"[6-9]\d\.\d+\s%"), timeout=60_000)
        expect(well).to_contain_text(re.compile(r"100\s%"))
        ill.click()
        expect(page.locator("#routes")).to_contain_text("Vote")
        context.close()


@pytest.mark.xdist_group("emojivoto")
def test_the_exercise(mesh: Cli, tmp_path: Path) -> None:
    # Who is not well? (In its first seconds, on a busy machine, anybody may fail for reasons of its own.)
    for service, low, high in (("web", 0.7, 0.95), ("voting", 0.7, 0.95), ("emoji", 1, 1)):
        wait_for(
            f"{service} succeeds with {low} to {high}",
            lambda service=service, low=low, high=high: low <= success(mesh, service)[service] <= high,
        )

    # Which method, which choice?
    def failing() -> set[str]:
        rates = success(mesh, "voting", "--by", "route")
        return {route for route, rate in rates.items() if rate < 1}

    wait_for("the method that fails", lambda: failing() == {"Vote"})
    events = [
        json.loads(line)
        for line in mesh.run("tap", "web", "--status", "5xx", "--max", "3", "-o", "json").splitlines()
    ]
    assert {event["path"] for event in events} == {"/api/vote?choice=%3Adoughnut%3A"}
    calls = [json.loads(line) for line in mesh.run("tap", "voting", "--max", "20", "-o", "json").splitlines()]
    assert {call["path"] for call in calls} == {"/emojivoto.v1.VotingService/Vote"}
    assert ":doughnut:" not in board(mesh)
    # The release without it.
    mesh.run("up", "--version", "voting=v2")
    begun = mesh.start("canary", "voting", "--to", "v2", "--steps", "50,100", "--hold", "60s")
    assert begun.stdout is not None
    assert "v2 gets 50% of the traffic of voting" in begun.stdout.readline()
    begun.send_signal(signal.SIGINT)
    said, _ = begun.communicate(timeout=mesh.deadline_s)
    assert begun.returncode == 130
    assert said.splitlines()[-1] == "stopped before its end: the traffic of voting is as it was: v1 100%"
    patient = tmp_path / "policy.yaml"  # this is about the release, not about a machine that is slow today
    patient.write_text(DEFAULT_POLICY.read_text().replace("below: 300ms", "below: 5s"))
    result = mesh.json(
        "canary", "voting", "--to", "v2", "--steps", "50,100", "--hold", "3s", "--policy", str(patient)
    )
    assert result["promoted"], result
    wait_for("nothing fails any more", lambda: success(mesh, "web", "--window", "3s")["web"] == 1)


@pytest.mark.xdist_group("emojivoto")
def test_votes_survive_a_restart_of_voting(mesh: Cli) -> None:
    before = wait_for("votes", lambda: board(mesh))
    killed = mesh.process("voting-v1-1")
    kill(killed)
    wait_for("another voting", lambda: mesh.process("voting-v1-1").pid != killed.pid)
    wait_for("voting is back", mesh.all_ready)
    after = board(mesh)
    assert all(after[choice] >= n for choice, n in before.items())


@pytest.mark.xdist_group("emojivoto")
@pytest.mark.parametrize("service", ["voting", "emoji", "web"])
def test_a_bad_release_of_any_service(mesh: Cli, service: str) -> None:
    """Over gRPC as over HTTP: LAT_MS and ERR_RATE do what `fault` says they do."""
    made = mesh.json("fault", "--service", service, "--lat", "30", "--err", "0.8")
    assert made["at"] == "app"

    def broken() -> bool:
        (row,) = (one for one in mesh.json("stat", service, "--window", "1s") if one["service"] == service)
        return bool(row["requests"] > 5 and row["success_rate"] < 0.5 and row["p50_ms"] >= 25)

    wait_for("harm", broken)
    mesh.run("fault", "clear", made["id"])
    wait_for("no harm", lambda: not broken())


@pytest.mark.xdist_group("emojivoto")
def test_what_does_not_read_the_variables_is_not_restarted_for_them(mesh: Cli) -> None:
    before = mesh.describe()["spec"]
    said = mesh.run("fault", "--service", "vote-bot", "--lat", "300", status=2)
    assert "vote-bot v1 does not honour LAT_MS and ERR_RATE" in said
    assert "--at mesh" in said
    assert mesh.describe()["spec"] == before
