"""Who gets which share of a service's requests, and which instances its callers know of. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from meshdemo.apps.model import Service
from meshdemo.control.model import Instance, Intent, MeshState, Traffic
from meshdemo.control.render.routes import Served

Versions = Mapping[str, Mapping[str, Sequence[Instance]]]
"""Service -> version -> the instances that its callers know of."""


def effective_split(service: Service, traffic: Traffic, ready: Mapping[str, int]) -> dict[str, int]:
    """Version -> weight, as callers should split.

    Without a split in the intent, the versions that `up` starts by itself get everything, each by the number
    of its ready instances: a version that is added later gets nothing until somebody says so. The share of a
    version with nobody ready goes to the others, rather than be lost.
    """
    if traffic.split:
        asked = {version: weight for version, weight in traffic.split.items() if weight}
        return {version: weight for version, weight in asked.items() if ready.get(version)} or asked
    initial = [version for version, workload in service.versions.items() if workload.initial]
    for candidates in (initial, list(ready)):
        weights = {version: ready[version] for version in candidates if ready.get(version)}
        if weights:
            return {next(iter(weights)): 100} if len(weights) == 1 else weights
    return {(initial or list(service.versions))[0]: 100}


def real_share(mesh: MeshState, intent: Intent, instance: Instance) -> float:
    """Of what callers send to an instance, the share (0..1) that is not the copy of a request."""
    traffic = intent.traffic.get(instance.service)
    if traffic is None or not traffic.mirror.get(instance.version):
        return 1.0
    ready = mesh.ready_by_version(instance.service, intent.ejected)
    split = effective_split(mesh.app.services[instance.service], traffic, ready)
    real = split.get(instance.version, 0) / sum(split.values())
    return real / (real + traffic.mirror[instance.version])


def serving(
    mesh: MeshState, traffic: Mapping[str, Traffic], ejected: Collection[str]
) -> tuple[dict[str, dict[str, int]], Versions]:
    """By service: the split in force, and for each version the instances that its callers know of.

    Those are the ones that are ready and not ejected. Where a version has none, its callers keep what there
    is: they send nothing there once the split has moved on, until then a draining instance still answers, and
    if there is no other version an instance that is not ready is better than none.
    """
    versions: dict[str, dict[str, list[Instance]]] = {
        name: {version: [] for version in service.versions} for name, service in mesh.app.services.items()
    }
    for instance in mesh.instances:
        if instance.host:  # a pod that is being started has no address yet
            versions[instance.service].setdefault(instance.version, []).append(instance)
    splits: dict[str, dict[str, int]] = {}
    known: dict[str, dict[str, list[Instance]]] = {}
    for name, service in mesh.app.services.items():
        takes = {
            version: [i for i in instances if i.ready and i.id not in ejected]
            for version, instances in versions[name].items()
        }
        split = effective_split(service, traffic[name], {version: len(i) for version, i in takes.items()})
        splits[name] = split
        known[name] = {
            version: takes[version] or [i for i in instances if version not in split or i.id not in ejected]
            for version, instances in versions[name].items()
        }
    return splits, known


def by_port(
    split: Mapping[str, int], versions: Mapping[str, Sequence[Instance]], port: Served
) -> Mapping[str, int]:
    """The split of a service as it is by one of its ports: among the versions whose instances have it.

    What leads to some of the instances alone has chosen by itself, so there each counts alike.
    """
    if not port.key:
        return split
    has = {
        version: number
        for version, instances in versions.items()
        if (number := sum(port.key in one.further for one in instances))
    }
    if port.part:
        return has or split
    return {version: weight for version, weight in split.items() if version in has} or has or split


def shares(backends: Iterable[tuple[str, str, Mapping[str, int], int]]) -> dict[str, int]:
    """Cluster -> weight: each backend's share, divided as its traffic is split.

    Args:
        backends: service, what the clusters of the port are called besides, the split, and weight.
    """
    parts = {
        f"{service}/{version}{port}": weight * part / sum(split.values())
        for service, port, split, weight in backends
        for version, part in split.items()
        if part
    }
    whole = sum(parts.values())
    return {cluster: max(1, round(1_000_000 * part / whole)) for cluster, part in parts.items()}
