"""What ships for Kubernetes: it renders, the schemas take it, and its names agree."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.support.manifests import SECRETS, Json, Manifests, faults, kustomize, read
from tests.support.process import checked
from tests.support.requirements import require
from tests.support.shipped import DEPLOY, KUBERNETES, SETS

ROOT = Path(__file__).resolve().parents[1]
ROLLOUT = (ROOT / "docs" / "rollout.md").read_text()
MONITORS = json.loads((ROOT / "tests/data/prometheus-operator.schema.json").read_text())

VERSIONS = {version.rsplit(".", 1)[0] for version in kubernetes_validate.utils.all_versions()}


def newer(oldest: str) -> list[str]:
    """The Kubernetes versions from this one on whose schemas are here."""
    number = int(oldest.split(".")[1])
    return sorted(one for one in VERSIONS if int(one.split(".")[1]) >= number)


OLDEST = {"native": "1.29", "plain": "1.27", "helm": "1.29", "helm-plain": "1.27"}

on_all = pytest.mark.parametrize("name", SETS)


# Schemas


# It reads its definitions, which are large, for each object.
kubernetes_validate.utils.schema_contents = lru_cache(16)(kubernetes_validate.utils.schema_contents)


def refused(found: Json, version: str) -> str | None:
    """Say why a Kubernetes of this version would not take an object; no field may be unknown."""
    try:
        if found["apiVersion"] == "monitoring.coreos.com/v1":
            jsonschema.validate(found, MONITORS[found["kind"]])
        else:
            kubernetes_validate.validate(found, version, strict=True)
    except jsonschema.ValidationError as fault:
        return f"{version} {found['kind']} {fault.json_path}: {fault.message}"
    return None


@on_all
def test_schemas_of_all_versions_take_everything(name: str) -> None:
    """From the oldest version that each form is for to the newest whose schema is here."""
    objects = SETS[name]().objects
    versions = newer(OLDEST[name])

    assert {"1.33", "1.34", "1.35"} < set(versions)
    assert [why for version in versions for one in objects if (why := refused(one, version))] == []


def test_schemas_are_strict() -> None:
    """A misspelt field is none, in ours and in the operator's; 1.27 knows no native sidecar."""
    manifests = SETS["native"]()
    manifests.pod["spec"]["initContainers"][0]["restartpolicy"] = "Always"
    assert "restartpolicy" in str(refused(manifests.deployment, "1.29"))
    (monitor,) = manifests.all("PodMonitor")
    monitor["spec"]["podMetricsEndpoints"][0]["intervall"] = "15s"
    assert "intervall" in str(refused(monitor, "1.29"))

    assert "restartPolicy" in str(refused(SETS["native"]().deployment, "1.27"))


# Wiring


@on_all
def test_names_agree(name: str) -> None:
    """Ports, selectors, settings, references, times of a stop, scrapes, policy, autoscaler."""
    manifests = SETS[name]()

    assert manifests.native is ("plain" not in name)
    assert faults(manifests) == []


def test_sets_have_what_they_should() -> None:
    """So that nothing above is well for want of objects."""
    common = {"Deployment", "Service", "PodDisruptionBudget"}
    more = {"ConfigMap", "HorizontalPodAutoscaler", "NetworkPolicy"}

    kinds = {name: {one["kind"] for one in made().objects} for name, made in SETS.items()}

    assert kinds == {
        "native": common | more | {"PodMonitor"},
        "plain": common | more | {"ServiceMonitor"},
        "helm": common | {"PodMonitor", "ServiceMonitor"},
        "helm-plain": common | {"PodMonitor", "ServiceMonitor"},
    }


SIDECAR = ("spec", "template", "spec", "initContainers", 0)
LITELLM = ("spec", "template", "spec", "containers", 0)
ENDPOINT = ("spec", "podMetricsEndpoints", 0)
GONE = object()

