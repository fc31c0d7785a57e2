"""Asks one question over HTTP, without a client library: the supervisor asks thousands while things start."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TIMEOUT_S = 1.0
_LIMIT = 4_000_000  # bytes of an answer that are read at most


@dataclass(frozen=True, slots=True)
class Answer:
    """Status 0: nobody answered."""

    status: int
    body: bytes = b""


async def ask(
    where: int | Path, path: str, *, method: str = "GET", body: Any = None, timeout_s: float = _TIMEOUT_S
) -> Answer:
    """Ask the server at a port of loopback, or at a Unix socket. Never raises.

    HTTP/1.0, so that the end of the answer is the end of the connection.
    """
    content = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.0\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
    request = f"{head}Content-Type: application/json\r\n\r\n".encode() + content
    try:
        async with asyncio.timeout(timeout_s):
            if isinstance(where, Path):
                reader, writer = await asyncio.open_unix_connection(where)
            else:
                reader, writer = await asyncio.open_connection("127.0.0.1", where)
            try:
                writer.write(request)
                raw = bytearray()
                while len(raw) < _LIMIT and (chunk := await reader.read(65536)):
                    raw += chunk
            finally:
                writer.close()
        first, _, rest = bytes(raw).partition(b"\r\n")
        return Answer(int(first.split()[1]), rest.partition(b"\r\n\r\n")[2])
    except (OSError, ValueError, IndexError):  # TimeoutError is an OSError
        return Answer(0)


async def answers(where: int | Path, path: str) -> bool:
    """Whether it answers 200."""
    return (await ask(where, path)).status == 200
