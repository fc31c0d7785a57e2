"""The local runtime as commands use it: brings a mesh up, speaks to its supervisor, takes it down.

Everything that lasts is the supervisor's; this is what runs inside a command. `up` and `down` of one mesh
exclude each other by a lock, and whatever an interrupted one has left is found by the next.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from typing import TYPE_CHECKING, Any

from meshdemo.errors import BadInput, Failed, MeshdemoError, Missing
from meshdemo.files import write_atomic
from meshdemo.runtime.local.client import SupervisorClient, told
from meshdemo.runtime.local.files import Lock, locked
from meshdemo.runtime.local.paths import MeshPaths, remove_home
from meshdemo.runtime.local.ports import GATEWAY_PORT, check_gateway_port
from meshdemo.runtime.steps import pause

if TYPE_CHECKING:
    from meshdemo.apps.model import App
    from meshdemo.control.client import ControlClient
    from meshdemo.control.model import Instance, WorkloadRevision
    from meshdemo.runtime.base import Step, UpOptions
    from meshdemo.runtime.local.spec import MeshSpec

_READY_S = 30.0  # for an instance of a running mesh to be replaced or added
_REPLY_S = 30.0  # on top of what an operation may take
_LOOK_S = 0.25
_REJECTED_S = 5.0  # a sidecar that rejects its configuration for so long will not change its mind
_LOCK_PATIENCE_S = 15.0
_SHUTDOWN_S = 15.0
_WATCH_ENDS_S = 5.0


class LocalRuntime:
    """A mesh of processes on this machine."""

    kind = "local"

    def __init__(self, name: str) -> None:
        self.name = name
        self.notes: list[str] = []  # what `up` did otherwise than one may expect
        self.paths = MeshPaths.of(name)
        self._supervisor = SupervisorClient(self.paths)
        self._lock: Lock | None = None
        self._process: subprocess.Popen[bytes] | None = None

    # -- up ------------------------------------------------------------------------------------------------

    def steps(self, options: UpOptions) -> Sequence[Step]:
        """The steps that bring the mesh up, or bring a running one to what `options` ask for.

        No steps if it is as asked for. Raises BadInput, Failed if it cannot be brought there.
        """
        from meshdemo.runtime.base import Step
        from meshdemo.runtime.local import room
        from meshdemo.runtime.local import spec as specs

        running = self._describe_if_running()
        before = self._stored_spec(running)
        wanted = specs.wanted(options, before, now=time.time())
        room.check(wanted.instances, before.instances if before is not None else 0)
        ready = running is not None and all(one["ready"] for one in running["instances"])
        if ready and not specs.differences(before, wanted):
            return []
        room.check_inotify(wanted.instances, before.instances if running and before is not None else 0)
        asked = options.extra.get("gateway_port")
        has = running["gateway_port"] if running else before.gateway_port if before else None
        if asked is not None and asked != has:
            check_gateway_port(asked)  # what is wrong with it is said before anything is begun
        up = _Up(
            self,
            wanted,
            before if running else None,
            options.timeout_s,
            options.extra.get("prometheus_rules") or "",
        )
        prepare = Step("Preparing the state folder", up.prepare, up.abandon)
        start = Step(
            "Changing what runs" if running else "Starting the supervisor",
            up.apply,
            up.revert,
            [prepare.title],
        )
        control = Step("Starting the control plane", up.wait_for("control"), after=[start.title])
        instances = [
            Step(_title(workload), up.wait_for(key), after=[start.title])
            for key, workload in wanted.workloads.items()
            if workload.instances
        ]
        extra = [Step("Starting the gateway", up.wait_for("gateway"), after=[start.title])]
        if shutil.which("prometheus"):
            extra.append(Step("Starting Prometheus", up.wait_for("prometheus"), after=[start.title]))
        before_last = [step.title for step in (control, *instances, *extra)]
        request = Step("Sending a request through the mesh", up.finish, after=before_last)
        return [prepare, start, control, *instances, *extra, request]

    def running_spec(self) -> MeshSpec | None:
        """What runs; None: nothing."""
        running = self._describe_if_running()
        return self._stored_spec(running) if running is not None else None

    def _describe_if_running(self) -> dict[str, Any] | None:
        try:
            return self._describe()
        except Missing:
            return None

    def _describe(self) -> dict[str, Any]:
        description: dict[str, Any] = self._supervisor.call("describe")
        return description

    def _stored_spec(self, running: dict[str, Any] | None) -> MeshSpec | None:
        """What runs, or ran when the supervisor was killed; None: nothing, or nothing that can be read."""
        from pydantic import ValidationError

        from meshdemo.runtime.local.spec import MeshSpec

        if running is not None:
            return MeshSpec.model_validate(running["spec"])
        try:
            return MeshSpec.model_validate_json(self.paths.spec.read_text())
        except (OSError, ValidationError):
            return None

    def take_lock(self) -> None:
        """Keep other `up` and `down` of this mesh away. Raises Failed naming the one at work."""
        self._lock = Lock.take(self.paths.lock, f"another `meshdemo up` of mesh '{self.name}'")

    def release_lock(self) -> None:
        """Let others work on this mesh again."""
        if self._lock is not None:
            self._lock.release(remove=True)
            self._lock = None

    def start_supervisor(self, spec: MeshSpec) -> None:
        """Start the supervisor with this spec; returns when it can be spoken to.

        Raises MeshdemoError with what it said if it does not start.
        """
        from meshdemo.runtime.local.leftovers import MARK, kill_all

        kill_all(self.paths.state)
        try:
            write_atomic(self.paths.spec, spec.model_dump_json())
        except OSError as error:
            raise Failed(
                f"cannot write {self.paths.spec}: {error.strerror}", "make room, or set MESHDEMO_HOME"
            ) from error
        log = self.paths.logs / "supervisor.log"
        module = "meshdemo.runtime.local.supervisor"
        with log.open("ab") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, "--state", str(self.paths.state)],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, cwd="/",
                env={**os.environ, MARK: str(self.paths.state)}, start_new_session=True,
            )  # fmt: skip
        assert self._process.stdout is not None
        with self._process.stdout as said:
            line = said.readline()
        if line == b"ready\n":
            return
        if line:
            raise told(json.loads(line))
        lines = "\n".join(f"    {one}" for one in log.read_text().splitlines()[-10:])
        raise Failed("the supervisor does not start", f"it said:\n{lines}")

    # -- down ----------------------------------------------------------------------------------------------

    def down(self) -> list[str]:
        """Remove all that `up` made; what was removed, in words. Nothing running is fine."""
        from meshdemo.runtime.local.leftovers import find

        traces = (self.paths.lock, self.paths.sockets, self.paths.watch_lock)
        left = self.paths.ours or any(path.exists() for path in traces)
        if not left and not find(self.paths.state):
            return []
        self._lock = Lock.take(
            self.paths.lock, f"another `meshdemo down` of mesh '{self.name}'", wait_s=_LOCK_PATIENCE_S
        )
        try:
            removed = self.remove()
            # A watch sees that its mesh is gone and ends; one that was killed has left its lock.
            with suppress(Failed):
                waiting = f"another `meshdemo down` of mesh '{self.name}'"
                Lock.take(self.paths.watch_lock, waiting, wait_s=_WATCH_ENDS_S).release(remove=True)
            return removed
        finally:
            self.release_lock()
            remove_home(self.paths.state.parent)

    def remove(self) -> list[str]:
        """Stop everything and remove every file. The lock is held."""
        from meshdemo.runtime.local.leftovers import kill_all

        removed = []
        with suppress(MeshdemoError):
            description = self._describe()
            removed = [one["name"] for one in description["processes"]]
            self._supervisor.call("shutdown")
            self._await_end(description["pid"], description["create_time"])
        if killed := kill_all(self.paths.state):
            removed.append(f"{killed} processes that were left over")
        if self._process is not None:
            self._process.wait()
        for folder in (self.paths.sockets, *([self.paths.state] if self.paths.ours else [])):
            if folder.exists():
                _remove_folder(folder)
                removed.append(str(folder))
        return removed

    def _await_end(self, pid: int, create_time: float) -> None:
        from meshdemo.runtime.local.leftovers import alive

        give_up = time.monotonic() + _SHUTDOWN_S
        while alive(pid, create_time) and time.monotonic() < give_up:
            time.sleep(0.02)

    # -- what runs -----------------------------------------------------------------------------------------

    def app(self) -> App:
        """The app that runs."""
        from meshdemo.apps.model import App

        return App.model_validate(self._describe()["spec"]["app"])

    def instances(self) -> list[Instance]:
        """The instances, whether ready or not."""
        from meshdemo.control.model import Instance

        return [Instance.model_validate(one) for one in self._describe()["instances"]]

    def endpoints(self) -> dict[str, str | None]:
        """URLs by name."""
        description = self._describe()
        prometheus = description["prometheus_port"] if description["prometheus_ready"] else None
        return {
            "gateway": gateway_url(description) if description["gateway_ready"] else None,
            "dashboard": f"http://127.0.0.1:{description['http_port']}/",
            "prometheus": f"http://127.0.0.1:{prometheus}/" if prometheus else None,
            "grafana": None,
        }

    def unavailable(self) -> dict[str, str]:
        """Why an endpoint that the mesh should have is not there, by name."""
        description = self._describe()
        if description["prometheus_port"] is None or description["prometheus_ready"]:
            return {}
        return {"prometheus": "not ready yet; `meshdemo logs` may tell why"}

    def note_gateway(self) -> None:
        """Say where the gateway is, if that is not where it is expected."""
        description = self._describe()
        named = description["spec"]["gateway_port"] is not None
        if not named and description["gateway_port"] != GATEWAY_PORT:
            self.notes.append(f"port {GATEWAY_PORT} is taken; the gateway is {gateway_url(description)}")

    def control(self) -> ControlClient:
        """A client of the control plane's API."""
        from meshdemo.control.client import ControlClient

        try:
            port = json.loads(self.paths.supervisor.read_text())["http_port"]
            token = (self.paths.control / "api-token").read_text().strip()
        except OSError:
            self._describe()  # says what is missing
            raise Missing(
                f"the control plane of mesh '{self.name}' has not started yet", "see `meshdemo logs`"
            ) from None
        return ControlClient(f"http://127.0.0.1:{port}", token)

    def revisions(self, service: str, version: str) -> list[WorkloadRevision]:
        """Revisions of a workload, oldest first; the last is the current one."""
        from meshdemo.control.model import WorkloadRevision

        rows = self._supervisor.call("revisions", service=service, version=version)
        return [WorkloadRevision.model_validate(row) for row in rows]

    # -- changes -------------------------------------------------------------------------------------------

    def set_env(
        self,
        service: str,
        version: str | None,
        env: dict[str, str | None],
        *,
        reason: str,
        instance: str | None = None,
        expires_at: float | None = None,
        fault_id: str | None = None,
    ) -> WorkloadRevision:
        """Roll out a new revision with these variables set (None: unset), no request failing.

        With several versions the revision of the last one is returned. A revision of a single instance
        (`instance`) is not among `revisions`, and ends with the next rollback.
        """
        return self._revision(
            "set_env", service=service, version=version, env=env, reason=reason, instance=instance,
            expires_at=expires_at, fault_id=fault_id,
        )  # fmt: skip

    def faults(self) -> list[str]:
        """The ids of the faults in workloads' environments."""
        workloads = self._describe()["spec"]["workloads"].values()
        return list(dict.fromkeys(fault["id"] for one in workloads for fault in one["faults"]))

    def end_faults(self, ids: Collection[str] | None, *, reason: str) -> list[str]:
        """Take these faults (None: all) out of the workloads that carry them; those that there were."""
        ended: list[str] = self._change("end_faults", ids=None if ids is None else list(ids), reason=reason)
        return ended

    def rollback(self, service: str, version: str, revision: int, *, reason: str) -> WorkloadRevision:
        """Roll out again what `revision` ran with, as a new revision."""
        return self._revision("rollback", service=service, version=version, revision=revision, reason=reason)

    def _revision(self, op: str, **arguments: Any) -> WorkloadRevision:
        from meshdemo.control.model import WorkloadRevision

        return WorkloadRevision.model_validate(self._change(op, **arguments))

    def _change(self, op: str, **arguments: Any) -> Any:
        return self._supervisor.call(op, wait_s=_READY_S + _REPLY_S, timeout_s=_READY_S, **arguments)

    def restart(self, instance: str, *, reason: str) -> None:
        """Replace one instance's process; returns when its replacement is ready.

        One that answers is replaced by another started beside it; one that hangs is killed.
        """
        self._change("restart", instance=instance, reason=reason)

    def scale(self, service: str, version: str, instances: int, *, reason: str) -> None:
        """Change the number of instances; returns when all are ready, or gone."""
        self._change("scale", service=service, version=version, instances=instances, reason=reason)

    def crash(self, instance: str) -> None:
        """Kill the workload's process of an instance (SIGKILL)."""
        self._supervisor.call("signal", instance=instance, number=signal.SIGKILL)

    def hang(self, instance: str) -> None:
        """Stop the workload's process of an instance without killing it (SIGSTOP)."""
        self._supervisor.call("signal", instance=instance, number=signal.SIGSTOP)

    def unhang(self, instance: str) -> None:
        """Let a stopped process of an instance go on (SIGCONT)."""
        self._supervisor.call("signal", instance=instance, number=signal.SIGCONT)

    def load(self) -> float | None:
        """The rate (requests/s) of each instance that makes load, unless the intent has another."""
        from meshdemo.runtime.local import spec as specs

        return specs.initial_load(specs.MeshSpec.model_validate(self._describe()["spec"]))

    def set_load(self, rps: float) -> None:
        """Set the rate of every instance that makes load; it outlives a restart of the instance."""
        self._supervisor.call("set_load", rps=rps)

    # -- logs and locks ------------------------------------------------------------------------------------

    def logs(self, service: str | None, follow: bool) -> Iterator[tuple[str, str]]:
        """(source, line) of instances, sidecars, the control plane and the supervisor, by time."""
        from meshdemo.apps.model import GATEWAY
        from meshdemo.runtime.local.logs import read

        spec = self._stored_spec(None)
        if spec is None:
            self._describe()  # says what is missing
            return
        known = (*spec.app.services, GATEWAY)
        if service is not None and service not in known:
            raise BadInput(f"no service '{service}'; there are: {', '.join(known)}")
        workloads = None if service is None else {GATEWAY}
        if service in spec.app.services:
            workloads = {f"{service}-{version}" for version in spec.app.services[service].versions}
        yield from read(self.paths.logs, workloads, follow)

    def watch_lock(self) -> AbstractContextManager[None]:
        """Held while a watch runs; raises Failed naming the holder if another one holds it."""
        self._describe()
        return locked(
            self.paths.watch_lock,
            f"a `meshdemo watch` of mesh '{self.name}'",
            "one acts on a mesh at a time: end that one first, or look on with `meshdemo watch --dry-run`",
        )

    def identity(self) -> str | None:
        """What tells this mesh from one brought up under its name later; None: there is none any more."""
        try:
            token = (self.paths.control / "api-token").read_bytes()  # made with the mesh, kept until `down`
        except FileNotFoundError:
            return None
        except OSError as error:
            raise Failed(f"cannot read {self.paths.control}: {error.strerror}") from error
        return hashlib.sha256(token).hexdigest()[:16]


