"""The control plane as one object, without sidecars: what it keeps, and what it does when that fails."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from xds_harness import pair

from meshdemo import files
from meshdemo.control.intent import add_fault, eject, new_fault, set_traffic
from meshdemo.control.model import Instance, Intent, MeshState
from meshdemo.control.plane import ControlPlane, Settings
from meshdemo.errors import BadInput, Failed
from meshdemo.resources import TEMPLATES


def instance(number: int) -> Instance:
    return Instance(
        id=f"b-{number}",
        service="service-b",
        version="v1",
        inbound_port=1,
        outbound_port=2,
        metrics_port=3,
        app_port=4,
        ready=True,
    )


MESH = MeshState(mesh="m", app=pair(), instances=(instance(1), instance(2)))


def run(
    work: Callable[[ControlPlane, list[dict[str, Any]]], Awaitable[None]], state: Path, **more: Any
) -> None:
    """Do something with a control plane on a loop."""

    async def go() -> None:
        events: list[dict[str, Any]] = []
        plane = ControlPlane(state, MESH, journal=lambda event: events.append(dict(event)), **more)
        await plane.start()
        try:
            await work(plane, events)
        finally:
            await plane.stop()

    asyncio.run(go())


def degrade(**request: Any) -> Callable[[Intent, MeshState], Intent]:
    request = {"service": "service-b", "lat_ms": 5, **request}
    return lambda intent, mesh: add_fault(intent, new_fault(request, mesh, time.time()))


def test_a_change_is_kept_and_comes_back_after_a_restart(tmp_path: Path) -> None:
    async def change(plane: ControlPlane, _: Any) -> None:
        effect = await plane.change(degrade(id="x"))
        assert (effect.revision, effect.sidecars, effect.unconfirmed) == (2, 0, ())
        same = await plane.change(lambda intent, _: intent)
        assert same.revision == 2

    async def look(plane: ControlPlane, _: Any) -> None:
        assert [fault.id for fault in plane.intent.faults] == ["x"]
        assert [(s.instance.id, s.connected, s.acked) for s in plane.sidecars()] == [
            ("b-1", False, False),
            ("b-2", False, False),
        ]

    run(change, tmp_path)
    run(look, tmp_path)


def test_an_instance_that_becomes_another_service_gets_its_identity(tmp_path: Path) -> None:
    async def work(plane: ControlPlane, _: Any) -> None:
        first = plane._certificates.of(MESH.instances[0], plane.mesh)
        other = MESH.instances[0].model_copy(update={"service": "service-a"})
        await plane.refresh(MESH.model_copy(update={"instances": (other, MESH.instances[1])}))
        second = plane._certificates.of(other, plane.mesh)
        assert first[0].chain != second[0].chain
        (names,) = (
            one["identity"] for one in (await plane.identities())["instances"] if one["instance"] == "b-1"
        )
        assert names.endswith("/sa/service-a")

    run(work, tmp_path)


def test_a_full_disk_fails_the_change_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def work(plane: ControlPlane, _: Any) -> None:
        await plane.change(degrade(id="x"))
        before = plane.intent
        with monkeypatch.context() as patched:
            patched.setattr(files.os, "fsync", full)
            with pytest.raises(Failed, match="No space left"):
                await plane.change(degrade(id="y"))
        assert plane.intent is before
        await plane.change(degrade(id="y"))
        assert len(plane.intent.faults) == 2

    run(work, tmp_path)


def test_bad_input_and_broken_templates_change_nothing(tmp_path: Path) -> None:
    templates = tmp_path / "envoy"
    shutil.copytree(TEMPLATES / "envoy", templates)
    host = templates / "virtual_host.yaml.j2"
    host.write_text(host.read_text() + "{% if traffic.timeout_ms %}\nnonsense: 1{% endif %}\n")

    async def work(plane: ControlPlane, _: Any) -> None:
        before = plane.intent
        with pytest.raises(BadInput):
            await plane.change(degrade(err_rate=2))
        with pytest.raises(Failed, match=r"templates are broken.*nonsense"):
            await plane.change(
                lambda intent, mesh: set_traffic(intent, mesh, "service-b", {"timeout_ms": 5}, time.time())
            )
        assert plane.intent is before
        await plane.change(degrade())

    (tmp_path / "state").mkdir()
    run(work, tmp_path / "state", settings=Settings(templates=templates))


def test_faults_whose_time_ran_out_while_nobody_was_there_end_at_the_start(tmp_path: Path) -> None:
    async def begin(plane: ControlPlane, _: Any) -> None:
        for name, seconds in (("short", 10), ("long", 3600)):
            await plane.change(degrade(id=name, for_s=seconds))
        await plane.change(degrade(id="forever"))

    async def wait(plane: ControlPlane, events: list[dict[str, Any]]) -> None:
        for _ in range(1000):
            if events:
                break
            await asyncio.sleep(0.01)
        assert [(event["event"], event["fault"]) for event in events] == [("fault_expired", "short")]
        assert [fault.id for fault in plane.intent.faults] == ["long", "forever"]

    run(begin, tmp_path)
    run(wait, tmp_path, clock=lambda: time.time() + 60)


def test_instances_that_go_take_their_ejections_with_them(tmp_path: Path) -> None:
    async def work(plane: ControlPlane, _: Any) -> None:
        await plane.change(lambda i, m: eject(i, m, "b-1", reason="r", by="test", now=1))
        await plane.refresh(MESH.model_copy(update={"instances": (instance(2), instance(3))}))
        assert plane.intent.ejections == ()
        assert [sidecar.instance.id for sidecar in plane.sidecars()] == ["b-2", "b-3"]
        assert (await plane.refresh(plane.mesh)).sidecars == 0

    run(work, tmp_path)


def test_changes_come_one_after_another(tmp_path: Path) -> None:
    async def work(plane: ControlPlane, _: Any) -> None:
        effects = await asyncio.gather(*(plane.change(degrade(id=f"f{n}")) for n in range(10)))
        assert sorted(effect.revision for effect in effects) == list(range(2, 12))
        assert len(plane.intent.faults) == 10

    run(work, tmp_path)


def test_no_token_no_instance(tmp_path: Path) -> None:
    async def work(plane: ControlPlane, _: Any) -> None:
        for value in ("", "Bearer", "Bearer x"):
            assert await plane.authenticate([("authorization", value)]) is None

    run(work, tmp_path)
