"""The sets of manifests that ship, as a cluster would get them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path

from tests.support.litellm_chart import chart
from tests.support.manifests import Json, Manifests, kustomize, read

__all__ = ["DEPLOY", "KUBERNETES", "SETS"]

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
KUBERNETES = DEPLOY / "kubernetes"


@cache
def _overlay(name: str) -> list[Json]:
    return kustomize(KUBERNETES / "overlays" / name)


def _helm(*, native: bool) -> Manifests:
    """What LiteLLM's chart makes of the values; for an old cluster as the file's head says."""
    (values,) = read(DEPLOY / "helm" / "litellm-values.yaml")
    if not native:
        (container,) = values.pop("extraInitContainers")
        values["extraContainers"] = [container]
        del container["restartPolicy"], container["lifecycle"]
    return Manifests(chart(values), litellm="http")


SETS: dict[str, Callable[[], Manifests]] = {
    "native": lambda: Manifests(deepcopy(_overlay("litellm"))),
    "plain": lambda: Manifests(deepcopy(_overlay("litellm-plain"))),
    "helm": lambda: _helm(native=True),
    "helm-plain": lambda: _helm(native=False),
}
"""Each call makes a set anew, to be broken at will."""
