"""Kubernetes objects that belong together: how they are rendered, and what is wrong with them.

It knows what the names in a set of manifests have to agree with: one another, the sidecar's
settings, and the times that a stop takes. Each check yields its faults in words, so that a test
can break a set in one place and see that the fault is found.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidecar import __version__, app, lifecycle, logs
from sidecar.config import PREFIX, Settings
from tests.support.requirements import require

__all__ = ["IMAGE", "Json", "Manifests", "faults", "kustomize", "read", "stopping_s"]

Json = dict[str, Any]

IMAGE = f"litellm-cache-sidecar:{__version__}"
LONGEST_ANSWER_S = Settings.model_fields["send_timeout_s"].default
"""How long the clients of Anthropic and OpenAI wait; the setting says the same."""
RESTING_MB = 88
"""With 2,000 idle clients and 500 streams; docs/operating.md."""
SECRETS = {"litellm-env", "litellm-sidecar"}
"""What the reader makes; docs/rollout.md says how."""


def read(path: Path) -> list[Json]:
    """Read all documents of a YAML file."""
    return list(yaml.safe_load_all(path.read_text()))


def kustomize(directory: Path) -> list[Json]:
    """Render a directory as `kubectl apply -k` would."""
    kubectl = Path(sysconfig.get_path("scripts")) / "kubectl"
    program = require(str(kubectl) if kubectl.exists() else None, "kubectl")
    done = subprocess.run(
        [program, "kustomize", str(directory)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return list(yaml.safe_load_all(done.stdout))


def stopping_s(environment: Mapping[str, str]) -> float:
    """Add up how long a sidecar with this environment may take to stop."""
    names = ("drain_delay_s", "drain_timeout_s", "final_scrape_wait_s")
    # On both ports what is cut has its time.
    fixed = 2 * lifecycle._CANCELLED_TASKS_S + lifecycle._LAST_ANSWERS_S
    fixed += app._FLUSH_S + logs._Handler._FLUSH_S
    return fixed + sum(
        float(environment.get(PREFIX + name.upper(), Settings.model_fields[name].default))
        for name in names
    )


@dataclass(frozen=True)
class Manifests:
    """A set of objects with one Deployment, whose pods have LiteLLM and the sidecar."""

    objects: list[Json]
    litellm: str = "litellm"
    """The name of LiteLLM's port."""

    def all(self, kind: str) -> list[Json]:
        """The objects of a kind."""
        return [found for found in self.objects if found["kind"] == kind]

    @cached_property
    def deployment(self) -> Json:
        """The Deployment."""
        (found,) = self.all("Deployment")
        return found

    @property
    def pod(self) -> Json:
        """What its pods are made of."""
        template: Json = self.deployment["spec"]["template"]
        return template

    @property
    def containers(self) -> list[Json]:
        """Every container that stays."""
        spec = self.pod["spec"]
        native = [one for one in spec.get("initContainers", []) if "restartPolicy" in one]
        return [*native, *spec["containers"]]

    def container(self, name: str) -> Json:
        """A container by its name."""
        (found,) = (one for one in self.containers if one["name"] == name)
        return found

    @property
    def native(self) -> bool:
        """Whether the sidecar is a native one."""
        return "restartPolicy" in self.container("sidecar")

    @property
    def ports(self) -> dict[str, int]:
        """The pod's ports by name."""
        ports = chain.from_iterable(one.get("ports", []) for one in self.containers)
        return {port["name"]: port["containerPort"] for port in ports}

    @property
    def admin_port(self) -> int:
        """The number of the sidecar's admin port; 0 if it has no name."""
        return self.ports.get("sidecar-metrics", 0)

    @property
    def environment(self) -> dict[str, str]:
        """The sidecar's environment; what comes from a Secret is made up."""
        return {
            entry["name"]: entry.get("value", "secret")
            for entry in self.container("sidecar")["env"]
        }

    def selected(self, selector: Mapping[str, str]) -> list[Json]:
        """The Services that have these labels."""
        return [
            service
            for service in self.all("Service")
            if selector.items() <= service["metadata"].get("labels", {}).items()
        ]

    def scrapes(self) -> Iterator[tuple[int, str]]:
        """What Prometheus asks each pod for: number of the port and path."""
        for monitor in self.all("PodMonitor"):
            for endpoint in monitor["spec"]["podMetricsEndpoints"]:
                if endpoint["port"] in self.ports:
                    yield self.ports[endpoint["port"]], endpoint["path"]
        for monitor in self.all("ServiceMonitor"):
            for service in self.selected(monitor["spec"]["selector"]["matchLabels"]):
                for endpoint in monitor["spec"]["endpoints"]:
                    for port in service["spec"]["ports"]:
                        if port["name"] == endpoint["port"]:
                            yield self._target(port["targetPort"]), endpoint["path"]

    def _target(self, port: int | str) -> int:
        return port if isinstance(port, int) else self.ports.get(port, 0)

    def targets(self, service: Json) -> list[int]:
        """The numbers of the ports where a Service leads."""
        return [self._target(port["targetPort"]) for port in service["spec"]["ports"]]


