"""The whole story on a real kind cluster. `pytest -m kind -s` shows the figures.

Needs docker, kind, a node image (MESHDEMO_KIND_IMAGE) and a base image (MESHDEMO_BASE_IMAGE); says so, loudly,
where it could not run. One cluster serves all tests of this module, in their order.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import registry_harness
import yaml
from kind_harness import BASE_IMAGE, Mesh, api_server_away, docker, nodes_frozen, on_kind, require, say, until

from meshdemo.kube import ApiError
from meshdemo.resources import DEFAULT_POLICY
from meshdemo.runtime.kubernetes import apply, images, kind, manifests
from meshdemo.runtime.kubernetes.forward import run

# For figures: so often each disturbance and each fault, MESHDEMO_KIND_ROUNDS=10 pytest -m kind -s -k "no_request or heals"
ROUNDS = int(os.environ.get("MESHDEMO_KIND_ROUNDS", "0"))

pytestmark = [pytest.mark.kind, pytest.mark.xdist_group("kind")]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    require()
    began = time.monotonic()
    with on_kind(tmp_path_factory.mktemp("kind"), "--rps", "100") as found:
        say(f"up on kind after {time.monotonic() - began:.1f} s")
        yield found


# -- it is there -------------------------------------------------------------------------------------------


def test_the_mesh_is_up_and_secured(mesh: Mesh) -> None:
    status = mesh.json("status")
    assert (status["runtime"], status["ready"], status["app"]) == ("kind", True, "pair")
    assert len(mesh.ids("service-b")) == 2
    (edge,) = until(lambda: [one for one in mesh.json("edges") if one["caller"] == "service-a"], "an edge")
    assert edge["secured"] is True
    assert edge["identity"] == f"spiffe://{mesh.name}/ns/{mesh.name}/sa/service-a"
    row = until(
        lambda: next((r for r in mesh.json("stat", "service-b") if 60 < r["rps"] < 140), None),
        "the load that was asked for",
    )
    assert row["success_rate"] == 1


def test_the_network_is_the_one_that_kind_itself_makes(mesh: Mesh) -> None:
    """`up` gives it earlier; kindnetd writes the same again, at its second look."""
    (node,) = mesh.cluster.find("Node")
    at_node = ["exec", node["metadata"]["name"], "cat"]
    mtu = int(docker(*at_node, "/sys/class/net/eth0/mtu"))
    ours = kind.cni_config(node["spec"]["podCIDRs"], mtu)
    read = lambda: docker(*at_node, "/etc/cni/net.d/10-kindnet.conflist")  # noqa: E731
    until(lambda: read().strip() != ours, "kindnetd's own")
    assert json.loads(read()) == json.loads(ours)


def test_up_again_changes_nothing_that_is_right(mesh: Mesh) -> None:
    pods = {pod["metadata"]["uid"] for pod in mesh.cluster.find("Pod", mesh.name)}
    assert "nothing to change" in mesh.run("up", "--runtime", "kind", "--rps", "100")
    assert {pod["metadata"]["uid"] for pod in mesh.cluster.find("Pod", mesh.name)} == pods


def test_the_cluster_runs_what_render_prints(mesh: Mesh) -> None:
    printed = [one for one in yaml.safe_load_all(mesh.run("render", "kubernetes")) if one]
    for manifest in printed:
        meta = manifest["metadata"]
        found = mesh.cluster.get(manifest["kind"], meta["name"], meta.get("namespace"))
        assert found is not None, (manifest["kind"], meta["name"])
        if not manifests.is_state(manifest) and manifest["kind"] != "Namespace":
            assert any(
                entry["manager"] == "meshdemo" and entry["operation"] == "Apply"
                for entry in found["metadata"]["managedFields"]
            )


def test_what_cannot_be_pulled_is_said_and_not_waited_for(mesh: Mesh) -> None:
    """No registry can be relied on here: the mesh is up all the same."""
    status = mesh.json("status")
    for name in manifests.OBSERVABILITY:
        assert mesh.cluster.get("Deployment", name, mesh.name) is not None
        url, why = status["endpoints"][name], status["unavailable"].get(name)
        assert (url is None) is (why is not None)
        assert url is None or url.startswith("http://127.0.0.1:")


def test_prometheus_finds_workloads_sidecars_and_the_control_plane(mesh: Mesh) -> None:
    if not images.Builder().has(manifests.PROMETHEUS_IMAGE):
        pytest.skip(f"PROMETHEUS ON KIND WAS NOT TESTED: Docker has no image {manifests.PROMETHEUS_IMAGE}")
    apply.await_rollout(mesh.cluster, mesh.name, ["prometheus"], timeout_s=120)
    url = mesh.json("status")["endpoints"]["prometheus"]

    def ask_prometheus(query: str) -> list[dict[str, Any]]:
        asked = f"{url}api/v1/query?{urllib.parse.urlencode({'query': query})}"
        with urllib.request.urlopen(asked, timeout=20) as response:  # noqa: S310 - our own URL
            found: list[dict[str, Any]] = json.load(response)["data"]["result"]
        return found

    def targets() -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for row in ask_prometheus("up == 1"):
            found.setdefault(row["metric"]["job"], set()).add(row["metric"]["instance"])
        return found

    gateways = {
        pod["metadata"]["name"]
        for pod in mesh.cluster.find("Pod", mesh.name, labels="app.kubernetes.io/component=gateway")
    }
    pods = {*mesh.ids("service-a"), *mesh.ids("service-b")}

    def all_found() -> bool:
        found = targets()
        return (
            found.get("workloads") == pods
            and found.get("sidecars") == pods | gateways
            and len(found.get("control-plane", ())) == 1
        )

    until(all_found, f"targets; there are {targets()}")
    assert ask_prometheus("up == 0") == []
    (row,) = until(
        lambda: ask_prometheus(
            'sum by (service) (rate(meshdemo_requests_total{service="service-b"}[30s])) > 50'
        ),
        "the rate of requests",
    )
    say(
        f"Prometheus: {len(ask_prometheus('up'))} targets up; service-b {float(row['value'][1]):.0f} requests/s"
    )
    with urllib.request.urlopen(f"{url}api/v1/rules", timeout=20) as response:  # noqa: S310
        groups = json.load(response)["data"]["groups"]
    assert {rule["health"] for group in groups for rule in group["rules"]} <= {"ok", "unknown"}
    assert groups


def test_only_the_redirecting_container_needs_more_than_restricted(mesh: Mesh) -> None:
    """As the API server's own admission judges it."""
    label = "pod-security.kubernetes.io/enforce"
    meta = {"name": f"{mesh.name}-strict", "labels": {label: "restricted"}}
    mesh.cluster.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": meta})
    try:
        for deployment in yaml.safe_load_all(mesh.run("render", "kubernetes")):
            if deployment["kind"] != "Deployment":
                continue
            spec = deployment["spec"]["template"]["spec"]
            spec["serviceAccountName"] = "default"
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": spec}
            path = f"/api/v1/namespaces/{meta['name']}/pods"
            redirect = [c for c in spec.get("initContainers", []) if c["name"] == "meshdemo-redirect"]
            until(lambda: mesh.cluster.get("ServiceAccount", "default", meta["name"]), "its account")
            if redirect:
                with pytest.raises(ApiError, match=r"restricted.*NET_ADMIN") as caught:
                    mesh.cluster.request("POST", path, body=pod, query={"dryRun": "All"})
                assert "meshdemo-sidecar" not in caught.value.message
                spec["initContainers"].remove(redirect[0])
            mesh.cluster.request("POST", path, body=pod, query={"dryRun": "All"})
    finally:
        mesh.cluster.delete("Namespace", str(meta["name"]))


