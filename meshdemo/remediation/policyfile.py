"""Reads a policy, and reports every problem with its line and column.

The policy is the part of watch that people edit, so being wrong must be cheap: a policy is checked whole,
all problems at once, and one with a problem never starts.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from meshdemo import positions
from meshdemo.control.signals import effective_bound_ms
from meshdemo.errors import BadInput
from meshdemo.positions import Document, Problem, one_of
from meshdemo.remediation.policy import SCOPES, Policy
from meshdemo.remediation.policywords import in_words


class PolicyError(BadInput):
    """A policy file with problems; the message lists all of them."""

    def __init__(self, name: str, problems: list[Problem]) -> None:
        self.problems = problems
        lines = [f"{name}:{problem}" for problem in problems]
        count = "a problem" if len(lines) == 1 else f"{len(lines)} problems"
        super().__init__("\n  ".join([f"{name} has {count}:", *lines]))


@dataclass(frozen=True, slots=True)
class Checked:
    """A policy text after checking: the policy, or what is wrong with it.

    `unset`: environment variables that it needs and that are not set here; they may be where watch runs.
    `remarks`: what is sound, and yet worth knowing.
    """

    policy: Policy | None
    problems: list[Problem]
    unset: Sequence[Problem] = ()
    remarks: Sequence[Problem] = ()


def load(path: Path, *, to_notify: bool = False) -> Policy:
    """Read and check a policy file. Raises PolicyError (exit status 2) with every problem in it.

    Args:
        to_notify: its webhooks will be told, so the variables that they need have to be set.
    """
    checked = check_file(path)
    if checked.policy is None:
        raise PolicyError(str(path), checked.problems)
    if to_notify and checked.unset:
        raise PolicyError(str(path), list(checked.unset))
    return checked.policy


def check_file(path: Path) -> Checked:
    """Check a policy file. Raises BadInput if there is none to read."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadInput(f"cannot read policy {path}: {error.strerror or error}") from error
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line, column = before.count(b"\n") + 1, len(before.rpartition(b"\n")[2].decode()) + 1
        return Checked(None, [Problem(line, column, f"not UTF-8 text: byte 0x{content[error.start]:02x}")])
    return check(text.replace("\r\n", "\n"))


def check(text: str, environment: Mapping[str, str] = os.environ) -> Checked:
    """Check a policy text; problems come in the order of their lines."""
    document = positions.parse(text)
    if document.data is None and not document.problems:
        return Checked(None, [Problem(1, 1, "the policy is empty; it needs at least one objective")])
    problems = list(document.problems)
    policy = None
    if document.data is not None:
        try:
            policy = Policy.model_validate(document.data)
        except ValidationError as error:
            problems.extend(in_words(document, dict(detail)) for detail in error.errors(include_url=False))
        # Also when the above found something: all problems at once, not one after the other.
        problems.extend(_references(document))
    if problems or policy is None:
        return Checked(None, sorted(set(problems)))
    unset = sorted(_unset(document, policy, environment))
    return Checked(policy, [], unset, sorted(_inexact(document, policy)))


def _unset(document: Document, policy: Policy, environment: Mapping[str, str]) -> Iterator[Problem]:
    for index, webhook in enumerate(policy.notify):
        for place, names in webhook.variables().items():
            for name in names:
                if name not in environment:
                    where = document.value_at(("notify", index, *place))
                    yield Problem(*where, f"the environment variable {name} is not set")


def _inexact(document: Document, policy: Policy) -> Iterator[Problem]:
    """Latencies that lie within a bucket of the histograms."""
    for index, objective in enumerate(policy.objectives):
        if (threshold := objective.threshold_ms) is None:
            continue
        bound = effective_bound_ms(threshold)
        if not math.isclose(bound, threshold):
            where = document.value_at(("objectives", index, "latency", "below"))
            yield Problem(*where, f"{threshold:g}ms is judged as {bound:g}ms, the nearest that is counted")


def _references(document: Document) -> Iterator[Problem]:
    """Names used twice, names that lead nowhere, and rules that can never be reached."""
    data = document.data
    if not isinstance(data, Mapping):
        return
    names: dict[str, set[str]] = {}
    for section in ("objectives", "rules", "notify"):
        names[section] = set()
        for index, entry in enumerate(_entries(data, section)):
            name = entry.get("name") if isinstance(entry, Mapping) else None
            if not isinstance(name, str):
                continue
            if name in names[section]:
                place = document.value_at((section, index, "name"))
                yield Problem(*place, f"the name '{name}' is taken by another of the {section}")
            names[section].add(name)
    for index, rule in enumerate(_entries(data, "rules")):
        wanted = rule.get("objectives") if isinstance(rule, Mapping) else None
        for position, name in enumerate(wanted if isinstance(wanted, list) else ()):
            if isinstance(name, str) and name not in names["objectives"]:
                place = document.value_at(("rules", index, "objectives", position))
                hint = one_of(name, sorted(names["objectives"]))
                yield Problem(*place, f"unknown objective '{name}'; {hint}")
    yield from _unreachable(document)


def _unreachable(document: Document) -> Iterator[Problem]:
    """Rules hidden by one above them that takes everything they would."""
    open_scopes: dict[str, str] = {}
    for index, rule in enumerate(_entries(document.data, "rules")):
        if not isinstance(rule, Mapping):
            continue
        scopes = rule.get("scope")
        scopes = [scopes] if isinstance(scopes, str) else scopes if isinstance(scopes, list) else []
        scopes = [scope for scope in scopes if scope in SCOPES]
        if scopes and all(scope in open_scopes for scope in scopes):
            place = document.value_at(("rules", index))
            above = open_scopes[scopes[0]]
            yield Problem(*place, f"never reached: rule '{above}' above takes everything of this scope")
        if not any(rule.get(key) for key in ("services", "except", "objectives", "symptom")):
            open_scopes.update({scope: str(rule.get("name")) for scope in scopes if scope not in open_scopes})


def _entries(data: Mapping[str, Any], section: str) -> list[Any]:
    value = data.get(section)
    return value if isinstance(value, list) else []
