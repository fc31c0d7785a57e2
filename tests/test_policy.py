"""Policy files: the default is sound, and every problem of a broken one is told with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from meshdemo.cli.main import run
from meshdemo.control import goals
from meshdemo.errors import BadInput
from meshdemo.remediation import policyfile
from meshdemo.remediation.policy import REMEDIES, Policy
from meshdemo.remediation.policyfile import Checked, PolicyError, check, load
from meshdemo.resources import DEFAULT_POLICY

SOUND = """\
objectives:
  - name: success
    success: 99%
rules:
  - name: bad-instance
    scope: instance
    remedies: [eject, {scale: {add: 2}}]
guardrails:
  cooldown: 30s
"""


def problems(text: str) -> list[str]:
    return [str(problem) for problem in check(text).problems]


def sound(text: str) -> Policy:
    checked = check(text)
    assert checked.policy is not None, checked.problems
    return checked.policy


# -- what is sound ----------------------------------------------------------------------------------------


def test_the_default_policy_is_sound_and_uses_every_section() -> None:
    policy = load(DEFAULT_POLICY)
    assert policy.objectives and policy.rules
    assert {rule.name for rule in policy.rules} >= {"bad-instance", "bad-version", "bad-service"}
    assert policy.objectives_of("service-b")[0].allowed == pytest.approx(0.01)
    for app, names in (
        ("emojivoto", ["success-emojivoto", "latency", "instances"]),
        ("mine", ["success", "latency", "instances"]),  # whose web and voting are its own affair
    ):
        for service in ("web", "voting"):
            assert [one.name for one in policy.of_app(app).objectives_of(service)] == names
        assert policy.of_app(app).objectives_of("emoji")[0].name == "success"


def test_the_default_policy_names_every_remedy_in_its_comments() -> None:
    text = DEFAULT_POLICY.read_text()
    for name in REMEDIES:
        assert f"#   {name}" in text


def test_values_become_numbers() -> None:
    policy = sound(SOUND + "  verify: 1500ms\n  min_in_service: 0.25\n")
    assert policy.objectives[0].allowed == pytest.approx(0.01)
    assert policy.guardrails.cooldown == 30
    assert policy.guardrails.verify == 1.5
    assert policy.guardrails.min_in_service == 0.25
    assert [remedy.kind for remedy in policy.rules[0].remedies] == ["eject", "scale"]


def test_services_are_selected_by_pattern() -> None:
    policy = sound(
        "objectives:\n"
        "  - {name: a, services: ['service-*'], except: [service-a], success: 99%}\n"
        "  - {name: b, latency: {below: 300ms, share: 95%}}\n"
    )
    assert [one.name for one in policy.objectives_of("service-a")] == ["b"]
    assert [one.name for one in policy.objectives_of("service-b")] == ["a", "b"]
    assert policy.objectives[1].threshold_ms == 300


def test_the_first_rule_that_fits_is_taken() -> None:
    policy = load(DEFAULT_POLICY)

    def rule(scope: str, symptom: str) -> str | None:
        found = policy.rule_for(scope=scope, service="service-b", objective="success", symptom=symptom)
        return found.name if found else None

    assert rule("instance", "errors") == "bad-instance"
    assert rule("instance", "hung") == "hung"
    assert rule("instance", "down") == "instance-down"
    assert rule("service", "slow") == "slow-service"
    assert rule("service", "errors") == "bad-service"
    assert rule("caller", "errors") == "bad-caller"


def test_secrets_come_from_the_environment() -> None:
    policy = sound(
        SOUND + "notify:\n  - name: chat\n    url: https://chat.example/${HOOK}\n"
        "    headers: {Authorization: 'Bearer ${TOKEN}'}\n"
    )
    webhook = policy.webhooks({"HOOK": "h", "TOKEN": "t"})[0]
    assert webhook.url == "https://chat.example/h"
    assert webhook.headers == {"Authorization": "Bearer t"}
    with pytest.raises(BadInput, match="environment variable TOKEN"):
        policy.webhooks({"HOOK": "h"})


def test_a_secret_that_makes_a_bad_url_is_told_without_it() -> None:
    policy = sound(SOUND + "notify: [{name: chat, url: 'https://${HOST}/x'}]\n")
    with pytest.raises(BadInput, match="'chat', with its variables filled in, makes no sense") as caught:
        policy.webhooks({"HOST": "secret:99999"})
    assert "secret" not in caught.value.message


def test_what_is_sound_and_worth_knowing() -> None:
    text = SOUND.replace("success: 99%", "latency: {below: 310ms, share: 95%}") + (
        "notify:\n  - name: chat\n    url: https://chat.example/${HOOK}\n    headers: {X: 'Bearer ${TOKEN}'}\n"
    )
    checked = check(text, {"HOOK": "h"})
    assert checked.policy is not None
    assert [str(one) for one in checked.unset] == ["13:18: the environment variable TOKEN is not set"]
    assert [str(one) for one in checked.remarks] == [
        "3:22: 310ms is judged as 300ms, the nearest that is counted"
    ]
    assert not check(SOUND, {}).unset and not check(SOUND, {}).remarks
    assert not check(DEFAULT_POLICY.read_text(), {}).remarks


# -- what is not ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "1:1: the policy is empty"),
        ("- 1", "1:1: the policy must have keys and values, not a list"),
        ("objectives: []", "1:13: 'objectives' must not be empty"),
        ("rules: []", "1:1: 'objectives' is missing"),
        ("objectives: [", "1:14: not YAML"),
        ("objectives:\n  - name: x\n   success: 99%", "3:4: not YAML"),
        ("a: \x07", "1:4: not YAML: character #x0007"),
        (SOUND.replace("success: 99%", "succes: 99%"), "3:5: unknown key 'succes'; did you mean 'success'?"),
        (SOUND.replace("99%", "99"), "3:14: 99 is no share"),
        (SOUND.replace("99%", "100%"), "3:14: 'success' is 100%, but must be less than 100%"),
        (SOUND.replace("99%", "-1%"), "3:14: '-1%' is no share"),
        (SOUND.replace("99%", ".nan"), "3:14: nan is no share"),
        (SOUND.replace("30s", "30"), "9:13: 30 is no duration"),
        (SOUND.replace("30s", "-30s"), "9:13: '-30s' is no duration"),
        (SOUND.replace("30s", "30 parsecs"), "9:13: '30 parsecs' is no duration"),
        (SOUND.replace("cooldown", "cool-down"), "9:3: unknown key 'cool-down'; did you mean 'cooldown'?"),
        (SOUND.replace("scope: instance", "scope: instanc"), "6:12: unknown scope 'instanc'; did you mean"),
        (SOUND.replace("scope: instance", "scope: [instance, pod]"), "6:23: unknown scope 'pod'; allowed"),
        (SOUND.replace("eject", "ejekt"), "7:16: unknown remedy 'ejekt'; did you mean 'eject'?"),
        (SOUND.replace("add: 2", "ad: 2"), "7:32: unknown key 'ad'; did you mean 'add'?"),
        (SOUND.replace("add: 2", "add: 0"), "7:37: 'add' is 0, but must be at least 1"),
        (SOUND.replace("add: 2", "add: two"), "7:37: 'add' must be a whole number, not 'two'"),
        (SOUND.replace("eject", "{eject: {x: 1}}"), "7:25: unknown key 'x'; eject has no settings"),
        (SOUND.replace("eject", "3"), "7:16: a remedy is one word"),
        (SOUND.replace("[eject, {scale: {add: 2}}]", "[]"), "7:15: 'remedies' must not be empty"),
        (SOUND.replace("[eject, {scale: {add: 2}}]", "eject"), "7:15: 'remedies' must be a list"),
        (SOUND.replace("    scope: instance\n", ""), "5:5: 'scope' is missing"),
        (SOUND.replace("name: success", "name: a b"), "2:11: name 'a b' has characters that are not allowed"),
        (SOUND + "  cooldown: 1s\n", "10:3: 'cooldown' stands here twice, first on line 9"),
        (SOUND + "notify: [{name: x, url: ftp://x}]\n", "10:10: url 'ftp://x' is not http:// or https://"),
        (SOUND.replace("success: 99%", "window: 20s"), "2:5: an objective has exactly one of"),
        (SOUND + "x: &a 1\ny: *a\n", "11:4: aliases"),
        (SOUND + "x: &a {b: 1}\ny:\n  <<: *a\n", "12:7: aliases"),
        (SOUND + "notify: [{name: x, url: 'http://'}]\n", "10:10: url 'http://' names no host"),
        (SOUND + "notify: [{name: x, url: 'http://x:99999/'}]\n", "10:10: url 'http://x:99999/' makes no sense: Port"),
        (SOUND + "notify: [{name: x, url: 'http://[x/'}]\n", "10:10: url 'http://[x/' makes no sense"),
        (SOUND + "notify: [{name: x, url: 'http://${HOST}:0/'}]\n", "10:10: url 'http://${HOST}:0/' has a port"),
    ],
)  # fmt: skip
def test_a_problem_is_told_with_its_place(text: str, expected: str) -> None:
    found = problems(text)
    assert any(problem.startswith(expected) for problem in found), found


def test_all_problems_are_told_at_once_in_the_order_of_their_lines() -> None:
    text = (
        SOUND.replace("99%", "99").replace("eject", "ejekt").replace("30s", "30")
        + "rules2: 1\n"
        + "notify: [{name: x, url: 'https://a', timeout: 2}]\n"
    )
    found = check(text).problems
    assert [problem.line for problem in found] == [3, 7, 9, 10, 11]


def test_names_that_are_taken_or_lead_nowhere() -> None:
    text = """\
