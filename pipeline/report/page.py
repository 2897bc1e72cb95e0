"""What the page is built of, numbers as text, and rendering into one HTML file without script or network."""

from __future__ import annotations

import base64
import hashlib
import io
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Table:
    """A caption, column heads and rows; the first cell of a row is its head."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: bool = False  # cells hold words, not numbers


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
    plots: Sequence[tuple[str, Markup]] = ()  # title, and the SVG that ``charts`` made
    hidden: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    preformatted: str = ""
    tiles: Sequence[tuple[str, str, str]] = ()  # name, number, remark


def format_number(value: float | None, digits: int = 4) -> str:
    """Return a number as text; None is "not defined"."""
    return "not defined" if value is None else f"{value:z.{digits}f}"  # z turns -0 into 0


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


def as_picture(png: bytes, alt: str, caption: str) -> Picture:
    """Pack a contact sheet as WebP, a fifth of the size of the PNG; same bytes in, same bytes out."""
    with Image.open(io.BytesIO(png)) as image:
        webp = io.BytesIO()
        image.convert("RGB").save(webp, "WEBP", quality=80, method=4)
        return Picture(webp.getvalue(), image.width, image.height, alt, caption)


def render_page(sections: Sequence[Section], title: str) -> str:
    """Return the whole page; every text is escaped, the same sections give the same bytes.

    The Content-Security-Policy lets nothing load, and only this style sheet apply (by its SHA-256).
    """
    style = _read_template("style.css")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    template = environment.from_string(_read_template("page.html.j2"))
    return template.render(sections=sections, title=title, style=Markup(style), style_digest=digest)  # noqa: S704 - ours


def _read_template(name: str) -> str:
    return (files("ichpipe.report") / "templates" / name).read_text(encoding="utf-8")
