"""`meshdemo stat`: requests/s, success rate and latency, one row each."""

from __future__ import annotations

import typer

from meshdemo.cli import _context


def command(ctx: typer.Context) -> None:
    """Requests/s, success rate and latency, one row each."""
    _context.of(ctx).emit([])
