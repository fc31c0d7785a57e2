"""What the supervisor must keep running: a value, and the pure functions that change it.

A workload runs at its latest revision; a single instance may deviate from it (an override). What runs is
always computed anew: the environment of the app file, with the faults that are recorded here laid over it,
the latest on top. So a fault ends (cleared, its time over, rolled back, undone) by being taken out of the
record, in whatever order, and nothing is ever restored. The whole is stored as `spec.json` and outlives the
supervisor.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from pydantic import BaseModel, ConfigDict, Field

from meshdemo.apps.model import App, Workload
from meshdemo.control.model import WorkloadRevision
from meshdemo.errors import BadInput, Failed
from meshdemo.limits import MAX_RPS
from meshdemo.runtime.base import UpOptions

MAX_INSTANCES = 1000
_KEPT_REVISIONS = 100

EnvChange = Mapping[str, str | None]  # None: unset


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AppFault(_Value):
    """A fault in the environment of a workload, or of one of its instances."""

    id: str
    instance: str | None = None
    env: dict[str, str]
    expires_at: float | None = None


class Override(_Value):
    """How one instance deviates from its workload. Its revision number is used nowhere else."""

    revision: int
    env: dict[str, str | None] = Field(description="against what its workload runs with")
    own: dict[str, str | None] = Field(default_factory=dict, description="what of it is no fault's")


class WorkloadSpec(_Value):
    """One program at one version with so many instances."""

    service: str
    version: str
    instances: int
    revisions: tuple[WorkloadRevision, ...] = Field(min_length=1)
    overrides: dict[str, Override] = Field(default_factory=dict)
    faults: tuple[AppFault, ...] = ()
    last_revision: int = 1

    @property
    def key(self) -> str:
        """`service/version`."""
        return f"{self.service}/{self.version}"

    @property
    def current(self) -> WorkloadRevision:
        """What its instances run, but for overrides."""
        return self.revisions[-1]

    @property
    def base(self) -> dict[str, str]:
        """What it runs with, without the faults."""
        return _base(self.current)

    def ids(self) -> list[str]:
        """The instances' ids."""
        return [f"{self.service}-{self.version}-{number}" for number in range(1, self.instances + 1)]

    def of(self, instance: str) -> tuple[int, dict[str, str]]:
        """Revision and environment of one instance."""
        override = self.overrides.get(instance)
        if override is None:
            return self.current.revision, dict(self.current.env)
        return override.revision, apply_env(self.current.env, override.env)


class MeshSpec(_Value):
    """All that must run."""

    mesh: str
    app: App
    cwd: str = Field(description="where the commands of workloads run: the folder of the app file")
    workloads: dict[str, WorkloadSpec]
    rps: float | None = Field(
        default=None, description="load of each instance that makes load; None: its own"
    )
    gateway_port: int | None = Field(default=None, description="as the user named it; None: any")

    @property
    def instances(self) -> int:
        """How many there are in all."""
        return sum(workload.instances for workload in self.workloads.values())

    def workload(self, service: str, version: str) -> WorkloadSpec:
        """A workload that runs. Raises BadInput naming those there are."""
        versions = self.versions(service)
        if version not in versions:
            there = ", ".join(versions) or "none"
            raise BadInput(f"{service} runs no version '{version}'; there are: {there}")
        return self.workloads[f"{service}/{version}"]

    def versions(self, service: str) -> list[str]:
        """The versions of a service that run. Raises BadInput naming the services there are."""
        if service not in self.app.services:
            raise BadInput(f"no service '{service}'; there are: {', '.join(self.app.services)}")
        return [one.version for one in self.workloads.values() if one.service == service]

    def program(self, service: str, version: str) -> Workload:
        """What the app file says of a workload."""
        return self.app.services[service].versions[version]

    def owner(self, instance: str) -> WorkloadSpec:
        """The workload of an instance. Raises BadInput naming the instances there are."""
        known: list[str] = []
        for workload in self.workloads.values():
            ids = workload.ids()
            if instance in ids:
                return workload
            known += ids
        raise BadInput(f"no instance '{instance}'; there are: {', '.join(known)}")

    def ends(self) -> dict[str, float]:
        """When faults are over that end by themselves, by their ids."""
        return {
            fault.id: fault.expires_at
            for workload in self.workloads.values()
            for fault in workload.faults
            if fault.expires_at is not None
        }

    def replacing(self, workload: WorkloadSpec) -> MeshSpec:
        """The same with this workload as given."""
        return self.model_copy(update={"workloads": {**self.workloads, workload.key: workload}})


