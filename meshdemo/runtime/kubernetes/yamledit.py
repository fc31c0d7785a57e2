"""Edits of YAML text that leave every other byte as it was.

A YAML library that loads and dumps, even a round-trip one, rewrites what it did not need to touch and takes
seconds for a large manifest. Here libyaml only tells where things stand (the marks of its nodes), and the
text itself is cut and joined there: comments, key order, quoting and line ends of the rest cannot change.

New keys and items go in front of the first one that is there, because the start of a node is exact in YAML
while the end of a block node is wherever the next token happens to begin.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

# libyaml's parser where PyYAML was built with it: ten times the speed, same marks.
Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

_NULL_TAG = "tag:yaml.org,2002:null"


class NotEditable(ValueError):
    """The text says what is meant through an alias or a merge key, which cannot be edited in one place."""


@dataclass(frozen=True, slots=True)
class Edit:
    """Replace text[start:end] by `text`."""

    start: int
    end: int
    text: str


def apply(text: str, edits: Sequence[Edit]) -> str:
    """The text with all edits made; they must not overlap. Edits at one place are made in their order."""
    out: list[str] = []
    at = 0
    for edit in sorted(edits, key=lambda e: e.start):
        if edit.start < at:
            raise AssertionError("edits overlap")
        out += (text[at : edit.start], edit.text)
        at = edit.end
    out.append(text[at:])
    return "".join(out)


def get(node: yaml.Node | None, *path: str) -> yaml.Node | None:
    """The node at a path of mapping keys; None where a key is absent or a parent is no mapping.

    Raises:
        NotEditable: the node is reached through an alias, or a merge key stands on the way.
    """
    for key in path:
        if not isinstance(node, yaml.MappingNode):
            return None
        found = None
        for key_node, value in node.value:
            if key_node.value == "<<":
                raise NotEditable(f"a merge key stands beside '{key}' (line {key_node.start_mark.line + 1})")
            if key_node.value == key:
                # An alias composes to the anchored node itself, which lies elsewhere in the text.
                if value.start_mark.index < key_node.end_mark.index:
                    raise NotEditable(f"'{key}' is a YAML alias (line {key_node.start_mark.line + 1})")
                found = value
        node = found
    return node


def scalar(node: yaml.Node | None) -> str | None:
    """The text of a scalar node; None for anything else, null included."""
    if isinstance(node, yaml.ScalarNode) and not is_null(node):
        return str(node.value)
    return None


def is_null(node: yaml.Node | None) -> bool:
    """Whether the node is there and null (`key:`, `key: ~`, `key: null`)."""
    return isinstance(node, yaml.ScalarNode) and node.tag == _NULL_TAG


def is_empty(node: yaml.Node) -> bool:
    """Whether the node holds nothing yet: null, `{}` or `[]`."""
    return is_null(node) or (isinstance(node, yaml.CollectionNode) and not node.value)


def items(node: yaml.Node | None) -> list[yaml.Node]:
    """The items of a sequence node; empty for anything else."""
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def keys(node: yaml.Node | None) -> dict[str, yaml.Node]:
    """The entries of a mapping node by key, where that is a scalar; empty for anything else."""
    entries = node.value if isinstance(node, yaml.MappingNode) else ()
    return {key.value: value for key, value in entries if isinstance(key, yaml.ScalarNode)}


@functools.lru_cache(maxsize=1)
def line_end(text: str) -> str:
    """The line end that the text uses; remembered, for each edit of a long text asks."""
    return "\r\n" if "\r\n" in text else "\n"


def add_keys(text: str, mapping: yaml.MappingNode, entries: Mapping[str, Any]) -> Edit:
    """Put entries in front of the first one of a mapping."""
    if mapping.flow_style or not mapping.value:
        at = text.index("{", mapping.start_mark.index) + 1
        tail = ", " if mapping.value else ""
        return Edit(at, at, ", ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in entries.items()) + tail)
    first = mapping.value[0][0].start_mark
    if text[text.rfind("\n", 0, first.index) + 1 : first.index].rstrip().endswith("?"):
        raise NotEditable(f"an explicit key ('? ') stands first (line {first.line + 1})")
    return Edit(first.index, first.index, _block(dict(entries), first.column, line_end(text)))


def add_items(text: str, sequence: yaml.SequenceNode, values: Sequence[Any]) -> Edit:
    """Put values in front of the first item of a sequence."""
    if sequence.flow_style or not sequence.value:
        at = text.index("[", sequence.start_mark.index) + 1
        tail = ", " if sequence.value else ""
        return Edit(at, at, ", ".join(json.dumps(value) for value in values) + tail)
    at = _first_dash(text, sequence)
    column = at - (text.rfind("\n", 0, at) + 1)
    return Edit(at, at, _block(list(values), column, line_end(text)))


def fill(text: str, node: yaml.Node, value: Any) -> Edit:
    """Put a value (as one line) where there was an empty one."""
    start, end = node.start_mark.index, node.end_mark.index
    # `key:` with nothing behind it needs the space that makes the colon one of YAML.
    lead = " " if start == end and not text[start - 1 : start].isspace() else ""
    return Edit(start, end, lead + json.dumps(value))


def drop_keys(text: str, mapping: yaml.MappingNode, drop: Sequence[str]) -> list[Edit]:
    """Remove entries of a mapping; the caller keeps at least one entry of a block mapping."""
    return _drop(
        text,
        mapping,
        [(k.start_mark.index, v) for k, v in mapping.value],
        [k.value in drop for k, _ in mapping.value],
    )


def drop_items(text: str, sequence: yaml.SequenceNode, drop: Sequence[bool]) -> list[Edit]:
    """Remove items of a sequence; the caller keeps at least one item of a block sequence."""
    if sequence.flow_style:
        starts = [item.start_mark.index for item in sequence.value]
    else:
        starts = _dashes(text, sequence)
    return _drop(text, sequence, list(zip(starts, sequence.value, strict=True)), drop)


def _drop(
    text: str, parent: yaml.CollectionNode, entries: Sequence[tuple[int, yaml.Node]], drop: Sequence[bool]
) -> list[Edit]:
    """One edit for each run of entries that go."""
    edits: list[Edit] = []
    first = 0
    while first < len(entries):
        if not drop[first]:
            first += 1
            continue
        last = first
        while last + 1 < len(entries) and drop[last + 1]:
            last += 1
        start, end = entries[first][0], _end(text, entries[last][1])
        if not parent.flow_style:
            if last + 1 < len(entries):
                # Up to the next entry: just what add_keys and add_items put in front of it.
                end = entries[last + 1][0]
            else:
                start = text.rfind("\n", 0, start) + 1
                newline = text.find("\n", end)
                end = len(text) if newline < 0 else newline + 1
        elif last + 1 < len(entries):
            end = text.index(",", end) + 1
            end += text[end : end + 1] == " "
        elif first:
            start = _end(text, entries[first - 1][1])
        edits.append(Edit(start, end, ""))
        first = last + 1
    return edits


def _end(text: str, node: yaml.Node) -> int:
    """Where the last character of a node stands, plus one (a block node's own mark lies too far on)."""
    while isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        node = last[1] if isinstance(last, tuple) else last
    end = int(node.end_mark.index)
    if isinstance(node, yaml.ScalarNode) and node.style in ("|", ">"):
        return len(text[:end].rstrip())
    return end


def _block(value: Any, column: int, newline: str) -> str:
    """Block YAML whose first line continues where it is put, and that ends ready for the next entry."""
    return _indented(json.dumps(value), column, newline)


@functools.lru_cache(maxsize=256)
def _indented(value: str, column: int, newline: str) -> str:
    """`_block` of a value given as JSON: a thousand documents mostly get the same lines."""
    text = yaml.dump(
        json.loads(value), Dumper=_Dumper, sort_keys=False, default_flow_style=False, width=10_000
    )
    first, *rest = text.splitlines()
    indent = " " * column
    return newline.join([first, *(indent + line if line else "" for line in rest)]) + newline + indent


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc] # a base known at run time
    """Text of several lines as a block, which people can read."""


def _text(dumper: _Dumper, text: str) -> yaml.Node:
    node: yaml.Node = dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    )
    return node


_Dumper.add_representer(str, _text)


def _first_dash(text: str, sequence: yaml.SequenceNode) -> int:
    return _dash_before(text, sequence.start_mark.index, sequence.value[0].start_mark.index)


def _dashes(text: str, sequence: yaml.SequenceNode) -> list[int]:
    dashes = [_first_dash(text, sequence)]
    column = dashes[0] - (text.rfind("\n", 0, dashes[0]) + 1)
    for before, item in zip(sequence.value, sequence.value[1:], strict=False):
        at = _dash_before(text, _end(text, before), item.start_mark.index, column)
        dashes.append(at)
    return dashes


def _dash_before(text: str, start: int, item: int, column: int | None = None) -> int:
    """The dash of the item that starts at `item`, looked for from `start`, comments passed over."""
    at = start
    while at < item:
        if text[at] == "#" and (at == 0 or text[at - 1].isspace()):
            at = text.index("\n", at)
        elif text[at] == "-" and (column is None or at - (text.rfind("\n", 0, at) + 1) == column):
            return at
        at += 1
    if text[item] == "-":
        return item
    raise NotEditable("a list item cannot be told from its surroundings")
