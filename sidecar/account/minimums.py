"""How many tokens a prefix must have to be kept, by model.

The values are those that others quote of Anthropic's page on prompt caching, of Amazon's on
Bedrock's and of OpenAI's guide; the pages themselves were not at hand (November 2026). Where
quotations disagree the smaller one is taken, and a model of which nothing is known, a newer one
too, is taken for one that keeps the shortest prefixes of all: what is called too short is too short
for any.
"""

from __future__ import annotations

import re

__all__ = ["SHORTEST", "minimum_of"]

SHORTEST = 512
"""Opus 5, Fable 5 and Mythos 5 (of platform.claude.com, prompt caching)."""
_MAX_NAME_CHARS = 200
"""So much of a name is looked at: a client can make up one of a megabyte."""
_MINIMUMS = (
    # Of platform.claude.com, prompt caching: quotations agree.
    (re.compile(r"opus-4[-.][56](?!\d)|haiku-4[-.]5|mythos-preview"), 4096),
    # Some say 2,048 for Opus 4.7, and earlier ones 4,096.
    (re.compile(r"opus-4[-.]7(?!\d)"), 2048),
    # As above, and of docs.aws.amazon.com, Bedrock, prompt caching, for 3.5.
    (re.compile(r"3[-.]5-haiku|haiku-3[-.]5|3-haiku|haiku-3"), 2048),
    # As above. For Sonnet 4.6 one says 2,048, and users have seen that.
    (re.compile(r"opus-4(?:$|[-.][18](?!\d)|[-@]20)|sonnet-4(?:$|[-.][56](?!\d)|[-@]20)"), 1024),
    (re.compile(r"sonnet-5(?:$|[-@]20)|3(?:[-.][57])?-sonnet|3-opus|sonnet-3[-.][57]"), 1024),
    # Of platform.openai.com, prompt caching: for all models.
    (re.compile(r"gpt-|(?:^|/)o\d"), 1024),
    # Of docs.aws.amazon.com, Bedrock, prompt caching.
    (re.compile(r"nova-(?:micro|lite|pro|premier)"), 1000),
)


def minimum_of(*names: str) -> int:
    """Find the minimum of a model.

    Args:
        names: what it is called, the surest first.
    """
    for name in names:
        for pattern, tokens in _MINIMUMS:
            if pattern.search(name, 0, _MAX_NAME_CHARS):
                return tokens
    return SHORTEST
