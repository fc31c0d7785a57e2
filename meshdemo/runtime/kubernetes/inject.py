"""Manifests in, the same manifests with sidecars out, and back.

Works on the text (see `yamledit`), so that what is not touched stays as it was to the byte. What a sidecar
consists of is not known here: the caller gives `Additions` for each pod template.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from meshdemo.errors import BadInput
from meshdemo.names import PREFIX
from meshdemo.runtime.kubernetes import yamledit
from meshdemo.runtime.kubernetes.yamledit import Edit, NotEditable

INJECT = PREFIX + "inject"  # annotation of the user: "disabled" leaves a workload alone
INJECTED = PREFIX + "injected"  # annotation of ours: what was put where there was null, as JSON
# Containers by which other meshes are known.
OTHER_MESHES = {
    "istio-proxy": "Istio",
    "linkerd-proxy": "Linkerd",
    "kuma-sidecar": "Kuma",
    "consul-dataplane": "Consul",
    "osm-envoy": "Open Service Mesh",
    "traffic-agent": "Telepresence",
}
# Where each kind keeps its pod template; a Pod is one itself.
TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "Pod": (),
    "Deployment": ("spec", "template"),
    "StatefulSet": ("spec", "template"),
    "DaemonSet": ("spec", "template"),
    "ReplicaSet": ("spec", "template"),
    "ReplicationController": ("spec", "template"),
    "Job": ("spec", "template"),
    "CronJob": ("spec", "jobTemplate", "spec", "template"),
}


@dataclass(frozen=True, slots=True)
class Additions:
    """What makes a pod a meshed one. Every item of the lists has a `name` of its own."""

    init_containers: Sequence[Mapping[str, Any]]
    volumes: Sequence[Mapping[str, Any]]
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PodTemplate:
    """What the caller is told of a pod template to decide what it gets."""

    kind: str
    name: str
    namespace: str | None
    service_account: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one object of the input."""

    kind: str
    name: str
    action: Literal["injected", "uninjected", "unchanged", "skipped", "refused"]
    reason: str = ""


def inject(text: str, additions_for: Callable[[PodTemplate], Additions]) -> tuple[str, list[Outcome]]:
    """The manifests with a sidecar in every pod template that takes one.

    Raises:
        BadInput: the text is no YAML; names line and column.
    """

    def one(kind: str, name: str, manifest: yaml.Node, template: yaml.MappingNode) -> _Change:
        annotations = {
            **_strings(yamledit.get(manifest, "metadata", "annotations")),
            **_strings(yamledit.get(template, "metadata", "annotations")),
        }
        # Whoever has switched it off asks for nothing that could be refused.
        if annotations.get(INJECT) == "disabled" and INJECTED not in annotations:
            return Outcome(kind, name, "skipped", f"annotation {INJECT}: disabled"), []
        if reason := _refusal(template):
            return Outcome(kind, name, "refused", reason), []
        if INJECTED in annotations:
            return Outcome(kind, name, "unchanged", "has a sidecar already"), []
        spec = yamledit.get(template, "spec")
        pod = PodTemplate(
            kind=kind,
            name=name,
            namespace=yamledit.scalar(yamledit.get(manifest, "metadata", "namespace")),
            service_account=yamledit.scalar(yamledit.get(spec, "serviceAccountName")) or "default",
            labels=_strings(yamledit.get(template, "metadata", "labels")),
            annotations=annotations,
        )
        ours = additions_for(pod)
        return Outcome(kind, name, "injected"), _insert(text, template, ours)

    return _each(text, one)


def uninject(text: str, ours: Additions) -> tuple[str, list[Outcome]]:
    """The manifests without what `inject` put there; `ours` names it (items by `name`, entries by key)."""

    def one(kind: str, name: str, manifest: yaml.Node, template: yaml.MappingNode) -> _Change:
        marker = yamledit.scalar(yamledit.get(template, "metadata", "annotations", INJECTED))
        if marker is None:
            return Outcome(kind, name, "unchanged", "has no sidecar of ours"), []
        return Outcome(kind, name, "uninjected"), _remove(text, template, ours, marker)

    return _each(text, one)


_Change = tuple[Outcome, list[Edit]]