def faults(manifests: Manifests) -> list[str]:
    """Say all that is wrong with a set of manifests."""
    checks = (_images, _selectors, _ports, _probes, _settings, _references, _stop, _scrapes)
    more = (_policy, _autoscaler, _least_privilege, _resources)
    return [fault for check in (*checks, *more) for fault in check(manifests)]


def _images(manifests: Manifests) -> Iterator[str]:
    if (image := manifests.container("sidecar")["image"]).rpartition("/")[2] != IMAGE:
        yield f"image {image}"
    for container in manifests.containers:
        if not re.search(r":v?\d+\.\d+\.\d+", container["image"]):
            yield f"image without a version: {container['image']}"


def _selectors(manifests: Manifests) -> Iterator[str]:
    labels = manifests.pod["metadata"]["labels"].items()
    spec = manifests.deployment["spec"]
    selectors = [("Deployment", spec["selector"]["matchLabels"])]
    selectors += [
        ("topology", spread["labelSelector"]["matchLabels"])
        for spread in manifests.pod["spec"].get("topologySpreadConstraints", [])
    ]
    for kind, field in (
        ("Service", None),
        ("PodDisruptionBudget", "selector"),
        ("NetworkPolicy", "podSelector"),
        ("PodMonitor", "selector"),
    ):
        for found in manifests.all(kind):
            spec = found["spec"]
            selector = spec[field]["matchLabels"] if field else spec["selector"]
            selectors.append((f"{kind} {found['metadata']['name']}", selector))
    for name, selector in selectors:
        if not selector or not selector.items() <= labels:
            yield f"selector of {name} does not select the pods: {selector}"
    for monitor in manifests.all("ServiceMonitor"):
        selector = monitor["spec"]["selector"]["matchLabels"]
        names = {
            port["name"]
            for service in manifests.selected(selector)
            for port in service["spec"]["ports"]
        }
        if wanted := {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} - names:
            yield f"selector of ServiceMonitor finds no Service with the ports {wanted}"


def _ports(manifests: Manifests) -> Iterator[str]:
    listed = [port for one in manifests.containers for port in one.get("ports", [])]
    if len({port["name"] for port in listed}) < len(listed):
        yield "a port's name stands twice in the pod"
    services = [port for service in manifests.all("Service") for port in service["spec"]["ports"]]
    for port in (*listed, *services):
        if not re.fullmatch(r"(?=.{1,15}$)[a-z0-9]+(-[a-z0-9]+)*", port["name"]):
            yield f"port with a bad name: {port['name']}"
    for service in manifests.all("Service"):
        for port in service["spec"]["ports"]:
            target = port["targetPort"]
            if target not in (*manifests.ports, *manifests.ports.values()):
                yield f"Service {service['metadata']['name']} leads to a port that is not there"
            # EndpointSlices have the named ports of native sidecars since 1.32.
            named = {port["name"] for port in manifests.container("sidecar")["ports"]}
            if manifests.native and target in named:
                yield f"Service leads to the port {target} of a native sidecar by name"
    for monitor in manifests.all("PodMonitor"):
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            if endpoint["port"] not in manifests.ports:
                yield f"PodMonitor asks a port that is not there: {endpoint['port']}"


