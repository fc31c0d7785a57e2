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
    """Ask the server at a port of loopback, or at a Unix socket. Never raises."""
    content = b"" if body is None else json.dumps(body).encode()
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    request = head.encode() + content
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
        headers, _, rest = bytes(raw).partition(b"\r\n\r\n")
        chunked = b"\r\ntransfer-encoding: chunked" in headers.lower()
        return Answer(int(headers.split(maxsplit=2)[1]), _joined(rest) if chunked else rest)
    except (OSError, ValueError, IndexError):  # TimeoutError is an OSError
        return Answer(0)


def _joined(chunked: bytes) -> bytes:
    """The content of a chunked body (RFC 9112, 7.1). Raises ValueError if it is none."""
    content = bytearray()
    while chunked:
        size, _, rest = chunked.partition(b"\r\n")
        length = int(size.partition(b";")[0], 16)
        content += rest[:length]
        chunked = rest[length + 2 :] if length else b""
    return bytes(content)


async def answers(where: int | Path, path: str) -> bool:
    """Whether it answers 200."""
    return (await ask(where, path)).status == 200
