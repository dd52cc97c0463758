"""How many tokens a prefix must have, by what its model is called."""

from __future__ import annotations

import pytest

from sidecar.account.minimums import SHORTEST, minimum_of


@pytest.mark.parametrize(
    ("names", "tokens"),
    [
        (("us.anthropic.claude-opus-4-5-20251101-v1:0",), 4096),
        (("claude-opus-4.6",), 4096),
        (("claude-opus-4-7",), 4096),
        (("claude-haiku-4-5@20251001",), 4096),
        (("claude-mythos-preview",), 4096),
        (("claude-3-5-haiku-20241022",), 2048),
        (("claude-3-haiku-20240307",), 2048),
        (("claude-opus-4-20250514",), 1024),
        (("claude-opus-4-8",), 1024),
        (("claude-sonnet-4-6",), 1024),
        (("openai/gpt-4o",), 1024),
        (("openai/o3-mini",), 1024),
        (("o3",), 1024),
        (("claude-opus-5",), SHORTEST),
        (("smart",), SHORTEST),
        (("", "smart", "claude-sonnet-4-5"), 1024),
        (("anthropic/claude-haiku-4-5", "claude-sonnet-4-5"), 4096),
    ],
)
def test_minimum_of_a_model(names: tuple[str, ...], tokens: int) -> None:
    """The first name that is known decides; for one that is not, the least of all."""
    assert minimum_of(*names) == tokens
