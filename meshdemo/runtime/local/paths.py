"""Where the local runtime keeps things, and nothing else.

All state of a mesh is in `<home>/<name>/`. Unix sockets are not: their path may have no more than 104 (macOS)
or 108 bytes, and a home may be deep. They are in a short private folder under /tmp whose name follows
from the state folder, so that it is found again without a note that could be lost.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from meshdemo.errors import Failed

_SHORT = Path("/tmp")  # noqa: S108 - the folder made in it is private, and checked to be ours
LOCK_SUFFIX = ".lock"


def home() -> Path:
    """The folder of all local meshes: MESHDEMO_HOME, or the platform's folder for a user's state.

    Without symbolic links, since a mesh is known by its path.
    """
    if chosen := os.environ.get("MESHDEMO_HOME"):
        return Path(chosen).expanduser().resolve()
    import platformdirs

    return Path(platformdirs.user_state_dir("meshdemo")).resolve()


@dataclass(frozen=True, slots=True)
class MeshPaths:
    """The files of one mesh; `state` is the folder that holds them."""

    state: Path

    @staticmethod
    def of(name: str) -> MeshPaths:
        """The files of the mesh of this name."""
        return MeshPaths(home() / name)

    @property
    def name(self) -> str:
        """The mesh's name."""
        return self.state.name

    @property
    def lock(self) -> Path:
        """Held by an `up` or `down` at work. Beside the folder, since `down` removes the folder."""
        return self.state.with_name(self.state.name + LOCK_SUFFIX)

    @property
    def watch_lock(self) -> Path:
        """Held by a watch."""
        return self.state / "watch.lock"

    @property
    def spec(self) -> Path:
        """What the supervisor must keep running (spec.py)."""
        return self.state / "spec.json"

    @property
    def supervisor(self) -> Path:
        """Who the supervisor is and which ports it gave away."""
        return self.state / "supervisor.json"

    @property
    def instances(self) -> Path:
        """What runs, as the control plane reads it (MeshState)."""
        return self.state / "instances.json"

    @property
    def control(self) -> Path:
        """The control plane's own files."""
        return self.state / "control"

    @property
    def logs(self) -> Path:
        """One log for each process."""
        return self.state / "logs"

    @property
    def prometheus(self) -> Path:
        """Configuration, targets and data of Prometheus."""
        return self.state / "prometheus"

    def instance(self, instance: str) -> Path:
        """Token and bootstrap of one instance."""
        return self.state / "instances" / instance

    @property
    def sockets(self) -> Path:
        """The short private folder for Unix sockets."""
        digest = hashlib.sha256(os.fsencode(self.state)).hexdigest()[:12]
        return _SHORT / f"meshdemo-{os.getuid()}-{digest}"

    @property
    def api(self) -> Path:
        """The supervisor's own API."""
        return self.sockets / "api"

    def admin(self, number: int) -> Path:
        """The admin endpoint of the sidecar with this number."""
        return self.sockets / f"{number}"

    def make(self) -> None:
        """Make the folders, readable by their owner alone. Raises Failed if that cannot be."""
        try:
            for folder in (self.state, self.control, self.logs):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.sockets.mkdir(mode=0o700, exist_ok=True)
            status = self.sockets.lstat()
        except OSError as error:
            raise Failed(
                f"cannot make {error.filename}: {error.strerror}",
                "set MESHDEMO_HOME to a folder that you can write to",
            ) from error
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise Failed(f"{self.sockets} is not a private folder of yours", f"remove {self.sockets}")


def names() -> Iterator[str]:
    """The names of all meshes that have left anything in `home()`."""
    folder = home()
    found = set()
    if folder.is_dir():
        for entry in folder.iterdir():
            if entry.is_dir():
                found.add(entry.name)
            elif entry.suffix == LOCK_SUFFIX:
                found.add(entry.stem)
    yield from sorted(found)
