"""A supervisor's API on a Unix socket: one JSON object in, one out, a connection each (client.py)."""

from __future__ import annotations

import asyncio
import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

from meshdemo.errors import Failed, MeshdemoError
from meshdemo.runtime.local.operations import Operations

log = logging.getLogger(__name__)

_LIMIT = 16 * 1024 * 1024  # bytes of one message


async def listen(operations: Operations, path: Path) -> asyncio.Server:
    """Answer on this socket, which its owner alone may open. Raises OSError."""
    path.unlink(missing_ok=True)  # noqa: ASYNC240 - takes no time
    server = await asyncio.start_unix_server(partial(_serve, operations), path, limit=_LIMIT)
    path.chmod(0o600)  # noqa: ASYNC240
    return server


def refusal(error: MeshdemoError) -> dict[str, Any]:
    """An error as it goes out; `client.told` makes it one again."""
    return {"error": error.message, "remedy": error.remedy, "exit_status": error.exit_status}


async def _serve(operations: Operations, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        request = json.loads(await reader.readline())
        answer = await _answer(operations, request.pop("op"), request)
        writer.write(json.dumps(answer).encode() + b"\n")
        await writer.drain()
    except (OSError, ValueError):
        pass  # the client has gone
    finally:
        writer.close()


async def _answer(operations: Operations, op: str, arguments: dict[str, Any]) -> dict[str, Any]:
    try:
        if op.startswith("_"):
            raise AttributeError(f"no operation '{op}'")
        return {"result": await getattr(operations, op)(**arguments)}
    except MeshdemoError as error:
        return refusal(error)
    except Exception as error:
        log.exception("%s failed", op)
        return refusal(Failed(f"{type(error).__name__}: {error}", "see `meshdemo logs`"))
