"""The page itself: sections into the template. No script, no network, one file."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from typing import TYPE_CHECKING

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ichpipe.report.blocks import Picture, Section


def render_page(sections: Sequence[Section], title: str) -> str:
    """Return the whole page; every text is escaped, the same sections give the same bytes.

    The Content-Security-Policy lets nothing load, and only this style sheet apply (by its SHA-256).
    """
    style = _template("style.css")
    environment = Environment(
        loader=FunctionLoader(_template),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["data_url"] = _data_url
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    template = environment.get_template("page.html.j2")
    return template.render(sections=sections, title=title, style=Markup(style), style_digest=digest)  # noqa: S704 - ours


def _template(name: str) -> str:
    return (files("ichpipe.report") / "templates" / name).read_text(encoding="utf-8")


def _data_url(picture: Picture) -> str:
    return f"data:image/webp;base64,{base64.b64encode(picture.webp).decode()}"
