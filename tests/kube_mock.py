"""A mock of the API server (kmock) in a thread of its own, for code that is not asynchronous."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import kmock
from kubernetes import client as api

from meshdemo.kube import Cluster

T = TypeVar("T")


class ApiServer:
    """`mock` is its handler; what touches it goes through `do`, for it lives on another loop."""

    def __init__(self) -> None:
        self._scripts: dict[str, list[list[Any]]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._run(self._start())

    async def _start(self) -> None:
        self.mock = kmock.KubernetesScaffold()
        await self.mock.__aenter__()
        self._server = kmock.Server(self.mock)
        await self._server.__aenter__()

    def close(self) -> None:
        async def stop() -> None:
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            await self._server.__aexit__(None, None, None)

        self._run(stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.port}"

    def cluster(self, patience_s: float = 10.0) -> Cluster:
        configuration = api.Configuration()
        configuration.host = self.url
        return Cluster(configuration, patience_s=patience_s)

    def do(self, fn: Callable[[kmock.KubernetesScaffold], T]) -> T:
        async def call() -> T:
            return fn(self.mock)

        found: T = self._run(call())
        return found

    def answer(
        self,
        criterion: str,
        payload: Any = None,
        *,
        status: int = 200,
        headers: dict[str, str] | None = None,
        times: int | None = None,
    ) -> None:
        """Answer requests (`get /path`) : `times` of them, then as said next.

        Of several criteria that a request meets, the one that was given first answers it. A payload may be
        a callable, of the request or of nothing.
        """
        script = self._scripts.get(criterion)
        if script is None:
            script = self._scripts[criterion] = []
            self.do(lambda mock: mock[criterion] << (lambda request: _next(script, request)))
        script.append([times, status, payload, headers])

    def requests(self, method: str = "", path: str = "") -> list[Any]:
        """The requests so far."""
        return self.do(
            lambda mock: [
                request
                for request in list(mock._requests)
                if (not method or request.method.value == method.upper()) and path in str(request.url)
            ]
        )


def _next(script: list[list[Any]], request: kmock.Request) -> kmock.Response:
    entry = script[0]
    times, status, payload, headers = entry
    if times is not None:
        entry[0] = times - 1
        if times == 1 and len(script) > 1:
            script.pop(0)
    if callable(payload):
        payload = payload(request) if inspect.signature(payload).parameters else payload()
    if isinstance(payload, Refusal):
        status, payload = payload.code, payload.body()
    # The status is always said: kmock remembers the one of the answer before.
    return kmock.Response(status=status, payload={} if payload is None else payload, headers=headers)


@dataclass(frozen=True)
class Refusal:
    """What the API server answers instead of an object."""

    code: int
    reason: str
    message: str

    def body(self) -> dict[str, Any]:
        """The Status object."""
        return {
            "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": self.code, "reason": self.reason,
            "message": self.message,
        }  # fmt: skip


class Stored:
    """A ConfigMap (or Secret) with the optimistic concurrency of the real thing."""

    def __init__(self, server: ApiServer, name: str, *, secret: bool = False) -> None:
        self.object: dict[str, Any] = {"metadata": {"name": name, "resourceVersion": "1"}}
        self.writes = 0
        self.refusal: Refusal | None = None  # what a write is answered with instead of being done
        self.loses_answers = 0  # so many writes are done, and answered as if they were not
        path = f"/api/v1/namespaces/n/{'secrets' if secret else 'configmaps'}/{name}"
        server.answer(f"get {path}", lambda: self.object)
        server.answer(f"patch {path}", self.patch)

    def patch(self, request: kmock.Request) -> Any:
        if self.refusal is not None:
            return self.refusal
        body = request.data
        expected = body.get("metadata", {}).get("resourceVersion")
        if expected is not None and expected != self.object["metadata"]["resourceVersion"]:
            return Refusal(409, "Conflict", "the object has been modified")
        self.write({key: value for key, value in body.items() if key != "metadata"})
        if self.loses_answers:
            self.loses_answers -= 1
            return Refusal(503, "ServiceUnavailable", "gone before it answered")
        return self.object

    def write(self, changes: dict[str, Any]) -> None:
        self.writes += 1
        version = str(int(self.object["metadata"]["resourceVersion"]) + 1)
        merged = {**self.object, "metadata": {**self.object["metadata"], "resourceVersion": version}}
        for field, values in changes.items():
            both = {**merged.get(field, {}), **values}
            merged[field] = {key: value for key, value in both.items() if value is not None}
        self.object = merged


FOREVER = (b"", lambda: asyncio.sleep(3600))
"""A watch to which nothing comes."""
