"""A griffe extension: what stands behind a field in the source is its description in the reference."""

from __future__ import annotations

from typing import Any

import griffe


class TrailingComments(griffe.Extension):
    """Take ``field: type  # comment`` of a class for the field's docstring."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Look at the field's line."""
        if attr.docstring or attr.lineno is None or attr.parent is None or not attr.parent.is_class:
            return
        line = attr.lines_collection[attr.filepath][attr.lineno - 1]
        _, mark, comment = line.partition("  # ")
        if mark:
            attr.docstring = griffe.Docstring(comment.strip(), parent=attr, lineno=attr.lineno)
