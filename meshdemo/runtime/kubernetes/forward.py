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

from kubernetes import client as api
from kubernetes.stream import portforward, stream

from meshdemo.errors import Failed, MeshdemoError
from meshdemo.kube import Cluster

log = logging.getLogger(__name__)

_CHUNK = 64 * 1024


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
        threading.Thread(target=self._server.serve_forever, name="port forward", daemon=True).start()

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
                # A client of its own: the stream helper changes the client that it is given.
                core = api.CoreV1Api(api.ApiClient(self._cluster.configuration))
                tunnel = portforward(
                    core.connect_get_namespaced_pod_portforward,
                    self._pod,
                    self._namespace,
                    ports=str(self._remote),
                )
                return tunnel.socket(self._remote)
            except (api.ApiException, MeshdemoError, OSError) as error:
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
    core = api.CoreV1Api(api.ApiClient(cluster.configuration))
    try:
        session = stream(
            core.connect_get_namespaced_pod_exec,
            pod,
            namespace,
            container=container,
            command=command,
            stdout=True,
            stderr=True,
            stdin=False,
            tty=False,
            _preload_content=False,
        )
        session.run_forever(timeout=20)
    except api.ApiException as error:
        raise Failed(
            f"cannot run `{' '.join(command)}` in {pod}: {error.reason}",
            "the API server must allow `exec` into pods, and the image must have the command",
        ) from error
    said = session.read_stdout(timeout=0) or ""
    if status := session.returncode:
        complaint = (session.read_stderr(timeout=0) or said).strip()
        raise Failed(f"`{' '.join(command)}` in {pod} ended with status {status}: {complaint}")
    return str(said)
