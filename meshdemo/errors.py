"""The errors that a user can cause or must act on.

One class with a message and a remedy; the CLI prints both on one line each, without a traceback, and
exits with the class's status (shared contract: 2 bad input, 3 something required is missing, 1 it failed).
"""

from __future__ import annotations


class MeshdemoError(Exception):
    """Something went wrong that the user should read, not debug.

    Args:
        message: what is wrong, naming the value.
        remedy: what to do about it; empty if nothing sensible can be said.
    """

    exit_status = 1

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} ({self.remedy})" if self.remedy else self.message


class Failed(MeshdemoError):
    """The command was understood, tried, and did not succeed."""


class BadInput(MeshdemoError):
    """The user gave a value that makes no sense; nothing was changed."""

    exit_status = 2


class Missing(MeshdemoError):
    """Something that the command needs is not there (a binary, a running mesh, a permission)."""

    exit_status = 3
