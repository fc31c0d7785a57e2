"""What workloads that make load have in common: settings, GET and PUT /load, and metrics.

    GET /load                                   the load as it is
    PUT /load {"rps": 50, "max_in_flight": 100} changes one or both, and answers as GET does

A request that is due while MAX_IN_FLIGHT are unanswered is not sent. It is counted as an error with the code
"dropped", so the limit protects the machine and never makes a stalled server look better than it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flask import Flask, Response, jsonify, request
from prometheus_client import Counter, Gauge, Histogram

from meshdemo.workloads.load import (
    MAX_IN_FLIGHT,
    MAX_RPS,
    Load,
    Schedule,
    Target,
    poisson,
    uniform,
)
from meshdemo.workloads.server import LATENCY_BUCKETS, flask_app
from meshdemo.workloads.settings import Environment, Identity

_RPS_ALLOWED = f"requests per second from 0 to {MAX_RPS:.0f}"
_LIMIT_ALLOWED = f"a whole number from 1 to {MAX_IN_FLIGHT}"


def load_app(
    env: Environment,
    identity: Identity,
    *,
    target: str,
    rps: float,
    metrics: str,
    requests: Callable[[Target], Callable[[], bytes]],
) -> tuple[Flask, Callable[[], None]]:
    """The app, from TARGET, RPS, MAX_IN_FLIGHT, TIMEOUT_S, ARRIVALS, and HTTP_PROXY and NO_PROXY.

    Args:
        target: default of TARGET.
        rps: default of RPS, in requests per second.
        metrics: prefix of the metrics' names.
        requests: given the target, what gives the next request.

    Raises:
        BadSetting: a value makes no sense.
    """
    goal = Target.of(env.text("TARGET", target), env.variables)
    rps = env.number("RPS", rps, allowed=_RPS_ALLOWED, low=0.0, high=MAX_RPS)
    max_in_flight = env.whole("MAX_IN_FLIGHT", 2000, low=1, high=MAX_IN_FLIGHT)
    timeout_s = env.number("TIMEOUT_S", 30.0, allowed="seconds from 0.001 to 3600", low=0.001, high=3600.0)
    gap = poisson if env.choice("ARRIVALS", ("uniform", "poisson")) == "poisson" else uniform

    load = Load(
        goal,
        Schedule(gap),
        next_request=requests(goal),
        max_in_flight=max_in_flight,
        timeout_s=timeout_s,
        record=_recorder(metrics),
    )
    Gauge(f"{metrics}_in_flight", "Requests sent and not answered.").set_function(lambda: load.in_flight)
    Gauge(f"{metrics}_target_rps", "Rate asked for, in requests per second.").set_function(lambda: load.rps)

    app = flask_app(identity)

    @app.get("/load")
    def get_load() -> dict[str, Any]:
        return {
            "rps": load.rps,
            "max_in_flight": load.max_in_flight,
            "achieved_rps": round(load.achieved_rps(), 2),
            "in_flight": load.in_flight,
            "dropped": load.dropped,
            "target": goal.url,
        }

    @app.put("/load")
    def put_load() -> dict[str, Any] | tuple[Response, int]:
        try:
            wanted = _change(request.get_json(force=True, silent=True))
        except ValueError as error:
            return jsonify(error=str(error)), 400
        load.set(float(wanted.get("rps", load.rps)), int(wanted.get("max_in_flight", load.max_in_flight)))
        return get_load()

    load.set(rps, max_in_flight)
    load.start()
    return app, lambda: load.stop(identity.drain_s)


def _recorder(metrics: str) -> Callable[[str, float | None], None]:
    """Where requests are counted: by code, which is a status or a word for why there is none."""
    requests = Counter(
        f"{metrics}_requests_total", "Requests that were due, by what became of them.", ["code"]
    )
    errors = Counter(f"{metrics}_errors_total", "Requests that failed: a status of 500 or above, or none.")
    latency = Histogram(
        f"{metrics}_latency_seconds",
        "From when a request was due until its end, errors included; not of those never sent.",
        buckets=LATENCY_BUCKETS,
    )
    by_code: dict[str, Counter] = {}

    def record(code: str, seconds: float | None) -> None:
        counter = by_code.get(code)
        if counter is None:
            counter = by_code[code] = requests.labels(code)
        counter.inc()
        if seconds is not None:
            latency.observe(seconds)
        if code >= "500":  # words sort after digits
            errors.inc()

    return record


def _change(body: Any) -> dict[str, float]:
    """What a PUT asks for.

    Raises:
        ValueError: it makes no sense; says what is allowed.
    """
    allowed = 'a JSON object like {"rps": 50, "max_in_flight": 2000}'
    if not isinstance(body, dict) or not body:
        raise ValueError(f"allowed: {allowed}")
    for name, value in body.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if name == "rps":
            if not number or not 0 <= value <= MAX_RPS:
                raise ValueError(f"rps: {value!r:.60} makes no sense; allowed: {_RPS_ALLOWED}")
        elif name == "max_in_flight":
            if not number or not 1 <= value <= MAX_IN_FLIGHT or value != int(value):
                raise ValueError(f"max_in_flight: {value!r:.60} makes no sense; allowed: {_LIMIT_ALLOWED}")
        else:
            raise ValueError(f"{name!r:.60} is no setting of the load; allowed: {allowed}")
    return body
