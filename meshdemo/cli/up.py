"""`meshdemo up`: bring the mesh up, or finish and change a running one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meshdemo.cli import _context
from meshdemo.errors import BadInput, MeshdemoError

if TYPE_CHECKING:
    from pathlib import Path

    from meshdemo.apps.model import App
    from meshdemo.runtime.base import Runtime

_GRACE_S = 1.0  # a step that knows why it is late gives up by itself, and says so


_MAX_TIMEOUT_S = 86_400.0


def command(
    ctx: typer.Context,
    runtime: Annotated[
        str, typer.Option("--runtime", metavar="R", help="Where: auto, local, kind or kubernetes.")
    ] = "auto",
    app: Annotated[
        str | None,
        typer.Option("--app", metavar="APP", help="What: pair, emojivoto or a YAML file (default: pair)."),
    ] = None,
    rps: Annotated[
        float | None,
        typer.Option(
            "--rps",
            metavar="N",
            help="Requests per second that each instance which makes load sends, 0 to 100000 (default: 50).",
        ),
    ] = None,
    replicas: Annotated[
        list[str] | None,
        typer.Option(
            "--replicas", metavar="SERVICE=N", help="Instances of a service, 0 to 1000; may be repeated."
        ),
    ] = None,
    version: Annotated[
        list[str] | None,
        typer.Option(
            "--version",
            metavar="SERVICE=V",
            help="Start a further version that the app file has; may be repeated.",
        ),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(
            "--context", metavar="CTX", help="kubeconfig context (kubernetes; default: the current one)."
        ),
    ] = None,
    kind_image: Annotated[
        str | None,
        typer.Option(
            "--kind-image",
            metavar="IMAGE",
            envvar="MESHDEMO_KIND_IMAGE",
            help="Node image (kind; default: that of the kind that is installed).",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", metavar="N", min=0, help="Nodes besides the first (kind; default: 0)."),
    ] = None,
    base_image: Annotated[
        str | None,
        typer.Option(
            "--base-image",
            metavar="IMAGE",
            envvar="MESHDEMO_BASE_IMAGE",
            help="Debian with Python, to build images from (kind, kubernetes).",
        ),
    ] = None,
    registry: Annotated[
        str | None,
        typer.Option("--registry", metavar="PREFIX", help="Where to push images to (kubernetes)."),
    ] = None,
    observability: Annotated[
        bool | None,
        typer.Option(
            "--observability/--no-observability",
            help="Prometheus and Grafana in the cluster; with, unless said otherwise (kind, kubernetes).",
        ),
    ] = None,
    gateway_port: Annotated[
        int | None,
        typer.Option(
            "--gateway-port",
            metavar="N",
            help="Where the app's front is reached (default: 8081, or a free port if that is taken).",
        ),
    ] = None,
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(
            "--otlp-endpoint",
            metavar="URL",
            help="Where sidecars send their spans (OpenTelemetry, gRPC: http://HOST:4317); off: nowhere.",
        ),
    ] = None,
    certificate_lifetime: Annotated[
        str | None,
        typer.Option(
            "--certificate-lifetime",
            metavar="DURATION",
            help="How long sidecars' certificates live, 10s to 365d (default: 1h); they renew themselves.",
        ),
    ] = None,
    watch: Annotated[
        bool | None,
        typer.Option("--watch/--no-watch", help="Run watch in the cluster, too (kind, kubernetes)."),
    ] = None,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", help="Give up after so many seconds.")
    ] = 300.0,
) -> None:
    """Bring the mesh up, or finish and change a running one.

    Returns when every instance is ready and a request has gone through the mesh and come back with 200.
    """
    from meshdemo.runtime.base import UpOptions
    from meshdemo.runtime.select import choose
    from meshdemo.runtime.steps import run_steps

    frame = _context.of(ctx)
    started = time.monotonic()
    counts = {name: _whole(text, name) for name, text in _pairs(replicas, "--replicas", "SERVICE=N")}
    versions: dict[str, list[str]] = {}
    for name, text in _pairs(version, "--version", "SERVICE=VERSION"):
        versions.setdefault(name, []).append(text)
    if not 0 < timeout <= _MAX_TIMEOUT_S:
        raise BadInput(f"--timeout {timeout:g}: a time-out is more than zero and at most a day (86400 s)")
    if gateway_port is not None and not 1 <= gateway_port <= 65535:
        raise BadInput(f"--gateway-port {gateway_port}: allowed is 1 to 65535")

    if otlp_endpoint not in (None, "off"):
        from meshdemo.control.intent import trace_endpoint

        trace_endpoint(otlp_endpoint)  # before anything is started

    lifetime_s = None if certificate_lifetime is None else _lifetime_s(certificate_lifetime)

    where, why = choose(runtime, frame.name)
    definition, folder = _app(app, where)
    options = UpOptions(
        name=frame.name, app=definition, rps=rps, replicas=counts, versions=versions, timeout_s=timeout,
        extra={
            "cwd": str(folder), "context": context, "kind_image": kind_image, "workers": workers,
            "base_image": base_image, "registry": registry, "observability": observability,
            "watch": watch, "gateway_port": gateway_port, **observed(definition),
        },
    )  # fmt: skip
    steps = where.steps(options)
    if steps and frame.chatty:
        frame.stderr.print(f"Mesh '{frame.name}' on the {where.kind} runtime ({why}), app {definition.name}")
    with _context.stoppable(undoing=True):
        seconds = run_steps(steps, frame.stderr if frame.chatty else None, timeout_s=timeout + _GRACE_S)
    if otlp_endpoint is not None:
        where.control().set_traces(None if otlp_endpoint == "off" else otlp_endpoint)
    renewed = None if lifetime_s is None else where.control().set_certificate_lifetime(lifetime_s)
    for note in getattr(where, "notes", ()):
        frame.stderr.print(f"Note: {note}", markup=False, soft_wrap=True)
    if frame.verbose:
        for title, took in seconds.items():
            frame.stderr.print(f"{took:6.2f} s  {title}")

    if frame.as_json:
        from meshdemo.cli.status import status

        frame.emit(status(where))
        return
    if renewed is not None and renewed.sidecars:
        frame.say(f"Certificates live {certificate_lifetime} from now on; {_context.effect_words(renewed)}.")
    elif not steps:
        frame.say(f"Mesh '{frame.name}' is up already, as asked for; nothing to change.")
    if steps:
        frame.say(f"Mesh '{frame.name}' is up after {time.monotonic() - started:.1f} s.")
    if frame.chatty:
        frame.say(_what_now(where.endpoints().get("gateway"), definition.front))


def _what_now(gateway: str | None, front: str) -> str:
    """For a person at a terminal: where the app is, and what one does next."""
    return "\n".join(
        [
            *([f"  the app      {gateway}"] if gateway else []),
            "  look         `meshdemo stat`, `meshdemo dashboard`",
            f"  break it     `meshdemo fault --at mesh --service {front} --err 0.2`",
            "  heal it      `meshdemo watch`",
            "  remove it    `meshdemo down`",
        ]
    )


def observed(app: App) -> dict[str, Any]:
    """What Prometheus and Grafana are given: rules, and provisioning for where they run side by side."""
    from meshdemo.ui import grafana

    files = grafana.files("http://prometheus:9090/", "/etc/grafana/provisioning/dashboards")
    return {"prometheus_rules": _rules(app), "grafana": files}


def _rules(app: App) -> str:
    """The default policy's objectives for an app as Prometheus rules."""
    from meshdemo.remediation import policyfile, rules
    from meshdemo.resources import DEFAULT_POLICY

    return rules.render(policyfile.load(DEFAULT_POLICY).of_app(app.name))


