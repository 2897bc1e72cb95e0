"""Tables of aligned columns as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def format_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, markdown: bool = False) -> str:
    """Align the first column to the left and the others to the right; ``markdown`` adds bars and a rule."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [
        [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))]
        for cells in (head, *rows)
    ]
    if not markdown:
        return "\n".join("  ".join(cells).rstrip() for cells in lines)
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
