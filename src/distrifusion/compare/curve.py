"""Curves as one inline SVG: a line per case over the steps, on a logarithmic axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

WIDTH, HEIGHT = 720, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 12, 12, 44
_LEAST = 1e-9  # what a logarithmic axis shows of zero

# Okabe and Ito's, which colour-blind readers can tell apart, without its black and yellow.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_DASHES = ("", "7 4", "2 3", "10 3 2 3")


@dataclass(frozen=True)
class Line:
    """One curve as SVG: its name, its looks, and the points of its polyline."""

    name: str
    colour: str
    dash: str
    points: str


@dataclass(frozen=True)
class Tick:
    """A mark on an axis, in the SVG's coordinates."""

    at: float
    text: str


@dataclass(frozen=True)
class Curves:
    """All that a template needs to draw."""

    lines: list[Line]
    rows: list[Tick]
    columns: list[Tick]
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = HEIGHT - _BOTTOM
    width: int = WIDTH
    height: int = HEIGHT


def curves(series: Sequence[tuple[str, Sequence[float]]]) -> Curves | None:
    """The curves of (name, value after each step); None where there is nothing to draw."""
    series = [(name, values) for name, values in series if values]
    if not series:
        return None
    shown = [max(value, _LEAST) for _, values in series for value in values]
    low, high = floor(log10(min(shown))), ceil(log10(max(shown)))
    jump = max(ceil((high - low) / 6), 1)
    high = low + jump * max(ceil((high - low) / jump), 1)  # so that the topmost line is at a mark
    count = max(len(values) for _, values in series)

    def x(step: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * (step - 1) / max(count - 1, 1)

    def y(value: float) -> float:
        share = (log10(max(value, _LEAST)) - low) / (high - low)
        return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * share

    lines = [
        Line(
            name,
            _COLOURS[place % len(_COLOURS)],
            _DASHES[place // len(_COLOURS) % len(_DASHES)],
            " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in enumerate(values, 1)),
        )
        for place, (name, values) in enumerate(series)
    ]
    rows = [Tick(round(y(10.0**power), 1), _power(power)) for power in range(low, high + 1, jump)]
    stride = next((stride for stride in (1, 2, 5, 10, 20, 50, 100) if count / stride <= 11), 200)
    steps = [1, *range(stride, count + 1, stride)] if stride > 1 else range(1, count + 1)
    return Curves(lines, rows, [Tick(round(x(step), 1), str(step)) for step in steps])


def _power(power: int) -> str:
    return f"{10.0**power:g}" if power >= -3 else f"1e{power}"
