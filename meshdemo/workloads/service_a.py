"""service-a: makes load on TARGET, open loop, at a rate that can be changed while it runs."""

from __future__ import annotations

from collections.abc import Callable

from flask import Flask

from meshdemo.workloads.load import Target
from meshdemo.workloads.load_app import load_app
from meshdemo.workloads.server import run
from meshdemo.workloads.settings import Environment, Identity


def build(env: Environment, identity: Identity) -> tuple[Flask, Callable[[], None]]:
    """The app; its settings are those of `load_app`.

    Raises:
        BadSetting: a value makes no sense.
    """

    def requests(target: Target) -> Callable[[], bytes]:
        always = target.request("service-a")
        return lambda: always

    return load_app(
        env,
        identity,
        target="http://service-b:5000/work",
        rps=50.0,
        metrics="service_a",
        requests=requests,
    )


if __name__ == "__main__":
    run("service-a", build)
