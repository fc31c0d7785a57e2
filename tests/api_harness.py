"""The real control plane process (`python -m meshdemo.control.server`) with real sidecars, for tests."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from xds_harness import DEADLINE_S, Member, Mesh, free_port, pair, until

from meshdemo.control.bootstrap import Placement, bootstrap_files, envoy_arguments, find_envoy
from meshdemo.control.client import ControlClient


class Server:
    """One control plane process over a state folder; it can be killed and started again."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.grpc_port, self.http_port, self.open_port = free_port(), free_port(), free_port()
        self.process: subprocess.Popen[bytes] | None = None

    def spawn(self, keeping: Sequence[int] = ()) -> subprocess.Popen[bytes]:
        """Start it, with these open files besides its own."""
        with (self.state / "server.log").open("ab") as log:
            return subprocess.Popen(
                [
                    sys.executable, "-m", "meshdemo.control.server", "--state", str(self.state),
                    "--grpc-port", str(self.grpc_port), "--http-port", str(self.http_port),
                    "--open-listen", f"127.0.0.1:{self.open_port}",
                ],
                stderr=log,
                pass_fds=keeping,
            )  # fmt: skip

    def start(self, keeping: Sequence[int] = ()) -> None:
        self.process = self.spawn(keeping)

        def up() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, self.log()
            return (self.state / "control" / "api-token").exists() and self.client().healthy()

        until(up, "the control plane to answer")

    def client(self, **more: float) -> ControlClient:
        token = (self.state / "control" / "api-token").read_text()
        return ControlClient(f"http://127.0.0.1:{self.http_port}", token, **more)

    def log(self) -> str:
        return (self.state / "server.log").read_text()

    def stop(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(DEADLINE_S)


class ServedMesh(Mesh):
    """A mesh whose control plane is the real process."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, pair())
        self.server = Server(folder)

    def write_instances(self) -> None:
        (self.folder / "instances.json").write_text(self.mesh_state().model_dump_json())

    def start(self) -> None:
        self.write_instances()
        self.server.start()
        for member in self.members.values():
            self.start_sidecar(member)
        for member in self.members.values():
            self.await_ready(member)

    def start_sidecar(self, member: Member) -> None:
        placement = Placement(
            folder=member.folder,
            trust=self.state / "trust.pem",
            admin=member.admin,
            control_host="127.0.0.1",
            control_port=self.server.grpc_port,
        )
        (member.folder / "token").write_text(member.token)
        for name, content in bootstrap_files(member.instance, placement).items():
            (member.folder / name).write_text(content)
        with (member.folder / "envoy.log").open("wb") as log:
            member.process = subprocess.Popen(
                envoy_arguments(find_envoy(), member.folder / "bootstrap.yaml"), stdout=log, stderr=log
            )

    def stop(self) -> None:
        super().stop()
        if self.server.process is not None and self.server.process.poll() is None:
            self.server.stop(signal.SIGKILL)


@contextlib.contextmanager
def served_mesh() -> Iterator[ServedMesh]:
    """A mesh to add instances to and start; gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="ms"))
    mesh = ServedMesh(folder)
    try:
        yield mesh
    finally:
        mesh.stop()
        shutil.rmtree(folder, ignore_errors=True)
