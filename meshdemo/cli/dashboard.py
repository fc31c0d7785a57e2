"""`meshdemo dashboard`: the web page of the mesh."""

from __future__ import annotations

import threading
from typing import Annotated
from urllib.parse import urlsplit

import typer

from meshdemo.cli import _context


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
        import webbrowser

        webbrowser.open(url)
    if stays:
        threading.Event().wait()
