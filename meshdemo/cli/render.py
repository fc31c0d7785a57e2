"""`meshdemo render`: print what would be applied or pushed, and touch nothing."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from meshdemo.cli import _context

app = typer.Typer(no_args_is_help=True, help="Print what would be applied or pushed, and touch nothing.")

_App = Annotated[
    str | None,
    typer.Option("--app", metavar="A", help="pair, emojivoto or a file (default: what runs, else pair)."),
]
_Service = Annotated[str | None, typer.Option("--service", metavar="S", help="Only this service.")]


@app.command()
def envoy(ctx: typer.Context, app: _App = None, service: _Service = None) -> None:
    """What the control plane pushes to a sidecar of each service, as YAML."""
    from meshdemo.control import preview
    from meshdemo.control.model import Intent, MeshState
    from meshdemo.errors import Missing

    context = _context.of(ctx)
    mesh, intent = preview.imagined(_load(app or "pair"), context.name), Intent()
    if app is None:
        try:
            runtime = context.runtime
            intent = runtime.control().intent()
            mesh = MeshState(mesh=context.name, app=runtime.app(), instances=tuple(runtime.instances()))
        except Missing:
            pass  # nothing runs: what would be pushed to the pair
    _print(context, preview.preview(mesh, intent, service))


@app.command()
def kubernetes(ctx: typer.Context, app: _App = None) -> None:
    """The manifests that `up` applies to a cluster, as YAML."""
    from meshdemo.runtime.kubernetes import manifests

    context = _context.of(ctx)
    documents = manifests.render(_load(app or "pair"), {"name": context.name})
    if context.as_json:
        import yaml

        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        context.emit([one for one in yaml.load_all(documents, Loader=loader) if one])
    else:
        context.say(documents.rstrip())


def _load(name: str) -> Any:
    from meshdemo.apps.loader import load

    return load(name)


def _print(context: _context.Context, value: Any) -> None:
    if context.as_json:
        context.emit(value)
        return
    import yaml

    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    context.say(yaml.dump(value, Dumper=dumper, sort_keys=False, allow_unicode=True).rstrip())
