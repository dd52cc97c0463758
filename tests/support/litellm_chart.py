"""What LiteLLM's own Helm chart makes of its values, as far as the sidecar meets it.

Read off the chart's templates of early 2026 (`deploy/charts/litellm-helm` in LiteLLM's repository:
deployment, service, servicemonitor, poddisruptionbudget and extra-resources): which field goes
where, and the names and labels that the chart chooses. None of its text is here.
"""

from __future__ import annotations

from tests.support.manifests import Json

__all__ = ["chart"]

_KNOWN = {
    *("extraContainers", "extraInitContainers", "extraResources", "lifecycle", "pdb"),
    *("podAnnotations", "serviceMonitor", "terminationGracePeriodSeconds"),
}


def chart(values: Json, release: str = "litellm") -> list[Json]:
    """Return the objects that the chart makes for a release.

    Raises:
        AssertionError: a value is none that the chart reads.
    """
    assert values.keys() <= _KNOWN
    selector = {
        "app.kubernetes.io/name": "litellm",
        "app.kubernetes.io/instance": release,
    }
    labels = {**selector, "app.kubernetes.io/managed-by": "Helm"}
    metadata = {"name": release, "labels": labels}
    port, probe = 4000, {"httpGet": {"path": "/health/readiness", "port": "http"}}
    container = {
        "name": "litellm",
        "image": "ghcr.io/berriai/litellm-database:v1.83.10-stable",
        "ports": [{"name": "http", "containerPort": port, "protocol": "TCP"}],
        "startupProbe": probe,
        "livenessProbe": {"httpGet": {"path": "/health/liveliness", "port": "http"}},
        "readinessProbe": probe,
    }
    if "lifecycle" in values:
        container["lifecycle"] = values["lifecycle"]
    pod: Json = {
        "containers": [container, *values.get("extraContainers", [])],
        "terminationGracePeriodSeconds": values.get("terminationGracePeriodSeconds", 90),
    }
    if "extraInitContainers" in values:
        pod["initContainers"] = values["extraInitContainers"]
    template = {
        "metadata": {"labels": labels, "annotations": values.get("podAnnotations", {})},
        "spec": pod,
    }
    made: list[Json] = [
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": metadata,
            "spec": {"replicas": 1, "selector": {"matchLabels": selector}, "template": template},
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata,
            "spec": {
                "type": "ClusterIP",
                "ports": [{"name": "http", "port": port, "targetPort": "http", "protocol": "TCP"}],
                "selector": selector,
            },
        },
    ]
    monitor = values.get("serviceMonitor", {})
    if monitor.get("enabled"):
        endpoint = {
            "port": "http",
            "path": "/metrics/",
            "interval": monitor.get("interval", "15s"),
            "scrapeTimeout": "10s",
            "scheme": "http",
        }
        spec: Json = {"selector": {"matchLabels": selector}, "endpoints": [endpoint]}
        spec["namespaceSelector"] = {"matchNames": ["default"]}
        made.append(
            {
                "apiVersion": "monitoring.coreos.com/v1",
                "kind": "ServiceMonitor",
                "metadata": metadata,
                "spec": spec,
            }
        )
    budget = values.get("pdb", {})
    if budget.get("enabled"):
        made.append(
            {
                "apiVersion": "policy/v1",
                "kind": "PodDisruptionBudget",
                "metadata": metadata,
                "spec": {
                    "selector": {"matchLabels": selector},
                    "maxUnavailable": budget["maxUnavailable"],
                },
            }
        )
    return [*made, *values.get("extraResources", [])]
