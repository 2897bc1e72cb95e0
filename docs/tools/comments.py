"""A griffe extension: the comment behind a field becomes its description in the reference."""

from __future__ import annotations

from typing import Any

import griffe


class TrailingComments(griffe.Extension):
    """Use the comment of ``field: type  # comment`` as the docstring of the field."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Read the comment of one field."""
        if attr.docstring or attr.lineno is None or attr.parent is None or not attr.parent.is_class:
            return
        line = attr.lines_collection[attr.filepath][attr.lineno - 1]
        _, mark, comment = line.partition("  # ")
        if mark:
            attr.docstring = griffe.Docstring(comment.strip(), parent=attr, lineno=attr.lineno)
