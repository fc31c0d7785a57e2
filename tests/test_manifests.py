"""What `up` applies to a cluster: valid for every Kubernetes that is supported, and no more rights than needed."""

from __future__ import annotations

import json
from typing import Any

import kubernetes_validate
import pytest
import yaml

from meshdemo.apps import loader
from meshdemo.apps.model import App
from meshdemo.control.model import WorkloadRevision
from meshdemo.remediation import policyfile, rules
from meshdemo.resources import DEFAULT_POLICY
from meshdemo.runtime.base import UpOptions
from meshdemo.runtime.kubernetes import manifests
from meshdemo.runtime.kubernetes.manifests import Site
from meshdemo.runtime.kubernetes.specs import env_patch
from meshdemo.runtime.local.spec import MeshSpec, initial_load, wanted
from meshdemo.ui import grafana

VERSIONS = ("1.30", "1.31", "1.32", "1.33", "1.34", "1.35", "1.36", "1.37")
FOREIGN = App.model_validate(
    {
        "name": "shop",
        "front": "web",
        "services": {
            "web": {
                "port": 8080,
                "calls": ["db"],
                "healthz": "/ping?a={b}",
                "versions": {
                    "v1": {
                        "image": "shop/web:1",
                        "command": ["serve", "--quote", 'it\'s "x"'],
                        "env": {"A": "1: {}"},
                    }
                },
            },
            "db": {
                "port": 5432,
                "protocol": "tcp",
                "versions": {"v1": {"image": "shop/db:1", "instances": 3}},
            },
        },
    }
)
POLICY = DEFAULT_POLICY.read_text()
RULES = rules.render(policyfile.load(DEFAULT_POLICY))
DASHBOARDS = grafana.files("http://prometheus:9090/", "/etc/grafana/provisioning/dashboards")
APPS = {"pair": loader.load("pair"), "emojivoto": loader.load("emojivoto")}


def spec_of(app: App, **options: Any) -> MeshSpec:
    return wanted(UpOptions(name="m", app=app, **options), None, now=1.0, runs_images=True)


def site_of(app: App, **fields: Any) -> Site:
    return Site(namespace="m", images=_Any(), **fields)


class _Any(dict[str, str]):
    def __missing__(self, name: str) -> str:
        return f"meshdemo/{name}:1"


def objects(app: App, **fields: Any) -> list[dict[str, Any]]:
    return manifests.objects(spec_of(app), site_of(app, **fields))


def deployments(app: App, **fields: Any) -> dict[str, dict[str, Any]]:
    return {o["metadata"]["name"]: o for o in objects(app, **fields) if o["kind"] == "Deployment"}


def containers(deployment: dict[str, Any]) -> list[dict[str, Any]]:
    pod = deployment["spec"]["template"]["spec"]
    return [*pod.get("initContainers", []), *pod["containers"]]


VARIANTS = {
    "pair": lambda: objects(APPS["pair"]),
    "emojivoto": lambda: objects(APPS["emojivoto"]),
    "v2": lambda: manifests.objects(spec_of(APPS["pair"], versions={"service-b": ["v2"]}, replicas={"service-b": 0}, rps=7), site_of(APPS["pair"])),
    "without volumes": lambda: objects(APPS["emojivoto"], storage=False),
    "autoscaled": lambda: objects(APPS["pair"], scaled_by_others=frozenset({"service-b-v1"})),
    "foreign": lambda: objects(FOREIGN),
    "plain": lambda: objects(APPS["pair"], observability=False),
    "monitored": lambda: objects(APPS["emojivoto"], service_monitor=True, prometheus_rule=True, rules=RULES),
    "watched": lambda: objects(APPS["pair"], watch=POLICY),
    "observed": lambda: objects(APPS["pair"], rules=RULES, grafana=DASHBOARDS, node_ports={"prometheus": 30090, "grafana": 30300}),
}  # fmt: skip