def test_a_service_monitor_where_the_kind_exists(mesh: Mesh) -> None:
    """As if somebody installed the Prometheus operator later."""
    path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    version = {
        "name": "v1", "served": True, "storage": True,
        "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}},
    }  # fmt: skip
    names = {"plural": "servicemonitors", "singular": "servicemonitor", "kind": "ServiceMonitor"}
    mesh.cluster.request(
        "POST",
        path,
        body={
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {"name": "servicemonitors.monitoring.coreos.com"},
            "spec": {
                "group": "monitoring.coreos.com", "scope": "Namespaced", "names": names, "versions": [version],
            },
        },
    )  # fmt: skip
    until(lambda: mesh.cluster.serves("ServiceMonitor"), "the kind ServiceMonitor")
    mesh.run("up")
    found = mesh.cluster.get("ServiceMonitor", "meshdemo", mesh.name)
    assert found is not None
    selected = found["spec"]["selector"]["matchLabels"]
    services = mesh.cluster.find(
        "Service", mesh.name, labels=",".join(f"{key}={value}" for key, value in selected.items())
    )
    assert {one["metadata"]["name"] for one in services} == {"mesh-metrics", "gateway-metrics"}
    for service in services:
        ports = {port["name"] for port in service["spec"]["ports"]}
        assert {endpoint["port"] for endpoint in found["spec"]["endpoints"]} <= ports
    assert "nothing to change" in mesh.run("up")


# -- who reaches whom --------------------------------------------------------------------------------------


