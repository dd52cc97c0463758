"""A plain line chart as SVG: panels above one another that share their x axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

__all__ = ["Panel", "draw"]

_WIDTH, _HEIGHT = 720, 120
"""Of a panel's plotting area."""
_LEFT, _TOP, _GAP, _BOTTOM, _RIGHT = 64, 56, 44, 48, 20
_TICKS = 4

_STYLE = """
  text { font: 12px sans-serif; fill: #333 }
  .title { font-size: 15px; font-weight: bold }
  .grid { stroke: #ddd; stroke-width: 1 }
  .line { fill: none; stroke: #1f6fb2; stroke-width: 1.5 }
  .end { text-anchor: end }
  .middle { text-anchor: middle }
"""


class Panel(NamedTuple):
    """One line over time; its y axis begins at zero."""

    title: str
    values: Sequence[float]


def draw(title: str, x_title: str, xs: Sequence[float], panels: Sequence[Panel]) -> str:
    """Draw the panels.

    Args:
        xs: of each value in every panel; they begin at or behind zero.
    """
    x_end = max(xs)
    x_step = _step(x_end)
    height = _TOP + len(panels) * (_HEIGHT + _GAP) - _GAP + _BOTTOM
    width = _LEFT + _WIDTH + _RIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}">',
        f"<style>{_STYLE}</style>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text class="title" x="{_LEFT}" y="22">{escape(title)}</text>',
    ]
    for number, panel in enumerate(panels):
        top = _TOP + number * (_HEIGHT + _GAP)
        parts += _panel(panel, [x / x_end for x in xs], top)
    bottom = _TOP + len(panels) * (_HEIGHT + _GAP) - _GAP
    for tick in range(int(x_end / x_step) + 1):
        at = _LEFT + tick * x_step / x_end * _WIDTH
        parts.append(
            f'<text class="middle" x="{at:.1f}" y="{bottom + 18}">{tick * x_step:g}</text>'
        )
    middle = _LEFT + _WIDTH / 2
    parts.append(
        f'<text class="middle" x="{middle}" y="{bottom + 38}">{escape(x_title)}</text></svg>'
    )
    return "\n".join(parts) + "\n"


def _panel(panel: Panel, shares: Sequence[float], top: int) -> list[str]:
    step = _step(max(panel.values))
    y_end = math.ceil(max(panel.values) / step) * step or 1
    parts = [f'<text x="{_LEFT}" y="{top - 10}">{escape(panel.title)}</text>']
    for tick in range(round(y_end / step) + 1):
        y = top + _HEIGHT - tick * step / y_end * _HEIGHT
        parts.append(
            f'<path class="grid" d="M{_LEFT} {y:.1f}h{_WIDTH}"/>'
            f'<text class="end" x="{_LEFT - 8}" y="{y + 4:.1f}">{tick * step:g}</text>'
        )
    points = " ".join(
        f"{_LEFT + share * _WIDTH:.1f},{top + _HEIGHT - value / y_end * _HEIGHT:.1f}"
        for share, value in zip(shares, panel.values, strict=True)
    )
    parts.append(f'<polyline class="line" points="{points}"/>')
    return parts


def _step(largest: float) -> float:
    """Choose a round distance for about so many ticks."""
    if largest <= 0:
        return 1.0
    rough = largest / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