@pytest.mark.parametrize("version", VERSIONS)
def test_manifests_are_valid(version: str) -> None:
    every = {json.dumps(manifest, sort_keys=True) for made in VARIANTS.values() for manifest in made()}
    assert len(every) > 40
    for manifest in map(json.loads, every):
        if manifest["kind"] not in ("ServiceMonitor", "PrometheusRule"):  # no kinds of Kubernetes' own
            kubernetes_validate.validate(manifest, version, strict=True)


def _annotations(manifest: dict[str, Any]) -> tuple[str | None, str | None, str | None]:
    found = manifest["metadata"].get("annotations", {})
    assert all(isinstance(value, str) for value in found.values())
    scrape, port, path = (found.get(f"prometheus.io/{name}") for name in ("scrape", "port", "path"))
    return scrape, port, path


def test_a_prometheus_without_an_operator_finds_everything_by_annotations() -> None:
    made = deployments(APPS["emojivoto"])
    plain = str(manifests.PLAIN_PORT)
    pods = {name: _annotations(one["spec"]["template"]) for name, one in made.items()}
    assert pods["web-v1"] == pods["voting-v1"] == ("true", plain, "/stats/prometheus")  # the sidecars
    (port,) = [
        port["containerPort"]
        for container in containers(made["control-plane"])
        for port in container["ports"]
        if port["name"] == "http-open"
    ]
    assert pods["control-plane"] == ("true", str(port), "/metrics")
    services = {o["metadata"]["name"]: o for o in objects(APPS["emojivoto"]) if o["kind"] == "Service"}
    assert _annotations(services["web"]) == ("true", plain, "/metrics")  # the workloads
    assert _annotations(services["voting"]) == (
        None,
        None,
        None,
    )  # has no metrics of its own: no 403 for ever


def test_a_prometheus_operator_is_told_of_everything() -> None:
    made = VARIANTS["monitored"]()
    services = [one for one in made if one["kind"] == "Service"]
    monitors = {one["metadata"]["name"]: one["spec"] for one in made if one["kind"] == "ServiceMonitor"}
    assert set(monitors) == {"meshdemo", "control-plane"}
    scraped = set()
    for monitor in monitors.values():
        wanted = monitor["selector"]["matchLabels"].items()
        found = [one for one in services if wanted <= one["metadata"]["labels"].items()]
        assert found
        for service in found:
            ports = {port["name"] for port in service["spec"]["ports"]}
            assert {endpoint["port"] for endpoint in monitor["endpoints"]} <= ports
            scraped.add(service["spec"]["selector"]["app.kubernetes.io/component"])
    assert scraped == {"workload", "gateway", "control-plane"}  # every sidecar, the gateway's Envoy included
    assert monitors["control-plane"]["endpoints"][0]["honorLabels"] is True
    workloads, sidecars = monitors["meshdemo"]["endpoints"]
    assert [one["action"] for one in workloads["relabelings"] if "action" in one] == ["keep"]
    assert "path" not in workloads and sidecars["path"] == "/stats/prometheus"
    (rule,) = [one for one in made if one["kind"] == "PrometheusRule"]
    assert rule["spec"] == yaml.safe_load(RULES)
    assert not any(one["kind"] == "PrometheusRule" for one in objects(APPS["pair"], prometheus_rule=True))


def test_what_a_user_writes_arrives_as_it_was_written() -> None:
    (web,) = deployments(FOREIGN)["web-v1"]["spec"]["template"]["spec"]["containers"]
    assert web["image"] == "shop/web:1"
    assert web["command"] == ["serve", "--quote", 'it\'s "x"']
    assert web["readinessProbe"]["httpGet"]["path"] == "/ping?a={b}"
    assert {"name": "A", "value": "1: {}"} in web["env"]
    (db,) = deployments(FOREIGN)["db-v1"]["spec"]["template"]["spec"]["containers"]
    assert db["readinessProbe"]["tcpSocket"] == {"port": 5432}