def ask(url: str) -> str:
    return (
        "import urllib.request as u, urllib.error as e\n"
        "try:\n"
        f"    print(u.urlopen({url!r}, timeout=5).status)\n"
        "except e.HTTPError as error:\n"
        "    print(error.code)\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
    )


@pytest.fixture(scope="module")
def stranger(mesh: Mesh) -> str:
    """A pod that is in no mesh, and serves plain HTTP on port 8000."""
    image = mesh.pod(mesh.ids()[0])["spec"]["containers"][0]["image"]
    pod = {
        "metadata": {"name": "stranger", "labels": {"app": "stranger"}},
        "spec": {
            "terminationGracePeriodSeconds": 0,
            "containers": [
                {"name": "app", "image": image, "command": ["python3", "-m", "http.server", "8000"]}
            ],
        },
    }
    mesh.cluster.create("Pod", pod, mesh.name)
    service = {
        "metadata": {"name": "stranger"},
        "spec": {"selector": {"app": "stranger"}, "ports": [{"port": 8000}]},
    }
    mesh.cluster.create("Service", service, mesh.name)
    until(lambda: apply.is_ready(mesh.pod("stranger")), "the stranger")
    return "stranger"


def test_plain_text_into_a_meshed_port_is_refused(mesh: Mesh, stranger: str) -> None:
    address = mesh.pod(mesh.ids()[0])["status"]["podIP"]
    assert mesh.python(stranger, ask(f"http://{address}:5000/work")).strip() == "403"
    assert mesh.python(stranger, ask("http://service-b:5000/work")).strip() == "403"
    # Declared paths are open, exactly as they are written; ways around that are not.
    assert mesh.python(stranger, ask(f"http://{address}:5000/healthz")).strip() == "200"
    assert mesh.python(stranger, ask(f"http://{address}:15020/metrics")).strip() == "200"
    for trick in ("//work", "/healthz/../work", "/healthz%2f..%2fwork", "/work?/healthz"):
        assert mesh.python(stranger, ask(f"http://{address}:5000{trick}")).strip() in {"400", "403", "404"}, (
            trick
        )
    # The sidecar's own ports lead nowhere, and above all not in a circle.
    for port in (15001, 15006):
        assert not mesh.python(stranger, ask(f"http://{address}:{port}/work")).strip().isdigit()
    assert mesh.python(mesh.ids()[0], ask("http://127.0.0.1:15001/")).strip()[:1] not in {"2", "3"}


def test_traffic_to_what_is_in_no_mesh_passes(mesh: Mesh, stranger: str) -> None:
    caller = mesh.ids("service-a")[0]
    assert mesh.python(caller, ask("http://stranger:8000/")).strip() == "200"
    # The API server, TLS and all, at the address that every pod is told.
    code = "import socket, ssl; c = ssl.create_default_context(); c.check_hostname = False; c.verify_mode = 0; print(c.wrap_socket(socket.create_connection(('kubernetes.default.svc', 443), 5)).version())"
    assert mesh.python(caller, code).strip().startswith("TLSv1")


def test_a_service_is_told_by_its_address_not_by_what_a_request_says(mesh: Mesh, stranger: str) -> None:
    """A request to the stranger that claims to be for service-b goes to the stranger."""
    code = (
        "import http.client as h; c = h.HTTPConnection('stranger', 8000, timeout=5);"
        "c.request('GET', '/', headers={'Host': 'service-b:5000'}); print(c.getresponse().getheader('server'))"
    )
    assert "SimpleHTTP" in mesh.python(mesh.ids("service-a")[0], code)


def test_access_is_denied_at_once_and_allowed_again(mesh: Mesh) -> None:
    caller = mesh.ids("service-a")[0]
    mesh.run("access", "deny", "service-a", "service-b")
    assert mesh.python(caller, ask("http://service-b:5000/work")).strip() == "403"
    mesh.run("access", "allow", "service-a", "service-b")
    assert mesh.python(caller, ask("http://service-b:5000/work")).strip() == "200"


# -- faults ------------------------------------------------------------------------------------------------


def quiet(mesh: Mesh) -> None:
    """Nothing is broken, and nobody kept out, any more."""
    mesh.run("fault", "clear")
    client = mesh.runtime.control()
    for row in client.status()["instances"]:
        if row["ejected"]:  # a watch that has ended lets nobody in again
            client.readmit(row["id"])
    until(
        lambda: all(
            row["success_rate"] == 1
            for row in mesh.json("stat", "service-b", "--window", "3s")
            if row["requests"]
        ),
        "a healthy service-b",
    )


