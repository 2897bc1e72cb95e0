"""What the page is built of: tables, plots with the table behind them, pictures, and numbers as text."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from markupsafe import Markup

NOT_DEFINED = "not defined"


@dataclass(frozen=True)
class Table:
    """A caption, column heads and rows; the first cell of a row is its head."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: bool = False  # cells hold words, not numbers


@dataclass(frozen=True)
class Plot:
    """One plot; ``svg`` is markup that ``charts`` made."""

    title: str
    svg: Markup


@dataclass(frozen=True)
class Picture:
    """A contact sheet: bytes of a WebP picture, what it shows in words, and a caption."""

    webp: bytes
    width: int
    height: int
    alt: str
    caption: str

    @property
    def data_url(self) -> str:
        """The picture as the address of an ``img`` element."""
        return f"data:image/webp;base64,{base64.b64encode(self.webp).decode()}"


@dataclass(frozen=True)
class Section:
    """A part of the page. ``lines`` are sentences; ``hidden`` tables stand folded, behind the plots."""

    key: str
    title: str
    lines: Sequence[str] = ()
    tables: Sequence[Table] = ()
    legend: Sequence[tuple[str, int]] = ()  # name, look
    plots: Sequence[Plot] = ()
    hidden: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    preformatted: str = ""
    tiles: Sequence[tuple[str, str, str]] = ()  # name, number, remark


def format_number(value: float | None, digits: int = 4) -> str:
    """Return a number as text; None is "not defined"."""
    return NOT_DEFINED if value is None else f"{value:z.{digits}f}"  # z turns -0 into 0


def format_share(part: int, whole: int) -> str:
    """Return ``12 of 80 (15.0 %)``; of none there is no share."""
    return f"{part:,} of {whole:,} ({100 * part / whole:.1f} %)" if whole else f"{part} of 0"


def format_duration(seconds: float) -> str:
    """Return a duration as people say it: 47.3 s, 12 min 5 s, 23 h 4 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
