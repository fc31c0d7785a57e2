"""`meshdemo dashboard`: the web page of the mesh."""

from __future__ import annotations

import threading
from html import escape
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

from meshdemo.cli import _context
from meshdemo.runtime.local.paths import home


def command(
    ctx: typer.Context,
    port: Annotated[
        int | None,
        typer.Option("--port", metavar="P", min=0, max=65535, help="Serve it on this port too; 0: any."),
    ] = None,
    no_open: Annotated[bool, typer.Option("--no-open", help="Only print the address.")] = False,
) -> None:
    """The web page of the mesh: print its address and open it.

    The address signs in whoever has it: it carries the key of the mesh. With --port, or where the mesh
    is not on this machine, the command stays until Ctrl-C, because it carries the traffic.
    """
    context = _context.of(ctx)
    url = context.client.page_url()
    stays = context.runtime.kind != "local"
    if port is not None:
        from meshdemo.ui.relay import Relay

        target = urlsplit(url)
        relay = Relay(port, (target.hostname or "127.0.0.1", target.port or 80))
        threading.Thread(target=relay.serve_forever, daemon=True).start()
        url = target._replace(netloc=f"127.0.0.1:{relay.server_address[1]}").geturl()
        stays = True
    if context.as_json:
        context.emit({"url": url})
    else:
        context.say(url)
    if context.chatty and not no_open:
        _open(url, home() / context.name)
    if stays:
        threading.Event().wait()


def _open(url: str, folder: Path) -> None:
    """Open the page without its key in the arguments of the browser's process, which everybody can read.

    The browser is given a file that only its owner can read and that leads on; `down` removes it.
    """
    import webbrowser

    if not folder.is_dir():  # a mesh that somebody else brought up: there is only the address to print
        return
    page = folder / "dashboard.html"
    page.unlink(missing_ok=True)
    page.touch(mode=0o600)
    page.write_text(
        f'<!doctype html><title>meshdemo</title><meta http-equiv="refresh" content="0;url={escape(url)}">'
        f'<a href="{escape(url)}">the page of the mesh</a>\n',
        encoding="utf-8",
    )
    webbrowser.open(page.as_uri())