class _Up:
    """One `up` at work: what its steps share."""

    def __init__(
        self,
        runtime: LocalRuntime,
        wanted: MeshSpec,
        running: MeshSpec | None,
        timeout_s: float,
        prometheus_rules: str = "",
    ) -> None:
        self._runtime = runtime
        self._wanted = wanted
        self._running = running
        self._deadline = time.monotonic() + timeout_s
        self._timeout_s = timeout_s
        self._rules = prometheus_rules
        self._supervisor = SupervisorClient(runtime.paths)
        self._owner = False

    def prepare(self) -> None:
        """Take the lock and make the folders.

        Raises Failed if the mesh was changed since this was planned.
        """
        self._runtime.take_lock()
        try:
            self._check_plan()
        except BaseException:
            self._runtime.release_lock()
            remove_home(self._runtime.paths.state.parent)
            raise
        self._owner = True
        self._runtime.paths.make()
        if self._rules:
            self._write_rules()

    def _check_plan(self) -> None:
        if self._runtime.running_spec() != self._running:
            raise Failed(
                f"another `meshdemo up` or `down` of mesh '{self._runtime.name}' has just ended",
                "run the same command again: it looks at what there is now",
            )

    def _write_rules(self) -> None:
        """Leave the rules where Prometheus looks for them when it starts."""
        from meshdemo.runtime.local.prometheus import RULES

        path = self._runtime.paths.prometheus / RULES
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomic(path, self._rules)
        except OSError as error:
            raise Failed(f"cannot write {path}: {error.strerror}", "make room on the disk") from error

    def abandon(self) -> None:
        """Leave nothing of a mesh that did not come up; leave one that ran before running."""
        if not self._owner:
            return  # somebody else is at work on this mesh
        try:
            if self._running is None:
                self._runtime.remove()
        finally:
            self._runtime.release_lock()
        if self._running is None:
            remove_home(self._runtime.paths.state.parent)

    def apply(self) -> None:
        """Start a supervisor, or tell the one that runs what is wanted now."""
        pause(0)
        if self._running is None:
            self._runtime.start_supervisor(self._wanted)
        else:
            self._call_apply(self._wanted)

    def revert(self) -> None:
        """Tell the supervisor to go back to what ran before."""
        if self._running is not None and self._owner:
            self._call_apply(self._running)

    def _call_apply(self, spec: MeshSpec) -> None:
        left = max(1.0, self._deadline - time.monotonic())
        self._supervisor.call(
            "apply", spec=spec.model_dump(mode="json"), timeout_s=left, wait_s=left + _REPLY_S
        )

    def wait_for(self, what: str) -> Any:
        """A step that waits until `what` is ready (see `Supervisor.op_wait`)."""

        def wait() -> None:
            rejected_since = None
            while not self._supervisor.call("wait", what=what, timeout_s=_LOOK_S):
                pause(0)
                now, rejected = time.monotonic(), self._rejected() if "/" in what else ""
                rejected_since = (rejected_since or now) if rejected else None
                if now > self._deadline:
                    raise self._too_late(f"{what.replace('/', ' ')} is not ready")
                if rejected_since is not None and now > rejected_since + _REJECTED_S:
                    raise Failed(f"{what.replace('/', ' ')} is not ready: {rejected}")

        return wait

    def _rejected(self) -> str:
        """What a sidecar has against its configuration; empty if none has anything."""
        try:
            nacks = self._runtime.control().status()["nacks"]
        except MeshdemoError:
            return ""
        return "; ".join(
            f"the sidecar of {nack['instance']} rejects its {nack['type']}: {nack['error'].strip()}"
            for nack in nacks[:1]
        )

    def finish(self) -> None:
        """See a request go through the mesh, and let go of the lock."""
        from meshdemo.runtime.local.through import request_through

        while problem := request_through(self._wanted.app, self._runtime.instances()):
            pause(0.02)
            if time.monotonic() > self._deadline:
                raise self._too_late(problem)
        self.wait_for("load")()
        self._runtime.note_gateway()
        self._runtime.release_lock()

    def _too_late(self, problem: str) -> Failed:
        return Failed(f"{problem} after {self._timeout_s:g} s", "give it longer with --timeout")


def gateway_url(description: dict[str, Any]) -> str:
    """Where a browser finds the gateway."""
    return f"http://localhost:{description['gateway_port']}/"


def _title(workload: Any) -> str:
    count = "1 instance" if workload.instances == 1 else f"{workload.instances} instances"
    return f"Starting {workload.service} {workload.version} ({count})"


def _remove_folder(folder: Any) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise Failed(f"cannot remove {folder}: {error.strerror}", f"remove {folder} yourself") from error
