"""What is wrong with a policy, in words: pydantic's errors for people who edit YAML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from meshdemo import positions
from meshdemo.control.goals import Latency, Objective
from meshdemo.positions import Document, Problem, one_of
from meshdemo.remediation.policy import REMEDIES, Guardrails, MaxActions, Policy, Rule, Webhook


def in_words(document: Document, error: Mapping[str, Any]) -> Problem:
    """One of pydantic's errors as a problem."""
    path = [step for step in error["loc"] if step not in ("function-before",)]
    kind, key = error["type"], str(error["loc"][-1]) if error["loc"] else ""
    given = error.get("input")
    match kind:
        case "extra_forbidden":
            return Problem(*document.key_at(path), _unknown_key(document.data, path))
        case "missing":
            message = f"'{key}' is missing"
            path = path[:-1]
        case "union_tag_invalid":
            name = str(given.get("kind")) if isinstance(given, Mapping) else str(given)
            message = f"unknown remedy '{name}'; {one_of(name, REMEDIES)}"
        case "union_tag_not_found" | "model_attributes_type" if "remedies" in path:
            message = f"a remedy is one word, or one word with its settings; {one_of('', REMEDIES)}"
        case "literal_error":
            allowed = re.findall(r"'([^']*)'", str(error["ctx"]["expected"]))
            message = f"unknown {_singular(path)} '{given}'; {one_of(str(given), allowed)}"
        case "string_pattern_mismatch":
            message = f"{_singular(path)} '{given}' has characters that are not allowed there"
        case "value_error":
            message = str(error["ctx"]["error"])
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
            raw = positions.lookup(document.data, path)
            message = f"'{key}' is {raw}, but must be {_bound(kind, error['ctx'], path)}"
        case "too_short":
            message = f"'{key}' must not be empty"
        case "model_type" | "dict_type" | "model_attributes_type":
            message = f"{_what(path)} must have keys and values, not {_kind_of(given)}"
        case "list_type":
            message = f"{_what(path)} must be a list, not {_kind_of(given)}"
        case "int_type" | "int_parsing" | "int_from_float":
            message = f"{_what(path)} must be a whole number, not {given!r}"
        case "string_type":
            message = f"{_what(path)} must be text, not {given!r}"
        case "bool_type":
            message = f"{_what(path)} must be true or false, not {given!r}"
        case _:
            message = f"{_what(path)}: {error['msg']}"
    return Problem(*document.value_at(path), message)


def _what(path: list[Any]) -> str:
    names = [str(step) for step in path if isinstance(step, str)]
    if not names:
        return "the policy"
    if isinstance(path[-1], int):
        return f"an entry of '{names[-1]}'"
    return f"'{names[-1]}'"


def _singular(path: list[Any]) -> str:
    name = next((str(step) for step in reversed(path) if isinstance(step, str)), "value")
    return name.removesuffix("s") if name not in ("success",) else name


def _kind_of(value: Any) -> str:
    return "a list" if isinstance(value, list) else "nothing" if value is None else repr(value)


def _bound(kind: str, context: Mapping[str, Any], path: list[Any]) -> str:
    limit = next(iter(context.values()))
    words = {
        "greater_than": "more than",
        "greater_than_equal": "at least",
        "less_than": "less than",
        "less_than_equal": "at most",
    }[kind]
    if path and path[-1] in ("success", "share", "in_service", "min_in_service"):
        return f"{words} {limit * 100:g}%"
    if path and path[-1] in _DURATIONS:
        return f"{words} {limit:g}s"
    return f"{words} {limit:g}"


_DURATIONS = ("below", "window", "budget", "per", "cooldown", "verify", "probation", "timeout", "for")


def _unknown_key(data: Any, path: list[Any]) -> str:
    """The words for an unknown key, with the nearest one that is allowed there."""
    parts = [step for step in path if isinstance(step, str)]
    key = parts[-1]
    model: type[BaseModel] = Policy
    for step in parts[:-1]:
        model = (REMEDIES if model is Rule else _MODELS).get(step, model)
    allowed = [field.alias or name for name, field in model.model_fields.items() if name != "kind"]
    if not allowed:
        return f"unknown key '{key}'; {parts[-2]} has no settings"
    return f"unknown key '{key}'; {one_of(key, allowed)}"


_MODELS: dict[str, type[BaseModel]] = {
    "objectives": Objective,
    "latency": Latency,
    "rules": Rule,
    "guardrails": Guardrails,
    "max_actions": MaxActions,
    "notify": Webhook,
}
