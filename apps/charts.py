"""Draws lines in a chart, as SVG that takes the colour of the page's text. Made at every move of a control, for which
matplotlib takes too long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np


_WIDTH, _HEIGHT = 340, 240
# Ends of the plane that lines are drawn in.
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 332, 28, 196
COLOURS = ("#2a9d8f", "#e07a3f", "#7b6fd6")


@dataclass(frozen=True)
class Axis:
    """Holds an axis: its `title`, the values at its `ends`, `ticks` with their texts, and whether it is
    logarithmic."""

    title: str
    ends: tuple[float, float]
    ticks: Sequence[tuple[float, str]]
    logarithmic: bool = False

    def place(self, values, start: float, end: float) -> np.ndarray:
        """Returns where values lie between the pixels `start` and `end` of the axis, those beyond it at its ends."""
        low, high = self.ends
        values = np.clip(values, min(low, high), max(low, high))
        if self.logarithmic:
            values, low, high = np.log(values), np.log(low), np.log(high)
        return start + (values - low) / (high - low) * (end - start)


def draw_lines(lines: dict[str, tuple[np.ndarray, np.ndarray]], x: Axis, y: Axis, mark: float | None = None) -> str:
    """
    Draws lines with a legend, as SVG text.

    Args:
        lines: Names to values along `x` and `y`, at most three.
        x, y ([`Axis`]): The axes.
        mark (`float`, *optional*): A value along `x` that gets a dashed line.
    """
    parts = [f'<path d="M{_LEFT} {_TOP}V{_BOTTOM}H{_RIGHT}" stroke="currentColor" fill="none" opacity="0.6"/>']
    for value, text in x.ticks:
        at = float(x.place(value, _LEFT, _RIGHT))
        parts.append(_grid(f"M{at:.1f} {_TOP}V{_BOTTOM}"))
        parts.append(_text(text, at, _BOTTOM + 17, "middle"))
    for value, text in y.ticks:
        at = float(y.place(value, _BOTTOM, _TOP))
        parts.append(_grid(f"M{_LEFT} {at:.1f}H{_RIGHT}"))
        parts.append(_text(text, _LEFT - 6, at + 4, "end"))
    parts.append(_text(x.title, (_LEFT + _RIGHT) / 2, _HEIGHT - 6, "middle"))
    middle = (_TOP + _BOTTOM) / 2
    parts.append(_text(y.title, 12, middle, "middle", f' transform="rotate(-90 12 {middle:.0f})"'))
    for number, (name, (along, up)) in enumerate(lines.items()):
        points = zip(x.place(along, _LEFT, _RIGHT), y.place(up, _BOTTOM, _TOP), strict=True)
        path, at = " ".join(f"{left:.1f},{top:.1f}" for left, top in points), _LEFT + 88 * number
        colour = f'stroke="{COLOURS[number]}" stroke-width="2"'
        parts.append(f'<polyline points="{path}" fill="none" {colour} stroke-linejoin="round"/>')
        parts.append(f'<path d="M{at} 12h14" {colour}/>')
        parts.append(_text(name, at + 18, 16, "start"))
    if mark is not None:
        at = float(x.place(mark, _LEFT, _RIGHT))
        parts.append(f'<path d="M{at:.1f} {_TOP}V{_BOTTOM}" stroke="currentColor" stroke-dasharray="5 4"/>')
    label = escape(f"{y.title} over {x.title}")
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}" font-size="12"'
        f' font-family="system-ui, sans-serif" fill="currentColor">{"".join(parts)}</svg>'
    )


def _grid(path: str) -> str:
    return f'<path d="{path}" stroke="currentColor" opacity="0.13"/>'


def _text(text: str, x: float, y: float, anchor: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(text)}</text>'
