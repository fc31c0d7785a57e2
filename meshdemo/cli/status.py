"""`meshdemo status`: what runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from meshdemo.cli import _context

if TYPE_CHECKING:
    from rich.console import Console

    from meshdemo.runtime.base import Runtime


def command(ctx: typer.Context) -> None:
    """What runs: services, versions, instances, and where to look at them."""
    context = _context.of(ctx)
    state = status(context.runtime)
    if context.as_json:
        context.emit(state)
    else:
        _show(state, context.console)


def status(runtime: Runtime) -> dict[str, Any]:
    """What runs, as `status -o json` and `up -o json` print it. Raises Missing if nothing does."""
    from meshdemo.errors import MeshdemoError

    app, instances = runtime.app(), runtime.instances()
    try:
        revision = runtime.control().status()["revision"]
    except MeshdemoError:
        revision = None
    services = []
    for name in app.services:
        versions: dict[str, list[dict[str, Any]]] = {}
        for one in instances:
            if one.service == name:
                row = {
                    "id": one.id, "ready": one.ready, "address": f"{one.host}:{one.inbound_port}",
                    "revision": one.revision,
                }  # fmt: skip
                versions.setdefault(one.version, []).append(row)
        rows = [{"version": version, "instances": rows} for version, rows in versions.items()]
        services.append({"name": name, "versions": rows})
    return {
        "name": runtime.name,
        "runtime": runtime.kind,
        "app": app.name,
        "ready": revision is not None and all(one.ready for one in instances),
        "revision": revision or 0,
        "services": services,
        "endpoints": runtime.endpoints(),
        "unavailable": runtime.unavailable(),
    }


def _show(state: dict[str, Any], console: Console) -> None:
    from rich.table import Table

    ready = "[green]ready[/]" if state["ready"] else "[yellow]not ready[/]"
    console.print(f"Mesh [bold]{state['name']}[/], {state['runtime']} runtime, app {state['app']}: {ready}")
    table = Table(box=None, pad_edge=False)
    for heading in ("SERVICE", "VERSION", "INSTANCE", "READY", "REVISION", "ADDRESS"):
        table.add_column(heading, overflow="fold")
    for service in state["services"]:
        for version in service["versions"]:
            for one in version["instances"]:
                mark = "[green]yes[/]" if one["ready"] else "[yellow]no[/]"
                table.add_row(
                    service["name"], version["version"], one["id"], mark, str(one["revision"]), one["address"]
                )
    console.print(table)
    for name, url in state["endpoints"].items():
        if url:
            console.print(f"{name}: {url}")
    for name, why in state["unavailable"].items():
        console.print(f"{name}: {why}", markup=False, soft_wrap=True)