def test_a_fault_in_the_app_is_a_new_revision(mesh: Mesh) -> None:
    fault = mesh.json("fault", "--lat", "50", "--err", "0.5")
    assert fault["at"] == "app"
    pods = [mesh.pod(name) for name in mesh.ids()]
    env = {variable["name"]: variable.get("value") for variable in pods[0]["spec"]["containers"][0]["env"]}
    assert (env["LAT_MS"], env["ERR_RATE"]) == ("50", "0.5")
    until(lambda: mesh.json("stat", "service-b", "--window", "3s")[0]["success_rate"] < 0.7, "errors")
    mesh.run("fault", "clear")
    assert mesh.json("fault", "list") == []
    quiet(mesh)


def test_a_fault_in_the_sidecars_restarts_nothing(mesh: Mesh) -> None:
    before = mesh.ids()
    fault = mesh.json("fault", "--err", "1", "--at", "mesh", "--instance", before[0])
    say(f"a mesh fault is in force after {fault['effective_ms']:.0f} ms on {fault['sidecars']} sidecars")
    until(
        lambda: (
            next(
                r
                for r in mesh.json("stat", "service-b", "--by", "instance", "--window", "3s")
                if r["instance"] == before[0]
            )["success_rate"]
            == 0
        ),
        "errors of one",
    )
    assert mesh.ids() == before
    quiet(mesh)


def test_one_instance_can_deviate_for_a_time(mesh: Mesh) -> None:
    victim = mesh.ids()[0]
    with mesh.no_request_lost("one pod replaced by another, and back"):
        mesh.run("fault", "--lat", "40", "--instance", victim, "--for", "20s")
        after = mesh.ids()
        assert victim not in after
        assert len(after) == 2
        deviating = [
            name for name in after if "meshdemo.dev/instance-env" in mesh.pod(name)["metadata"]["annotations"]
        ]
        assert len(deviating) == 1
        until(lambda: len(mesh.ids()) == 2 and deviating[0] not in mesh.ids(), "the end of the fault")
        until(lambda: mesh.json("status")["ready"], "all ready")
    assert mesh.json("fault", "list") == []


# -- nothing is lost ---------------------------------------------------------------------------------------


def replace_all(mesh: Mesh) -> None:
    restarted = {"spec": {"template": {"metadata": {"annotations": {"restarted": str(time.time())}}}}}
    mesh.cluster.patch("Deployment", "service-b-v1", mesh.name, restarted)
    apply.await_rollout(mesh.cluster, mesh.name, ["service-b-v1"], timeout_s=180)


def delete_one(mesh: Mesh) -> None:
    mesh.cluster.delete("Pod", mesh.ids()[0], mesh.name)
    time.sleep(1)
    apply.await_rollout(mesh.cluster, mesh.name, ["service-b-v1"], timeout_s=180)


def scale_down(mesh: Mesh) -> None:
    runtime = mesh.runtime
    runtime.scale("service-b", "v1", 3, reason="test")
    runtime.scale("service-b", "v1", 2, reason="test")


def restart_control_plane(mesh: Mesh) -> None:
    runtime = mesh.runtime
    runtime.cluster.delete("Pod", runtime._control_pod(), mesh.name)
    time.sleep(1)
    apply.await_rollout(runtime.cluster, mesh.name, ["control-plane"], timeout_s=180)


@pytest.mark.parametrize("disturb", [replace_all, delete_one, scale_down, restart_control_plane])
def test_no_request_fails(mesh: Mesh, disturb: Callable[[Mesh], None]) -> None:
    for _ in range(ROUNDS or 2):
        with mesh.no_request_lost(disturb.__name__):
            disturb(mesh)


def test_the_root_is_replaced_under_load_and_no_request_fails(mesh: Mesh) -> None:
    """Also while pods come and the control plane goes, before any kubelet has brought the new root to a pod."""
    client = mesh.runtime.control()

    def root() -> str:
        trust = mesh.cluster.get("ConfigMap", "meshdemo-trust", mesh.name)
        assert trust is not None
        return str(trust["data"]["trust.pem"])

    def connected() -> bool:
        return all(row["connected"] and row["acked"] for row in client.status()["instances"])

    for round_ in range(ROUNDS or 2):
        before = root()
        with mesh.no_request_lost(f"the root replaced, {('a pod', 'the control plane')[round_ % 2]} with it"):
            mesh.run("identity", "rotate", "--root")
            assert root() != before
            assert root().count("BEGIN CERTIFICATE") == 1
            (delete_one if round_ % 2 == 0 else restart_control_plane)(mesh)
            client = mesh.runtime.control()
            until(connected, "all sidecars to be back")
        # What the pods were brought is what they started with, or newer; they need not have the new root yet.
        old = mesh.ids("service-a")[0]
        brought = run(mesh.cluster, mesh.name, old, "meshdemo-sidecar", ["cat", "/etc/meshdemo/trust.pem"])
        say(f"a pod that was there {'has the new root' if brought == root() else 'has yet to be told'}")
    assert client.identities()["trusted_roots"] == 1
    until(lambda: next(one for one in mesh.json("edges") if one["caller"] == "service-a")["secured"], "mTLS")