def test_render_prints_what_is_applied() -> None:
    text = manifests.render(APPS["pair"], {"name": "other"})
    printed = [one for one in yaml.safe_load_all(text) if one]
    assert {one["metadata"].get("namespace", "other") for one in printed} == {"other"}
    kinds = [one["kind"] for one in printed]
    assert kinds[0] == "Namespace"
    assert "# " in text  # a person reads it
    images = {c["image"] for one in printed if one["kind"] == "Deployment" for c in containers(one)}
    assert any(image.startswith("meshdemo/service-b:") for image in images)
    pushed = manifests.render(APPS["pair"], {"registry": "reg.example.com/team/"})
    assert "image: reg.example.com/team/meshdemo/sidecar:" in pushed


def test_everything_says_whose_it_is() -> None:
    for manifest in objects(APPS["emojivoto"], watch=POLICY):
        labels = manifest["metadata"]["labels"]
        assert labels["app.kubernetes.io/managed-by"] == "meshdemo"
        assert labels["meshdemo.dev/mesh"] == "m"


@pytest.mark.parametrize("app", APPS.values(), ids=lambda app: app.name)
def test_every_container_but_one_is_restricted(app: App) -> None:
    """The `restricted` Pod Security Standard, written out."""
    for name, deployment in deployments(app, watch=POLICY).items():
        pod = deployment["spec"]["template"]["spec"]
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
        assert {next(iter(volume.keys() - {"name"})) for volume in pod.get("volumes", [])} <= {
            "emptyDir", "projected", "secret", "configMap", "persistentVolumeClaim",
        }  # fmt: skip
        for container in containers(deployment):
            context = container["securityContext"]
            if container["name"] == "meshdemo-redirect":
                assert context["capabilities"] == {"drop": ["ALL"], "add": ["NET_ADMIN"]}
                assert context["runAsUser"] == 0
            else:
                assert context["runAsNonRoot"] is True, (name, container["name"])
                assert context.get("runAsUser") != 0
                assert context["capabilities"] == {"drop": ["ALL"]}
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["seccompProfile"] == {"type": "RuntimeDefault"}
            assert (
                container["resources"]["requests"].keys()
                == container["resources"]["limits"].keys()
                == {"cpu", "memory"}
            )


def test_the_sidecar_starts_first_and_ends_last() -> None:
    pod = deployments(APPS["pair"])["service-b-v1"]["spec"]["template"]["spec"]
    assert [c["name"] for c in pod["initContainers"]] == ["meshdemo-redirect", "meshdemo-sidecar"]
    redirect, sidecar = pod["initContainers"]
    assert "restartPolicy" not in redirect
    assert sidecar["restartPolicy"] == "Always"
    assert sidecar["startupProbe"]["httpGet"] == {"path": "/ready", "port": 15021}
    (app,) = pod["containers"]
    assert app["lifecycle"] == {"preStop": {"sleep": {"seconds": 1}}}
    assert pod["enableServiceLinks"] is False
    (token,) = [
        s["serviceAccountToken"]
        for v in pod["volumes"]
        if v["name"] == "meshdemo"
        for s in v["projected"]["sources"]
        if "serviceAccountToken" in s
    ]
    assert token["audience"] == "meshdemo"
    assert pod["automountServiceAccountToken"] is False
    assert pod["serviceAccountName"] == "service-b"


def test_the_app_knows_nothing_of_the_mesh() -> None:
    (app,) = deployments(APPS["pair"])["service-a-v1"]["spec"]["template"]["spec"]["containers"]
    env = {variable["name"]: variable.get("value") for variable in app["env"]}
    assert env["TARGET"] == "http://service-b:5000/work"
    assert not {"HTTP_PROXY", "http_proxy", "HTTPS_PROXY"} & env.keys()
    assert (env["HOST"], env["PORT"], env["SERVICE"], env["VERSION"]) == (
        "127.0.0.1",
        "5000",
        "service-a",
        "v1",
    )
    assert env["RPS"] == "0"  # load begins once everybody is there
    assert initial_load(spec_of(APPS["pair"])) == 50
    assert initial_load(spec_of(APPS["pair"], rps=7)) == 7


