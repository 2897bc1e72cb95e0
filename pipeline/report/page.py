"""Renders sections into one HTML file, without script or network."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from typing import TYPE_CHECKING

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ichpipe.report.blocks import Section


def render_page(sections: Sequence[Section], title: str) -> str:
    """Return the whole page; every text is escaped, the same sections give the same bytes.

    The Content-Security-Policy lets nothing load, and only this style sheet apply (by its SHA-256).
    """
    style = _read_template("style.css")
    environment = Environment(
        loader=FunctionLoader(_read_template),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    template = environment.get_template("page.html.j2")
    return template.render(sections=sections, title=title, style=Markup(style), style_digest=digest)  # noqa: S704 - ours


def _read_template(name: str) -> str:
    return (files("ichpipe.report") / "templates" / name).read_text(encoding="utf-8")
