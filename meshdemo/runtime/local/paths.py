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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from meshdemo.errors import BadInput, Failed

_SHORT = Path("/tmp")  # noqa: S108 - the folder made in it is private, and checked to be ours
LOCK_SUFFIX = ".meshdemo.lock"
HOME = "MESHDEMO_HOME"  # the environment variable that moves all state
MARK = ".meshdemo"  # a file in each folder that we made: what carries it is a mesh and may be removed
HOME_MARK = ".meshdemo-home"  # the same for `home()`, which is no mesh


def home() -> Path:
    """The folder of all local meshes: MESHDEMO_HOME, or the platform's folder for a user's state.

    Without symbolic links, since a mesh is known by its path.
    """
    if chosen := os.environ.get(HOME):
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
    def ours(self) -> bool:
        """Whether the folder is one that `up` has made, and so `down` may remove.

        An `up` that was killed may have left it without its mark; it is empty then, and the lock is there.
        """
        return is_marked(self.state) or (self.lock.exists() and _is_empty(self.state))

    @property
    def watch_lock(self) -> Path:
        """Held by a watch. Beside the folder too: a watch may outlive the mesh for a moment."""
        return self.state.with_name(f"{self.state.name}.watch{LOCK_SUFFIX}")

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
        """Make the folders, readable by their owner alone.

        Raises Failed if that cannot be, BadInput if the folder holds something else than a mesh.
        """
        try:
            claim(self.state)
            for folder in (self.control, self.logs):
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


def make_home(folder: Path) -> None:
    """Make the folder that meshes are in, unless it is there. Raises OSError."""
    if not folder.is_dir():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / HOME_MARK).touch(mode=0o600)


def remove_home(folder: Path) -> None:
    """Remove the folder that meshes are in if we have made it, and nothing is in it any more."""
    mark = folder / HOME_MARK
    try:
        if [path.name for path in folder.iterdir()] != [HOME_MARK]:
            return
        mark.unlink()
    except OSError:
        return  # gone: another `down` was faster
    try:
        folder.rmdir()
    except OSError:  # an `up` has begun meanwhile, and its `down` is to know
        with suppress(OSError):
            mark.touch(mode=0o600)


def is_marked(folder: Path) -> bool:
    """Whether this is the folder of a mesh."""
    return (folder / MARK).is_file()


def check_free(folder: Path) -> None:
    """Raises BadInput if a folder holds something, and that is no mesh."""
    try:
        foreign = not is_marked(folder) and any(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return
    if foreign:
        raise BadInput(
            f"{folder} holds files that are not a mesh's: use another --name, or set MESHDEMO_HOME to a "
            "folder of its own"
        )


def claim(folder: Path) -> None:
    """Make the folder of a mesh, and mark it as such before anything else is in it.

    Raises BadInput if it holds something else, OSError.
    """
    check_free(folder)
    make_home(folder.parent)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    (folder / MARK).touch(mode=0o600)


def _is_empty(folder: Path) -> bool:
    try:
        return not any(folder.iterdir())
    except OSError:
        return False


def names() -> Iterator[str]:
    """The names of all meshes that have left anything in `home()`."""
    folder = home()
    found = set()
    if folder.is_dir():
        for entry in folder.iterdir():
            if is_marked(entry):
                found.add(entry.name)
            elif entry.name.endswith(LOCK_SUFFIX):
                found.add(entry.name.partition(".")[0])  # a mesh's name has no dot
    yield from sorted(found)