def test_probes_go_to_the_apps_own_port_and_path() -> None:
    for name, path in (("service-b-v1", "/healthz"),):
        (app,) = deployments(APPS["pair"])[name]["spec"]["template"]["spec"]["containers"]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert app[probe]["httpGet"] == {"path": path, "port": 5000}
    (voting,) = deployments(APPS["emojivoto"])["voting-v1"]["spec"]["template"]["spec"]["containers"]
    assert voting["readinessProbe"]["exec"]["command"][0] == "grep"  # gRPC: does it listen on 5000 (0x1388)?
    assert ":1388 " in voting["readinessProbe"]["exec"]["command"][2]


def test_traffic_is_redirected_but_for_the_sidecars_own() -> None:
    redirect = containers(deployments(APPS["pair"])["service-b-v1"])[0]
    (text,) = [variable["value"] for variable in redirect["env"] if variable["name"] == "RULES"]
    lines = text.splitlines()
    assert lines[0] == "*nat"
    assert text.endswith("COMMIT\n")
    out = [line for line in lines if line.startswith("-A MESHDEMO_OUT")]
    itself = (
        "-A MESHDEMO_OUT -p tcp ! -d 127.0.0.0/8 -o lo -m owner --uid-owner 1337 -j REDIRECT --to-ports 15006"
    )
    assert out[0] == itself  # a pod that calls itself through its own Service
    assert out[1] == "-A MESHDEMO_OUT -m owner --uid-owner 1337 -j RETURN"
    assert out[-1] == "-A MESHDEMO_OUT -p tcp -j REDIRECT --to-ports 15001"
    assert not any("udp" in line for line in lines)
    skipping = manifests.redirect_rules(skip_inbound=(9000,), skip_outbound=(25, 3306))
    assert "-A MESHDEMO_IN -p tcp --dport 9000 -j RETURN\n" in skipping
    assert "-A MESHDEMO_OUT -p tcp --dport 3306 -j RETURN\n" in skipping


