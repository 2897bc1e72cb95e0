"""Small plots as inline SVG: plain text, the same bytes for the same numbers, coloured by the page's style sheet.

Drawn here and not by matplotlib, so that the colours follow light, dark and print, and a plot costs 2 kB. Whatever text
comes in is escaped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from markupsafe import Markup

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDTH: Final = 320.0
HEIGHT: Final = 240.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 10.0, 10.0, 40.0
LOOKS: Final = 6
"""Lines that can be told apart; the style sheet has a colour and dashes for each (``s0`` … ``s5``)."""

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
class Interval:
    """One row of an interval plot: a value with its bounds; None where there is none."""

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Axis:
    """From where to where an axis runs, and what stands beside it."""

    name: str
    low: float
    high: float
    whole: bool = False  # ticks at whole numbers only

    def ticks(self, wanted: int = 5) -> list[float]:
        """Return round numbers within the axis, about ``wanted`` of them."""
        span = self.high - self.low
        rough = max(span / max(1, wanted), 1.0 if self.whole else 0.0)
        power = 10.0 ** math.floor(math.log10(rough))
        factors = (1, 2, 5, 10) if self.whole else (1, 2, 2.5, 5, 10)
        step = next(power * factor for factor in factors if power * factor >= rough * 0.8)
        first = math.ceil(self.low / step - 1e-9)
        return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]


def axis_over(name: str, values: Sequence[float], *, pad: float = 0.06) -> Axis:
    """Return an axis that holds all values with some room; one value alone gets room too."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    room = pad * (high - low) or pad * abs(high) or 1.0
    return Axis(name, low - room, high + room)


def line_plot(title: str, lines: Sequence[Line], x: Axis, y: Axis, *, diagonal: bool = False) -> Markup:
    """Draw lines over two axes, as an image with a title for those who can't see it."""
    frame = _Frame(x, y)
    parts = [*frame.grid()]
    if diagonal:
        parts.append(_element("line", "chance", **frame.segment(x.low, y.low, x.high, y.high)))
    for line in lines:
        parts += frame.line(line)
    parts += frame.names()
    return _svg(title, parts, WIDTH, HEIGHT)


def interval_plot(title: str, rows: Sequence[Interval], name: str, *, zero: bool = False, digits: int = 3) -> Markup:
    """Draw one value with its interval per row, the row's name above it; a value that is not there is said so."""
    known = [v for row in rows for v in (row.value, row.low, row.high) if v is not None] + ([0.0] if zero else [])
    axis = axis_over(name, known, pad=0.08)
    height = TOP + ROW * len(rows) + BOTTOM
    frame = _Frame(axis, Axis("", 0, 1), height=height, left=12.0)
    parts = [*frame.grid(across=False)]
    if zero:
        parts.append(_element("line", "chance", **frame.segment(0.0, 0.0, 0.0, 1.0)))
    for number, row in enumerate(rows):
        parts += frame.interval(row, TOP + ROW * number, number % LOOKS, digits)
    parts += frame.names()
    return _svg(title, parts, WIDTH, height)


class _Frame:
    """The place of numbers in the picture."""

    def __init__(self, x: Axis, y: Axis, *, height: float = HEIGHT, left: float = LEFT) -> None:
        self.x, self.y, self.height, self.left = x, y, height, left

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x.low) / (self.x.high - self.x.low)
        up = (y - self.y.low) / (self.y.high - self.y.low)
        bottom = self.height - BOTTOM
        return self.left + across * (WIDTH - self.left - RIGHT), bottom - up * (bottom - TOP)

    def segment(self, x1: float, y1: float, x2: float, y2: float) -> dict[str, float]:
        (a, b), (c, d) = self.at(x1, y1), self.at(x2, y2)
        return {"x1": a, "y1": b, "x2": c, "y2": d}

    def grid(self, *, across: bool = True) -> list[Markup]:
        parts = []
        for value in self.x.ticks():
            parts.append(_element("line", "grid", **self.segment(value, self.y.low, value, self.y.high)))
            place, _ = self.at(value, self.y.low)
            parts.append(_text(place, self.height - BOTTOM + 14, _short(value, self.x), "tick mid"))
        for value in self.y.ticks() if across else ():
            parts.append(_element("line", "grid", **self.segment(self.x.low, value, self.x.high, value)))
            _, place = self.at(self.x.low, value)
            parts.append(_text(self.left - 5, place + 4, _short(value, self.y), "tick end"))
        parts.append(_element("line", "axis", **self.segment(self.x.low, self.y.low, self.x.high, self.y.low)))
        return parts

    def names(self) -> list[Markup]:
        middle = (self.left + WIDTH - RIGHT) / 2
        parts = [_text(middle, self.height - 7, self.x.name, "name mid")]
        if self.y.name:
            turn = Markup(' transform="rotate(-90 10 {0})"').format(_number((self.height - BOTTOM + TOP) / 2))
            parts.append(_text(10, (self.height - BOTTOM + TOP) / 2, self.y.name, "name mid", turn))
        return parts

    def line(self, line: Line) -> list[Markup]:
        places = [self.at(x, y) for x, y in line.points]
        path = "M" + "L".join(f"{_number(a)} {_number(b)}" for a, b in places) if places else ""
        parts = [Markup('<path class="line s{0}" d="{1}"/>').format(line.look, path)] if path else []
        if line.dots:
            parts += [_element("circle", f"dot f{line.look}", cx=a, cy=b, r=3.0) for a, b in places]
        return parts

    def interval(self, row: Interval, top: float, look: int, digits: int) -> list[Markup]:
        name = row.name if len(row.name) <= NAME_LENGTH else row.name[: NAME_LENGTH - 1] + "…"
        parts = [_text(self.left, top + 12, name, "row")]
        if row.value is None:
            return [*parts, _text(self.left, top + 28, "not defined", "tick")]
        parts.append(_text(WIDTH - RIGHT, top + 12, f"{row.value:.{digits}f}", "row end"))
        if row.low is not None and row.high is not None:
            (a, _), (b, _) = self.at(row.low, 0), self.at(row.high, 0)
            parts.append(_element("line", f"bar s{look} solid", x1=a, y1=top + 25, x2=b, y2=top + 25))
        place, _ = self.at(row.value, 0)
        return [*parts, _element("circle", f"dot f{look}", cx=place, cy=top + 25, r=4.5)]


def _svg(title: str, parts: Sequence[Markup], width: float, height: float) -> Markup:
    head = Markup('<svg class="plot" viewBox="0 0 {0} {1}" role="img" aria-label="{2}"><title>{2}</title>')
    return head.format(_number(width), _number(height), title) + Markup("").join(parts) + Markup("</svg>")


def _element(kind: str, css: str, **places: float) -> Markup:
    given = Markup("").join(Markup(' {0}="{1}"').format(key, _number(value)) for key, value in places.items())
    return Markup('<{0} class="{1}"{2}/>').format(kind, css, given)


def _text(x: float, y: float, text: str, css: str, more: Markup | str = "") -> Markup:
    return Markup('<text class="{0}" x="{1}" y="{2}"{3}>{4}</text>').format(css, _number(x), _number(y), more, text)


def _number(value: float) -> str:
    """One decimal is a third of a pixel at most; -0 would be another text for 0."""
    text = f"{value:.1f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def _short(value: float, axis: Axis) -> str:
    step = (axis.high - axis.low) / 5
    digits = max(0, min(6, 1 - math.floor(math.log10(step)))) if step < 10 else 0
    text = f"{value:.{digits}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text in ("-0", "") else text
