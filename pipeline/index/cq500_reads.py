"""CQ500's scan names and its three readers' findings (Chilamkurthy et al., Lancet 2018, 392, 2388-2396)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd

from ichpipe.common.classes import CLASSES
from ichpipe.common.constants import ABBREVIATIONS
from ichpipe.common.user_tables import read_table

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from ichpipe.common.user_tables import Table

    Floats = NDArray[np.float64]

READERS: Final = ("R1", "R2", "R3")
FINDINGS: Final = ABBREVIATIONS  # CQ500's name of each class; six of its 14 findings are haemorrhages
_NAME: Final = re.compile(r"CQ500[\W_]*CT[\W_]*(\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class ScanTable:
    """Values of scans by name."""

    title: str
    values: pd.DataFrame  # index: names CQ500-CT-N, unique, by N; the columns of CLASSES, float64
    report: dict[str, Any]


def scan_number(text: str) -> int | None:
    """Return N of ``CQ500-CT-N``, ``CQ500CTN CQ500CTN`` or a path with such a folder; None for none or several N."""
    numbers = {int(digits) for digits in _NAME.findall(text)}
    return numbers.pop() if len(numbers) == 1 else None


def scan_numbers(texts: pd.Series) -> Floats:
    """Return the scan number of each text (rows,), NaN where `scan_number` returns None."""
    return np.array([np.nan if (number := scan_number(text)) is None else number for text in texts], dtype=np.float64)


def scan_name(number: int) -> str:
    """Return the name in the spelling of ``reads.csv``."""
    return f"CQ500-CT-{number}"


def read_majority(path: Path) -> ScanTable:
    """Read ``reads.csv``: 1 where at least two of the three readers saw the finding, else 0.

    Columns ``name`` and ``R1:ICH`` to ``R3:SAH``. Raises DataError that names file and line: a read other than 0 or 1,
    a name that is no scan of CQ500, two different rows of one scan. The report counts scans with ICH and none of the
    five kinds (some bleeds have no kind), and scans with a kind and no ICH.
    """
    columns = [f"{reader}:{finding}" for reader in READERS for finding in FINDINGS.values()]
    table = read_table(path, "label", ["name", *columns])
    absent = [name for name in ("name", *columns) if name not in table.names]
    if absent:
        near = table.near_misses(["name", *columns])
        raise table.error(f"is no reads.csv of CQ500: it lacks {', '.join(absent[:6])}{near}")
    reads = {name: table.numbers(name) for name in columns}
    for name, values in reads.items():
        table.refuse(~np.isin(values, (0.0, 1.0)), f"column {name} is neither 0 nor 1", values)
    votes = [sum(reads[f"{reader}:{finding}"] for reader in READERS) for finding in FINDINGS.values()]
    names = table.text("name").to_pandas()
    numbers = scan_numbers(names)
    table.refuse(np.isnan(numbers), "column name is no scan of CQ500", names)
    frame = one_row_each(table, np.column_stack(votes) >= 2, numbers)
    kinds = frame[list(CLASSES[1:])].max(axis="columns")
    report = {
        "file": str(path),
        "n_rows": len(names),
        "n_duplicate_rows": len(names) - len(frame),
        "n_ich_of_no_kind": int(((frame["any"] == 1) & (kinds == 0)).sum()),
        "n_kind_without_ich": int(((frame["any"] == 0) & (kinds == 1)).sum()),
    }
    return ScanTable(table.title, frame, report)


def one_row_each(table: Table, values: NDArray[Any], numbers: Floats) -> pd.DataFrame:
    """Index values (rows, 6) by scan, sorted by number; drop repeated rows and rows whose number (rows,) is NaN.

    Raises DataError where two rows of one scan differ.
    """
    frame = pd.DataFrame(values.astype(np.float64), columns=list(CLASSES))
    kept = frame.groupby(numbers).first()  # without the rows of no scan
    differ = ~np.isnan(numbers) & (frame.to_numpy() != kept.reindex(numbers).to_numpy()).any(axis=1)
    remedy = "keep one of them" + (", or pool them with --pool max" if table.role == "prediction" else "")
    names = np.array(["" if np.isnan(number) else scan_name(int(number)) for number in numbers], dtype=object)
    table.refuse(differ, f"contradicts another row of the same scan; {remedy}", names)
    return kept.set_axis(pd.Index([scan_name(int(number)) for number in kept.index]))