def test_pods_spread_and_are_not_all_drained_at_once() -> None:
    found = objects(APPS["pair"])
    (budget,) = [
        o for o in found if o["kind"] == "PodDisruptionBudget" and o["metadata"]["name"] == "service-b"
    ]
    assert budget["spec"]["maxUnavailable"] == 1
    deployment = deployments(APPS["pair"])["service-b-v1"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert budget["spec"]["selector"]["matchLabels"].items() <= labels.items()
    (spread,) = deployment["spec"]["template"]["spec"]["topologySpreadConstraints"]
    assert spread["topologyKey"] == "kubernetes.io/hostname"
    assert spread["labelSelector"]["matchLabels"].items() <= labels.items()
    assert deployment["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0


def test_votes_outlive_their_pods_where_the_cluster_has_volumes() -> None:
    spec = spec_of(APPS["emojivoto"], versions={"voting": ["v2"]})
    made = manifests.objects(spec, site_of(APPS["emojivoto"]))
    (claim,) = [one for one in made if one["kind"] == "PersistentVolumeClaim"]
    assert claim["metadata"]["name"] == "voting-state"
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]
    found = {one["metadata"]["name"]: one for one in made if one["kind"] == "Deployment"}
    for name in ("voting-v1", "voting-v2"):  # both versions count the same votes
        template = found[name]["spec"]["template"]
        pod = template["spec"]
        (state,) = [volume for volume in pod["volumes"] if volume["name"] == "state"]
        assert state["persistentVolumeClaim"] == {"claimName": "voting-state"}
        assert pod["securityContext"]["fsGroup"] == pod["containers"][0]["securityContext"]["runAsGroup"]
        # Such a volume is on one node, and a rollout has old and new pods at the same time.
        (term,) = pod["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert term["topologyKey"] == "kubernetes.io/hostname"
        assert term["labelSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
        assert "topologySpreadConstraints" not in pod
    for name in ("web-v1", "emoji-v1"):
        assert "affinity" not in found[name]["spec"]["template"]["spec"]
    without = VARIANTS["without volumes"]()
    assert not [one for one in without if one["kind"] == "PersistentVolumeClaim"]
    (voting,) = [
        one for one in without if one["kind"] == "Deployment" and one["metadata"]["name"] == "voting-v1"
    ]
    assert "emptyDir" in voting["spec"]["template"]["spec"]["volumes"][0]


def test_an_autoscaler_is_left_in_peace() -> None:
    assert deployments(APPS["pair"])["service-b-v1"]["spec"]["replicas"] == 2
    alone = deployments(APPS["pair"], scaled_by_others=frozenset({"service-b-v1"}))
    assert "replicas" not in alone["service-b-v1"]["spec"]
    assert alone["service-a-v1"]["spec"]["replicas"] == 1


def test_together_sidecars_report_no_more_often_than_can_be_taken_in() -> None:
    def interval(files: dict[str, str]) -> str:
        return str(yaml.safe_load(files["bootstrap.yaml"])["stats_flush_interval"])

    sizes = {3: "0.5s", 100: "0.5s", 101: "1s", 400: "2s", 1000: "5s", 3000: "15s", 5000: "30s", 9000: "30s"}
    assert {size: interval(dict(manifests.sidecar_files("m", size))) for size in sizes} == sizes
    spec = spec_of(APPS["pair"], replicas={"service-b": 399})
    found = manifests.objects(spec, site_of(APPS["pair"]))
    (given,) = [one for one in found if one["metadata"]["name"] == "meshdemo-sidecar"]
    assert interval(given["data"]) == "2s"  # a caller, and its 399


def test_the_control_plane_has_the_rights_that_it_needs_and_no_other() -> None:
    granted = {
        o["kind"]: o["rules"]
        for o in objects(APPS["pair"], observability=False)
        if o["kind"] in {"Role", "ClusterRole"}
    }
    state = ("meshdemo-intent", "meshdemo-journal", "meshdemo-spec", "meshdemo-trust")
    assert flat(granted["ClusterRole"]) == {
        ("authentication.k8s.io", "tokenreviews", "create", ()),
        ("", "pods", "list", ()), ("", "pods", "watch", ()),
        ("", "services", "list", ()), ("", "services", "watch", ()),
        ("discovery.k8s.io", "endpointslices", "list", ()), ("discovery.k8s.io", "endpointslices", "watch", ()),
        # Where pods are injected, this one ConfigMap.
        ("", "configmaps", "create", ("meshdemo-m",)), ("", "configmaps", "patch", ("meshdemo-m",)),
        ("networking.k8s.io", "ingresses", "list", ()), ("networking.k8s.io", "ingresses", "watch", ()),
        ("networking.k8s.io", "ingresses/status", "patch", ()),
        ("gateway.networking.k8s.io", "httproutes", "list", ()),
        ("gateway.networking.k8s.io", "httproutes", "watch", ()),
        ("gateway.networking.k8s.io", "httproutes/status", "patch", ()),
        ("", "events", "create", ()),
    }  # fmt: skip
    assert flat(granted["Role"]) == {
        ("", "pods", "delete", ()),
        ("", "configmaps", "get", state), ("", "configmaps", "list", state), ("", "configmaps", "watch", state),
        ("", "configmaps", "patch", state),
        ("", "secrets", "get", ("meshdemo-ca",)), ("", "secrets", "patch", ("meshdemo-ca",)),
        ("apps", "deployments", "patch", ()),
    }  # fmt: skip


def flat(rules: list[dict[str, Any]]) -> set[tuple[str, str, str, tuple[str, ...]]]:
    return {
        (group, resource, verb, tuple(rule.get("resourceNames", ())))
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def test_watch_in_the_cluster_only_looks_into_other_namespaces() -> None:
    (role,) = [
        one
        for one in objects(APPS["pair"], observability=False, watch=POLICY)
        if one["kind"] == "ClusterRole" and one["metadata"]["name"].endswith(":watch")
    ]
    assert flat(role["rules"]) == {
        ("", "pods", "list", ()), ("", "services", "list", ()), ("discovery.k8s.io", "endpointslices", "list", ()),
    }  # fmt: skip


def test_only_the_control_plane_and_prometheus_may_talk_to_the_api_server() -> None:
    for name, deployment in deployments(APPS["pair"]).items():
        pod = deployment["spec"]["template"]["spec"]
        if name not in {"control-plane", "prometheus"}:  # and watch, where there is one
            assert pod["automountServiceAccountToken"] is False, name


def test_state_is_made_once_and_never_applied() -> None:
    state = [o for o in objects(APPS["pair"]) if manifests.is_state(o)]
    assert {(o["kind"], o["metadata"]["name"]) for o in state} == {
        ("ConfigMap", "meshdemo-intent"), ("ConfigMap", "meshdemo-journal"), ("ConfigMap", "meshdemo-spec"),
        ("ConfigMap", "meshdemo-trust"), ("Secret", "meshdemo-ca"), ("Secret", "meshdemo-api"),
    }  # fmt: skip
    assert all("data" not in o for o in state)


def test_a_new_environment_is_a_patch_of_what_changed() -> None:
    now = WorkloadRevision(
        service="service-b",
        version="v1",
        revision=3,
        env={"A": "1", "LAT_MS": "200"},
        created_at=1,
        reason="fault f-1",
    )
    patch = env_patch({"A": "1", "OLD": "x"}, now)
    (app,) = patch["spec"]["template"]["spec"]["containers"]
    assert app == {
        "name": "app",
        "env": [{"name": "LAT_MS", "value": "200"}, {"name": "OLD", "$patch": "delete"}],
    }
    assert patch["spec"]["template"]["metadata"]["annotations"]["meshdemo.dev/revision"] == "3"
    assert "fault f-1" in patch["metadata"]["annotations"]["kubernetes.io/change-cause"]


def test_what_watches_and_observes_is_configured_by_what_it_was_given() -> None:
    found = {(o["kind"], o["metadata"]["name"]): o for o in VARIANTS["watched"]() + VARIANTS["observed"]()}
    config = found["ConfigMap", "prometheus"]["data"]
    assert yaml.safe_load(config["objectives.yml"]) == yaml.safe_load(RULES)
    jobs = {job["job_name"]: job for job in yaml.safe_load(config["prometheus.yml"])["scrape_configs"]}
    assert set(jobs) == {"workloads", "sidecars", "control-plane"}
    assert jobs["workloads"]["kubernetes_sd_configs"][0]["namespaces"] == {"names": ["m"]}
    assert jobs["sidecars"]["metrics_path"] == "/stats/prometheus"
    kept = found["ConfigMap", "grafana"]["data"]
    volume = next(
        v
        for v in found["Deployment", "grafana"]["spec"]["template"]["spec"]["volumes"]
        if v["name"] == "config"
    )
    assert {item["path"]: kept[item["key"]] for item in volume["configMap"]["items"]} == DASHBOARDS
    policy = found["ConfigMap", "watch"]["data"]["policy.yaml"]
    assert yaml.safe_load(policy) == yaml.safe_load(POLICY)
    assert ":latest" not in str(found)


def test_a_kind_cluster_has_the_nodes_and_ports_asked_for() -> None:
    config = yaml.safe_load(manifests.kind_config(workers=2, ports={30090: 1234}))
    assert [node["role"] for node in config["nodes"]] == ["control-plane", "worker", "worker"]
    (mapping,) = config["nodes"][0]["extraPortMappings"]
    assert mapping == {
        "containerPort": 30090,
        "hostPort": 1234,
        "listenAddress": "127.0.0.1",
        "protocol": "TCP",
    }
    assert "extraPortMappings" not in manifests.kind_config(workers=0, ports={})
