"""`meshdemo inject` and `meshdemo uninject`: manifests in, the same manifests with (without) sidecars out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from meshdemo.cli import _context
from meshdemo.errors import BadInput

if TYPE_CHECKING:
    from meshdemo.runtime.kubernetes.inject import Outcome

_File = Annotated[
    str, typer.Argument(metavar="FILE|-", help="Manifests (YAML or JSON); - for standard input.")
]


def command(
    ctx: typer.Context,
    file: _File,
    image: Annotated[
        str | None,
        typer.Option("--image", metavar="IMAGE", help="The sidecar's image (default: as `up` builds it)."),
    ] = None,
) -> None:
    """Put a sidecar into every workload of Kubernetes manifests; all else stays as it is, to the byte.

    The pods may be in any namespace of the cluster that the mesh (--name) is in. Exit status 1 if a workload
    was refused: it is passed on as it was, and the reason is on standard error.
    """
    from meshdemo.runtime.kubernetes import inject, sidecars

    context = _context.of(ctx)
    chosen = image or sidecars.default_image(context.name)
    _run(
        context,
        file,
        lambda text: inject.inject(text, lambda pod: sidecars.additions(pod, context.name, chosen)),
        sidecars.unknown(context.name),
    )


def uninject(ctx: typer.Context, file: _File) -> None:
    """Take the sidecars out again that `inject` put in."""
    from meshdemo.runtime.kubernetes import inject, sidecars

    context = _context.of(ctx)
    _run(context, file, lambda text: inject.uninject(text, sidecars.ours(context.name, "any")))


def _run(
    context: _context.Context,
    file: str,
    change: Callable[[str], tuple[str, Sequence[Outcome]]],
    note: str = "",
) -> None:
    text, outcomes = change(_read(file))
    if context.as_json:
        context.emit({"manifests": text, "workloads": [asdict(one) for one in outcomes]})
    else:
        sys.stdout.write(text)
        sys.stdout.flush()
        for one in outcomes:
            reason = f": {one.reason}" if one.reason else ""
            context.stderr.print(f"{one.kind} {one.name}: {one.action}{reason}", markup=False, soft_wrap=True)
    if note and any(one.action == "injected" for one in outcomes):
        context.stderr.print(f"Note: {note}", markup=False, soft_wrap=True)
    if any(one.action == "refused" for one in outcomes):
        raise typer.Exit(1)


def _read(file: str) -> str:
    # Bytes, because text mode would turn \r\n into \n.
    try:
        content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return content.decode("utf-8")
    except OSError as error:
        raise BadInput(
            f"cannot read '{file}': {error.strerror}", "give a file, or - for standard input"
        ) from None
    except UnicodeDecodeError:
        raise BadInput(f"'{file}' is not UTF-8 text", "give Kubernetes manifests as YAML or JSON") from None
