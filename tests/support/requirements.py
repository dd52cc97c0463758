"""What a test needs beyond Python: named when absent, and a failure where all was promised."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

import pytest

__all__ = ["CORPUS", "require", "require_corpus"]

Found = TypeVar("Found")

CORPUS = Path(__file__).parents[3] / "shared" / "corpus"
"""1,365 recorded answers with their true usage; they lie beside the repository, not in it."""


def require(found: Found | None, what: str) -> Found:
    """Skip the test if something is not here, saying what; fail it under REQUIRE_ALL=1."""
    if found:
        return found
    if os.environ.get("REQUIRE_ALL") == "1":
        pytest.fail(f"{what} is not here, and REQUIRE_ALL=1 asks for it")
    pytest.skip(f"{what} is not here")


def require_corpus() -> Path:
    """Return the corpus's folder. It cannot be installed: where it is absent tests are skipped."""
    if not (CORPUS / "index.jsonl").is_file():
        pytest.skip(f"the corpus of recorded answers is not at {CORPUS}")
    return CORPUS
