"""service-b: a dependency that can be made slow or faulty, as a bad release would be (`breakable`)."""

from __future__ import annotations

from collections.abc import Callable

import gevent
from flask import Flask
from prometheus_client import Counter, Histogram

from meshdemo.workloads.breakable import Breakage
from meshdemo.workloads.server import LATENCY_BUCKETS, Canned, Measured, flask_app, run
from meshdemo.workloads.settings import Environment, Identity


def build(env: Environment, identity: Identity) -> tuple[Flask, Callable[[], None]]:
    """The app, from LAT_MS (ms) and ERR_RATE (0 to 1).

    Raises:
        BadSetting: a value makes no sense.
    """
    breakage = Breakage.of(env)

    requests = Counter("service_b_requests_total", "Responses, of any status.")
    errors = Counter("service_b_errors_total", "Responses with a status of 500 or above.")
    latency = Histogram(
        "service_b_latency_seconds", "Time to answer, errors included.", buckets=LATENCY_BUCKETS
    )

    def record(code: int, seconds: float) -> None:
        requests.inc()
        latency.observe(seconds)
        if code >= 500:
            errors.inc()

    app = flask_app(identity)
    ok = Canned(b'{"result":"ok"}\n')
    injected = Canned(b'{"error":"injected"}\n', status=500)

    def work() -> Canned:
        return injected if breakage.strike(gevent.sleep) else ok

    app.short("/work", work)
    app.wsgi_app = Measured(app.wsgi_app, record)  # type: ignore[method-assign]
    return app, lambda: None


if __name__ == "__main__":
    run("service-b", build)
