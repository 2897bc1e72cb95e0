"""Predictions as a table for people, on 80 columns."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any, Final

from ichpipe.common.classes import CLASSES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import pandas as pd

    from ichpipe.inference.findings import Extent

WIDTH: Final = 80
IN_FULL: Final = 10
"""Of more studies than this, only ``any`` and what is positive is shown."""

_HEAD: Final = f"{'study':<25}{'class':<17}{'probability':>11}{'first mm':>10}{'last mm':>9}{'slices':>8}"
_UID_END: Final = 23
_REFUSED: Final = 10  # that a message names


def studies_text(
    studies: pd.DataFrame,
    where: Mapping[str, Mapping[str, Extent]],
    series: pd.DataFrame,
    forced: Mapping[str, str],
    threshold: float,
    mark: Callable[[str], str] = str,
) -> str:
    """Return a table: study, class, probability, place of the first and last positive slice along the normal, mm.

    Below each study: which series was taken, and why. ``mark`` is applied to the lines of classes whose probability is
    ``threshold`` or more.
    """
    reasons = series.set_index("series_uid")["reason"]
    rows = [{str(key): value for key, value in row.items()} for row in studies.to_dict("records")]
    parts = [_HEAD]
    for row in rows:
        uid = str(row["series_uid"])
        names = [name for name in CLASSES if len(rows) <= IN_FULL or name == "any" or row[name] >= threshold]
        parts += _classes(row, names, where[uid], threshold, mark)
        parts += _wrapped(f"series {short_uid(uid)}, {counted(row['n_slices'], 'slice')}: {reasons[uid]}")
        if uid in forced:
            parts += _wrapped(f"FORCED, although: {forced[uid]}")
    return "\n".join(parts)


def refused_text(refused: pd.DataFrame) -> list[str]:
    """Return a line for each refused study, the first ten."""
    rows = [(str(row["study_uid"]), str(row["reason"])) for row in refused.to_dict("records")]
    lines = [line for uid, reason in rows[:_REFUSED] for line in _wrapped(f"{short_uid(uid)}: {reason}")]
    return [*lines, f"  and {len(rows) - _REFUSED} more"] if len(rows) > _REFUSED else lines


def counted(number: int, what: str, plural: str = "") -> str:
    """Return ``1 file``, ``2 files``."""
    return f"{number} {what if number == 1 else plural or what + 's'}"


def short_uid(uid: str) -> str:
    """Return the end of a UID, which tells it from others of the same device."""
    return uid if len(uid) <= _UID_END else f"…{uid[-_UID_END + 1 :]}"


def _classes(
    row: Mapping[str, Any],
    names: Sequence[str],
    where: Mapping[str, Extent],
    threshold: float,
    mark: Callable[[str], str],
) -> list[str]:
    lines = []
    for number, name in enumerate(names):
        study, found = short_uid(str(row["study_uid"])) if number == 0 else "", where[name]
        first, last = ("-" if one is None else f"{one:.1f}" for one in (found.first_mm, found.last_mm))
        line = f"{study:<25}{name:<17}{row[name]:>11.3f}{first:>10}{last:>9}{len(found.sop_uids):>8}"
        lines.append(mark(line) if row[name] >= threshold else line)
    return lines


def _wrapped(text: str) -> list[str]:
    return wrapped(text, indent="  ")


def wrapped(text: str, indent: str = "") -> list[str]:
    """Return a sentence as lines of at most 80 columns; paths and UIDs stay whole."""
    more = f"{indent}  "
    return textwrap.wrap(
        text, WIDTH, initial_indent=indent, subsequent_indent=more, break_long_words=False, break_on_hyphens=False
    )