BROKEN = [
    # kind, where, what is put there, what is said of it
    ("Deployment", (*SIDECAR, "image"), "litellm-cache-sidecar:latest", "image "),
    ("Deployment", (*LITELLM, "image"), "litellm:main-latest", "image without"),
    ("Deployment", ("spec", "template", "metadata", "labels"), {"a": "b"}, "does not select"),
    ("Service", ("spec", "selector"), {"app": "litellm"}, "selector of Service"),
    ("PodDisruptionBudget", ("spec", "selector", "matchLabels"), {"a": "b"}, "selector of Pod"),
    ("PodMonitor", ("spec", "selector", "matchLabels"), {"a": "b"}, "selector of PodMonitor"),
    ("NetworkPolicy", ("spec", "podSelector", "matchLabels"), {}, "selector of NetworkPolicy"),
    ("Deployment", (*SIDECAR, "ports", 0, "name"), "side", "listens on"),
    ("Deployment", (*SIDECAR, "ports", 1, "containerPort"), 4003, "listens on"),
    ("Deployment", (*SIDECAR, "ports", 1, "name"), "prometheus-metrics", "bad name"),
    ("Deployment", (*LITELLM, "ports", 0, "name"), "sidecar", "stands twice"),
    ("Service", ("spec", "ports", 0, "targetPort"), 4003, "leads to a port that is not there"),
    ("Service", ("spec", "ports", 0, "targetPort"), "sidecar", "native sidecar by name"),
    ("Service", ("spec", "ports", 0, "targetPort"), 4002, "NetworkPolicy lets clients"),
    ("PodMonitor", (*ENDPOINT, "port"), "metrics", "PodMonitor asks a port"),
    ("PodMonitor", (*ENDPOINT, "port"), "litellm", "sidecar is not scraped once"),
    ("PodMonitor", ("spec", "podMetricsEndpoints", 1, "port"), "sidecar", "LiteLLM is not scraped"),
    ("PodMonitor", (*ENDPOINT, "interval"), "30s", "interval 30s"),
    ("Deployment", (*SIDECAR, "startupProbe", "httpGet", "path"), "/readyz", "startupProbe of"),
    ("Deployment", (*SIDECAR, "livenessProbe", "httpGet", "port"), "sidecar", "livenessProbe of"),
    ("Deployment", (*LITELLM, "livenessProbe", "httpGet", "port"), "http", "asks a port"),
    ("Deployment", (*SIDECAR, "env", 0, "value"), "http://127.0.0.1:4001", "not LiteLLM's port"),
    ("Deployment", (*SIDECAR, "env", 0, "name"), "SIDECAR_UPSTREAMS", "is no setting"),
    ("Deployment", (*SIDECAR, "env", 0, "value"), "localhost:4000", "settings: "),
    ("Deployment", (*SIDECAR, "env", 2, "value"), "300", "shorter than the longest answer"),
    ("Deployment", (*SIDECAR, "env", 2, "value"), "610", "times: "),
    ("Deployment", (*SIDECAR, "lifecycle"), GONE, "nobody tells the native sidecar"),
    ("Deployment", (*LITELLM, "lifecycle"), GONE, "does not wait for the sidecar"),
    ("Deployment", ("spec", "template", "spec", "terminationGracePeriodSeconds"), 600, "times: "),
    (
        "Deployment",
        (*SIDECAR, "livenessProbe", "terminationGracePeriodSeconds"),
        GONE,
        "that hangs",
    ),
    ("Deployment", (*LITELLM, "envFrom", 0, "secretRef", "name"), "litellm", "Secret litellm is"),
    ("ConfigMap", ("metadata", "name"), "another", "is not there"),
    ("Deployment", (*LITELLM, "volumeMounts", 0, "name"), "settings", "volume settings"),
    ("NetworkPolicy", ("spec", "ingress", 0, "ports"), [{"port": 4000}], "lets clients to {4000}"),
    ("NetworkPolicy", ("spec", "ingress", 1, "ports", 1), {"port": 4001}, "lets Prometheus to"),
    ("NetworkPolicy", ("spec", "ingress", 1, "from"), GONE, "lets clients to"),
    ("HorizontalPodAutoscaler", ("spec", "scaleTargetRef", "name"), "proxy", "something else"),
    (
        "HorizontalPodAutoscaler",
        ("spec", "metrics", 0),
        {"type": "Resource", "resource": {"name": "cpu"}},
        "the whole pod",
    ),
    (
        "HorizontalPodAutoscaler",
        ("spec", "metrics", 0, "containerResource", "container"),
        "sidecar",
        "autoscaler looks at sidecar",
    ),
    ("Deployment", (*LITELLM, "resources", "requests"), {}, "request that is not made"),
    ("Deployment", ("spec", "replicas"), 2, "how many pods"),
    ("Deployment", (*SIDECAR, "securityContext", "runAsUser"), 0, "securityContext"),
    ("Deployment", (*SIDECAR, "resources", "requests", "memory"), "64Mi", "memory of the sidecar"),
    ("Deployment", (*SIDECAR, "resources", "limits", "cpu"), "1", "no limit"),
]