def test_a_restarted_control_plane_has_forgotten_nothing(mesh: Mesh) -> None:
    mesh.run("traffic", "set", "service-b", "--timeout", "7s")
    fault = mesh.json("fault", "--lat", "1", "--at", "mesh")
    events = mesh.runtime.control().events()
    time.sleep(1.5)  # the journal is carried to the cluster once a second
    restart_control_plane(mesh)
    assert [one["id"] for one in mesh.json("fault", "list")] == [fault["id"]]
    until(lambda: mesh.json("status")["ready"], "the mesh")
    client = mesh.runtime.control()
    assert client.traffic()["service-b"].timeout_ms == 7000
    again = client.events()
    assert again.seq >= events.seq
    assert [event["seq"] for event in again.events][: len(events.events)] == [
        event["seq"] for event in events.events
    ]
    quiet(mesh)


def test_the_control_plane_is_small(mesh: Mesh) -> None:
    runtime = mesh.runtime
    said = run(runtime.cluster, mesh.name, runtime._control_pod(), "control-plane", ["cat", "/proc/1/status"])
    used_mb = int(next(line.split()[1] for line in said.splitlines() if line.startswith("VmRSS"))) / 1024
    say(f"the control plane uses {used_mb:.0f} MB")
    assert used_mb < 120


# -- healing -----------------------------------------------------------------------------------------------

FAULTS = {
    "error rate 0.3 of the app": ("--err", "0.3"),
    "latency 400 ms of the app": ("--lat", "400"),
    "one instance at 50 % errors": ("--err", "0.5", "--at", "mesh", "--instance", "ONE"),
    "one instance hung": ("--hang", "--instance", "ONE"),
    "one instance killed": ("--crash", "--instance", "ONE"),
}


UNLIMITED = """guardrails:
  cooldown: 0s
  max_actions: {count: 1000, per: 10m}
"""


@pytest.mark.parametrize("fault", FAULTS)
def test_watch_heals(mesh: Mesh, fault: str, tmp_path: Path) -> None:
    policy = DEFAULT_POLICY
    if ROUNDS:  # the same remedy again and again within minutes, which guardrails are there to prevent
        text = policy.read_text()
        policy = tmp_path / "policy.yaml"
        policy.write_text(text[: text.index("guardrails:")] + UNLIMITED)
    runs = [healed_after(mesh, fault, policy) for _ in range(ROUNDS or 1)]
    for what, values in zip(("detected", "healthy again"), zip(*runs, strict=True), strict=True):
        say(f"{fault}: {what}: median {statistics.median(values):.1f} s, worst {max(values):.1f} s")


