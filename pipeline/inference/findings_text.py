"""Formats the table that `predict` prints, on 80 columns."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Final

from ichpipe.common.classes import CLASSES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import pandas as pd

    from ichpipe.inference.findings import Extent

WIDTH: Final = 80
MAX_FULL_STUDIES: Final = 10  # of more studies than this, only ``any`` and positive classes are shown
MAX_REFUSED: Final = 10  # studies that a message names
UID_WIDTH: Final = 23


def format_studies(
    studies: pd.DataFrame,
    where: Mapping[str, Mapping[str, Extent]],
    series: pd.DataFrame,
    forced: Mapping[str, str],
    threshold: float,
    mark: Callable[[str], str] = str,
) -> str:
    """Return a table of studies and classes, with the mm of the first and last positive slice along the normal.

    Below each study stands the series and the reason for its choice. ``mark`` is applied to the lines of classes whose
    probability is ``threshold`` or more.
    """
    reasons = series.set_index("series_uid")["reason"]
    lines = [f"{'study':<25}{'class':<17}{'probability':>11}{'first mm':>10}{'last mm':>9}{'slices':>8}"]
    for row in studies.to_dict("records"):
        uid, study = str(row["series_uid"]), short_uid(str(row["study_uid"]))
        for name in CLASSES:
            if len(studies) <= MAX_FULL_STUDIES or name == "any" or row[name] >= threshold:
                extent = where[uid][name]
                first, last = ("-" if mm is None else f"{mm:.1f}" for mm in (extent.first_mm, extent.last_mm))
                line = f"{study:<25}{name:<17}{row[name]:>11.3f}{first:>10}{last:>9}{len(extent.sop_uids):>8}"
                lines.append(mark(line) if row[name] >= threshold else line)
                study = ""
        choice = f"series {short_uid(uid)}, {counted(row['n_slices'], 'slice')}: {reasons[uid]}"
        lines += wrapped(choice, "  ") + (wrapped(f"FORCED, although: {forced[uid]}", "  ") if uid in forced else [])
    return "\n".join(lines)


def format_refused(refused: pd.DataFrame) -> list[str]:
    """Return a line for each refused study, the first ten."""
    lines = []
    for row in refused.iloc[:MAX_REFUSED].to_dict("records"):
        lines += wrapped(f"{short_uid(str(row['study_uid']))}: {row['reason']}", "  ")
    return [*lines, f"  and {len(refused) - MAX_REFUSED} more"] if len(refused) > MAX_REFUSED else lines


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return ``1 file``, ``2 files``."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def short_uid(uid: str) -> str:
    """Return the end of a UID, which differs between studies of the same device."""
    return uid if len(uid) <= UID_WIDTH else f"…{uid[-UID_WIDTH + 1 :]}"


def wrapped(text: str, indent: str = "") -> list[str]:
    """Wrap a sentence at 80 columns; paths and UIDs stay whole."""
    more = f"{indent}  "
    return textwrap.wrap(
        text, WIDTH, initial_indent=indent, subsequent_indent=more, break_long_words=False, break_on_hyphens=False
    )
