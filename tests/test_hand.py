"""What the page has the runtime do: the command that is run, and what becomes of its complaints."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from flask import Flask

from meshdemo.control.hand import Hand, blueprint, fault_words
from meshdemo.errors import BadInput, Failed


def command(script: str) -> list[str]:
    """A command that runs this Python with the words as `sys.argv[1:]`."""
    return [sys.executable, "-c", f"import json, sys, time\n{script}"]


ECHO = command("print(json.dumps({'words': sys.argv[1:]}))")


def test_each_value_is_one_word_with_its_option() -> None:
    assert fault_words({"service": "service-b", "lat_ms": 200, "err_rate": 0.2, "for_s": 30}) == [
        "--service=service-b", "--lat=200", "--err=0.2", "--for=30s",
    ]  # fmt: skip
    assert fault_words({"kind": "hang", "instance": "service-b-v1-1"}) == [
        "--hang", "--instance=service-b-v1-1",
    ]  # fmt: skip
    # What looks like an option of its own stays the value that it was sent as.
    assert fault_words({"service": "--crash"}) == ["--service=--crash"]
    assert fault_words({"version": None}) == []


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"kind": "explode"}, "allowed: degrade, crash, hang"),
        ({"kind": ["crash"]}, "allowed: degrade, crash, hang"),
        ({"name": "other"}, "no field name"),
        ({"service": ["a", "b"]}, "a name or a number"),
        ({"err_rate": True}, "a name or a number"),
    ],
)
def test_what_makes_no_sense_is_refused(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput) as refused:
        fault_words(asked)
    assert words in str(refused.value)


def test_the_command_is_run_and_its_answer_passed_on() -> None:
    hand = Hand(ECHO)
    assert hand.there
    assert hand.fault({"service": "service-b", "err_rate": 1})["words"] == [
        "fault", "--service=service-b", "--err=1", "-o", "json",
    ]  # fmt: skip
    assert hand.clear()["words"] == ["fault", "clear", "-o", "json"]


@pytest.mark.parametrize(("status", "kind"), [(2, BadInput), (1, Failed), (3, Failed)])
def test_a_complaint_is_the_users(status: int, kind: type[Exception]) -> None:
    said = "meshdemo: no service 'x'; there are: y\\n  do this\\n"
    hand = Hand(command(f"sys.stderr.write({said!r}.encode().decode('unicode_escape')); sys.exit({status})"))
    with pytest.raises(kind) as complaint:
        hand.fault({})
    assert str(complaint.value) == "no service 'x'; there are: y (do this)"


def test_without_a_command_it_says_what_to_type() -> None:
    hand = Hand(())
    assert not hand.there
    with pytest.raises(Failed, match=r"cannot change what runs .*type: meshdemo fault --crash"):
        hand.fault({"kind": "crash"})


def test_one_at_a_time() -> None:
    hand = Hand(command("sys.stdout.write('{}'); sys.stdout.flush(); open(sys.argv[-1]); sys.exit()"))
    with hand._busy, pytest.raises(Failed, match="under way"):
        hand.clear()
    assert not hand._busy.locked()


def test_over_http() -> None:
    app = Flask(__name__)
    app.register_blueprint(blueprint(Hand(ECHO)))
    with app.test_client() as client:
        asked = {"service": "service-b", "lat_ms": 5.5}
        answer = client.post("/v1/hand/faults", json=asked)
        assert json.loads(answer.data)["words"][:3] == ["fault", "--service=service-b", "--lat=5.5"]
        assert json.loads(client.delete("/v1/hand/faults").data)["words"][:2] == ["fault", "clear"]
