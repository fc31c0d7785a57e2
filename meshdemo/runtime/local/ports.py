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
from collections.abc import Iterable, Iterator
from contextlib import suppress

from meshdemo.errors import BadInput

LOOPBACK = "127.0.0.1"
GATEWAY_PORT = 8081
_CAN_HOLD = sys.platform == "linux"


class Port:
    """A port on loopback, held until `release` where that is possible."""

    def __init__(self, number: int = 0, *, hold: bool = True) -> None:
        """`number`: this very port (OSError if it cannot be had); 0: one that the system chooses."""
        self._hold = hold and _CAN_HOLD
        self._sockets: tuple[socket.socket, ...] = ()
        self.number = 0
        self._take(number)

    def renew(self) -> None:
        """Choose another number."""
        self.release()
        self._take(0)

    def _take(self, number: int) -> None:
        bound = socket.socket()
        held = [bound]
        try:
            if number and self._hold:
                # Two that hold one port do not hinder each other, so that one of them would have to lose it
                # later. The name of an abstract socket is there once.
                held.append(socket.socket(socket.AF_UNIX))
                held[1].bind(f"\0meshdemo/port/{number}")
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((LOOPBACK, number))
        except OSError:
            _close(held)
            raise
        self.number = bound.getsockname()[1]
        if self._hold:
            self._sockets = tuple(held)
        else:
            bound.close()

    def hand_over(self) -> None:
        """Let a program bind it that may not set SO_REUSEADDR. What else holds ports as this does still finds
        it taken, until `release`; any other program may get it first."""
        _close(self._sockets[:1])
        self._sockets = self._sockets[1:]

    def release(self) -> None:
        """Let go of it."""
        _close(self._sockets)
        self._sockets = ()

    def lost(self) -> bool:
        """Whether somebody uses it. Ask while the program that it is meant for does not listen on it."""
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, self.number))
            except OSError:
                return True
        return False


def renew_lost(ports: Iterable[Port]) -> list[Port]:
    """Choose other numbers for the ports that somebody uses (`Port.lost`); those ports."""
    lost = [port for port in ports if port.lost()]
    for port in lost:
        port.renew()
    return lost


def _close(sockets: Iterable[socket.socket]) -> None:
    for one in sockets:
        one.close()


# -- the gateway's port, which people know -----------------------------------------------------------------


def gateway_port(asked: int | None) -> Port:
    """The port that was asked for; if none was, the default one, or a free one where that is taken.

    Raises BadInput if the port that was asked for cannot be had.
    """
    try:
        return Port(asked or GATEWAY_PORT)
    except PermissionError:
        if asked is not None:
            raise BadInput(
                f"--gateway-port {asked}: you may not use this port", "give another one, 1024 to 65535"
            ) from None
    except OSError:
        if asked is not None:
            raise taken(asked) from None
    return Port()


def check_gateway_port(asked: int) -> None:
    """Raises BadInput if the port that was asked for cannot be had."""
    gateway_port(asked).release()


def taken(asked: int) -> BadInput:
    """That the port that was asked for is somebody else's."""
    return BadInput(
        f"--gateway-port {asked}: the port is taken{_by_whom(asked)}",
        "give another one, 1 to 65535; without --gateway-port a free one is found",
    )


def _by_whom(port: int) -> str:
    """The program that listens on a port, as far as that may be known."""
    return next((f" by {name} (process {pid})" for name, pid in _listeners(port)), "")


def _listeners(port: int) -> Iterator[tuple[str, int]]:
    import psutil

    with suppress(psutil.Error):
        for one in psutil.net_connections("tcp"):
            if one.status == psutil.CONN_LISTEN and one.laddr and one.laddr.port == port and one.pid:
                yield psutil.Process(one.pid).name(), one.pid
