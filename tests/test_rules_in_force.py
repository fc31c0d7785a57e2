"""What `traffic show` says is in force."""

from __future__ import annotations

from xds_harness import pair

from meshdemo.control.intent import set_traffic
from meshdemo.control.model import Instance, Intent, MeshState
from meshdemo.control.rules import DEFAULTS, in_force


def mesh() -> MeshState:
    instances = tuple(
        Instance(
            id=f"{service}-{n}", service=service, version="v1", inbound_port=1, outbound_port=2,
            metrics_port=3, app_port=4, ready=True,
        )
        for service, n in (("service-a", 1), ("service-b", 1), ("service-b", 2))
    )  # fmt: skip
    return MeshState(mesh="m", app=pair(), instances=instances)


def test_defaults_are_shown_and_what_was_set_says_since_when() -> None:
    rules = in_force(mesh(), Intent())["service-b"]
    assert {name: rule["value"] for name, rule in rules.items()} == {**DEFAULTS, "split": {"v1": 100}}
    assert all(rule["origin"] == "default" and rule["since"] is None for rule in rules.values())
    intent = set_traffic(Intent(), mesh(), "service-b", {"timeout_ms": 500}, 10.0)
    intent = set_traffic(intent, mesh(), "service-b", {"timeout_ms": 500, "retries": 1}, 20.0)
    rules = in_force(mesh(), intent)["service-b"]
    assert rules["timeout_ms"] == {"value": 500, "origin": "set", "since": 10.0}
    assert rules["retries"] == {"value": 1, "origin": "set", "since": 20.0}
    assert rules["outlier"] == {"value": True, "origin": "default", "since": None}
    assert set_traffic(intent, mesh(), "service-b", dict.fromkeys(DEFAULTS), 30.0).traffic == {}
