"""The journal: what is on disk after any end, and what happens when the disk takes no more."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshdemo.control.journal import MAX_EVENT_BYTES, Journal
from meshdemo.errors import BadInput


def numbers(journal: Journal, after: int = 0) -> list[int]:
    return [event["n"] for event in journal.after(after)[1]]


def test_events_outlive_the_process(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    first = Journal(path, clock=lambda: 7.5)
    assert first.append({"event": "fault", "n": 1}) == {"event": "fault", "n": 1, "time": 7.5, "seq": 1}
    first.append({"event": "healed", "n": 2, "time": 3.0, "seq": 99})
    second = Journal(path)
    assert second.append({"event": "x", "n": 3})["seq"] == 3
    assert numbers(second) == [1, 2, 3]
    assert second.after(1)[1][0]["time"] == 3.0
    assert path.stat().st_mode & 0o777 == 0o600


@given(st.integers(min_value=0))
def test_cut_anywhere_only_the_torn_line_is_lost(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("journal") / "events.jsonl"
    journal = Journal(path)
    for n in range(4):
        journal.append({"event": "e", "n": n, "text": "äöü\n"})
    whole = path.read_bytes()
    cut %= len(whole) + 1
    path.write_bytes(whole[:cut])
    again = Journal(path)
    kept = whole[:cut].count(b"\n")
    assert numbers(again) == list(range(kept))
    again.append({"event": "e", "n": 100})
    assert numbers(Journal(path)) == [*range(kept), 100]


def test_lines_that_are_no_events_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"seq":1,"event":"a","n":1}\nnonsense\n[]\n\xff\xfe\n{"seq":2,"event":"b","n":2}\n')
    assert numbers(Journal(path)) == [1, 2]


@pytest.mark.parametrize(
    "event",
    [{}, {"event": 5}, {"event": "x", "time": "now"}, {"event": "x", "v": float("nan")}, {"event": "x", "v": {1}},
     {"event": "x" * MAX_EVENT_BYTES}],
)  # fmt: skip
def test_what_is_no_event_is_refused_and_leaves_no_gap(tmp_path: Path, event: dict[str, Any]) -> None:
    journal = Journal(tmp_path / "events.jsonl")
    with pytest.raises(BadInput):
        journal.append(event)
    assert journal.append({"event": "x"})["seq"] == 1


def test_it_stays_small_and_keeps_the_newest(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    journal = Journal(path, max_bytes=4_000, kept=1_000)
    for n in range(500):
        journal.append({"event": "e", "n": n, "text": "x" * 30})
        assert path.stat().st_size < 4_200
    assert numbers(journal) == list(range(500))
    again = Journal(path)
    kept = numbers(again)
    assert kept == list(range(500 - len(kept), 500))
    assert len(kept) > 15
    assert again.append({"event": "e"})["seq"] == 501


def test_memory_is_bounded(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "events.jsonl", kept=10)
    for n in range(50):
        journal.append({"event": "e", "n": n})
    assert numbers(journal) == list(range(40, 50))


def test_waiting_for_an_event(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "events.jsonl")
    assert journal.after(0, wait_s=0.01) == (0, [])
    threading.Timer(0.05, lambda: journal.append({"event": "e", "n": 1})).start()
    seq, events = journal.after(0, wait_s=10)
    assert (seq, events[0]["n"]) == (1, 1)
    assert journal.after(-1) == (1, [])


def test_a_full_disk_costs_no_event_and_no_crash(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: writes come back short, then fail."""
    script = textwrap.dedent(
        """
        import json, resource, signal, sys
        from pathlib import Path
        from meshdemo.control.journal import Journal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        path = Path(sys.argv[1])
        journal = Journal(path)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        for n in range(50):
            journal.append({"event": "e", "n": n})
        full = (journal.trouble, path.stat().st_size, path.read_bytes()[-1:] == b"\\n")
        in_memory = [event["n"] for event in journal.after(0)[1]]
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        journal.append({"event": "e", "n": 50})
        on_disk = [json.loads(line)["n"] for line in path.read_bytes().splitlines()]
        print(json.dumps([full, in_memory, journal.trouble, on_disk]))
        """
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "events.jsonl")], capture_output=True, check=True
    )
    (trouble, size, whole_lines), in_memory, after, on_disk = json.loads(ran.stdout)
    assert "kept in memory alone" in trouble
    assert size <= 1000
    assert whole_lines
    assert in_memory == list(range(50))
    assert after == ""
    assert on_disk == list(range(51))


def test_a_folder_that_is_gone_costs_no_event(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "gone" / "events.jsonl")
    journal.append({"event": "e", "n": 1})
    assert os.strerror(errno.ENOENT) in journal.trouble
    (tmp_path / "gone").mkdir()
    journal.append({"event": "e", "n": 2})
    assert journal.trouble == ""
    assert numbers(Journal(tmp_path / "gone" / "events.jsonl")) == [1, 2]


def test_killed_while_writing(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    script = (
        "import sys; from pathlib import Path; from meshdemo.control.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "while True: print(journal.append({'event': 'e', 'n': 0})['seq'], flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    told = 0
    for line in process.stdout:
        told = int(line)
        if told == 500:
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    process.stdout.close()
    seq, events = Journal(path).after(0)
    assert seq >= told
    assert [event["seq"] for event in events] == list(range(1, seq + 1))
