"""Small line charts as SVG, sharp on any screen and in print."""

from __future__ import annotations

import math
from collections.abc import Sequence

WIDTH, HEIGHT, LEFT, BOTTOM = 460, 190, 44, 24


def smooth(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """Exponential moving average, unbiased at the start."""
    result, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(total / weight)
    return result


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    step = 10 ** math.floor(math.log10(max(high - low, 1e-12) / count))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= count)
    return [step * index for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def line_chart(title: str, values: Sequence[float]) -> str:
    """One curve over updates: each value faint, their moving average drawn over it."""
    if not values:
        return ""
    low, high = min(values), max(values)
    high = high if high > low else low + 1
    across, up = (WIDTH - LEFT - 8) / max(1, len(values) - 1), (HEIGHT - BOTTOM - 24) / (high - low)

    def path(points: Sequence[float]) -> str:
        return " ".join(
            f"{LEFT + index * across:.1f},{HEIGHT - BOTTOM - (value - low) * up:.1f}" for index, value in enumerate(points)
        )

    marks = "".join(
        f'<line class="rule" x1="{LEFT}" x2="{WIDTH - 8}" y1="{HEIGHT - BOTTOM - (tick - low) * up:.1f}" '
        f'y2="{HEIGHT - BOTTOM - (tick - low) * up:.1f}"/><text class="tick" x="{LEFT - 6}" '
        f'y="{HEIGHT - BOTTOM - (tick - low) * up + 3.5:.1f}" text-anchor="end">{tick:g}</text>'
        for tick in _ticks(low, high)
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">'
        f'<text class="title" x="{LEFT}" y="14">{title}</text>{marks}'
        f'<text class="tick" x="{LEFT}" y="{HEIGHT - 6}">1</text>'
        f'<text class="tick" x="{WIDTH - 8}" y="{HEIGHT - 6}" text-anchor="end">update {len(values)}</text>'
        f'<polyline class="faint" points="{path(values)}"/><polyline class="curve" points="{path(smooth(values))}"/></svg>'
    )
