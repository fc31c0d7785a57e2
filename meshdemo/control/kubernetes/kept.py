"""Where the control plane keeps what it must not forget: in ConfigMaps and a Secret.

None of it is in the pod, which may go at any moment.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import logging
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from pydantic import ValidationError

from meshdemo.control.intent import Overtaken
from meshdemo.control.model import Intent
from meshdemo.errors import Failed, MeshdemoError
from meshdemo.files import write_atomic
from meshdemo.kube import ApiError, Cluster

log = logging.getLogger(__name__)

INTENT, JOURNAL, SPEC, TRUST, AUTHORITY, API = (
    "meshdemo-intent", "meshdemo-journal", "meshdemo-spec", "meshdemo-trust", "meshdemo-ca", "meshdemo-api"
)  # fmt: skip
AUTHORITY_FILES = ("ca.pem", "ca-next.pem", "trust.pem")


class IntentMap:
    """The intent in a ConfigMap. Two writers cannot overwrite each other: the second one is told."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self._cluster, self._namespace = cluster, namespace
        self._version = ""

    def load(self) -> Intent:
        """The stored intent, or a fresh one if none was stored yet. Raises Failed if it is none."""
        stored = self._cluster.get("ConfigMap", INTENT, self._namespace)
        if stored is None:
            raise Failed(f"the ConfigMap {INTENT} is gone", "run `meshdemo up` again")
        text = (stored.get("data") or {}).get("intent.json")
        try:
            found = Intent.model_validate_json(text) if text else Intent()
        except ValidationError as error:
            raise Failed(
                f"the ConfigMap {INTENT} does not hold an intent: {error.errors()[0]['msg']}",
                "repair its intent.json, or remove that key to start without faults, traffic or access rules",
            ) from error
        self._version = stored["metadata"]["resourceVersion"]
        return found

    def save(self, intent: Intent) -> None:
        """Store the intent; the one before stays if that fails. Raises Failed, Overtaken."""
        data = {"intent.json": intent.model_dump_json(indent=1)}
        body = {"metadata": {"resourceVersion": self._version}, "data": data}
        try:
            stored = self._cluster.patch("ConfigMap", INTENT, self._namespace, body, merge="merge")
        except ApiError as error:
            # Where an answer is lost, what is asked is asked again, and then overtakes itself.
            there = self._cluster.get("ConfigMap", INTENT, self._namespace) if error.status == 409 else None
            if there is None:
                raise
            if there.get("data") != data:
                raise Overtaken(
                    "the intent was changed by somebody else meanwhile; theirs is in force, yours is not",
                    "look at it (`meshdemo traffic show`, `fault list`, `access show`) and try again",
                ) from error
            stored = there
        self._version = stored["metadata"]["resourceVersion"]


class Keeper:
    """Files of a folder that are kept in a ConfigMap or a Secret, compressed.

    The control plane's parts write files, wherever it runs; in a cluster the folder is empty at each start,
    and this fills it and carries what changes back, within a second.
    """

    def __init__(
        self, cluster: Cluster, kind: str, name: str, namespace: str, folder: Path, files: Iterable[str],
        *, at_most: int = 700_000,
    ) -> None:  # fmt: skip
        """`at_most`: of a larger file the end is kept, in whole lines (objects hold 1 MiB at most)."""
        self._cluster, self._kind, self._name, self._namespace = cluster, kind, name, namespace
        self._folder, self._files, self._at_most = folder, tuple(files), at_most
        self._kept: dict[str, bytes | None] = {}
        self._field = "data" if kind == "Secret" else "binaryData"

    def restore(self) -> None:
        """Fill the folder. Raises Failed if the object cannot be read."""
        stored = self._cluster.get(self._kind, self._name, self._namespace)
        if stored is None:
            raise Failed(f"the {self._kind} {self._name} is gone", "run `meshdemo up` again")
        packed = stored.get(self._field) or {}
        for name in self._files:
            content = packed.get(f"{name}.gz")
            self._kept[name] = None if content is None else gzip.decompress(base64.b64decode(content))
            if (kept := self._kept[name]) is not None:
                write_atomic(self._folder / name, kept, durable=True)

    def save(self) -> bool:
        """Carry back what has changed; was there anything? Raises Failed."""
        now = {name: self._read(name) for name in self._files}
        if now == self._kept:
            return False
        changed = {name: content for name, content in now.items() if content != self._kept.get(name)}
        self._cluster.patch(
            self._kind, self._name, self._namespace,
            {self._field: {f"{name}.gz": _packed(content) for name, content in changed.items()}},
            merge="merge",
        )  # fmt: skip
        self._kept = now
        return True

    def _read(self, name: str) -> bytes | None:
        try:
            content = (self._folder / name).read_bytes()
        except FileNotFoundError:
            return None
        if len(content) > self._at_most:
            content = content[-self._at_most :].partition(b"\n")[2]
        return content


class AuthorityKeeper:
    """The certificate authority's files in a Secret, and what they trust in the ConfigMap that pods mount.

    Sidecars check the control plane by the latter. It reaches them when their kubelets see fit, which nobody
    waits for: see `meshdemo.control.identity`.
    """

    def __init__(self, cluster: Cluster, namespace: str, folder: Path) -> None:
        self._cluster, self._namespace = cluster, namespace
        self._files = Keeper(cluster, "Secret", AUTHORITY, namespace, folder, AUTHORITY_FILES)
        self._path = folder / "trust.pem"
        self._trusted = ""
        self._saving = threading.Lock()

    def restore(self) -> None:
        """Fill the folder. Raises Failed if the Secret cannot be read."""
        self._files.restore()

    def save(self) -> bool:
        """Carry back what has changed, the secret half first; was there anything? Raises Failed."""
        with self._saving:  # a replacement of the root does not wait for the one that looks each second
            changed = self._files.save()
            trusted = self._path.read_text()
            if trusted == self._trusted:
                return changed
            self._cluster.patch(
                "ConfigMap", TRUST, self._namespace, {"data": {self._path.name: trusted}}, merge="merge"
            )
            self._trusted = trusted
            return True


class _Keeps(Protocol):
    def save(self) -> bool: ...


def pack(content: bytes) -> str:
    """A file as a Secret or a ConfigMap's `binaryData` holds it (see `Keeper`)."""
    return base64.b64encode(gzip.compress(content, 5, mtime=0)).decode()


def _packed(content: bytes | None) -> str | None:
    return None if content is None else pack(content)


async def keep(keepers: Iterable[_Keeps], *, every_s: float = 1.0) -> None:
    """Carry back what changes, for as long as the control plane runs."""
    keepers = tuple(keepers)
    while True:
        for keeper in keepers:
            await asyncio.to_thread(_save, keeper)
        await asyncio.sleep(every_s)


def _save(keeper: _Keeps) -> None:
    try:
        keeper.save()
    except MeshdemoError as error:
        log.warning("cannot store what has changed; trying again: %s", error.message)
