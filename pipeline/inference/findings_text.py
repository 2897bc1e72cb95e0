"""The table that `predict` prints, on 80 columns."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Final

from ichpipe.common.classes import CLASSES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import pandas as pd

    from ichpipe.inference.findings import Extent

WIDTH: Final = 80
IN_FULL: Final = 10  # of more studies than this, only ``any`` and positive classes are shown
_HEAD: Final = f"{'study':<25}{'class':<17}{'probability':>11}{'first mm':>10}{'last mm':>9}{'slices':>8}"
_UID_END: Final = 23
_REFUSED: Final = 10  # that a message names


def format_studies(
    studies: pd.DataFrame,
    where: Mapping[str, Mapping[str, Extent]],
    series: pd.DataFrame,
    forced: Mapping[str, str],
    threshold: float,
    mark: Callable[[str], str] = str,
) -> str:
    """Return a table: study, class, probability, positions of the first and last positive slice along the normal, mm.

    Below each study stands the series and the reason for its choice. ``mark`` is applied to the lines of classes whose
    probability is ``threshold`` or more.
    """
    reasons = series.set_index("series_uid")["reason"]
    lines = [_HEAD]
    for row in studies.to_dict("records"):
        uid, study = str(row["series_uid"]), short_uid(str(row["study_uid"]))
        for name in CLASSES:
            if len(studies) <= IN_FULL or name == "any" or row[name] >= threshold:
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
    named = zip(refused["study_uid"].iloc[:_REFUSED], refused["reason"], strict=False)
    lines = [line for uid, reason in named for line in wrapped(f"{short_uid(str(uid))}: {reason}", "  ")]
    return [*lines, f"  and {len(refused) - _REFUSED} more"] if len(refused) > _REFUSED else lines


def counted(number: int, what: str, plural: str = "") -> str:
    """Return ``1 file``, ``2 files``."""
    return f"{number} {what if number == 1 else plural or what + 's'}"


def short_uid(uid: str) -> str:
    """Return the end of a UID, which differs between studies of the same device."""
    return uid if len(uid) <= _UID_END else f"…{uid[-_UID_END + 1 :]}"


def wrapped(text: str, indent: str = "") -> list[str]:
    """Return a sentence as lines of at most 80 columns; paths and UIDs stay whole."""
    more = f"{indent}  "
    return textwrap.wrap(
        text, WIDTH, initial_indent=indent, subsequent_indent=more, break_long_words=False, break_on_hyphens=False
    )
