"""How long certificates live: a setting of the mesh, which a running one takes and a restart keeps."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from local_harness import Cli, kill, read_url, wait_for
from test_plane import run

from meshdemo.control.intent import set_certificate_lifetime
from meshdemo.control.model import Intent
from meshdemo.control.plane import ControlPlane
from meshdemo.errors import BadInput


@pytest.mark.parametrize("seconds", [9.9, 0.0, -1.0, 366 * 86_400.0, float("nan"), float("inf")])
def test_lifetimes_beyond_what_renewal_bears_are_refused(seconds: float) -> None:
    with pytest.raises(BadInput, match="allowed is 10s to 365d"):
        set_certificate_lifetime(Intent(), seconds)


def test_it_is_kept_over_a_restart(tmp_path: Path) -> None:
    async def change(plane: ControlPlane, _: Any) -> None:
        assert (await plane.identities())["lifetime_s"] == 3600
        await plane.change(lambda intent, _: set_certificate_lifetime(intent, 600))
        assert (await plane.identities())["lifetime_s"] == 600

    async def look(plane: ControlPlane, _: Any) -> None:
        assert (await plane.identities())["lifetime_s"] == 600

    run(change, tmp_path)
    run(look, tmp_path)


def test_a_shorter_one_is_not_slept_through(tmp_path: Path) -> None:
    """The next look at what is due comes in time for the new lifetime, not for the old."""

    async def change(plane: ControlPlane, _: Any) -> None:
        await asyncio.sleep(0)  # the timer pauses for as long as certificates of an hour let it
        await plane.change(lambda intent, _: set_certificate_lifetime(intent, 20))
        first = plane._certificates.server
        assert first.expires_at - time.time() < 20.5
        async with asyncio.timeout(60):
            while plane._certificates.server is first:  # noqa: ASYNC110 (there is nothing to wait on)
                await asyncio.sleep(0.05)
        assert time.time() < first.expires_at

    run(change, tmp_path)


@pytest.mark.parametrize("text", ["9s", "366d", "0s", "x", "", "10"])
def test_bad_input_starts_nothing(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    cli = Cli(tmp_path_factory.mktemp("home"))
    said = cli.run("up", "--runtime", "local", "--certificate-lifetime", text, status=2)
    assert f"--certificate-lifetime '{text}': allowed is a duration from 10s to 365d" in said
    assert cli.leftovers() == []


def test_short_lived_ones_are_renewed_under_load(tmp_path_factory: pytest.TempPathFactory) -> None:
    with Cli(tmp_path_factory.mktemp("home")).up("--runtime", "local", "--rps", "50") as mesh:

        def ends() -> dict[str, Any]:
            """When each instance's certificate expires."""
            return {one["instance"]: one["expires_at"] for one in mesh.json("identity", "show")["instances"]}

        def renewed_after(before: dict[str, Any]) -> bool:
            return all(end is not None and end > before[instance] for instance, end in ends().items())

        def outlive(first: dict[str, Any]) -> None:
            wait_for("new certificates", lambda: renewed_after(first))
            wait_for("the first ones to expire", lambda: time.time() > max(first.values()) + 0.5)

        with mesh.no_request_lost():
            assert "live 10s from now on" in mesh.run("up", "--certificate-lifetime", "10s")
            first = ends()
            assert max(first.values()) < time.time() + 10.5
        mesh.loses_no_request(lambda _: outlive(ends()))
        # Connections that begin now are made with certificates that live.
        assert read_url(mesh.json("status")["endpoints"]["gateway"] + "work")
        assert "a certificate lives 10s" in mesh.run("identity", "show")

        # Another control plane goes on so, and sidecars believe the certificate that it shows.
        killed, issued = mesh.process("control plane"), ends()
        kill(killed)
        wait_for("another control plane", lambda: mesh.process("control plane").pid != killed.pid)
        wait_for("certificates from it", lambda: renewed_after(issued))
        assert mesh.json("identity", "show")["lifetime_s"] == 10
        mesh.loses_no_request(lambda _: outlive(ends()))
        with mesh.no_request_lost():
            mesh.run("up", "--certificate-lifetime", "1h")
            assert min(ends().values()) > time.time() + 3500
        assert "nothing to change" in mesh.run("up", "--certificate-lifetime", "1h")
