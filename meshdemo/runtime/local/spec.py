"""What the supervisor must keep running: a value, and the pure functions that change it.

A workload runs at its latest revision; a single instance may deviate from it (an override). A change that
ends by itself (`fault --for`) leaves a timer, which knows what it has changed, so that only that is changed
back. The whole is stored as `spec.json` and outlives the supervisor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict, Field

from meshdemo.apps.model import App, Workload
from meshdemo.control.model import WorkloadRevision
from meshdemo.errors import BadInput, Failed
from meshdemo.runtime.base import UpOptions

MAX_INSTANCES = 1000
_KEPT_REVISIONS = 100

EnvChange = Mapping[str, str | None]  # None: unset


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Override(_Value):
    """How one instance deviates from its workload. Its revision number is used nowhere else."""

    revision: int
    env: dict[str, str | None]


class Timer(_Value):
    """A change that ends by itself: which variables had which value before and after it."""

    service: str
    version: str
    instance: str | None
    before: dict[str, str | None]
    after: dict[str, str | None]
    expires_at: float
    fault_id: str | None


class WorkloadSpec(_Value):
    """One program at one version with so many instances."""

    service: str
    version: str
    instances: int
    revisions: tuple[WorkloadRevision, ...] = Field(min_length=1)
    overrides: dict[str, Override] = Field(default_factory=dict)
    last_revision: int = 1

    @property
    def key(self) -> str:
        """`service/version`."""
        return f"{self.service}/{self.version}"

    @property
    def current(self) -> WorkloadRevision:
        """What its instances run, but for overrides."""
        return self.revisions[-1]

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
    timers: tuple[Timer, ...] = ()
    gateway_port: int | None = Field(default=None, description="as the user named it; None: any")

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
                new = _revised(new, dict(program.env), reason="changed app file", now=now, always=True)
        workloads[new.key] = new
    return MeshSpec(
        mesh=options.name,
        app=app,
        cwd=str(options.extra.get("cwd", before.cwd if before else "/")),
        workloads=workloads,
        rps=options.rps if options.rps is not None else (before.rps if before else None),
        timers=tuple(timer for timer in (before.timers if before else ()) if _key(timer) in workloads),
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


def check_rps(app: App, rps: float) -> None:
    """Raises BadInput if nothing in the app makes load, or the rate makes no sense."""
    if not 0 <= rps <= 100_000:
        raise BadInput(f"a load of {rps:g} requests/s: allowed is 0 to 100000")
    if not any(service.load for service in app.services.values()):
        raise BadInput(f"no service of the app '{app.name}' makes load", "one with `load: true` would")


def _programs(app: App) -> Sequence[tuple[str, str, Workload]]:
    return [
        (name, version, program)
        for name, service in app.services.items()
        for version, program in service.versions.items()
    ]


def _key(timer: Timer) -> str:
    return f"{timer.service}/{timer.version}"


# -- changes of a running mesh -----------------------------------------------------------------------------


def scaled(workload: WorkloadSpec, instances: int) -> WorkloadSpec:
    """The workload with another number of instances. Raises BadInput if it is out of range."""
    if not 0 <= instances <= MAX_INSTANCES:
        raise BadInput(f"{instances} instances of {workload.service}: allowed is 0 to {MAX_INSTANCES}")
    smaller = workload.model_copy(update={"instances": instances})
    kept = {key: value for key, value in workload.overrides.items() if key in smaller.ids()}
    return smaller.model_copy(update={"overrides": kept})


def with_env(
    workload: WorkloadSpec, change: EnvChange, *, instance: str | None, reason: str, now: float
) -> WorkloadSpec:
    """The workload with variables set or unset, for all its instances or for one."""
    if instance is None:
        return _revised(workload, apply_env(workload.current.env, change), reason=reason, now=now)
    override = workload.overrides.get(instance)
    env = {**(override.env if override else {}), **change}
    # What deviates in nothing is no override, and the instance is back at its workload's revision.
    env = {name: value for name, value in env.items() if workload.current.env.get(name) != value}
    overrides = {key: value for key, value in workload.overrides.items() if key != instance}
    number = workload.last_revision
    if env and not (override and override.env == env):
        number += 1
        overrides[instance] = Override(revision=number, env=env)
    elif env and override:
        overrides[instance] = override
    return workload.model_copy(update={"overrides": overrides, "last_revision": number})


def rolled_back(workload: WorkloadSpec, revision: int, *, reason: str, now: float) -> WorkloadSpec:
    """The workload with what `revision` ran with, for all its instances: overrides end.

    Raises BadInput if there is no such revision.
    """
    for one in workload.revisions:
        if one.revision == revision:
            plain = workload.model_copy(update={"overrides": {}})
            return _revised(plain, dict(one.env), reason=reason, now=now)
    known = ", ".join(str(one.revision) for one in workload.revisions)
    raise BadInput(f"{workload.service} {workload.version} has no revision {revision}; there are: {known}")


def timer_for(
    workload: WorkloadSpec,
    change: EnvChange,
    *,
    instance: str | None,
    expires_at: float,
    fault_id: str | None,
) -> Timer:
    """The timer of a change that is about to be made to `workload`."""
    env = workload.of(instance)[1] if instance else workload.current.env
    return Timer(
        service=workload.service, version=workload.version, instance=instance,
        before={name: env.get(name) for name in change}, after=dict(change),
        expires_at=expires_at, fault_id=fault_id,
    )  # fmt: skip


def expired(spec: MeshSpec, timer: Timer, *, now: float) -> MeshSpec:
    """The spec after a timer has run out: what the timer's change made is undone where it still stands.

    A variable that was given another value since (a later fault, a rollback) is left alone.
    """
    spec = spec.model_copy(update={"timers": tuple(one for one in spec.timers if one != timer)})
    workload = spec.workloads.get(_key(timer))
    if workload is None or (timer.instance is not None and timer.instance not in workload.ids()):
        return spec
    env = workload.of(timer.instance)[1] if timer.instance else workload.current.env
    undo = {name: timer.before[name] for name, value in timer.after.items() if env.get(name) == value}
    reason = f"end of fault {timer.fault_id}" if timer.fault_id else "end of a temporary change"
    return spec.replacing(with_env(workload, undo, instance=timer.instance, reason=reason, now=now))


def _revised(
    workload: WorkloadSpec, env: dict[str, str], *, reason: str, now: float, always: bool = False
) -> WorkloadSpec:
    """The workload at a new revision with this environment; as it is if that is what it runs.

    `always`: a new revision in any case, for something else about it has changed.
    """
    if env == workload.current.env and not always:
        return workload
    number = workload.last_revision + 1
    revision = WorkloadRevision(
        service=workload.service, version=workload.version, revision=number, env=env, created_at=now,
        reason=reason,
    )  # fmt: skip
    kept = (*workload.revisions, revision)[-_KEPT_REVISIONS:]
    return workload.model_copy(update={"revisions": kept, "last_revision": number})