def _app(reference: str | None, where: Runtime) -> tuple[App, Path]:
    """The app asked for; without one that which runs already, else the pair."""
    from pathlib import Path

    from meshdemo.apps import loader

    if reference is None:
        with suppress(MeshdemoError):
            return where.app(), Path.cwd()
        reference = "pair"
    return loader.load(reference), loader.folder(reference)


def _lifetime_s(text: str) -> float:
    from meshdemo import durations
    from meshdemo.control.intent import MAX_CERTIFICATE_S, MIN_CERTIFICATE_S

    lifetime_s = durations.seconds(text)
    if lifetime_s is None or not MIN_CERTIFICATE_S <= lifetime_s <= MAX_CERTIFICATE_S:
        raise BadInput(
            f"--certificate-lifetime {text!r}: allowed is a duration from 10s to 365d, such as 10m or 1h"
        )
    return lifetime_s


def _pairs(values: list[str] | None, option: str, form: str) -> Iterator[tuple[str, str]]:
    for value in values or ():
        name, equals, rest = value.partition("=")
        if not (name and equals and rest):
            raise BadInput(f"{option} {value!r}: write it as {form}")
        yield name, rest


def _whole(text: str, name: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise BadInput(f"--replicas {name}={text}: the number of instances is a whole number") from None