@pytest.mark.parametrize(("kind", "where", "value", "said"), BROKEN)
def test_what_does_not_agree_is_found(
    kind: str, where: tuple[str | int, ...], value: Any, said: str
) -> None:
    """Each break in one place is seen, so that the test above says something."""
    manifests = SETS["native"]()
    node: Any = manifests.all(kind)[0]
    for step in where[:-1]:
        node = node[step]
    if value is GONE:
        del node[where[-1]]
    else:
        node[where[-1]] = value

    assert any(said in fault for fault in faults(manifests)), faults(manifests)


def test_plain_sidecar_with_a_hook_is_found() -> None:
    """Its own signal and the kubelet's are two, and the second cuts."""
    manifests = SETS["plain"]()
    hook = SETS["native"]().container("sidecar")["lifecycle"]
    manifests.container("sidecar")["lifecycle"] = hook

    assert any("second signal" in fault for fault in faults(manifests))


def test_service_that_hides_the_last_scrape_is_found() -> None:
    """Pods that end are not ready, and a Service forgets them unless told otherwise."""
    manifests = SETS["plain"]()
    (service,) = manifests.selected({"app.kubernetes.io/component": "metrics"})
    service["spec"]["publishNotReadyAddresses"] = False

    assert any("that end are no targets" in fault for fault in faults(manifests))


# LiteLLM's own monitor


@on_all
def test_monitor_of_litellms_chart_finds_no_service_of_ours(name: str) -> None:
    """Neither its labels nor its port fit; each alone would do."""
    theirs = SETS["helm"]()
    (monitor,), (own, *_) = theirs.all("ServiceMonitor"), theirs.all("Service")
    (endpoint,) = monitor["spec"]["endpoints"]
    labels = monitor["spec"]["selector"]["matchLabels"]
    ours = [service for service in SETS[name]().all("Service") if service != own]

    assert ours
    for service in ours:
        assert not labels.items() <= service["metadata"]["labels"].items()
        # Nor where there is a monitor for every release of the chart.
        assert labels["app.kubernetes.io/name"] not in service["metadata"]["labels"].values()
        assert endpoint["port"] not in [port["name"] for port in service["spec"]["ports"]]


def test_service_with_litellms_labels_and_port_doubles_spend() -> None:
    """What the labels and the port are for: with both, LiteLLM is scraped through the sidecar."""
    manifests = SETS["helm"]()
    ours, theirs = manifests.all("Service")[1], manifests.all("Service")[0]
    assert ours["metadata"]["name"] == "litellm-sidecar"
    ours["metadata"]["labels"] = theirs["metadata"]["labels"]
    assert faults(manifests) == []
    ours["spec"]["ports"][0]["name"] = "http"

    assert sorted(manifests.scrapes()) == [
        (4000, "/metrics/"),
        (4001, "/metrics/"),
        (4002, "/metrics"),
    ]
    assert any("LiteLLM is not scraped once" in fault for fault in faults(manifests))


# One source


def test_helm_has_the_same_container_and_hook() -> None:
    """What the chart's values say stands in the component, word by word."""
    helm, native = SETS["helm"](), SETS["native"]()

    assert helm.container("sidecar") == native.container("sidecar")
    assert helm.container("litellm")["lifecycle"] == native.container("litellm")["lifecycle"]
    grace = "terminationGracePeriodSeconds"
    assert helm.pod["spec"][grace] == native.pod["spec"][grace]
    (theirs,), (ours,) = helm.all("PodMonitor"), native.all("PodMonitor")
    assert theirs["spec"]["podMetricsEndpoints"] == ours["spec"]["podMetricsEndpoints"][:1]


def test_plain_form_is_the_native_one_but_for_its_place() -> None:
    """Neither a policy of its own nor a hook; all else is the same."""
    plain, native = SETS["plain"]().container("sidecar"), SETS["native"]().container("sidecar")

    assert native.pop("restartPolicy") == "Always"
    assert native.pop("lifecycle")["preStop"]
    assert plain == native


