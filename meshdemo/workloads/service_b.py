"""service-b: a dependency that can be made slow or faulty, as a bad release would be.

LAT_MS adds latency to every answer of /work, ERR_RATE makes that share of them an error. An injected error
takes the latency too: it stands for a dependency that fails after the work, not for one that refuses it.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import gevent
from flask import Flask
from prometheus_client import Counter, Histogram

from meshdemo.workloads.server import LATENCY_BUCKETS, Canned, Measured, flask_app, run
from meshdemo.workloads.settings import Environment, Identity


def build(env: Environment, identity: Identity) -> tuple[Flask, Callable[[], None]]:
    """The app, from LAT_MS (ms) and ERR_RATE (0 to 1).

    Raises:
        BadSetting: a value makes no sense.
    """
    latency_s = env.number("LAT_MS", 0.0, allowed="milliseconds, 0 or more", low=0.0) / 1000
    error_share = env.number("ERR_RATE", 0.0, allowed="a share from 0 to 1", low=0.0, high=1.0)

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
        if latency_s:
            gevent.sleep(latency_s)
        return injected if random.random() < error_share else ok  # noqa: S311 - no secret hangs on it

    app.short("/work", work)
    app.wsgi_app = Measured(app.wsgi_app, record)  # type: ignore[method-assign]
    return app, lambda: None


if __name__ == "__main__":
    run("service-b", build)
