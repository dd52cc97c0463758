"""How long a prefix must be, by what a model is called."""

from __future__ import annotations

import pytest

from sidecar.account.minimums import SHORTEST, minimum_of


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("claude-opus-4-5-20251101", 4096),
        ("us.anthropic.claude-opus-4-6-v1", 4096),
        ("anthropic/claude-haiku-4.5", 4096),
        ("claude-opus-4-7", 2048),
        ("claude-3-5-haiku-20241022", 2048),
        ("anthropic.claude-3-haiku-20240307-v1:0", 2048),
        ("claude-opus-4-20250514", 1024),
        ("claude-opus-4@20250514", 1024),
        ("claude-opus-4-1-20250805", 1024),
        ("claude-opus-4-8", 1024),
        ("claude-sonnet-4-5@20250929", 1024),
        ("global.anthropic.claude-sonnet-4-20250514-v1:0", 1024),
        ("claude-sonnet-4-6", 1024),
        ("claude-sonnet-5", 1024),
        ("claude-3-7-sonnet-20250219", 1024),
        ("gpt-4o-mini", 1024),
        ("o3", 1024),
        ("openai/o3-mini", 1024),
        ("claude-mythos-preview", 4096),
        ("us.amazon.nova-pro-v1:0", 1000),
        ("claude-opus-5", SHORTEST),
        ("claude-fable-5", SHORTEST),
    ],
)
def test_models_that_are_known(name: str, tokens: int) -> None:
    """As their makers and sellers write them."""
    assert minimum_of(name) == tokens


@pytest.mark.parametrize(
    "name", ["claude-opus-4-9", "claude-opus-4-10", "claude-sonnet-5-5", "claude-haiku-5", "fast"]
)
def test_models_that_are_not_known_have_the_least(name: str) -> None:
    """A newer one of a family may keep less than those before it."""
    assert minimum_of(name) == SHORTEST


def test_the_first_name_that_tells_decides() -> None:
    """An alias says nothing; the deployment's own name is asked first."""
    assert minimum_of("fast", "claude-opus-4-5") == 4096
    assert minimum_of("claude-sonnet-4-5", "claude-opus-4-5") == 1024


def test_names_are_looked_at_up_to_a_length() -> None:
    """Who makes up one of a megabyte does not hold up the loop with it."""
    assert minimum_of("x" * 200 + "claude-opus-4-5") == SHORTEST
    assert minimum_of("x" * 185 + "claude-opus-4-5" + "x" * 1_000_000) == 4096