def test_monitors_drop_what_the_scrape_configuration_drops() -> None:
    """One job is the same under the operator and without it."""
    (config,) = read(DEPLOY / "prometheus" / "prometheus.yml")
    jobs = {
        job["job_name"]: [rule["regex"] for rule in job["metric_relabel_configs"]]
        for job in config["scrape_configs"]
    }

    for name in ("native", "plain"):
        manifests = SETS[name]()
        for monitor in (*manifests.all("PodMonitor"), *manifests.all("ServiceMonitor")):
            spec = monitor["spec"]
            for endpoint in spec.get("podMetricsEndpoints") or spec["endpoints"]:
                (job,) = endpoint["relabelings"]
                assert job["targetLabel"] == "job"
                dropped = [rule["regex"] for rule in endpoint["metricRelabelings"]]
                assert dropped == jobs[job["replacement"]]


def test_every_file_is_rendered() -> None:
    """Each is named by a kustomization, and each kustomization leads to an overlay."""
    seen: set[Path] = set()

    def follow(directory: Path) -> None:
        path = directory / "kustomization.yaml"
        (found,) = read(path)
        seen.add(path)
        generated = found.get("configMapGenerator", [])
        names = [*found.get("resources", []), *found.get("components", [])]
        names += [patch["path"] for patch in found.get("patches", []) if "path" in patch]
        names += [name for one in generated for name in one["files"]]
        for name in names:
            target = (directory / name).resolve()
            if target.is_dir():
                follow(target)
            else:
                seen.add(target)

    for directory in sorted((KUBERNETES / "overlays").iterdir()):
        follow(directory)

    there = {path for path in KUBERNETES.rglob("*") if path.is_file()}
    assert there - seen == set()


# Somebody's own Deployment


def test_component_fits_a_deployment_that_is_there(tmp_path: Path) -> None:
    """Whatever other containers it has, the sidecar is added and LiteLLM's own fields stay."""
    own = deepcopy(SETS["native"]().deployment)
    pod = own["spec"]["template"]["spec"]
    (sidecar,) = pod.pop("initContainers")
    pod["initContainers"] = [{"name": "migrate", "image": "migrate:1.0.0"}]
    pod["containers"].append({"name": "exporter", "image": "exporter:1.0.0"})
    for container in pod["containers"]:
        container.pop("lifecycle", None)
    (tmp_path / "deployment.yaml").write_text(yaml.safe_dump(own))
    for form in ("native", "plain"):
        kustomization = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": ["deployment.yaml", os.path.relpath(KUBERNETES / "base", tmp_path)],
            "components": [
                os.path.relpath(KUBERNETES / "components" / f"{form}-sidecar", tmp_path)
            ],
        }
        (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))

        made = Manifests(kustomize(tmp_path))

        spec = made.pod["spec"]
        assert made.container("sidecar")["env"] == sidecar["env"]
        assert made.container("litellm")["lifecycle"]["preStop"]
        assert made.container("litellm")["args"]
        inits = [one["name"] for one in spec["initContainers"]]
        assert inits == (["sidecar", "migrate"] if form == "native" else ["migrate"])
        assert {one["name"] for one in spec["containers"]} - {"sidecar"} == {"litellm", "exporter"}


# The rollout page


def test_example_of_the_page_renders(tmp_path: Path) -> None:
    """A Deployment of one's own with the base and the components, in the place of `deploy`."""
    (example,) = re.findall(r"```yaml\n(apiVersion: kustomize.+?)```", ROLLOUT, re.DOTALL)
    own = SETS["native"]().deployment
    pod = own["spec"]["template"]["spec"]
    del pod["initContainers"], pod["containers"][0]["lifecycle"]
    del pod["volumes"], pod["containers"][0]["volumeMounts"]
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    (tmp_path / "my-litellm.yaml").write_text(yaml.safe_dump(own))
    (tmp_path / "kustomization.yaml").write_text(example)

    made = Manifests(kustomize(tmp_path))

    assert faults(made) == []
    assert made.container("sidecar")["image"].startswith("REGISTRY/")
    assert made.all("HorizontalPodAutoscaler") == []


