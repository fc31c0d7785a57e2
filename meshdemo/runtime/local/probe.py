"""Asks whether a server is there, without a client library: a supervisor asks often while things start."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshdemo.apps.model import Service

_TIMEOUT_S = 1.0
_SETTINGS = 4  # frame type (RFC 9113, 6.5)
# The client's preface and an empty SETTINGS frame; the server begins with its SETTINGS, too (RFC 9113, 3.4).
_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, _SETTINGS, 0, 0, 0, 0, 0])
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


async def listening(admin: Path) -> set[int] | None:
    """The ports that a live sidecar listens on; None if it is not live, or does not say.

    `/ready` alone does not tell that a listener got its port.
    """
    if not await answers(admin, "/ready"):
        return None
    listed = await ask(admin, "/listeners?format=json")
    try:
        statuses = json.loads(listed.body).get("listener_statuses", [])
        return {one["local_address"]["socket_address"]["port_value"] for one in statuses}
    except (ValueError, KeyError, TypeError):
        return None


async def serves(port: int, service: Service, timeout_s: float = _TIMEOUT_S) -> bool:
    """Whether a workload's own server answers: 200 at its health check, for gRPC its first HTTP/2 frame.

    A TCP service is only asked for a connection, which the system makes even for a process that hangs.
    """
    if service.protocol == "http":
        return (await ask(port, service.healthz, timeout_s=timeout_s)).status == 200
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                if service.protocol == "tcp":
                    return True
                writer.write(_HTTP2_HELLO)
                frame = await reader.readexactly(9)
                return frame[3] == _SETTINGS
            finally:
                writer.close()
    except (OSError, asyncio.IncompleteReadError):
        return False
