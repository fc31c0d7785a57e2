"""The load that the mesh makes on itself: asked for once, kept up over restarts of those who make it.

The wanted rate is part of the intent. A load-making instance knows nothing of that: it starts at the rate of
its environment and is told another over its plain listener (`PUT /load`, which the sidecar lets through to
who shows a token that the control plane alone knows). So
the control plane looks once a second at what each of them makes, and tells it again where that differs: the
same on every runtime, whoever restarted the instance. Nothing is looked at while nobody has asked for a rate.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException
from typing import Any

from flask import Blueprint, Response, jsonify, request

from meshdemo.control.api.mesh import Control
from meshdemo.control.api.request import control
from meshdemo.control.intent import set_load
from meshdemo.control.model import Instance, MeshState
from meshdemo.errors import BadInput, Failed

log = logging.getLogger(__name__)

_EVERY_S = 1.0
_TIMEOUT_S = 3.0
_AT_ONCE = 8


class LoadKeeper:
    """Keeps every load-making instance at the rate that the intent asks for."""

    def __init__(self, mesh: Control, *, every_s: float = _EVERY_S) -> None:
        self._mesh = mesh
        self._every_s = every_s
        self._workers = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="load")

    def start(self) -> None:
        """Begin, in a thread that ends with the process."""
        threading.Thread(target=self._run, name="load", daemon=True).start()

    def _run(self) -> None:
        pause = threading.Event()
        said: list[str] = []
        while not pause.wait(self._every_s):
            rate = self._mesh.intent.load_rps
            if rate is None:
                continue
            try:
                troubles = self.tell(rate, makers(self._mesh.mesh))
            except RuntimeError:
                return  # the process is ending: nothing can be started any more
            for trouble in troubles:
                if trouble not in said:  # once, not every second that it lasts
                    log.warning("%s", trouble)
            said = troubles

    def set(self, rps: float) -> dict[str, Any]:
        """Ask for another rate: in the intent, and of every instance that is ready.

        Returns the rate and the instances that took it. Raises BadInput for a rate that makes no sense;
        Failed naming the instances that did not take it. They are told again until they do.
        """
        effect = self._mesh.change(lambda intent, mesh: set_load(intent, mesh, rps))
        self._mesh.record({"event": "load", "rps": rps})
        there = makers(self._mesh.mesh)
        if troubles := self.tell(rps, there):
            raise Failed("; ".join(troubles), "the load is set as soon as it answers")
        return {
            "rps": rps,
            "instances": [instance.id for instance in there],
            "effect": effect.model_dump(mode="json"),
        }

    def tell(self, rps: float, instances: Iterable[Instance]) -> list[str]:
        """Have these instances make `rps`, those that do not yet; what went wrong, in words."""
        outcomes = self._workers.map(
            lambda instance: _settle(instance, rps, self._mesh.plane.load_token), instances
        )
        return [trouble for trouble in outcomes if trouble]


def makers(mesh: MeshState) -> list[Instance]:
    """The instances that make load and are ready."""
    return [i for i in mesh.instances if i.ready and mesh.app.services[i.service].load]


def _settle(instance: Instance, rps: float, token: str) -> str:
    """Bring one instance to a rate if it is at another; what went wrong, in words."""
    try:
        if _ask(instance, "GET", token)["rps"] != rps:
            _ask(instance, "PUT", token, {"rps": rps})
    except (OSError, HTTPException, ValueError, KeyError) as error:
        return f"{instance.id} does not take the load of {rps:g} requests/s: {error}"
    return ""


def _ask(instance: Instance, method: str, token: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    connection = HTTPConnection(instance.host, instance.metrics_port, timeout=_TIMEOUT_S)
    try:
        content = None if body is None else json.dumps(body)
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"} if body else {}
        connection.request(method, "/load", content, headers)
        answer = connection.getresponse()
        text = answer.read(4096)
    finally:
        connection.close()
    if answer.status != 200:
        raise ValueError(f"{answer.status} {text[:200].decode('utf-8', 'replace').strip()}")
    result: dict[str, Any] = json.loads(text)
    return result


def blueprint(keeper: LoadKeeper) -> Blueprint:
    """`/v1/load`, for `api.app.create_app`."""
    load = Blueprint("load", __name__)

    @load.get("/v1/load")
    def get_load() -> Response:
        mesh = control()
        return jsonify(
            {"rps": mesh.intent.load_rps, "instances": [instance.id for instance in makers(mesh.mesh)]}
        )

    @load.put("/v1/load")
    def put_load() -> Response:
        body = request.get_json(silent=True)
        if not isinstance(body, dict) or set(body) != {"rps"}:
            raise BadInput("the body says nothing but the rate", 'such as {"rps": 50}')
        return jsonify(keeper.set(body["rps"]))

    return load