def test_rollback_is_one_field(tmp_path: Path) -> None:
    """The Service's target: clients then reach LiteLLM past the sidecar, also through the policy,
    and no pod is started anew."""
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    path = tmp_path / "deploy" / "kubernetes" / "base" / "service.yaml"
    before = path.read_text()
    path.write_text(before.replace("targetPort: 4001", "targetPort: 4000"))
    assert path.read_text() != before

    back = Manifests(kustomize(tmp_path / "deploy" / "kubernetes" / "overlays" / "litellm"))

    (service,) = back.all("Service")
    assert back.targets(service) == [back.ports["litellm"]]
    assert faults(back) == []
    assert back.deployment == SETS["native"]().deployment


def test_rollback_by_hand_does_the_same() -> None:
    """The patch on the page leads the Service to LiteLLM; the page says what to do with the policy
    before that, which would keep clients out."""
    (found,) = re.findall(r"kubectl patch service litellm --type json \\\n\s+-p '(.+)'", ROLLOUT)
    (step,) = json.loads(found)
    manifests = SETS["native"]()
    (service,) = manifests.all("Service")
    ports, index, field = step["path"].split("/")[2:]

    assert step["op"] == "replace"
    assert service["spec"][ports][int(index)][field] == manifests.ports["sidecar"]
    assert step["value"] == manifests.ports["litellm"]
    (policy,) = manifests.all("NetworkPolicy")
    assert (
        0
        < ROLLOUT.index(f"kubectl delete networkpolicy {policy['metadata']['name']}")
        < ROLLOUT.index("kubectl patch service")
    )


def test_page_says_how_to_make_the_secrets() -> None:
    """What is referred to and not in the manifests is made by hand."""
    assert set(re.findall(r"kubectl create secret generic (\S+)", ROLLOUT)) == SECRETS


def test_annotations_of_meshes_name_the_ports() -> None:
    """The admin port is the one that is taken out of the mesh."""
    admin = str(SETS["native"]().ports["sidecar-metrics"])
    found = dict(re.findall(r'^((?:traffic\.sidecar|config\.linkerd)\S+): "(.+)"$', ROLLOUT, re.M))

    assert {name: value.split(",")[0] for name, value in found.items()} == {
        "traffic.sidecar.istio.io/excludeInboundPorts": admin,
        "config.linkerd.io/skip-inbound-ports": admin,
    }


def test_rules_become_objects_of_the_operator(tmp_path: Path) -> None:
    """What the page's commands apply has all groups of the files, and the dashboard's folder is
    there."""
    (commands,) = re.findall(r"```sh\n(for name in .+?)```", ROLLOUT, re.DOTALL)
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(
        '#!/bin/sh\necho "$*" >>"$0.asked"\n'
        '[ "$1" != apply ] || { cat; echo "---"; } >>"$0.applied"\n'
    )
    kubectl.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"

    subprocess.run(["sh", "-euc", commands], cwd=ROOT, env={"PATH": path}, check=True, timeout=30)

    *made, _ = read(tmp_path / "kubectl.applied")
    assert {one["kind"] for one in made} == {"PrometheusRule"}
    assert {one["metadata"]["name"].rpartition("-")[2]: one["spec"] for one in made} == {
        name: read(DEPLOY / "prometheus" / f"{name}.yml")[0] for name in ("rules", "alerts")
    }
    (folder,) = re.findall(r"--from-file (\S+)", (tmp_path / "kubectl.asked").read_text())
    assert [found.suffix for found in (ROOT / folder).iterdir()] == [".json"]


def test_queries_of_the_page_are_good(tmp_path: Path) -> None:
    """Prometheus reads them, and every metric in them is the sidecar's, or one of LiteLLM's."""
    promtool = require(shutil.which("promtool"), "promtool")
    queries = re.findall(r"```promql\n(.+?)```", ROLLOUT, re.DOTALL)
    lines = [line for text in queries for line in text.splitlines() if line[:1] not in "#"]
    rules = [{"record": f"q:{n}", "expr": line} for n, line in enumerate(lines)]
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "page", "rules": rules}]}))
    checked(promtool, "check", "rules", str(path), directory=tmp_path)

    listed = (ROOT / "docs" / "metrics.md").read_text()
    known = {
        *re.findall(r"(?m)^\| `(litellm\w+)` \|", listed),
        "litellm_output_tokens_metric_total",
        "litellm_proxy_total_requests_metric_total",
        "process_resident_memory_bytes",
    }
    used = {
        re.sub(r"_(bucket|count|sum)$", "", name)
        for line in lines
        for name in re.findall(r"\b(?:litellm|process)_\w+", line)
    }
    assert lines
    assert used - known == set()