def apply_env(env: Mapping[str, str], change: EnvChange) -> dict[str, str]:
    """The environment after a change."""
    merged = {**env, **change}
    return {name: value for name, value in merged.items() if value is not None}


# -- what `up` asks for ------------------------------------------------------------------------------------


def wanted(options: UpOptions, before: MeshSpec | None, *, now: float, runs_images: bool = False) -> MeshSpec:
    """What must run after `up` with these options, on top of what ran before.

    Args:
        runs_images: the runtime can run a container image (and so cannot run a bare command).

    What the options do not speak of stays as it is. Raises BadInput for an unknown service or version or
    a number out of range, Failed if another app runs under this name.
    """
    _check(options, runs_images)
    app = options.app
    if before is not None and before.app.name != app.name:
        raise Failed(
            f"mesh '{options.name}' runs the app '{before.app.name}', not '{app.name}'",
            f"run `meshdemo down --name {options.name}` first, or use another --name",
        )
    workloads: dict[str, WorkloadSpec] = {}
    for service, version, program in _programs(app):
        old = before.workloads.get(f"{service}/{version}") if before else None
        if old is None and not program.initial and version not in options.versions.get(service, ()):
            continue
        instances = old.instances if old else program.instances
        if program.initial:
            instances = options.replicas.get(service, instances)
        if old is None:
            first = WorkloadRevision(
                service=service, version=version, revision=1, env=program.env, created_at=now, reason="up"
            )
            new = WorkloadSpec(service=service, version=version, instances=instances, revisions=(first,))
        else:
            new = scaled(old, instances)
            assert before is not None
            if _changed(before.program(service, version), program):
                new = _settled(new, base=dict(program.env), reason="changed app file", now=now, always=True)
        workloads[new.key] = new
    _check_there(app, workloads.values(), options.replicas if before else app.services)
    return MeshSpec(
        mesh=options.name,
        app=app,
        cwd=str(options.extra.get("cwd", before.cwd if before else "/")),
        workloads=workloads,
        rps=options.rps if options.rps is not None else (before.rps if before else None),
        gateway_port=None if runs_images else options.extra.get("gateway_port") or _port(before),
    )


def _port(before: MeshSpec | None) -> int | None:
    return before.gateway_port if before is not None else None


def differences(before: MeshSpec | None, after: MeshSpec) -> list[str]:
    """What changes from one to the other, in words; empty if nothing does."""
    if before is None:
        return ["everything"]
    words = []
    for key, workload in after.workloads.items():
        old = before.workloads.get(key)
        name = f"{workload.service} {workload.version}"
        if old is None:
            words.append(f"{name} added")
            continue
        if old.instances != workload.instances:
            words.append(f"{name}: {workload.instances} instances, were {old.instances}")
        if old.current != workload.current:
            words.append(f"{name}: revision {workload.current.revision}")
    words += [
        f"{old.service} {old.version} removed"
        for key, old in before.workloads.items()
        if key not in after.workloads
    ]
    if after.rps is not None and before.rps != after.rps:
        words.append(f"load: {after.rps:g} requests/s")
    if after.gateway_port is not None and before.gateway_port != after.gateway_port:
        words.append(f"gateway: port {after.gateway_port}")
    if not words and before.app != after.app:
        words.append("the app file")
    return words


def _changed(before: Workload, after: Workload) -> bool:
    """Whether a workload runs something else now; how many of it and since when do not matter."""
    return any(
        getattr(before, field) != getattr(after, field) for field in ("program", "command", "image", "env")
    )


def _check(options: UpOptions, runs_images: bool) -> None:
    services = options.app.services
    known = ", ".join(services)
    for service, instances in options.replicas.items():
        if service not in services:
            raise BadInput(f"--replicas {service}={instances}: no service '{service}'; there are: {known}")
        if not 0 <= instances <= MAX_INSTANCES:
            raise BadInput(f"--replicas {service}={instances}: allowed is 0 to {MAX_INSTANCES}")
    for service, versions in options.versions.items():
        if service not in services:
            raise BadInput(f"--version {service}={versions[0]}: no service '{service}'; there are: {known}")
        for version in versions:
            if version not in services[service].versions:
                there = ", ".join(services[service].versions)
                raise BadInput(f"--version {service}={version}: no such version; there are: {there}")
    if options.rps is not None:
        check_rps(options.app, options.rps)
    seen: dict[str, str] = {}
    for service, version, program in _programs(options.app):
        name = f"{service}-{version}"
        if name in seen:
            raise BadInput(f"{service} {version} and {seen[name]} would both have instances named {name}-1")
        seen[name] = f"{service} {version}"
        if runs_images and not (program.program or program.image):
            raise BadInput(
                f"{service} {version} has only a command; in a cluster it needs a program or an image",
                "use --runtime local, or give it an image",
            )
        if not runs_images and not (program.program or program.command):
            raise BadInput(
                f"{service} {version} has only an image; the local runtime needs a program or a command",
                "use --runtime kind or kubernetes, or give it a command",
            )