def _each(
    text: str, one: Callable[[str, str, yaml.Node, yaml.MappingNode], _Change]
) -> tuple[str, list[Outcome]]:
    edits: list[Edit] = []
    outcomes: list[Outcome] = []
    try:
        documents = list(yaml.compose_all(text, Loader=yamledit.Loader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise BadInput(
            f"not YAML: {where}{error.problem}", "give Kubernetes manifests as YAML or JSON"
        ) from None
    except yaml.YAMLError as error:
        raise BadInput(f"not YAML: {error}", "give Kubernetes manifests as YAML or JSON") from None
    for manifest in _objects(documents):
        kind = yamledit.scalar(_plain(manifest, "kind")) or ""
        name = yamledit.scalar(_plain(_plain(manifest, "metadata"), "name")) or "(no name)"
        if kind not in TEMPLATES:
            continue
        try:
            template = yamledit.get(manifest, *TEMPLATES[kind])
            if not isinstance(template, yaml.MappingNode) or not isinstance(
                yamledit.get(template, "spec"), yaml.MappingNode
            ):
                outcomes.append(Outcome(kind, name, "refused", "has no pod template"))
                continue
            outcome, changes = one(kind, name, manifest, template)
        except NotEditable as error:
            outcome, changes = Outcome(kind, name, "refused", str(error)), []
        outcomes.append(outcome)
        edits += changes
    return yamledit.apply(text, edits), outcomes


def _objects(documents: Sequence[yaml.Node | None]) -> list[yaml.Node]:
    found: list[yaml.Node] = []
    for document in documents:
        if not isinstance(document, yaml.MappingNode):
            continue
        kind = yamledit.scalar(_plain(document, "kind")) or ""
        found += _objects(yamledit.items(_plain(document, "items"))) if kind.endswith("List") else [document]
    return found


def _plain(node: yaml.Node | None, key: str) -> yaml.Node | None:
    """A value that is only read, so that aliases and merge keys do not matter."""
    return yamledit.keys(node).get(key)


def _strings(node: yaml.Node | None) -> dict[str, str]:
    return {
        key: value.value for key, value in yamledit.keys(node).items() if isinstance(value, yaml.ScalarNode)
    }


def _refusal(template: yaml.MappingNode) -> str:
    spec = yamledit.get(template, "spec")
    if (yamledit.scalar(yamledit.get(spec, "hostNetwork")) or "").lower() == "true":
        return "hostNetwork: the redirection would catch the whole node's traffic"
    containers = yamledit.items(yamledit.get(spec, "containers"))
    for container in containers + yamledit.items(yamledit.get(spec, "initContainers")):
        name = yamledit.scalar(_plain(container, "name")) or ""
        if name in OTHER_MESHES:
            return f"carries the sidecar of another mesh already: container {name} ({OTHER_MESHES[name]})"
    if not containers:
        return "has no containers"
    return ""


def _insert(text: str, template: yaml.MappingNode, ours: Additions) -> list[Edit]:
    spec = yamledit.get(template, "spec")
    metadata = yamledit.get(template, "metadata")
    assert isinstance(spec, yaml.MappingNode)
    edits: list[Edit] = []
    # What stood where there was nothing yet (null, {} or []), so that uninject puts it back to the letter.
    empty: dict[str, str] = {}
    new_in_spec: dict[str, Any] = {}
    for key, items in (("initContainers", ours.init_containers), ("volumes", ours.volumes)):
        node = yamledit.get(spec, key)
        plain = [_plain_data(item) for item in items]
        if node is None:
            new_in_spec[key] = plain
        elif yamledit.is_empty(node):
            empty[key] = text[node.start_mark.index : node.end_mark.index]
            edits.append(yamledit.fill(text, node, plain))
        elif isinstance(node, yaml.SequenceNode):
            edits.append(yamledit.add_items(text, node, plain))
        else:
            raise NotEditable(f"'{key}' is no list (line {node.start_mark.line + 1})")
    if new_in_spec:
        edits.append(yamledit.add_keys(text, spec, new_in_spec))

    labels = yamledit.get(metadata, "labels")
    annotations = yamledit.get(metadata, "annotations")
    for key, node in (("metadata", metadata), ("labels", labels), ("annotations", annotations)):
        if node is not None and yamledit.is_empty(node):
            empty[key] = text[node.start_mark.index : node.end_mark.index]
    marker = {INJECTED: json.dumps(empty) if empty else "true"}
    new_in_metadata: dict[str, Any] = {}
    for key, node, entries in (
        ("labels", labels, dict(ours.labels)),
        ("annotations", annotations, {**marker, **ours.annotations}),
    ):
        if not entries:
            continue
        if node is None:
            new_in_metadata[key] = entries
        elif key in empty:
            edits.append(yamledit.fill(text, node, entries))
        elif isinstance(node, yaml.MappingNode):
            edits.append(yamledit.add_keys(text, node, entries))
        else:
            raise NotEditable(f"'{key}' is no mapping (line {node.start_mark.line + 1})")
    if not new_in_metadata:
        return edits
    if metadata is None:
        edits.append(yamledit.add_keys(text, template, {"metadata": new_in_metadata}))
    elif "metadata" in empty:
        edits.append(yamledit.fill(text, metadata, new_in_metadata))
    elif isinstance(metadata, yaml.MappingNode):
        edits.append(yamledit.add_keys(text, metadata, new_in_metadata))
    else:
        raise NotEditable(f"'metadata' is no mapping (line {metadata.start_mark.line + 1})")
    return edits


def _remove(text: str, template: yaml.MappingNode, ours: Additions, marker: str) -> list[Edit]:
    try:
        empty = json.loads(marker)
    except json.JSONDecodeError:
        empty = {}
    empty = empty if isinstance(empty, dict) else {}
    spec = yamledit.get(template, "spec")
    metadata = yamledit.get(template, "metadata")
    edits: list[Edit] = []
    gone_from_spec: list[str] = []
    for key, additions in (("initContainers", ours.init_containers), ("volumes", ours.volumes)):
        node = yamledit.get(spec, key)
        if not isinstance(node, yaml.SequenceNode):
            continue
        names = {item["name"] for item in additions}
        drop = [yamledit.scalar(_plain(item, "name")) in names for item in node.value]
        edits += _shrink(text, node, key, drop, empty, gone_from_spec)
    gone_from_metadata: list[str] = []
    for key, known in (("labels", set(ours.labels)), ("annotations", {INJECTED, *ours.annotations})):
        node = yamledit.get(metadata, key)
        if isinstance(node, yaml.MappingNode):
            drop = [k.value in known for k, _ in node.value]
            edits += _shrink(text, node, key, drop, empty, gone_from_metadata)
    gone_from_template: list[str] = []
    if isinstance(metadata, yaml.MappingNode) and gone_from_metadata:
        drop = [k.value in gone_from_metadata for k, _ in metadata.value]
        inside = (metadata.start_mark.index, metadata.end_mark.index)
        more = _shrink(text, metadata, "metadata", drop, empty, gone_from_template)
        if all(drop):  # the whole of it goes, and with it the edits inside
            edits = [e for e in edits if not inside[0] <= e.start < inside[1]]
        edits += more
    if isinstance(spec, yaml.MappingNode) and gone_from_spec:
        edits += yamledit.drop_keys(text, spec, gone_from_spec)
    if gone_from_template:
        edits += yamledit.drop_keys(text, template, gone_from_template)
    return edits


def _shrink(
    text: str,
    node: yaml.CollectionNode,
    key: str,
    drop: Sequence[bool],
    empty: Mapping[str, str],
    gone: list[str],
) -> list[Edit]:
    """Edits that take entries out of a collection; one that was not there before goes into `gone`."""
    if not any(drop):
        return []
    if all(drop) and key in empty:
        start = node.start_mark.index
        start -= text[start - 1 : start] == " " and not empty[key]
        return [Edit(start, node.end_mark.index, empty[key])]
    if all(drop):
        gone.append(key)
        return []
    if isinstance(node, yaml.MappingNode):
        names = [k.value for (k, _), out in zip(node.value, drop, strict=True) if out]
        return yamledit.drop_keys(text, node, names)
    assert isinstance(node, yaml.SequenceNode)
    return yamledit.drop_items(text, node, drop)


def _plain_data(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain_data(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_data(item) for item in value]
    return value
