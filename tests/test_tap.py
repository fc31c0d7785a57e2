"""Which single requests a tap shows."""

from __future__ import annotations

from typing import Any, cast

import pytest
from typer.testing import CliRunner

from meshdemo.cli.main import app
from meshdemo.control.client import TapEvent
from meshdemo.control.tap import Filter
from meshdemo.errors import BadInput


def event(**fields: Any) -> TapEvent:
    row = {
        "service": "voting", "caller": "web", "route": "vote", "path": "/v/Vote", "status": 200,
        "grpc_status": None, "flags": "", **fields,
    }  # fmt: skip
    return cast(TapEvent, row)


@pytest.mark.parametrize(
    ("fields", "failed", "of_5xx"),
    [
        ({}, False, False),
        ({"status": 404}, False, False),
        ({"status": 503}, True, True),
        ({"grpc_status": 0}, False, False),
        ({"grpc_status": 13}, True, True),  # an error of gRPC comes as 200
        ({"status": 0, "flags": "DC"}, True, False),
        ({"flags": "UC"}, True, False),  # cut off in the middle of the answer
    ],
)
def test_failures_are_what_success_rates_count(fields: dict[str, Any], failed: bool, of_5xx: bool) -> None:
    assert Filter(failed=True).wants(event(**fields)) is failed
    assert Filter(status="5xx").wants(event(**fields)) is of_5xx


def test_a_status_is_one_that_there_is() -> None:
    for status in ("99", "6xx", "0xx", "5x"):
        with pytest.raises(BadInput):
            Filter(status=status)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rate", "5000"], "--rate 5000: allowed is 0.1 to 1000"),
        (["--rate", "0.05"], "--rate 0.05"),
        (["--status", "99"], "--status '99'"),
        (["--status", "6xx"], "--status '6xx'"),
    ],
)
def test_wrong_options_are_named(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["tap", *arguments])
    assert words in result.output + str(result.exception)