def _check_there(app: App, workloads: Iterable[WorkloadSpec], services: Iterable[str]) -> None:
    """Raises BadInput if one of these services is called, and has no instance: nothing would ever answer."""
    called = {callee for service in app.services.values() for callee in service.calls} | {app.front}
    counts: dict[str, int] = {}
    for workload in workloads:
        counts[workload.service] = counts.get(workload.service, 0) + workload.instances
    for service in services:
        if service in called and counts.get(service) == 0:
            raise BadInput(f"0 instances of {service}: it is called, so it needs at least 1")


def check_rps(app: App, rps: float) -> None:
    """Raises BadInput if nothing in the app makes load, or the rate makes no sense."""
    if not 0 <= rps <= MAX_RPS:
        raise BadInput(f"a load of {rps:g} requests/s: allowed is 0 to {MAX_RPS:.0f}")
    if not any(service.load for service in app.services.values()):
        raise BadInput(f"no service of the app '{app.name}' makes load", "one with `load: true` would")


def _programs(app: App) -> Sequence[tuple[str, str, Workload]]:
    return [
        (name, version, program)
        for name, service in app.services.items()
        for version, program in service.versions.items()
    ]


# -- changes of a running mesh -----------------------------------------------------------------------------


def scaled(workload: WorkloadSpec, instances: int) -> WorkloadSpec:
    """The workload with another number of instances. Raises BadInput if it is out of range."""
    if not 0 <= instances <= MAX_INSTANCES:
        raise BadInput(f"{instances} instances of {workload.service}: allowed is 0 to {MAX_INSTANCES}")
    smaller = workload.model_copy(update={"instances": instances})
    gone = set(workload.ids()) - set(smaller.ids())
    overrides = {key: value for key, value in workload.overrides.items() if key not in gone}
    faults = tuple(fault for fault in workload.faults if fault.instance not in gone)
    return smaller.model_copy(update={"overrides": overrides, "faults": faults})


def with_env(
    workload: WorkloadSpec, change: EnvChange, *, instance: str | None, reason: str, now: float
) -> WorkloadSpec:
    """The workload with variables set or unset, for all its instances or for one; faults stay on top."""
    if instance is None:
        return _settled(workload, base=apply_env(workload.base, change), reason=reason, now=now)
    others = _folded(workload.base, workload.faults, instance)
    mine = {**_own(workload).get(instance, {}), **change}
    own = {**_own(workload), instance: {key: one for key, one in mine.items() if others.get(key) != one}}
    return _settled(workload, own=own, reason=reason, now=now)


def with_fault(workload: WorkloadSpec, fault: AppFault, *, reason: str, now: float) -> WorkloadSpec:
    """The workload with one more fault, on top of those that it carries."""
    return _settled(workload, faults=(*workload.faults, fault), reason=reason, now=now)


def without_faults(
    workload: WorkloadSpec, ids: Collection[str] | None, *, reason: str, now: float
) -> WorkloadSpec:
    """The workload without these faults (None: without any); those that are left stay as they are."""
    left = tuple(fault for fault in workload.faults if ids is not None and fault.id not in ids)
    return _settled(workload, faults=left, reason=reason, now=now)


def uniform(workload: WorkloadSpec) -> WorkloadSpec:
    """The workload with no instance that deviates, and no fault of a single one."""
    faults = tuple(fault for fault in workload.faults if fault.instance is None)
    return workload.model_copy(update={"faults": faults, "overrides": {}})


def renamed(workload: WorkloadSpec, instance: str, name: str) -> WorkloadSpec:
    """The workload with what one instance carries given to another, which takes its place."""
    faults = tuple(
        fault.model_copy(update={"instance": name}) if fault.instance == instance else fault
        for fault in workload.faults
    )
    overrides = {name if key == instance else key: override for key, override in workload.overrides.items()}
    return workload.model_copy(update={"faults": faults, "overrides": overrides})


