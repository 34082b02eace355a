"""Plots as inline SVG that takes its colours from the page, light or dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

__all__ = ["COLORS", "Point", "bars", "mark", "scatter", "ticks"]

COLORS = 8
"""Colours that a page defines as ``--c0`` to ``--c7``; behind them shapes change."""

_SHAPES = (
    "M-5.5 0A5.5 5.5 0 1 1 5.5 0A5.5 5.5 0 1 1 -5.5 0Z",
    "M-5 -5H5V5H-5Z",
    "M0 -6.8L6.8 0L0 6.8L-6.8 0Z",
    "M0 -6.5L6.2 5H-6.2Z",
)

_WIDTH, _HEIGHT = 560, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 18, 14, 46
_LETTER = 6.4  # pixels of a letter of a label

_Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True, slots=True)
class Point:
    """A mark with its intervals; ``tip`` is shown when the pointer is on it."""

    label: str
    x: float
    y: float
    color: int
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    tip: str = ""


def mark(number: int) -> tuple[str, str]:
    """The path about zero and the colour of a variant by its number: 32 are told apart."""
    shape = _SHAPES[number // COLORS % len(_SHAPES)]
    return f'<path class="shape" d="{shape}"', f"--c:var(--c{number % COLORS})"


def ticks(low: float, high: float, log: bool = False, most: int = 6) -> list[float]:
    """Round values from `low` to `high`, about `most` of them; powers and their parts if `log`."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        steps: tuple[int, ...] = (1,) if len(decades) > 4 else (1, 2, 5)
        found = [m * 10.0**d for d in decades for m in steps if low <= m * 10.0**d <= high]
        if len(found) >= 2:
            return found
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
    first = math.ceil(low / step)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


class _Axis:
    """Values to pixels."""

    def __init__(self, values: Sequence[float], start: float, stop: float, log: bool) -> None:
        low, high = min(values), max(values)
        self.log = log and low > 0
        if self.log:
            spread = max(math.log(high / low), 0.1)
            self.low, self.high = low * math.exp(-spread * 0.08), high * math.exp(spread * 0.12)
        else:
            spread = max(high - low, abs(high) * 1e-3, 1e-9)
            self.low, self.high = low - spread * 0.08, high + spread * 0.12
        self._start, self._stop = start, stop

    def __call__(self, value: float) -> float:
        if self.log:
            part = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return self._start + part * (self._stop - self._start)

    def ticks(self) -> list[float]:
        return ticks(self.low, self.high, self.log)


def _number(value: float) -> str:
    if value and abs(value) < 0.001:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:,.6g}"


def scatter(
    points: Sequence[Point],
    x_label: str,
    y_label: str,
    front: Sequence[str] = (),
    *,
    x_log: bool = False,
    y_log: bool = False,
) -> str:
    """Marks with their names beside them; those of `front` are joined by steps.

    Parameters
    ----------
    points : sequence of Point
        At least one, finite.
    x_label, y_label : str
    front : sequence of str
        Labels of the points that no other one beats.
    x_log, y_log : bool
        Logarithmic, where all values are above zero.
    """
    xs = [v for p in points for v in (p.x, *(p.x_range or ()))]
    ys = [v for p in points for v in (p.y, *(p.y_range or ()))]
    x = _Axis(xs, _LEFT, _WIDTH - _RIGHT, x_log)
    y = _Axis(ys, _HEIGHT - _BOTTOM, _TOP, y_log)
    parts = [_frame(x, y, x_label, y_label)]
    best = [p for p in points if p.label in front]
    lines: list[_Box] = []
    if len(best) > 1:
        # Between two points of the front nothing is reached but what the worse one gives.
        best.sort(key=lambda p: p.y, reverse=True)
        path = f"M{x(best[0].x):.1f} {y(best[0].y):.1f}"
        for a, b in pairwise(best):
            path += f"H{x(b.x):.1f}V{y(b.y):.1f}"
            lines += [_line(x(a.x), y(a.y), x(b.x), y(a.y)), _line(x(b.x), y(a.y), x(b.x), y(b.y))]
        parts.append(f'<path class="front" d="{path}"/>')
    for p in points:
        at, up, (shape, style) = x(p.x), y(p.y), mark(p.color)
        marks = f"<title>{escape(p.tip or p.label)}</title>"
        if p.y_range:
            low, high = (y(value) for value in p.y_range)
            lines.append(_line(at, low, at, high))
            marks += f'<path d="M{at:.1f} {low:.1f}V{high:.1f}"/>'
        if p.x_range:
            low, high = (x(value) for value in p.x_range)
            lines.append(_line(low, up, high, up))
            marks += f'<path d="M{low:.1f} {up:.1f}H{high:.1f}"/>'
        marks += f'{shape} transform="translate({at:.1f} {up:.1f})"/>'
        parts.append(f'<g class="mark" style="{style}">{marks}</g>')
    parts += _labels([(x(p.x), y(p.y), p.label) for p in points], lines)
    return _svg("".join(parts), _HEIGHT, f"{y_label} against {x_label}")