def healed_after(mesh: Mesh, fault: str, policy: Path) -> tuple[float, float]:
    """How long after its beginning a fault was detected, and healed (s)."""
    until(lambda: mesh.json("status")["ready"], "the mesh to be ready")
    quiet(mesh)
    time.sleep(random.random())  # sidecars report once a second: at any moment in it
    watch = subprocess.Popen(
        [
            sys.executable, "-m", "meshdemo", "--name", mesh.name,
            "watch", "--policy", str(policy), "--for", "180s", "-o", "jsonl",
        ],
        env=mesh.env, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert watch.stdout is not None
    events: list[dict[str, Any]] = []
    try:
        for line in watch.stdout:
            event = json.loads(line)
            if event["event"] == "started":
                words = [mesh.ids()[0] if word == "ONE" else word for word in FAULTS[fault]]
                mesh.run("fault", *words)
            if event["event"] != "signals":
                events.append(event)
            if event["event"] in {"healed", "gave_up"}:
                break
    finally:
        watch.terminate()
        watch.wait(30)
    said = [event["event"] for event in events]
    assert said[-1] == "healed", events
    detect_s = next(event for event in events if event["event"] == "violated")["detect_s"]
    recover_s = events[-1]["recover_s"]
    remedies = [event.get("remedy") for event in events if event["event"] == "chosen"]
    say(f"{fault}: detected after {detect_s:.1f} s, healthy again after {recover_s:.1f} s by {remedies}")
    quiet(mesh)
    until(lambda: mesh.json("status")["ready"], "the mesh to be ready")
    return detect_s, recover_s


def test_remedies_leave_events(mesh: Mesh) -> None:
    victim = mesh.ids()[0]

    def said(reason: str, about: str = victim) -> list[str]:
        events = mesh.cluster.find("Event", mesh.name, fields=f"involvedObject.name={about}")
        return [event["message"] for event in events if event["reason"] == reason]

    mesh.runtime.control().eject(victim, reason="a test", by="test")
    until(lambda: any("a test" in message for message in said("Ejected")), "the Event")
    mesh.runtime.control().readmit(victim)
    mesh.runtime.restart(victim, reason="another test")
    assert "another test" in said("Restarted")
    assert victim not in mesh.ids()
    revision = mesh.runtime.revisions("service-b", "v1")[-1].revision
    mesh.runtime.set_env("service-b", "v1", {"LAT_MS": "1"}, reason="a change")
    mesh.runtime.rollback("service-b", "v1", revision, reason="a third test")
    assert any(f"to revision {revision}: a third test" in one for one in said("RolledBack", "service-b-v1"))
    scale_down(mesh)
    assert [one for one in said("Scaled", "service-b-v1") if "to 3: test" in one]


def test_watch_in_the_cluster(mesh: Mesh) -> None:
    """It heals, nobody else acts meanwhile, and it goes when it is not wanted any more."""
    quiet(mesh)
    mesh.run("up", "--watch")
    assert "nothing to change" in mesh.run("up", "--watch")
    until(lambda: "runs already" in mesh.run("watch", "--for", "1s", "--plain", status=None), "the Lease")
    client = mesh.runtime.control()
    seq = client.events().seq
    mesh.run("fault", "--err", "0.5", "--at", "mesh", "--instance", mesh.ids()[0])

    def healed() -> list[dict[str, Any]]:
        return [event for event in client.events(after=seq).events if event["event"] == "healed"]

    (event, *_) = until(healed, "watch to heal")
    assert event["service"] == "service-b"
    quiet(mesh)
    mesh.run("up", "--no-watch")
    assert mesh.cluster.get("Deployment", "watch", mesh.name) is None
    assert mesh.cluster.get("Role", "watch", mesh.name) is None
    mesh.run("watch", "--for", "1s", "--plain")


def test_two_watches_do_not_fight(mesh: Mesh) -> None:
    with mesh.runtime.watch_lock():
        assert "runs already" in mesh.run("watch", "--for", "5s", "--plain", status=1)


def test_an_autoscaler_is_left_in_peace(mesh: Mesh) -> None:
    target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": "service-b-v1"}
    hpa = {
        "metadata": {"name": "busy"},
        "spec": {"scaleTargetRef": target, "minReplicas": 2, "maxReplicas": 3},
    }
    mesh.cluster.create("HorizontalPodAutoscaler", hpa, mesh.name)
    try:
        with pytest.raises(Exception, match="the autoscaler busy decides"):
            mesh.runtime.scale("service-b", "v1", 5, reason="test")
    finally:
        mesh.cluster.delete("HorizontalPodAutoscaler", "busy", mesh.name)


def test_logs_come_from_everywhere(mesh: Mesh) -> None:
    sources = {json.loads(line)["source"] for line in mesh.run("logs", "-o", "jsonl").splitlines()}
    assert any(source.startswith("control-plane") for source in sources)
    assert any(source.startswith("service-") for source in sources)


def test_a_further_version_can_be_added_and_is_given_traffic(mesh: Mesh) -> None:
    mesh.run("up", "--version", "service-b=v2")
    mesh.run("traffic", "set", "service-b", "--split", "v1=50,v2=50")
    rows = until(
        lambda: [
            r
            for r in mesh.json("stat", "service-b", "--by", "version", "--window", "5s")
            if r["requests"] > 100 and r["version"] == "v2"
        ],
        "traffic to v2",
    )
    assert rows
    mesh.run("traffic", "set", "service-b", "--split", "v1=100")


# -- failing well ------------------------------------------------------------------------------------------


@pytest.fixture
def other(mesh: Mesh, tmp_path: Path) -> Iterator[Mesh]:
    """A second mesh on the same cluster, as a user of that cluster sees it."""
    found = Mesh(tmp_path / "home", "other", mesh.kubeconfig)
    yield found
    mesh.cluster.delete("Namespace", "other")
    until(lambda: mesh.cluster.get("Namespace", "other") is None, "the namespace to go")
    for kind_ in ("ClusterRoleBinding", "ClusterRole"):
        mesh.cluster.delete(kind_, "meshdemo:other:control-plane")


UP = ("up", "--runtime", "kubernetes", "--no-observability")


def timed(mesh: Mesh, *arguments: str, status: int) -> str:
    began = time.monotonic()
    said = mesh.run(*arguments, status=status)
    say(
        f"exit {status} after {time.monotonic() - began:.0f} s: {' | '.join(said.strip().splitlines()[:3])[:300]}"
    )
    return said


def test_an_image_that_cannot_be_pulled(mesh: Mesh, other: Mesh, tmp_path: Path) -> None:
    app = yaml.safe_load(mesh.run("render", "kubernetes") and "{}") or {}
    app = {
        "name": "shop",
        "front": "web",
        "services": {"web": {"port": 80, "versions": {"v1": {"image": "no-such-registry.invalid/web:1"}}}},
    }
    (tmp_path / "shop.yaml").write_text(yaml.safe_dump(app))
    said = timed(other, *UP, "--app", str(tmp_path / "shop.yaml"), "--timeout", "120", status=1)
    assert "web-v1" in said
    assert "no-such-registry.invalid/web:1" in said
    assert "--registry" in said


def test_a_program_that_ends_at_once_and_then_does_not(other: Mesh, tmp_path: Path) -> None:
    def app(latency: str) -> str:
        workload = {"program": "service_b", "env": {"LAT_MS": latency}}
        path = tmp_path / "app.yaml"
        path.write_text(
            yaml.safe_dump(
                {"name": "one", "front": "b", "services": {"b": {"port": 5000, "versions": {"v1": workload}}}}
            )
        )
        return str(path)

    said = timed(other, *UP, "--app", app("soon"), "--timeout", "120", status=1)
    assert "b-v1" in said
    assert "LAT_MS" in said  # the program's own last line
    # Once the cause is gone, the same command finishes the job.
    timed(other, *UP, "--app", app("1"), "--timeout", "200", status=0)
    assert other.json("status")["ready"] is True


def test_no_room(other: Mesh) -> None:
    said = timed(other, *UP, "--replicas", "service-b=300", "--timeout", "100", status=1)
    assert "service-b-v1" in said
    assert "nodes are available" in said
    assert "--replicas" in said


def test_a_namespace_that_is_being_deleted(mesh: Mesh, other: Mesh) -> None:
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "other"}}
    mesh.cluster.apply(namespace)
    held = {"metadata": {"name": "held", "finalizers": ["example.com/held"]}}
    mesh.cluster.create("ConfigMap", held, "other")
    mesh.cluster.delete("Namespace", "other")
    said = timed(other, *UP, "--timeout", "15", status=1)
    assert "is being deleted since" in said
    assert "example.com/held" in said
    mesh.cluster.patch("ConfigMap", "held", "other", {"metadata": {"finalizers": None}}, merge="merge")
    timed(other, *UP, "--timeout", "200", status=0)


