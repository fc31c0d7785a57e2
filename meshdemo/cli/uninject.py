"""`meshdemo uninject`: see `inject`."""

from meshdemo.cli.inject import uninject as command

__all__ = ["command"]