objectives:
  - {name: success, success: 99%}
  - {name: success, success: 98%}
rules:
  - {name: a, scope: instance, objectives: [sucess], remedies: [eject]}
  - {name: a, scope: version, remedies: [rollback]}
"""
    assert problems(text) == [
        "3:12: the name 'success' is taken by another of the objectives",
        "5:45: unknown objective 'sucess'; did you mean 'success'? allowed: success",
        "6:12: the name 'a' is taken by another of the rules",
    ]


def test_a_rule_that_can_never_be_reached() -> None:
    text = SOUND + "rules_: 1\n"
    text = text.replace(
        "guardrails:", "  - {name: late, scope: [instance], symptom: hung, remedies: [restart]}\nguardrails:"
    )
    assert any("never reached: rule 'bad-instance' above" in problem for problem in problems(text))


def test_a_policy_with_an_error_never_loads(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(SOUND.replace("99%", "99"))
    with pytest.raises(PolicyError) as caught:
        load(path)
    assert caught.value.exit_status == 2
    assert f"{path}:3:14: 99 is no share" in caught.value.message


def test_what_cannot_be_read_is_bad_input(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    with pytest.raises(BadInput, match="cannot read"):
        policyfile.check_file(path)
    path.write_bytes(b"objectives:\n  - name: caf\xc3\xa9 \xff")
    with pytest.raises(PolicyError) as caught:
        load(path)
    assert f"{path}:2:16: not UTF-8 text: byte 0xff" in caught.value.message


# -- properties -------------------------------------------------------------------------------------------

_LINES = DEFAULT_POLICY.read_text().splitlines()
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 1000) | st.floats(allow_nan=False) | st.text(max_size=8)
    | st.sampled_from(["99%", "10s", "eject", "instance", "service", "success"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["name", "scope", "remedies", "success", "latency", "below", "share", "objectives",
                         "rules", "guardrails", "notify", "scale", "add", "url", "x"]), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


def _told(checked: Checked, text: str) -> None:
    assert (checked.policy is None) == bool(checked.problems)
    lines = text.count("\n") + 1
    for problem in checked.problems:
        assert 1 <= problem.line <= lines + 1 and problem.column >= 1 and problem.message


@given(st.text(max_size=200))
@example("\u2028: [")
@example("? [\n: 1")
def test_any_text_is_either_sound_or_told_what_is_wrong(text: str) -> None:
    _told(check(text), text)


@given(st.dictionaries(st.sampled_from(["objectives", "rules", "guardrails", "notify", "x"]), _VALUES))
def test_any_structure_is_either_sound_or_told_what_is_wrong(data: dict[str, object]) -> None:
    text = json.dumps(data)  # JSON is YAML
    _told(check(text), text)


@given(
    st.integers(0, len(_LINES) - 1), st.sampled_from(["drop", "double", "indent", "cut"]), st.integers(0, 60)
)
def test_a_damaged_default_policy_is_either_sound_or_told_what_is_wrong(line: int, how: str, at: int) -> None:
    lines = list(_LINES)
    if how == "drop":
        del lines[line]
    elif how == "double":
        lines.insert(line, lines[line])
    elif how == "indent":
        lines[line] = " " + lines[line]
    else:
        lines[line] = lines[line][:at]
    text = "\n".join(lines)
    _told(check(text), text)


# -- the commands -----------------------------------------------------------------------------------------


def _run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        run(list(arguments))
    return int(caught.value.code or 0)


def test_policy_check_says_sound_or_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(SOUND)
    assert _run("policy", "check", str(path)) == 0
    assert "is sound" in capsys.readouterr().out
    path.write_text(SOUND.replace("99%", "99").replace("eject", "ejekt"))
    assert _run("policy", "check", str(path)) == 2
    error = capsys.readouterr().err
    assert "3:14" in error and "7:16" in error
    assert _run("policy", "check", str(path), "-o", "json") == 2
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is False
    assert [(one["line"], one["column"]) for one in answer["problems"]] == [(3, 14), (7, 16)]


def test_an_unset_variable_is_a_warning_for_check_and_a_line_for_watch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(SOUND + "notify: [{name: chat, url: 'https://${NOT_SET_HERE}/'}]\n")
    assert _run("policy", "check", str(path)) == 0
    said = capsys.readouterr()
    assert "is sound" in said.out and "10:28: the environment variable NOT_SET_HERE is not set" in said.err
    assert _run("policy", "check", str(path), "-o", "json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is True
    assert [(one["line"], one["column"]) for one in answer["warnings"]] == [(10, 28)]
    assert _run("watch", "--policy", str(path)) == 2
    assert f"{path}:10:28: the environment variable NOT_SET_HERE" in capsys.readouterr().err


def test_watch_does_not_start_with_a_broken_policy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(SOUND.replace("eject", "ejekt"))
    assert _run("watch", "--policy", str(path)) == 2
    assert "7:16: unknown remedy 'ejekt'" in capsys.readouterr().err


@pytest.mark.parametrize(("text", "seconds"), [("1m30s", 90), ("1d", 86_400), ("500ms", 0.5)])
def test_durations_are_those_of_the_command_line(text: str, seconds: float) -> None:
    from meshdemo.cli import _values

    assert goals.duration_s(text) == _values.duration_s(text, "--for") == pytest.approx(seconds)
