"""How models are named: one model has a dozen spellings between client, LiteLLM and provider.

A plain id (`claude-sonnet-4-5`), one with a date (`…-20250929`, Vertex AI's `…@20250929`),
Bedrock's with a region and a version (`us.anthropic.…-v1:0`), an ARN around that, and before any
of them LiteLLM's provider and way (`bedrock/converse/…`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

__all__ = ["general_names", "plain_name", "provider_in", "same_price_names"]

_PROVIDERS = ("anthropic", "azure_ai", "bedrock", "bedrock_converse", "vertex_ai")
_DATE = re.compile(r"[-@](?:20\d{6}|20\d\d-\d\d-\d\d|latest|default)$")
_COMPACT_DATE = re.compile(r"-(20\d{6})$")
_REGION = re.compile(r"^(?:[a-z]{2,8}(?:-gov)?\.)(?=anthropic\.)")
_VERSION = re.compile(r"-v\d+(?::\d+)?$")
_BEDROCK_ID = re.compile(r"(?:[a-z]{2,8}(?:-gov)?\.)?anthropic\.")
_WAY = re.compile(r"(?:converse|converse_like|invoke)/|([a-z]{2,3}(?:-[a-z]+)+-\d+)/")
"""What LiteLLM takes before an id of Bedrock's: a route, and an AWS region to call."""


def provider_in(name: str) -> str:
    """Tell the provider from a model's name, as LiteLLM calls it; empty if it does not say."""
    if name.startswith("arn:") or _BEDROCK_ID.match(name):
        return "bedrock"
    head, slash, _ = name.partition("/")
    return head if slash else ""


def same_price_names(name: str, provider: str) -> Iterator[str]:
    """Spell a model in the ways of LiteLLM's cost map that leave its price as it is.

    The region of an id is never dropped: `us.anthropic.…` is dearer than `global.anthropic.…`.
    One that is called (`bedrock/eu-west-1/…`) is, behind the entry that it may have for itself.

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
    region = ""
    if provider.startswith("bedrock") or "anthropic." in bare:
        while way := _WAY.match(bare):
            region, bare = way[1] or region, bare[way.end() :]
    if bare.startswith("arn:"):
        kind, _, bare = bare.rpartition("/")
        if not kind.endswith((":foundation-model", ":inference-profile")):
            return  # an application's own profile has an id that says nothing
        provider = "bedrock"
    undated = _DATE.sub("", bare)
    if provider.startswith("bedrock") or "anthropic." in bare:
        if region:
            yield f"bedrock/{region}/{bare}"
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