def ending(spec: MeshSpec, fault_id: str, expires_at: float) -> MeshSpec:
    """The spec with another end of a fault that ends by itself."""
    ends = {"expires_at": expires_at}
    workloads = {
        key: workload.model_copy(
            update={
                "faults": tuple(
                    fault.model_copy(update=ends) if fault.id == fault_id else fault
                    for fault in workload.faults
                )
            }
        )
        for key, workload in spec.workloads.items()
    }
    return spec.model_copy(update={"workloads": workloads})


def rolled_back(workload: WorkloadSpec, revision: int, *, reason: str, now: float) -> WorkloadSpec:
    """The workload with what `revision` ran with, for all its instances: overrides end.

    So do the faults that began after it; one that was in force then and has ended since does not come back.
    Raises BadInput if there is no such revision.
    """
    for one in workload.revisions:
        if one.revision == revision:
            kept = tuple(
                fault for fault in workload.faults if fault.instance is None and fault.id in one.faults
            )
            return _settled(workload, base=_base(one), faults=kept, own={}, reason=reason, now=now)
    known = ", ".join(str(one.revision) for one in workload.revisions)
    raise BadInput(f"{workload.service} {workload.version} has no revision {revision}; there are: {known}")


def _base(revision: WorkloadRevision) -> dict[str, str]:
    return dict(revision.env if revision.base is None else revision.base)


def _own(workload: WorkloadSpec) -> dict[str, dict[str, str | None]]:
    return {instance: override.own for instance, override in workload.overrides.items()}


def _folded(base: Mapping[str, str], faults: Iterable[AppFault], instance: str | None) -> dict[str, str]:
    """An environment with the faults over it that a workload carries, or one of its instances."""
    env = dict(base)
    for fault in faults:
        if fault.instance in {None, instance}:
            env.update(fault.env)
    return env


def _settled(
    workload: WorkloadSpec,
    *,
    base: Mapping[str, str] | None = None,
    faults: tuple[AppFault, ...] | None = None,
    own: Mapping[str, Mapping[str, str | None]] | None = None,
    reason: str,
    now: float,
    always: bool = False,
) -> WorkloadSpec:
    """The workload with another base, other faults, other deviations (None: as it is), computed anew.

    It gets a new revision where its environment differs, and so does each instance that deviates. `always`: a
    new revision in any case, for something else about it has changed.
    """
    base = workload.base if base is None else dict(base)
    faults = workload.faults if faults is None else faults
    own = _own(workload) if own is None else own
    env, number, revisions = _folded(base, faults, None), workload.last_revision, workload.revisions
    carried = tuple(fault.id for fault in faults if fault.instance is None)
    about = {"faults": carried, "base": base if carried else None}
    if env != workload.current.env or always:
        number += 1
        revision = WorkloadRevision(
            service=workload.service, version=workload.version, revision=number, env=env, created_at=now,
            reason=reason,
        ).model_copy(update=about)  # fmt: skip
        revisions = (*revisions, revision)[-_KEPT_REVISIONS:]
    else:
        revisions = (*revisions[:-1], revisions[-1].model_copy(update=about))
    overrides = {}
    for instance in sorted({*own, *(fault.instance for fault in faults if fault.instance is not None)}):
        its_own = dict(own.get(instance, {}))
        its = apply_env(_folded(base, faults, instance), its_own)
        deviation = {key: its.get(key) for key in sorted(its | env) if its.get(key) != env.get(key)}
        if not deviation:
            continue  # what deviates in nothing is no override, and runs its workload's revision
        before = workload.overrides.get(instance)
        if before is not None and workload.of(instance)[1] == its:
            overrides[instance] = Override(revision=before.revision, env=deviation, own=its_own)
        else:
            number += 1
            overrides[instance] = Override(revision=number, env=deviation, own=its_own)
    return workload.model_copy(
        update={"revisions": revisions, "overrides": overrides, "faults": faults, "last_revision": number}
    )


def initial_load(spec: MeshSpec) -> float | None:
    """The rate (requests/s) that every instance that makes load begins with; None if there is none."""
    if spec.rps is not None:
        return spec.rps
    for one in spec.workloads.values():
        rate = one.current.env.get("RPS", "")
        if spec.app.services[one.service].load and rate.replace(".", "", 1).isdigit():
            return float(rate)
    return None
