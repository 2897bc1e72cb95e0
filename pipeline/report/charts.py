"""Small plots as inline SVG: the same bytes for the same numbers, coloured by the page's style sheet.

Matplotlib does not draw them: the colours follow light, dark and print, and a plot costs 2 kB. All text is escaped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from markupsafe import Markup

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ichpipe.scoring.bootstrap import Estimate

WIDTH: Final = 320.0
HEIGHT: Final = 240.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 10.0, 10.0, 40.0
LOOKS: Final = 6  # lines that can be told apart: the style sheet has a colour and dashes for each (``s0`` … ``s5``)
ROW: Final = 40.0
NAME_LENGTH: Final = 44


@dataclass(frozen=True)
class Line:
    """One line of a plot. ``look`` chooses colour and dashes, 0 … LOOKS - 1."""

    name: str
    points: Sequence[tuple[float, float]]
    look: int = 0
    dots: bool = False


@dataclass(frozen=True)
class Axis:
    """Name and range of an axis."""

    name: str
    low: float
    high: float
    whole: bool = False  # ticks at whole numbers only

    def ticks(self) -> list[float]:
        """Return round numbers within the axis, about five of them."""
        rough = max((self.high - self.low) / 5, 1.0 if self.whole else 0.0)
        power = 10.0 ** math.floor(math.log10(rough))
        factors = (1, 2, 5, 10) if self.whole else (1, 2, 2.5, 5, 10)
        step = next(power * factor for factor in factors if power * factor >= rough * 0.8)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]

    def tick_label(self, value: float) -> str:
        """Return ``value`` with the digits that tell neighbouring ticks apart."""
        step = (self.high - self.low) / 5
        digits = max(0, min(6, 1 - math.floor(math.log10(step)))) if step < 10 else 0
        text = f"{value:z.{digits}f}"  # z turns -0 into 0
        return text.rstrip("0").rstrip(".") if "." in text else text


def axis_over(name: str, values: Sequence[float], *, pad: float = 0.06) -> Axis:
    """Return an axis that holds all values with some room; one value alone gets room too."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    room = pad * (high - low) or pad * abs(high) or 1.0
    return Axis(name, low - room, high + room)


def line_plot(title: str, lines: Sequence[Line], x: Axis, y: Axis, *, diagonal: bool = False) -> Markup:
    """Draw lines over two axes; screen readers read ``title``."""
    frame = _Frame(x, y)
    parts = frame.grid()
    if diagonal:
        parts.append(frame.segment("chance", x.low, y.low, x.high, y.high))
    for line in lines:
        points = [frame.to_pixels(*point) for point in line.points]
        if points:
            path = "M" + "L".join(f"{_number(a)} {_number(b)}" for a, b in points)
            parts.append(Markup('<path class="line s{0}" d="{1}"/>').format(line.look, path))
        if line.dots:
            parts += [_element("circle", f"dot f{line.look}", cx=a, cy=b, r=3.0) for a, b in points]
    return frame.svg(title, parts)


def interval_plot(
    title: str, rows: Sequence[tuple[str, Estimate]], name: str, *, zero: bool = False, digits: int = 3
) -> Markup:
    """Draw a named value with its interval per row; a missing value is "not defined"."""
    values = [v for _, row in rows for v in (row.value, row.low, row.high) if v is not None] + ([0.0] if zero else [])
    axis = axis_over(name, values, pad=0.08)
    frame = _Frame(axis, Axis("", 0, 1), height=TOP + ROW * len(rows) + BOTTOM, left=12.0)
    parts = frame.grid(across=False)
    if zero:
        parts.append(frame.segment("chance", 0.0, 0.0, 0.0, 1.0))
    for number, (label, row) in enumerate(rows):
        top, look = TOP + ROW * number, number % LOOKS
        short = label if len(label) <= NAME_LENGTH else label[: NAME_LENGTH - 1] + "…"
        parts.append(_text(frame.left, top + 12, short, "row"))
        if row.value is None:
            parts.append(_text(frame.left, top + 28, "not defined", "tick"))
            continue
        parts.append(_text(WIDTH - RIGHT, top + 12, f"{row.value:.{digits}f}", "row end"))
        if row.low is not None and row.high is not None:
            low, high = (frame.to_pixels(bound, 0)[0] for bound in (row.low, row.high))
            parts.append(_element("line", f"bar s{look} solid", x1=low, y1=top + 25, x2=high, y2=top + 25))
        parts.append(_element("circle", f"dot f{look}", cx=frame.to_pixels(row.value, 0)[0], cy=top + 25, r=4.5))
    return frame.svg(title, parts)


class _Frame:
    """Axes, grid and names of a plot."""

    def __init__(self, x: Axis, y: Axis, *, height: float = HEIGHT, left: float = LEFT) -> None:
        self.x, self.y, self.left, self.height, self.bottom = x, y, left, height, height - BOTTOM

    def to_pixels(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x.low) / (self.x.high - self.x.low)
        up = (y - self.y.low) / (self.y.high - self.y.low)
        return self.left + across * (WIDTH - self.left - RIGHT), self.bottom - up * (self.bottom - TOP)

    def segment(self, css: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
        (a, b), (c, d) = self.to_pixels(x1, y1), self.to_pixels(x2, y2)
        return _element("line", css, x1=a, y1=b, x2=c, y2=d)

    def grid(self, *, across: bool = True) -> list[Markup]:
        x, y, parts = self.x, self.y, []
        for value in x.ticks():
            parts.append(self.segment("grid", value, y.low, value, y.high))
            parts.append(_text(self.to_pixels(value, 0)[0], self.bottom + 14, x.tick_label(value), "tick mid"))
        for value in y.ticks() if across else ():
            parts.append(self.segment("grid", x.low, value, x.high, value))
            parts.append(_text(self.left - 5, self.to_pixels(0, value)[1] + 4, y.tick_label(value), "tick end"))
        return [*parts, self.segment("axis", x.low, y.low, x.high, y.low)]

    def svg(self, title: str, parts: Sequence[Markup]) -> Markup:
        names = _text((self.left + WIDTH - RIGHT) / 2, self.height - 7, self.x.name, "name mid")
        if self.y.name:
            middle = (self.bottom + TOP) / 2
            turn = Markup(' transform="rotate(-90 10 {0})"').format(_number(middle))
            names += _text(10, middle, self.y.name, "name mid", turn)
        head = Markup('<svg class="plot" viewBox="0 0 {0} {1}" role="img" aria-label="{2}"><title>{2}</title>')
        head = head.format(_number(WIDTH), _number(self.height), title)
        return head + Markup("").join(parts) + names + Markup("</svg>")


def _element(kind: str, css: str, **numbers: float) -> Markup:
    attributes = Markup("").join(Markup(' {0}="{1}"').format(key, _number(value)) for key, value in numbers.items())
    return Markup('<{0} class="{1}"{2}/>').format(kind, css, attributes)


def _text(x: float, y: float, text: str, css: str, attributes: Markup | str = "") -> Markup:
    form = Markup('<text class="{0}" x="{1}" y="{2}"{3}>{4}</text>')
    return form.format(css, _number(x), _number(y), attributes, text)


def _number(value: float) -> str:
    """One decimal is a third of a pixel at most; z turns -0 into 0."""
    return f"{value:z.1f}".rstrip("0").rstrip(".")
