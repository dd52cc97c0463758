"""How many tokens a prefix must have to be kept, by model.

From Anthropic's page on prompt caching and OpenAI's guide to it, as they stood in summer 2026:
4,096 for Opus 4.5 to 4.7, Haiku 4.5 and Mythos Preview, 2,048 for the older Haikus, 512 for
Opus 5, 1,024 for the rest and for OpenAI's. A model of which nothing is known is taken for one
that keeps the shortest prefixes of all, so that what is called too short is too short for any.
"""

from __future__ import annotations

import re

__all__ = ["SHORTEST", "minimum_of"]

SHORTEST = 512
_MINIMUMS = (
    (re.compile(r"opus-4[-.][5-7]|haiku-4[-.]5|mythos-preview"), 4096),
    (re.compile(r"3[-.]5-haiku|haiku-3[-.]5|3-haiku|haiku-3"), 2048),
    (re.compile(r"opus-5"), SHORTEST),
    (re.compile(r"claude|gpt-|(?:^|/)o\d"), 1024),
)


def minimum_of(*names: str) -> int:
    """Find the minimum of a model.

    Args:
        names: what it is called, the surest first.
    """
    for name in names:
        for pattern, tokens in _MINIMUMS:
            if pattern.search(name):
                return tokens
    return SHORTEST