def _probes(manifests: Manifests) -> Iterator[str]:
    paths = {"startupProbe": "/healthz", "livenessProbe": "/healthz", "readinessProbe": "/readyz"}
    sidecar = manifests.container("sidecar")
    for name, path in paths.items():
        probe = sidecar[name]["httpGet"]
        # Whatever asks LiteLLM must not hold up the start, nor restart the sidecar.
        if probe != {"path": path, "port": "sidecar-metrics"}:
            yield f"{name} of the sidecar asks {probe}"
    for container in manifests.containers:
        names = {port["name"] for port in container.get("ports", [])}
        for name in paths:
            if name in container and container[name]["httpGet"]["port"] not in names:
                yield f"{name} of {container['name']} asks a port that is not there"


def _settings(manifests: Manifests) -> Iterator[str]:
    environment = manifests.environment
    for name in environment:
        if name.removeprefix(PREFIX).lower() not in Settings.model_fields:
            yield f"{name} is no setting"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            settings = Settings()
        except ValueError as fault:
            yield f"settings: {fault}"
            return
    ports = manifests.ports
    if settings.upstream != f"http://127.0.0.1:{ports.get(manifests.litellm)}":
        yield f"the upstream {settings.upstream} is not LiteLLM's port"
    listening = {"sidecar": settings.port, "sidecar-metrics": settings.admin_port}
    if {name: ports.get(name) for name in listening} != listening:
        yield f"the sidecar listens on {listening}, and the container has {ports}"
    links = manifests.pod["spec"].get("enableServiceLinks", True)
    for service in manifests.all("Service"):
        if links and service["metadata"]["name"].startswith("sidecar"):
            yield "a Service called sidecar writes into the settings"


def _references(manifests: Manifests) -> Iterator[str]:
    made = {found["metadata"]["name"] for found in manifests.all("ConfigMap")}

    def walk(node: Any) -> Iterator[tuple[str, str]]:
        if isinstance(node, dict):
            for key, value in node.items():
                if key in ("configMap", "configMapRef", "configMapKeyRef"):
                    yield "ConfigMap", value["name"]
                elif key in ("secretRef", "secretKeyRef", "secret"):
                    yield "Secret", value.get("name", value.get("secretName"))
                else:
                    yield from walk(value)
        elif isinstance(node, list):
            for value in node:
                yield from walk(value)

    spec = manifests.pod["spec"]
    for kind, name in walk(spec):
        if name not in (made if kind == "ConfigMap" else SECRETS):
            yield f"{kind} {name} is not there"
    volumes = {volume["name"] for volume in spec.get("volumes", [])}
    for container in manifests.containers:
        for mount in container.get("volumeMounts", []):
            if mount["name"] not in volumes:
                yield f"volume {mount['name']} is not there"


def _stop(manifests: Manifests) -> Iterator[str]:
    """Both containers end in the right order, and in time."""
    sidecar, environment = manifests.container("sidecar"), manifests.environment
    signals = "lifecycle" in sidecar
    if signals and "SIGTERM" not in sidecar["lifecycle"]["preStop"]["exec"]["command"][-1]:
        yield "the sidecar's hook does not tell it to stop"
    if manifests.native and not signals:
        yield "nobody tells the native sidecar to drain before LiteLLM has ended"
    if signals and not manifests.native:
        yield "a second signal cuts what the sidecar drains"
    (litellm,) = (one for one in manifests.containers if one["name"] != "sidecar")
    hook = litellm.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["pass"])
    ast.parse(hook[-1])
    bound = re.search(r"- began\) < (\d+)", hook[-1])
    if bound is None:
        yield "LiteLLM's hook does not wait for the sidecar"
        return
    if f'"127.0.0.1", {manifests.admin_port}' not in hook[-1]:
        yield "LiteLLM's hook asks another port than the admin port"
    grace_s = manifests.pod["spec"]["terminationGracePeriodSeconds"]
    drain_s = float(environment.get("SIDECAR_DRAIN_TIMEOUT_S", "0"))
    if drain_s < LONGEST_ANSWER_S:
        yield f"the drain of {drain_s} s is shorter than the longest answer"
    if not (stop_s := stopping_s(environment)) < float(bound[1]) <= grace_s - 20:
        yield f"times: stop {stop_s} s, LiteLLM's hook {bound[1]} s, grace period {grace_s} s"
    for name in ("startupProbe", "livenessProbe"):
        if sidecar[name].get("terminationGracePeriodSeconds", grace_s) > 30:
            yield f"a sidecar that hangs is killed late ({name})"


