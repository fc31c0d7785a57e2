"""An alternative to watch: Prometheus and Alertmanager, every interval one second, and a webhook that heals.

The rules are bare ratios (templates/bench/rules.yml.j2), as an operator would write them, and the webhook
carries out the same remedies with the same code as watch. What differs is how an incident is found, and
judged to be one.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from meshdemo.bench import machine
from meshdemo.bench.stage import Stage, until
from meshdemo.errors import Failed
from meshdemo.remediation.choose import Plan
from meshdemo.remediation.core import Action
from meshdemo.remediation.remedies import Remedies

if TYPE_CHECKING:
    from meshdemo.runtime.local.runtime import LocalRuntime

SERVICE, VERSION = "service-b", "v1"
_FIRST_REVISION = 1
_ANSWER_S = 2.0


def not_installed() -> str:
    """Why this alternative is left out; empty if it is there."""
    for names in (("prometheus",), ("prometheus-alertmanager", "alertmanager")):
        if machine.tool(*names) is None:
            return machine.missing(names[0])
    return ""


class Webhook:
    """Takes alerts and, if it is to heal, carries out a remedy for each."""

    def __init__(self, runtime: LocalRuntime, *, heals: bool) -> None:
        self._times: list[float] = []
        self._runtime = runtime
        self._remedies = Remedies(runtime.control, runtime, time.time)
        self._workers = ThreadPoolExecutor(2) if heals else None
        webhook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                now = time.time()
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                self.send_response(200)
                self.end_headers()
                for alert in body["alerts"]:
                    webhook.take(now, alert["labels"])

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = int(self._server.server_address[1])
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def times(self) -> list[float]:
        """When alerts came (seconds since the epoch)."""
        return list(self._times)

    def take(self, now: float, labels: Mapping[str, str]) -> None:
        """An alert has come."""
        self._times.append(now)
        if self._workers is not None:
            self._workers.submit(self._heal, labels)

    def close(self) -> None:
        """Take no more, and finish the remedies that are under way."""
        self._server.shutdown()
        self._server.server_close()
        if self._workers is not None:
            self._workers.shutdown(cancel_futures=True)

    def _heal(self, labels: Mapping[str, str]) -> None:
        plan = self._plan(labels)
        if plan is not None:
            self._remedies.carry_out(Action(plan.words, plan, labels["alertname"]))

    def _plan(self, labels: Mapping[str, str]) -> Plan | None:
        """What watch would do by its default policy; None: nothing that makes sense."""
        name, instance = labels["alertname"], labels.get("instance", "")
        if name == "InstanceDown":
            return Plan("restart", SERVICE, instance, f"restart {instance}", instances=(instance,))
        if name.startswith("Instance"):
            if self._runtime.control().intent().ejections:
                return None  # at least half of the instances stay in service
            return Plan("eject", SERVICE, instance, f"eject {instance}", instances=(instance,))
        if len(self._runtime.revisions(SERVICE, VERSION)) > 1:
            rollbacks = {VERSION: _FIRST_REVISION}
            return Plan("rollback", SERVICE, SERVICE, f"roll back {SERVICE}", rollbacks=rollbacks)
        faults = tuple(
            one.id for one in self._runtime.control().intent().faults
            if one.at == "mesh" and one.instance is None
        )  # fmt: skip
        if faults:
            words = f"clear fault {', '.join(faults)}"
            return Plan("clear-fault", SERVICE, SERVICE, words, fault_ids=faults)
        return None


@contextmanager
def running(stage: Stage, runtime: LocalRuntime, *, heals: bool) -> Iterator[Webhook]:
    """Both for a block, from when Prometheus has seen traffic of both instances.

    Raises:
        Failed: one of them does not start, or sees nothing.
    """
    with ExitStack() as stack:
        webhook = Webhook(runtime, heals=heals)
        stack.callback(webhook.close)
        alerts, port = stage.port(), stage.port()
        program = machine.tool("prometheus-alertmanager", "alertmanager")
        settings = stage.render("alertmanager.yml.j2", webhook=webhook.port)
        command = [
            str(program), f"--config.file={settings}", f"--storage.path={stage.path('alertmanager')}",
            f"--web.listen-address=127.0.0.1:{alerts}", "--cluster.listen-address=", "--log.level=warn",
        ]  # fmt: skip
        stack.enter_context(stage.running("alertmanager", command, port=alerts))
        instances = [one for one in runtime.instances() if one.service == SERVICE]
        settings = stage.render(
            "prometheus.yml.j2", rules=str(stage.render("rules.yml.j2")), alertmanager=alerts,
            instances=instances,
        )  # fmt: skip
        command = [
            str(machine.tool("prometheus")), f"--config.file={settings}",
            f"--storage.tsdb.path={stage.path('prometheus')}", f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=warn",
        ]  # fmt: skip
        stack.enter_context(stage.running("prometheus", command, port=port))
        query = f"count(irate(service_b_requests_total[3s])) + {len(instances)} * count(up == 1)"
        wanted = len(instances) + len(instances) * 2 * len(instances)
        until("Prometheus to see traffic", lambda: _value(port, query) == wanted)
        yield webhook


def _value(port: int, query: str) -> float | None:
    """The only value of a query; None without an answer."""
    url = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_ANSWER_S) as answer:
            found = json.load(answer)["data"]["result"]
    except (OSError, ValueError, KeyError):
        return None
    if len(found) > 1:
        raise Failed(f"Prometheus gives {len(found)} values for {query}")
    return float(found[0]["value"][1]) if found else None
