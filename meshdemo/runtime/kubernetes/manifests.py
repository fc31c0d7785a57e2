"""The manifests of a mesh: what must run, as objects for the API server.

Pure: a `MeshSpec` (what runs) and a `Site` (where) in, YAML out, through templates/kubernetes. `up` applies
exactly what `meshdemo render kubernetes` prints.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import PurePosixPath
from typing import Any

import yaml

from meshdemo.apps.model import App, Service
from meshdemo.control.bootstrap import Placement, bootstrap_files, report_interval_s
from meshdemo.control.ingress import CLASS, CONTROLLER
from meshdemo.control.model import Instance
from meshdemo.kube import Manifest
from meshdemo.names import INBOUND_PORT, OUTBOUND_PORT, PLAIN_PORT, XDS_PORT, handout
from meshdemo.runtime.base import UpOptions
from meshdemo.runtime.kubernetes import images
from meshdemo.runtime.kubernetes.pieces import (
    API_FOLDER,
    CONFIG_FOLDER,
    PORTS,
    RUN_FOLDER,
    STATE_FOLDER,
    Loader,
    common,
    environment,
    redirect_rules,
)  # fmt: skip
from meshdemo.runtime.kubernetes.record import Record
from meshdemo.runtime.kubernetes.specs import deployment_of
from meshdemo.runtime.local.spec import MeshSpec, wanted

PROMETHEUS_IMAGE = "prom/prometheus:v3.5.0"
GRAFANA_IMAGE = "grafana/grafana:12.1.1"
OBSERVABILITY = ("prometheus", "grafana")


@dataclass(frozen=True, slots=True)
class Site:
    """Where a mesh runs and what it finds there."""

    namespace: str
    images: Mapping[str, str]  # image by recipe name
    scaled_by_others: frozenset[str] = field(default_factory=frozenset)  # SERVICE-VERSION with an autoscaler
    observability: bool = True  # Prometheus and Grafana
    rules: str = ""  # Prometheus' recording and alert rules
    grafana: Mapping[str, str] = field(default_factory=dict)  # its provisioning, by path
    node_ports: Mapping[str, int] = field(default_factory=dict)  # Services that are on ports of the nodes
    gateway_api: bool = False  # the cluster has the kinds of the Gateway API
    service_monitor: bool = False  # the cluster has the kind ServiceMonitor
    prometheus_rule: bool = False  # the cluster has the kind PrometheusRule
    storage: bool = True  # the cluster has volumes for what must outlive a pod
    watch: str | None = None  # run `meshdemo watch` in the cluster, by this policy


def render(app: App, options: Mapping[str, Any] | None = None) -> str:
    """The manifests of an app as `up` would apply them, as YAML documents.

    Args:
        options: `name` of the mesh, `base_image`, `registry`, `observability`, `prometheus_rules`,
            `grafana` (files by path) and `watch` (a policy), all optional.
    """
    options = options or {}
    name = str(options.get("name", "mesh-demo"))
    spec = wanted(UpOptions(name=name, app=app), None, now=time.time(), runs_images=True)
    site = Site(
        namespace=name,
        images={
            key: recipe.reference(options.get("registry"))
            for key, recipe in images.recipes(app, options.get("base_image") or images.BASE_IMAGE).items()
        },
        observability=bool(options.get("observability", True)),
        rules=str(options.get("prometheus_rules") or ""),
        grafana=options.get("grafana") or {},
        watch=options.get("watch"),
    )
    return "".join(documents(spec, site).values())


def objects(spec: MeshSpec, site: Site) -> list[Manifest]:
    """All objects of a mesh, in the order in which they are applied."""
    return [
        manifest
        for text in documents(spec, site).values()
        for manifest in yaml.load_all(text, Loader=Loader)
        if manifest
    ]


def is_state(manifest: Manifest) -> bool:
    """Is this an object that is made once and never applied again, since the mesh itself writes to it?"""
    return bool(manifest["metadata"]["labels"].get("app.kubernetes.io/component") == "state")


def documents(spec: MeshSpec, site: Site) -> dict[str, str]:
    """All objects of a mesh as YAML, by what they are about, in the order in which they are applied."""
    found = {
        "namespace": _render("namespace", spec.mesh, site),
        "state": _render("state", spec.mesh, site),
        "control-plane": _render(
            "control-plane",
            spec.mesh,
            site,
            cluster_role=f"meshdemo:{site.namespace}:control-plane",
            handout=handout(spec.mesh),
            sidecar_files=sidecar_files(
                site.namespace, sum(one.instances for one in spec.workloads.values())
            ),
            control_args=[
                "--mesh", spec.mesh, "--namespace", site.namespace, "--state", STATE_FOLDER,
                "--api-token", f"{API_FOLDER}/token",
            ],
        ),
    }  # fmt: skip
    for service in spec.app.services:
        if spec.versions(service):
            metrics = spec.app.services[service].metrics
            about = _of_service(spec.app, service) | {"storage": site.storage}
            found[service] = _render("service", spec.mesh, site, **about, metrics=metrics)
    for key in spec.workloads:
        found[key] = _workload(spec, site, key)
    found["gateway"] = _render(
        "gateway",
        spec.mesh,
        site,
        node_ports=site.node_ports,
        gateway_api=site.gateway_api,
        ingress_class=CLASS,
        controller=CONTROLLER,
    )
    if site.observability:
        found |= _observability(spec, site)
    if site.service_monitor:
        found["service-monitor"] = _render("service-monitor", spec.mesh, site)
    if site.prometheus_rule and site.rules:
        found["prometheus-rule"] = _render("prometheus-rule", spec.mesh, site, rules=site.rules)
    if site.watch is not None:
        here = Record(kind="kubernetes", mesh=spec.mesh, inside=True).model_dump_json()
        found["watch"] = _render(
            "watch", spec.mesh, site, record=here, policy=site.watch, content_hash=_hash(here, site.watch)
        )
    return found


def prometheus_config(mesh: str, namespace: str) -> str:
    """What Prometheus in the cluster is configured with."""
    template = environment().get_template("kubernetes/prometheus.yml.j2")
    return template.render(mesh=mesh, namespace=namespace, ports=PORTS)


def _observability(spec: MeshSpec, site: Site) -> dict[str, str]:
    config = prometheus_config(spec.mesh, site.namespace)
    return {
        "prometheus": _render(
            "prometheus",
            spec.mesh,
            site,
            prometheus_image=PROMETHEUS_IMAGE,
            prometheus_config=config,
            rules=site.rules,
            node_ports=site.node_ports,
            content_hash=_hash(config, site.rules),
        ),
        "grafana": _render(
            "grafana",
            spec.mesh,
            site,
            grafana_image=GRAFANA_IMAGE,
            grafana_files=site.grafana,
            node_ports=site.node_ports,
            content_hash=_hash(*site.grafana.values()),
        ),
    }


def _hash(*texts: str) -> str:
    """So much of the content's hash that a change of it shows; begins with a letter, for YAML's sake."""
    return "h" + hashlib.sha256("\0".join(texts).encode()).hexdigest()[:12]


def namespace(mesh: str, name: str) -> Manifest:
    """The namespace of a mesh."""
    text = _render("namespace", mesh, Site(namespace=name, images={}))
    manifest: Manifest = yaml.load(text, Loader=Loader)  # noqa: S506 - a safe loader
    return manifest


def _workload(spec: MeshSpec, site: Site, key: str) -> str:
    one = spec.workloads[key]
    service = spec.app.services[one.service]
    program = spec.program(one.service, one.version)
    name = deployment_of(one)
    env = dict(one.current.env)
    if service.load:
        # Load begins once everybody is there: the control plane says when, and how much.
        env["RPS"] = "0"
    return _render(
        "workload",
        spec.mesh,
        site,
        **_of_service(spec.app, one.service),
        storage=site.storage,
        version=one.version,
        replicas=None if name in site.scaled_by_others else one.instances,
        revision=one.current.revision,
        metrics=service.metrics,
        image=site.images[images.image_name(program.program)] if program.program else program.image,
        command=None if program.program else program.command,
        env={
            **env,
            # The sidecar alone reaches the app; whoever else tries finds no one listening.
            "HOST": "127.0.0.1", "PORT": str(service.port), "STATE_DIR": STATE_FOLDER,
            "SERVICE": one.service, "VERSION": one.version,
        },
        probe=_probe(service, ours=program.program is not None),
    )  # fmt: skip


def _of_service(app: App, name: str) -> dict[str, Any]:
    service = app.services[name]
    return {"service": name, "port": service.port, "protocol": service.protocol, "keeps": service.keeps}


def _probe(service: Service, *, ours: bool) -> str:
    """How the kubelet asks the app, as one line of YAML."""
    if service.protocol == "http":
        return f"httpGet: {{path: {json.dumps(service.healthz)}, port: {service.port}}}"
    if not ours:
        # The sidecar takes the connection: this says that the pod is there, and no more.
        return f"tcpSocket: {{port: {service.port}}}"
    # Does anything listen on the port? (State 0A in /proc/net/tcp; a connection would end at the sidecar.)
    line = f"^ *[0-9]+: [0-9A-F]+:{service.port:04X} [0-9A-F:]+ 0A "
    return f"exec: {{command: [grep, -qE, '{line}', /proc/net/tcp, /proc/net/tcp6]}}"


def sidecar_files(namespace: str, sidecars: int) -> Mapping[str, str]:
    """What every sidecar starts from, by file name, in a mesh of so many. `namespace`: the mesh's.

    One set of files for all: who a sidecar is comes from its token, and --service-node says it in logs.
    """
    return _sidecar_files(namespace, report_interval_s(sidecars))


@cache
def _sidecar_files(namespace: str, interval_s: float) -> Mapping[str, str]:
    folder = PurePosixPath(CONFIG_FOLDER)
    return bootstrap_files(
        Instance(
            id="sidecar", service="mesh", version="v1",
            inbound_port=INBOUND_PORT, outbound_port=OUTBOUND_PORT, metrics_port=PLAIN_PORT, app_port=0,
        ),
        Placement(
            folder=folder,
            trust=folder / "trust.pem",
            admin=PurePosixPath(RUN_FOLDER) / "admin.sock",
            control_host=f"control-plane.{namespace}.svc",
            control_port=XDS_PORT,
            report_interval_s=interval_s,
        ),
    )  # fmt: skip


def kind_config(*, workers: int, ports: Mapping[int, int]) -> str:
    """The configuration of a kind cluster. `ports`: node port -> port of this machine."""
    return environment().get_template("kubernetes/kind.yaml.j2").render(workers=workers, ports=ports)


def _render(template: str, mesh: str, site: Site, **values: Any) -> str:
    known = {**common(mesh), "redirect_rules": redirect_rules()}
    text = (
        environment()
        .get_template(f"kubernetes/{template}.yaml.j2")
        .render(**known, namespace=site.namespace, images=site.images, **values)
    )
    text = "\n".join(line.rstrip() for line in text.splitlines() if line.strip())
    return text + "\n" if text.startswith("---") else f"---\n{text}\n"
