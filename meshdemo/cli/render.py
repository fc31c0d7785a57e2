"""`meshdemo render`: print what would be applied or pushed, and touch nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from meshdemo.cli import _context, _values
from meshdemo.errors import Failed

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
            url = runtime.endpoints()["gateway"]
            edges = (preview.edge(urlsplit(url).port or 80),) if url else ()
            mesh = MeshState(
                mesh=context.name, app=runtime.app(), instances=tuple(runtime.instances()), gateways=edges
            )
        except Missing:
            pass  # nothing runs: what would be pushed to the pair
    _print(context, preview.preview(mesh, intent, service))


@app.command()
def kubernetes(ctx: typer.Context, app: _App = None, service: _Service = None) -> None:
    """The manifests that `up` applies to a cluster, as YAML; those of one service with --service."""
    import yaml

    from meshdemo.cli.up import observed
    from meshdemo.names import SERVICE
    from meshdemo.runtime.kubernetes import manifests

    context = _context.of(ctx)
    definition = _definition(context, app, service)
    text = manifests.render(definition, {"name": context.name, **observed(definition)})
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    documents = [(part, yaml.load(part, Loader=loader)) for part in re.split(r"(?m)^---\n", text)]  # noqa: S506
    chosen = [
        (part, one)
        for part, one in documents
        if one and (service is None or one["metadata"].get("labels", {}).get(SERVICE) == service)
    ]
    if context.as_json:
        context.emit([one for _, one in chosen])
    else:
        context.say("".join(f"---\n{part}" for part, _ in chosen).rstrip())


_Policy = Annotated[
    Path | None,
    typer.Option("--policy", metavar="FILE", help="Whose objectives become rules (default: policy.yaml)."),
]
_Out = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="Write the files there instead of printing them.")
]


@app.command()
def prometheus(
    ctx: typer.Context,
    app: _App = None,
    service: _Service = None,
    policy: _Policy = None,
    out: _Out = None,
    scrape: Annotated[
        str,
        typer.Option("--scrape", metavar="DURATION", help="How often yours scrapes; bounds the windows."),
    ] = "5s",
) -> None:
    """Prometheus' configuration, and the recording and alert rules of a policy's objectives.

    The configuration is that of the runtime on which the mesh runs; --service is about the rules.
    """
    from meshdemo.remediation import policyfile, rules
    from meshdemo.resources import DEFAULT_POLICY
    from meshdemo.runtime.local.prometheus import RULES

    context = _context.of(ctx)
    definition = _definition(context, app, service)
    objectives = policyfile.load(policy or DEFAULT_POLICY).of_app(definition.name)
    if service is not None:
        objectives = objectives.of_service(service)
    _give(
        context,
        {
            "prometheus.yml": _prometheus_config(context).rstrip() + "\n",
            RULES: rules.render(objectives, _values.duration_s(scrape, "--scrape")) + "\n",
        },
        out,
    )


def _prometheus_config(context: _context.Context) -> str:
    from meshdemo.errors import MeshdemoError
    from meshdemo.runtime.local import prometheus as local
    from meshdemo.runtime.local.paths import MeshPaths

    control_plane = "127.0.0.1:8080"  # an example, while nothing runs
    with suppress(MeshdemoError):
        if context.runtime.kind != "local":
            from meshdemo.runtime.kubernetes.manifests import prometheus_config

            return prometheus_config(context.name, context.name)
        control_plane = urlsplit(context.client.base_url).netloc
    paths = MeshPaths.of(context.name)
    return local.config(
        mesh=context.name,
        targets=paths.prometheus,
        control_plane=control_plane,
        credentials=paths.control / "api-token",
    )


@app.command()
def grafana(
    ctx: typer.Context,
    app: _App = None,
    service: _Service = None,
    url: Annotated[
        str | None,
        typer.Option("--prometheus", metavar="URL", help="As Grafana reaches it (default: the mesh's)."),
    ] = None,
    out: _Out = None,
) -> None:
    """Grafana's provisioning: the data source and two dashboards; --service: which one is shown first."""
    from meshdemo.errors import MeshdemoError
    from meshdemo.ui import grafana as dashboards

    context = _context.of(ctx)
    if service is not None:
        _definition(context, app, service)
    if url is None:
        with suppress(MeshdemoError):
            url = context.runtime.endpoints()["prometheus"]
    folder = (out.resolve() / "dashboards") if out else Path("/etc/grafana/provisioning/dashboards")
    _give(context, dashboards.files(url or "http://127.0.0.1:9090/", str(folder), service), out)


def _give(context: _context.Context, files: Mapping[str, str], out: Path | None) -> None:
    """Write files to a folder, or print them: as YAML documents, each after its name."""
    if out is not None:
        try:
            for name, text in files.items():
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                (out / name).write_text(text)
        except OSError as error:
            raise Failed(f"cannot write {error.filename}: {error.strerror}") from error
        names = [str(out / name) for name in files]
        if context.as_json:
            context.emit({"files": names})
        else:
            context.say("\n".join(names))
    elif context.as_json:
        import yaml

        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        parsed = {name: yaml.load(text, Loader=loader) for name, text in files.items()}  # noqa: S506 - a safe loader
        context.emit(parsed)
    else:
        context.say("".join(f"---\n# {name}\n{text}" for name, text in files.items()).rstrip())


def _definition(context: _context.Context, app: str | None, service: str | None) -> Any:
    """The app that is named, else what runs, else the pair. Raises BadInput if it has no such service."""
    from meshdemo.errors import BadInput, MeshdemoError

    definition = None
    if app is None:
        with suppress(MeshdemoError):
            definition = context.runtime.app()
    definition = definition or _load(app or "pair")
    if service is not None and service not in definition.services:
        raise BadInput(f"no service '{service}'; there are: {', '.join(definition.services)}")
    return definition


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
