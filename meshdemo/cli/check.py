"""`meshdemo check`: what is installed, what is missing and how to get it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from meshdemo.cli import _context
from meshdemo.errors import Missing


def command(
    ctx: typer.Context,
    runtime: Annotated[
        str, typer.Option("--runtime", metavar="R", help="For which: auto, local, kind or kubernetes.")
    ] = "auto",
) -> None:
    """What is installed, what is missing and how to get it. Touches nothing."""
    from meshdemo.runtime import checks

    context = _context.of(ctx)
    with context.progress("Looking"):
        found = checks.check(runtime)
    ok = checks.all_required(found)
    if context.as_json:
        context.emit({"ok": ok, "checks": [asdict(one) for one in found]})
    else:
        from rich.markup import escape

        for one in found:
            mark = "[green]✓[/]" if one.ok else "[red]✗[/]" if one.required else "[yellow]-[/]"
            context.console.print(f"{mark} {one.name}: {escape(one.detail)}", soft_wrap=True)
            if one.remedy and not one.ok:
                context.console.print(f"    {escape(one.remedy)}", soft_wrap=True)
        if ok and runtime == "auto":
            from meshdemo.runtime.select import choose

            where, why = choose(runtime, context.name)
            context.say(f"`meshdemo up` takes the {where.kind} runtime: {why}")
    if not ok:
        missing = ", ".join(one.name for one in found if one.required and not one.ok)
        raise Missing(f"required and missing: {missing}")
