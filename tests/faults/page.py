"""Writes the table of faults for `docs/faults.md`: what the lab's cases claim, in words."""

from __future__ import annotations

__all__ = ["chapters"]


def chapters(table: object) -> str:
    raise NotImplementedError
