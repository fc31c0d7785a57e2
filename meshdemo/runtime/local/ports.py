"""Ports, chosen by the system and kept.

A port that is merely found free may be somebody else's a moment later, most likely as the source of an
outgoing connection. So each is held: on Linux a socket that is bound with SO_REUSEADDR and does not listen
keeps the system from giving the port away, while a server that sets SO_REUSEADDR too (Envoy, gRPC, Go, Node
and Python servers do) may still bind and listen on it. Other systems refuse the second bind, so there,
and for programs we do not know, a port is only found; losing it is then noticed, and another one chosen.
"""

from __future__ import annotations

import socket
import sys

LOOPBACK = "127.0.0.1"
_CAN_HOLD = sys.platform == "linux"


class Port:
    """A port on loopback, held until `release` where that is possible."""

    def __init__(self, *, hold: bool = True) -> None:
        self._hold = hold and _CAN_HOLD
        self._socket: socket.socket | None = None
        self.number = 0
        self.renew()

    def renew(self) -> None:
        """Choose another number."""
        self.release()
        bound = socket.socket()
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((LOOPBACK, 0))
        self.number = bound.getsockname()[1]
        if self._hold:
            self._socket = bound
        else:
            bound.close()

    def release(self) -> None:
        """Let go of it."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def lost(self) -> bool:
        """Whether somebody uses it. Ask while the program that it is meant for does not listen on it."""
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, self.number))
            except OSError:
                return True
        return False