def _scrapes(manifests: Manifests) -> Iterator[str]:
    asked = list(manifests.scrapes())
    if asked.count((manifests.admin_port, "/metrics")) != 1:
        yield f"the sidecar is not scraped once: {asked}"
    # The data port passes on what LiteLLM says.
    others = [port for port, _ in asked if port != manifests.admin_port]
    if others != [manifests.ports.get(manifests.litellm)]:
        yield f"LiteLLM is not scraped once: {asked}"
    wait_s = float(manifests.environment.get("SIDECAR_FINAL_SCRAPE_WAIT_S", "20"))
    for monitor in (*manifests.all("PodMonitor"), *manifests.all("ServiceMonitor")):
        spec = monitor["spec"]
        for endpoint in spec.get("podMetricsEndpoints") or spec["endpoints"]:
            if not float(endpoint["interval"].removesuffix("s")) < wait_s:
                yield f"interval {endpoint['interval']} is longer than the wait for a last scrape"
    for monitor in manifests.all("ServiceMonitor"):
        selector = monitor["spec"]["selector"]["matchLabels"]
        for service in manifests.selected(selector):
            # The chart's own Service is not ours to change.
            ours = "sidecar" in service["metadata"]["labels"]["app.kubernetes.io/name"]
            if ours and service["spec"].get("publishNotReadyAddresses") is not True:
                yield "pods that end are no targets of the ServiceMonitor"


def _policy(manifests: Manifests) -> Iterator[str]:
    """Clients get where their Service leads, Prometheus where it scrapes, and that is all."""
    for policy in manifests.all("NetworkPolicy"):
        rules = policy["spec"]["ingress"]
        clients = {port["port"] for rule in rules if "from" not in rule for port in rule["ports"]}
        others = {port["port"] for rule in rules if "from" in rule for port in rule["ports"]}
        services = [
            service
            for service in manifests.all("Service")
            if service["spec"].get("clusterIP") != "None"
        ]
        wanted = {port for service in services for port in manifests.targets(service)}
        if clients != wanted:
            yield f"NetworkPolicy lets clients to {clients}, and the Service leads to {wanted}"
        if others != (scraped := {port for port, _ in manifests.scrapes()}):
            yield f"NetworkPolicy lets Prometheus to {others}, and it scrapes {scraped}"


def _autoscaler(manifests: Manifests) -> Iterator[str]:
    for scaler in manifests.all("HorizontalPodAutoscaler"):
        spec = scaler["spec"]
        target = spec["scaleTargetRef"]
        deployment = manifests.deployment
        if (target["kind"], target["name"]) != ("Deployment", deployment["metadata"]["name"]):
            yield f"autoscaler of something else: {target}"
        if "replicas" in deployment["spec"]:
            yield "autoscaler and Deployment both say how many pods there are"
        for metric in spec["metrics"]:
            name = metric.get("containerResource", {}).get("container")
            container = [one for one in manifests.containers if one["name"] == name]
            if name == "sidecar" or not container:
                yield f"autoscaler looks at {name or 'the whole pod'}"
            elif "cpu" not in container[0].get("resources", {}).get("requests", {}):
                yield "autoscaler looks at a share of a request that is not made"


def _least_privilege(manifests: Manifests) -> Iterator[str]:
    wanted = {
        "runAsNonRoot": True,
        "runAsUser": 65532,
        "runAsGroup": 65532,
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    if (context := manifests.container("sidecar").get("securityContext")) != wanted:
        yield f"securityContext of the sidecar: {context}"


def _resources(manifests: Manifests) -> Iterator[str]:
    resources = manifests.container("sidecar")["resources"]
    memory = {
        kind: int(resources[kind]["memory"].removesuffix("Mi")) * (1 << 20) / 1e6
        for kind in ("requests", "limits")
    }
    if not RESTING_MB < memory["requests"] < memory["limits"]:
        yield f"memory of the sidecar: {memory}"
    if "cpu" in resources["limits"] or "cpu" not in resources["requests"]:
        yield "CPU of the sidecar: a request and no limit"
