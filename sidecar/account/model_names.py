"""How models are named: one model has a dozen spellings between client, LiteLLM and provider.

A plain id (`claude-sonnet-4-5`), one with a date (`…-20250929`, Vertex AI's `…@20250929`),
Bedrock's with a region and a version (`us.anthropic.…-v1:0`), an ARN around that, and before any
of them LiteLLM's provider and way (`bedrock/converse/…`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

__all__ = ["general_names", "plain_name", "same_price_names"]

_PROVIDERS = ("anthropic", "azure_ai", "bedrock", "bedrock_converse", "vertex_ai")
_DATE = re.compile(r"[-@](?:20\d{6}|20\d\d-\d\d-\d\d|latest|default)$")
_COMPACT_DATE = re.compile(r"-(20\d{6})$")
_REGION = re.compile(r"^(?:[a-z]{2,8}(?:-gov)?\.)(?=anthropic\.)")
_VERSION = re.compile(r"-v\d+(?::\d+)?$")


def same_price_names(name: str, provider: str) -> Iterator[str]:
    """Spell a model in the ways of LiteLLM's cost map that leave its price as it is.

    A region is never dropped: `us.anthropic.…` is dearer than `global.anthropic.…`.

    Args:
        provider: as LiteLLM calls it; empty if it is not known.
    """
    head, _, bare = name.partition("/")
    if bare and not name.startswith("arn:"):
        yield name
        if head == provider or head in _PROVIDERS:
            provider = head
        else:
            bare = name
    else:
        bare = name
    if bare.startswith("arn:"):
        kind, _, bare = bare.rpartition("/")
        if not kind.endswith((":foundation-model", ":inference-profile")):
            return  # an application's own profile has an id that says nothing
        provider = "bedrock"
    undated = _DATE.sub("", bare)
    if provider.startswith("bedrock") or "anthropic." in bare:
        bare = bare.removeprefix("converse/").removeprefix("invoke/")
        for each in (bare, bare.removeprefix("global.")):
            yield each
            yield f"{each}:0"
            yield each.removesuffix(":0")
            yield _VERSION.sub("", each)
    elif provider in ("vertex_ai", "azure_ai"):
        # Never without the provider: that would be Anthropic's own price.
        if provider == "vertex_ai":
            bare = _COMPACT_DATE.sub(r"@\1", bare)
        yield f"{provider}/{bare}"
        yield f"{provider}/{undated}"
    else:
        yield bare
        yield undated
        if provider:
            yield f"{provider}/{bare}"
            yield f"{provider}/{undated}"


def general_names(name: str) -> Iterator[str]:
    """Spell a model from the most exact to the most general, in lower case."""
    name = name.lower()
    yield name
    bare = name.rpartition("/")[2]
    yield bare
    unversioned = _VERSION.sub("", bare)
    yield unversioned
    regionless = _REGION.sub("", unversioned)
    yield regionless
    own = regionless.removeprefix("anthropic.")
    yield own
    yield _DATE.sub("", own)


def plain_name(name: str) -> str:
    """Name a model without provider, region, version and date, for comparison."""
    *_, plain = general_names(name)
    return plain.replace(".", "-").removesuffix("-0")
