"""YAML with positions: plain data, and for every part of it the line and column where it stands.

A policy is written by people, and "rules.2.remedies.1: invalid" sends them counting. PyYAML's node tree
carries the marks, so the data is built from it here instead of by `yaml.safe_load`, which drops them (and
lets a later key replace an earlier one of the same name without a word).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

Path = tuple[str | int, ...]
_MAX_BYTES = 1_000_000  # a policy is a page; anything longer is another file


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One thing that is wrong with a file; line and column count from 1."""

    line: int
    column: int
    message: str

    def __str__(self) -> str:
        return f"{self.line}:{self.column}: {self.message}"


@dataclass(slots=True)
class Document:
    """What a YAML text says, where it says so, and what is wrong with it as YAML."""

    data: Any = None
    problems: list[Problem] = field(default_factory=list)
    keys: dict[Path, tuple[int, int]] = field(default_factory=dict)  # where a mapping's key stands
    values: dict[Path, tuple[int, int]] = field(default_factory=dict)

    def value_at(self, path: Sequence[str | int]) -> tuple[int, int]:
        """(line, column) of the value at a path, or of the nearest thing around it that is there."""
        for end in range(len(path), -1, -1):
            if (place := self.values.get(tuple(path[:end]))) is not None:
                return place
        return (1, 1)

    def key_at(self, path: Sequence[str | int]) -> tuple[int, int]:
        """(line, column) of a mapping's key, else of the value."""
        return self.keys.get(tuple(path)) or self.value_at(path)


def parse(text: str) -> Document:
    """Read one YAML document. Never raises for what the text says: all of that is in `problems`."""
    document = Document()
    if len(text) > _MAX_BYTES:
        document.problems.append(Problem(1, 1, f"longer than {_MAX_BYTES} characters"))
        return document
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        words = ", ".join(part for part in (error.context, error.problem) if part)
        document.problems.append(Problem(line, column, f"not YAML: {words}"))
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        line, column = before.count("\n") + 1, error.position - (before.rfind("\n") + 1) + 1
        document.problems.append(
            Problem(line, column, f"not YAML: character #x{ord(text[error.position]):04x}")
        )
    except RecursionError:
        document.problems.append(Problem(1, 1, "not readable: nested too deeply"))
    else:
        if root is not None:
            document.data = _Builder(document).build(root, ())
    return document


_ALIAS = "!alias"


class _Loader(yaml.SafeLoader):
    """Leaves aliases as they stand: PyYAML puts the anchor's node, and its position, in their place."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.get_event()  # type: ignore[no-untyped-call]
            return yaml.ScalarNode(_ALIAS, event.anchor, event.start_mark, event.end_mark)
        return super().compose_node(parent, index)


class _Builder:
    def __init__(self, document: Document) -> None:
        self._document = document
        self._scalars = yaml.constructor.SafeConstructor()

    def build(self, node: yaml.Node, path: Path) -> Any:
        # Refusing aliases keeps a few lines from standing for billions of values, and no policy is so long
        # that it needs one.
        if node.tag == _ALIAS:
            self._problem(node, "aliases (*name) and merge keys are not supported here: write it out")
            return None
        self._document.values[path] = _place(node)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
        return self._scalar(node)

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._problem(key_node, "a key must be a word")
                continue
            key = str(key_node.value)
            if key in result:
                first = self._document.keys[*path, key]
                self._problem(key_node, f"'{key}' stands here twice, first on line {first[0]}")
                continue
            self._document.keys[*path, key] = _place(key_node)
            result[key] = self.build(value_node, (*path, key))
        return result

    def _scalar(self, node: yaml.Node) -> Any:
        try:
            return self._scalars.construct_object(node)
        except yaml.constructor.ConstructorError as error:
            self._problem(node, f"not plain YAML: {error.problem}")
        except ValueError as error:
            self._problem(node, f"'{node.value}' makes no sense: {error}")
        return None

    def _problem(self, node: yaml.Node, message: str) -> None:
        self._document.problems.append(Problem(*_place(node), message))


def _place(node: yaml.Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1


def one_of(name: str, allowed: Iterable[str]) -> str:
    """What to say to somebody who wrote a name that is none of those allowed: the nearest, and all."""
    names = list(allowed)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"{hint}allowed: {', '.join(names)}"


def lookup(data: Any, path: Sequence[str | int]) -> Any:
    """The value at a path of plain data; None where the path leads nowhere."""
    for step in path:
        if isinstance(data, Mapping):
            data = data.get(str(step))
        elif isinstance(data, list) and isinstance(step, int) and 0 <= step < len(data):
            data = data[step]
        else:
            return None
    return data
