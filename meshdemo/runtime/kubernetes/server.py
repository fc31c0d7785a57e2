"""The control plane's process in a cluster: `python -m meshdemo.runtime.kubernetes.server`.

It is the same control plane as everywhere. What differs is where it learns of the mesh (watches), how it
knows its sidecars (TokenReview) and where it keeps things (ConfigMaps, a Secret); besides, it ends faults in
an app's environment when their time is over, and leaves an Event on a pod that is taken out of load
balancing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from meshdemo import names
from meshdemo.control import server
from meshdemo.control.api.mesh import Control
from meshdemo.control.kubernetes import kept
from meshdemo.control.kubernetes.handouts import Handouts
from meshdemo.control.kubernetes.kept import AuthorityKeeper, IntentMap, Keeper, keep
from meshdemo.control.kubernetes.source import Source
from meshdemo.control.kubernetes.tokens import TokenReviews
from meshdemo.control.model import MeshState
from meshdemo.errors import Failed, MeshdemoError
from meshdemo.kube import ApiError, Cluster
from meshdemo.runtime.kubernetes import manifests
from meshdemo.runtime.kubernetes.entrance import Reporter
from meshdemo.runtime.kubernetes.specs import SpecMap, parsed, patch_env
from meshdemo.runtime.local import spec as specs
from meshdemo.runtime.local.spec import MeshSpec

log = logging.getLogger(__name__)

# The API server may be away for a while, but a call of ours has somebody waiting for it.
_PATIENCE_S = 4.0
_EVENTS = {
    "ejected": ("Ejected", "taken out of load balancing"),
    "readmitted": ("Readmitted", "back in load balancing"),
}


class Backend(server.Backend):
    """The cluster, as the control plane sees it."""

    def __init__(self, place: server.Place, cluster: Cluster, mesh: str, namespace: str, token: Path) -> None:
        self._place = place
        self._cluster, self._namespace = cluster, namespace
        self._token = token
        self._source = Source(cluster, mesh, namespace)
        self._specs = SpecMap(cluster, mesh, namespace)
        self.authenticator = TokenReviews(cluster, self._source)
        self.intents = IntentMap(cluster, namespace)
        folder = place.control
        self._authority = AuthorityKeeper(cluster, namespace, folder)
        self.keep_authority = self._authority.save
        self._keepers = (
            self._authority,
            Keeper(cluster, "ConfigMap", kept.JOURNAL, namespace, folder, ("events.jsonl",)),
        )
        self._reporter = Reporter(cluster, namespace)
        self._changed = asyncio.Event()
        self._handouts = Handouts(
            cluster, mesh, self._source.guests, self._sidecar_files, folder / "trust.pem"
        )

    def _sidecar_files(self) -> Mapping[str, str]:
        mesh = self._source.mesh()
        return manifests.sidecar_files(self._namespace, len(mesh.sidecars) if mesh else 0)

    async def start(self) -> MeshState:
        """Fill the control plane's folder and wait for the first complete picture of the mesh."""
        (self._place.control / "api-token").write_bytes(self._token.read_bytes().strip())
        for keeper in self._keepers:
            await asyncio.to_thread(keeper.restore)
        return await self._source.start()

    def mesh(self) -> MeshState:
        """The mesh as the API server last showed it."""
        mesh = self._source.mesh()
        if mesh is None:
            raise Failed("the API server has not shown the whole mesh yet", "try again in a moment")
        return mesh

    async def follow(self, control: Control) -> None:
        """Take changes in, carry back what must be kept, end what is over, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._refresh(control))
            tasks.create_task(keep((*self._keepers, self._handouts)))
            tasks.create_task(self._end_what_is_over())
            tasks.create_task(self._leave_events(control))
            tasks.create_task(self._report_entrance())

    async def stop(self) -> None:
        """Carry back what was written last."""
        self._source.stop()
        for keeper in self._keepers:
            with contextlib.suppress(MeshdemoError):
                await asyncio.to_thread(keeper.save)

    async def _report_entrance(self) -> None:
        """Tell on Ingresses and HTTPRoutes what became of them, whenever something has changed."""
        while True:
            entrance, services = self._source.entrance, self._source.services
            await asyncio.to_thread(self._reporter.report, entrance, services)
            await self._changed.wait()
            self._changed.clear()

    async def _refresh(self, control: Control) -> None:
        while True:
            await self._source.change()
            if mesh := self._source.mesh():
                self._changed.set()
                control.store.track([one.id for one in mesh.sidecars if not one.leaving])
                try:
                    await control.plane.refresh(mesh)
                except MeshdemoError as error:
                    log.error("what the cluster shows cannot be taken in: %s", error)

    # -- faults for a time ---------------------------------------------------------------------------------

    async def _end_what_is_over(self) -> None:
        while True:
            await asyncio.sleep(0.25)
            stored = self._source.spec
            spec = parsed(stored) if stored else None
            due = [fault for fault, end in spec.ends().items() if end <= time.time()] if spec else []
            for fault_id in due:
                try:
                    await asyncio.to_thread(self._end, fault_id)
                except MeshdemoError as error:
                    log.warning("cannot end fault %s yet: %s", fault_id, error)
                    await asyncio.sleep(2)

    def _end(self, fault_id: str) -> None:
        """Take a fault out of the workloads that carry it; a pod that differs is replaced by a plain one.

        With such a pod all ends that it alone carried: its ReplicaSet makes the next one.
        """
        pods: list[str] = []
        before: list[MeshSpec] = []

        def end(spec: MeshSpec) -> MeshSpec:
            before[:] = [spec]
            faults = [fault for workload in spec.workloads.values() for fault in workload.faults]
            pods[:] = [fault.instance for fault in faults if fault.id == fault_id and fault.instance]
            ids = {fault_id, *(fault.id for fault in faults if fault.instance in pods)}
            for workload in spec.workloads.values():
                new = specs.without_faults(workload, ids, reason=f"end of fault {fault_id}", now=time.time())
                if new.current.revision != workload.current.revision:
                    new = specs.uniform(new)  # the rollout replaces pods that deviate by plain ones
                spec = spec.replacing(new)
            return spec

        after = self._specs.change(end)
        for pod in pods:
            self._cluster.delete("Pod", pod, self._namespace)
        for key, new in after.workloads.items():
            old = before[0].workloads[key]
            if old.current.revision != new.current.revision:
                patch_env(self._cluster, self._namespace, old, new)
        log.info("fault %s is over", fault_id)

    # -- events --------------------------------------------------------------------------------------------

    async def _leave_events(self, control: Control) -> None:
        """Tell on the pod what was done to it, for whoever looks with kubectl."""
        seq, _ = control.journal.after(-1)
        while True:
            seq, events = await asyncio.to_thread(control.journal.after, seq, 1.0)
            for event in events:
                if event["event"] in _EVENTS:
                    await asyncio.to_thread(self._leave_event, event)

    def _leave_event(self, event: Mapping[str, Any]) -> None:
        pod = self._source.pod(str(event.get("instance")))
        reason, what = _EVENTS[event["event"]]
        why = f" by {event['by']}: {event['reason']}" if event.get("by") and event.get("reason") else ""
        if pod is not None:
            try:
                self._cluster.event({"apiVersion": "v1", "kind": "Pod", **pod}, reason, what + why)
            except ApiError as failure:
                log.warning("cannot leave an Event: %s", failure)


def main(arguments: Sequence[str] | None = None) -> int:
    """The process; its exit status as of `MeshdemoError`."""
    parser = argparse.ArgumentParser(prog="meshdemo-control-plane", description=__doc__.splitlines()[0])
    parser.add_argument("--mesh", required=True)
    parser.add_argument("--namespace", required=True)
    parser.add_argument("--state", type=Path, required=True, help="an empty folder")
    parser.add_argument("--api-token", type=Path, required=True, help="the file with the API's token")
    given = parser.parse_args(arguments)
    place = server.Place(
        state=given.state,
        grpc_port=names.XDS_PORT,
        http_port=names.API_PORT,
        grpc_host="0.0.0.0",  # noqa: S104 - sidecars come from everywhere, with TLS and their tokens
        open_listen=f"0.0.0.0:{names.OPEN_PORT}",
    )

    def backend() -> Backend:
        cluster = Cluster.inside(patience_s=_PATIENCE_S)
        return Backend(place, cluster, given.mesh, given.namespace, given.api_token)

    return server.run(place, backend)


if __name__ == "__main__":
    sys.exit(main())
