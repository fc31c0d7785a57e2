"""A port of a pod on this machine's loopback, through the API server; what `kubectl port-forward` does.

Each connection to the local port becomes a connection of its own to the pod that is ready at that moment, so
a forward outlives the pod: after a restart of the control plane the next request reaches the new one.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import socketserver
import threading
from collections.abc import Callable
from typing import Any

from kubernetes.client.exceptions import ApiException
from kubernetes.stream import ws_client

from meshdemo.errors import Failed, MeshdemoError
from meshdemo.kube import KINDS, Cluster

log = logging.getLogger(__name__)

_CHUNK = 64 * 1024
_RUN_S = 20.0


class Forward:
    """Forwards a local port for as long as the process lives, or until `close`."""

    def __init__(self, cluster: Cluster, namespace: str, find_pod: Callable[[], str], port: int) -> None:
        """`find_pod` names the pod to connect to; it is asked again whenever a connection fails."""
        self._cluster, self._namespace, self._find_pod, self._remote = cluster, namespace, find_pod, port
        self._pod: str | None = None
        forward = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                forward._serve(self.request)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *_: Any) -> None:
                log.debug("a forwarded connection failed", exc_info=True)

        self._server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="port forward", daemon=True
        ).start()

    @property
    def port(self) -> int:
        """The local port."""
        return int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """Where HTTP on the forwarded port is reached."""
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        """Stop taking connections."""
        self._server.shutdown()
        self._server.server_close()

    def _serve(self, here: socket.socket) -> None:
        there = self._connect()
        if there is None:
            return  # closing at once is how the client learns that nothing answers
        try:
            back = threading.Thread(target=_pump, args=(there, here), daemon=True)
            back.start()
            _pump(here, there)
            back.join()
        finally:
            there.close()

    def _connect(self) -> Any:
        for fresh in (False, True):
            try:
                if fresh or self._pod is None:
                    self._pod = self._find_pod()
                tunnel = ws_client.portforward_call(
                    self._cluster.configuration,
                    "GET",
                    self._cluster.url + KINDS["Pod"].path(self._namespace, self._pod, "portforward"),
                    query_params=[("ports", str(self._remote))],
                    headers=_headers(self._cluster),
                )
                return tunnel.socket(self._remote)
            except (ApiException, MeshdemoError, OSError) as error:
                log.debug("cannot forward to %s: %s", self._pod, error)
        self._pod = None
        return None


def _pump(source: Any, sink: Any) -> None:
    """Carry bytes one way until the source ends, then say so to the sink."""
    with contextlib.suppress(OSError):
        while data := source.recv(_CHUNK):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


def run(cluster: Cluster, namespace: str, pod: str, container: str, command: list[str]) -> str:
    """Run a command in a container; what it printed. Raises Failed if it fails."""
    query = [("container", container), ("stdout", "true"), ("stderr", "true")]
    query += [("command", word) for word in command]
    try:
        session: Any = ws_client.websocket_call(
            cluster.configuration,
            "GET",
            cluster.url + KINDS["Pod"].path(namespace, pod, "exec"),
            query_params=query,
            headers=_headers(cluster),
            _preload_content=False,
        )
        session.run_forever(timeout=_RUN_S)
    except ApiException as error:
        raise Failed(
            f"cannot run `{' '.join(command)}` in {pod}: {error.reason}",
            "the API server must allow `exec` into pods, and the image must have the command",
        ) from error
    said = str(session.read_stdout(timeout=0) or "")
    if status := session.returncode:
        complaint = (session.read_stderr(timeout=0) or said).strip()
        raise Failed(f"`{' '.join(command)}` in {pod} ended with status {status}: {complaint}")
    return said


def _headers(cluster: Cluster) -> dict[str, str]:
    """How a request says who it is. (The client's own classes for this would take a second to import.)"""
    token = cluster.configuration.auth_settings().get("BearerToken")
    return {"authorization": token["value"]} if token and token["value"] else {}