def _frame(x: _Axis, y: _Axis, x_label: str, y_label: str) -> str:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for value in y.ticks():
        up = y(value)
        parts.append(f'<path class="grid" d="M{_LEFT} {up:.1f}H{right}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{up + 4:.1f}" class="end">{_number(value)}</text>')
    for value in x.ticks():
        at = x(value)
        parts.append(f'<path class="grid" d="M{at:.1f} {_TOP}V{bottom}"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 18}" class="middle">{_number(value)}</text>')
    middle = (_LEFT + right) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 8}" class="middle">{escape(x_label)}</text>')
    up = (_TOP + bottom) / 2
    parts.append(
        f'<text class="middle" transform="translate(14 {up}) rotate(-90)">{escape(y_label)}</text>'
    )
    return "".join(parts)


def _line(x0: float, y0: float, x1: float, y1: float) -> _Box:
    """What a level or upright line takes, with a little room beside it."""
    return min(x0, x1) - 2, min(y0, y1) - 2, max(x0, x1) + 2, max(y0, y1) + 2


def _labels(points: Sequence[tuple[float, float, str]], lines: Sequence[_Box]) -> list[str]:
    """Each name where it hides least: right, left, above or below its mark, or further off."""
    taken = [*lines, *((at - 7, up - 7, at + 7, up + 7) for at, up, _ in points)]
    parts = []
    for at, up, label in points:
        wide = len(label) * _LETTER
        # The end that is next to the mark is held: how wide letters come out is a guess.
        places = [
            (at + side * (9 + wide / 2), up + 4 + drop, side)
            for drop in (0, -12, 12, -24, 24, -36, 36, -48, 48)
            for side in (1, -1)
        ] + [
            (at + side * (wide / 2 - 8), up + drop, side)
            for drop in (-12, 20, -24, 32)
            for side in (0, 1, -1)
        ]

        def cost(place: tuple[float, float, int], wide: float = wide, up: float = up) -> float:
            mid, base, _ = place
            box = (mid - wide / 2, base - 11, mid + wide / 2, base + 3)
            over = sum(
                max(0.0, min(box[2], t[2]) - max(box[0], t[0]))
                * max(0.0, min(box[3], t[3]) - max(box[1], t[1]))
                for t in taken
            )
            outside = max(0.0, _LEFT - box[0]) + max(0.0, box[2] - _WIDTH + 2)
            outside += max(0.0, _TOP - box[1]) + max(0.0, box[3] - _HEIGHT + _BOTTOM)
            return over + 40 * outside + abs(base - up - 4) * 0.5

        mid, base, side = min(places, key=cost)
        taken.append((mid - wide / 2, base - 11, mid + wide / 2, base + 3))
        anchor = ("end", "middle", "start")[side + 1]
        parts.append(
            f'<text class="name {anchor}" x="{mid - side * wide / 2:.1f}" y="{base:.1f}">'
            f"{escape(label)}</text>"
        )
    return parts


def bars(rows: Sequence[tuple[str, float, int]], label: str) -> str:
    """Horizontal bars from zero: names, values at least zero, colours."""
    wide = max(len(name) for name, _, _ in rows) * _LETTER + 10
    high = 16
    top = max(value for _, value, _ in rows) or 1.0
    scale = (_WIDTH - wide - 70) / top
    parts = []
    for i, (name, value, color) in enumerate(rows):
        up = i * high
        parts.append(
            f'<g class="mark" style="--c:var(--c{color % COLORS})"><title>{escape(name)}: '
            f'{value:.4g}</title><rect x="{wide:.1f}" y="{up + 2}" '
            f'width="{max(0.0, value) * scale:.1f}" height="{high - 4}" rx="2"/></g>'
            f'<text class="end small" x="{wide - 6:.1f}" y="{up + 12}">{escape(name)}</text>'
            f'<text class="small" x="{wide + max(0.0, value) * scale + 5:.1f}" '
            f'y="{up + 12}">{value:.3g}</text>'
        )
    height = len(rows) * high + 22
    middle = (wide + _WIDTH) / 2
    parts.append(f'<text class="middle" x="{middle:.1f}" y="{height - 5}">{escape(label)}</text>')
    return _svg("".join(parts), height, label)


def _svg(inner: str, height: int, what: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(what)}">{inner}</svg>'
    )