@pytest.mark.parametrize("away", [api_server_away, nodes_frozen])
def test_an_api_server_that_is_away_for_20_s(
    mesh: Mesh, other: Mesh, away: Callable[[Mesh, float], AbstractContextManager[None]]
) -> None:
    process = other.start(*UP, "--timeout", "200")
    until(lambda: mesh.cluster.get("Namespace", "other") is not None, "up to have begun")
    with away(mesh, 20):
        pass
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, (out, err)
    assert other.json("status")["ready"] is True


def test_an_api_server_that_stays_away(mesh: Mesh, other: Mesh) -> None:
    """`up` ends within its time-out though nothing answers, says so, and finishes the job later."""
    process = other.start(*UP, "--timeout", "25")
    began = time.monotonic()
    until(lambda: mesh.cluster.get("Namespace", "other") is not None, "up to have begun")
    with nodes_frozen(mesh, 40):
        _, err = process.communicate(timeout=60)
        took_s = time.monotonic() - began
        say(f"exit {process.returncode} after {took_s:.0f} s: {err.strip()[:300]}")
        assert process.returncode == 1
        assert "does not answer" in err
        assert took_s < 30
    timed(other, *UP, "--timeout", "200", status=0)


def test_a_dead_cluster(other: Mesh, tmp_path: Path) -> None:
    config = yaml.safe_load(Path(other.env["KUBECONFIG"]).read_text())
    config["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:1"
    dead = tmp_path / "dead"
    dead.write_text(yaml.safe_dump(config))
    began = time.monotonic()
    said = other.run(*UP, status=None, KUBECONFIG=str(dead))
    assert "does not answer" in said
    assert time.monotonic() - began < 30
    assert not (other.home / other.name).exists()  # nothing was made, and nothing is remembered


def test_no_right_to_make_a_namespace(mesh: Mesh, other: Mesh, tmp_path: Path) -> None:
    config = yaml.safe_load(Path(other.env["KUBECONFIG"]).read_text())
    mesh.cluster.apply(
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "nobody", "namespace": mesh.name}}
    )
    path = f"/api/v1/namespaces/{mesh.name}/serviceaccounts/nobody/token"
    token = mesh.cluster.request(
        "POST", path, body={"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
    )
    config["users"][0]["user"] = {"token": token["status"]["token"]}
    limited = tmp_path / "limited"
    limited.write_text(yaml.safe_dump(config))
    said = other.run(*UP, status=1, KUBECONFIG=str(limited))
    assert "namespaces" in said
    assert "system:serviceaccount" in said


def test_several_nodes(mesh: Mesh, tmp_path: Path) -> None:
    """Copies are spread over the nodes, each of which has the images; another cluster stays as it is."""
    docker("pause", *mesh.nodes)  # two clusters at once are much for a small machine
    try:
        with on_kind(tmp_path, "--workers", "2", "--no-observability") as wide:
            # Where there are others, kind keeps the first node free of pods.
            workers = set(wide.nodes) - {f"{wide.name}-control-plane"}
            assert len(workers) == 2
            assert {wide.pod(name)["spec"]["nodeName"] for name in wide.ids()} == workers
            used = {
                container["image"]
                for deployment in wide.cluster.find("Deployment", wide.name)
                for container in deployment["spec"]["template"]["spec"]["containers"]
            }
            assert [kind.Kind().missing(node, used) for node in wide.nodes] == [[], [], []]
    finally:
        docker("unpause", *mesh.nodes)
    assert mesh.name in kind.Kind().clusters()


def test_images_come_from_a_registry(mesh: Mesh, other: Mesh, tmp_path: Path) -> None:
    """`--runtime kubernetes --registry`: pushed from here, pulled by the nodes, again by a new mesh."""
    gateway = docker("network", "inspect", "kind", "--format", "{{range .IPAM.Config}}{{.Gateway}} {{end}}")
    address = next(one for one in gateway.split() if "." in one)
    with registry_harness.registry(tmp_path, "127.0.0.1", address) as port:
        # For the node too the registry is on 127.0.0.1, where no certificate is asked for.
        here = ["-p", "tcp", "--dport", str(port)]
        for node in mesh.nodes:
            for rule in (
                ["OUTPUT", "-d", "127.0.0.1", *here, "-j", "DNAT", "--to-destination", f"{address}:{port}"],
                ["POSTROUTING", "-d", address, *here, "-j", "MASQUERADE"],
            ):
                docker("exec", node, "iptables", "-t", "nat", "-I", *rule)
        prefix = f"127.0.0.1:{port}/team"
        config = tmp_path / "two-contexts"
        known = yaml.safe_load(mesh.kubeconfig.read_text())
        known["contexts"].append({"name": "this-one", "context": known["contexts"][0]["context"]})
        known["current-context"] = "none"
        config.write_text(yaml.safe_dump(known))
        other.env["KUBECONFIG"] = str(config)
        try:
            timed(other, *UP, "--context", "this-one", "--registry", prefix, "--timeout", "200", status=0)
        finally:
            name = "{{.Repository}}:{{.Tag}}"
            built = docker("image", "ls", "--filter", f"reference={prefix}/*/*", "--format", name).split()
            docker("image", "rm", *built)
        images_used = {
            container["image"]
            for pod in mesh.cluster.find("Pod", "other")
            for container in (*pod["spec"]["containers"], *pod["spec"].get("initContainers", []))
            if pod["metadata"].get("labels", {}).get("meshdemo.dev/service")
        }
        assert images_used
        assert all(image.startswith(prefix) for image in images_used), images_used
        assert other.json("status")["ready"] is True


def test_an_existing_cluster_is_used_and_not_deleted(mesh: Mesh, tmp_path: Path) -> None:
    """A kind cluster that somebody else made: `up` uses it, `down` leaves it."""
    elsewhere = Mesh(tmp_path / "home", mesh.name, tmp_path / "none")  # knows nothing of who made it
    (tmp_path / "none").write_text("apiVersion: v1\nkind: Config\n")
    elsewhere.run("up", "--runtime", "kind", "--no-observability")
    assert elsewhere.json("status")["ready"] is True
    elsewhere.run("down")
    assert mesh.name in kind.Kind().clusters()
    with pytest.raises(ApiError):
        mesh.cluster.request("GET", f"/api/v1/namespaces/{mesh.name}/pods/none")
    assert BASE_IMAGE
