"""Label tables. So far the long table of RSNA 2019: ``ID,Label`` with IDs ``<SOPInstanceUID>_<class>``.

A slice whose rows contradict each other is not trusted: all six of its labels become unknown.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import DataError
from ichpipe.common.files import require_file

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

COLUMNS: Final = ("ID", "Label")
_EXAMPLES: Final = 10  # UIDs that the report quotes of each kind


@dataclass(frozen=True)
class LabelReport:
    """What stood in a label table. The UIDs are examples, at most ten of each kind, sorted."""

    rows: int
    slices: int
    duplicate_rows: int  # rows that repeat an earlier row's ID
    contradictory_slices: int  # one ID with both 0 and 1: all six labels unknown
    contradictory_sop_uids: tuple[str, ...]
    inconsistent_any_slices: int  # `any` is not the maximum of the five: all six labels unknown
    inconsistent_any_sop_uids: tuple[str, ...]
    incomplete_slices: int  # rows of some class are absent: those labels unknown
    incomplete_sop_uids: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON-like values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


@dataclass(frozen=True)
class _Counts:
    """Rows of the table that say 0 and 1, per slice and class: (slices, 6)."""

    sop_uids: NDArray[np.object_]
    zeros: NDArray[np.int64]
    ones: NDArray[np.int64]


def read_kaggle(path: Path) -> tuple[pd.DataFrame, LabelReport]:
    """Read a Kaggle long table, such as ``stage_2_train.csv`` of RSNA 2019.

    Returns the labels, indexed by ``sop_uid`` (sorted), with the columns of CLASSES as float32 that are
    0, 1 or NaN (unknown), and a report of what was odd. Raises DataError that names the file and the
    first bad line: unknown column or class, a label other than 0 or 1; MissingFileError without a file.
    """
    table = _read_table(require_file(path, "name the label table with prepare.labels, or null for none"))
    counts = _count(_uids_and_classes(table["ID"], path), _values(table["Label"], path), path)
    return _resolve(counts, table.num_rows)


def _read_table(path: Path) -> pa.Table:
    types = csv.ConvertOptions(column_types=dict.fromkeys(COLUMNS, pa.string()), strings_can_be_null=False)
    try:
        table = csv.read_csv(path, convert_options=types)
    except (pa.ArrowInvalid, pa.ArrowKeyError, OSError) as error:
        raise DataError(f"label table {path} can't be read as CSV with the columns ID,Label: {error}") from error
    if sorted(table.column_names) != sorted(COLUMNS):
        found = ", ".join(table.column_names[:10])
        raise DataError(f"label table {path} must have exactly the columns ID,Label; found {found}")
    return table.combine_chunks()


def _uids_and_classes(ids: pa.ChunkedArray, path: Path) -> tuple[pa.Array, NDArray[np.int64]]:
    parts = pc.split_pattern(_one_array(ids), "_", max_splits=1, reverse=True)
    _refuse(pc.not_equal(pc.list_value_length(parts), 2), ids, path, "ID is not <SOPInstanceUID>_<class>")
    flat = parts.flatten()
    uids, names = flat.take(_every_second(flat, 0)), flat.take(_every_second(flat, 1))
    _refuse(pc.equal(uids, ""), ids, path, "ID has no SOPInstanceUID before the class")
    codes = pc.index_in(names, value_set=pa.array(CLASSES))
    _refuse(pc.is_null(codes), ids, path, f"ID ends in an unknown class (known: {', '.join(CLASSES)})")
    return uids, np.asarray(codes, dtype=np.int64)


def _every_second(flat: pa.Array, start: int) -> pa.Array:
    return pa.array(np.arange(start, len(flat), 2))


def _values(labels: pa.ChunkedArray, path: Path) -> NDArray[np.bool_]:
    text = pc.utf8_trim_whitespace(_one_array(labels))
    zero, one = (pc.is_in(text, value_set=pa.array([digit, f"{digit}.0"])) for digit in "01")
    _refuse(pc.invert(pc.or_(zero, one)), labels, path, "Label is not 0 or 1")
    return np.asarray(one)


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _refuse(bad: pa.Array, values: pa.ChunkedArray, path: Path, complaint: str) -> None:
    """Raise DataError for the first row marked in ``bad``; line 1 is the heading."""
    rows = np.flatnonzero(np.asarray(bad))
    if rows.size:
        row = int(rows[0])
        value = str(values[row].as_py())[:80]
        raise DataError(f"label table {path}, line {row + 2}: {complaint}: {value!r} ({rows.size} such line(s))")


def _count(keys: tuple[pa.Array, NDArray[np.int64]], positive: NDArray[np.bool_], path: Path) -> _Counts:
    uids, classes = keys
    if not len(uids):
        raise DataError(f"label table {path} has a heading and no rows")
    encoded = pc.dictionary_encode(uids)
    sop_uids = np.asarray(encoded.dictionary.to_pylist(), dtype=object)
    cells = np.asarray(encoded.indices, dtype=np.int64) * len(CLASSES) + classes
    size, shape = len(sop_uids) * len(CLASSES), (len(sop_uids), len(CLASSES))
    ones = np.bincount(cells[positive], minlength=size).reshape(shape)
    zeros = np.bincount(cells[~positive], minlength=size).reshape(shape)
    order = np.argsort(sop_uids)
    return _Counts(sop_uids[order], zeros[order], ones[order])


def _resolve(counts: _Counts, rows: int) -> tuple[pd.DataFrame, LabelReport]:
    known, positive = (counts.zeros + counts.ones) > 0, counts.ones > 0
    contradictory = np.logical_or.reduce(positive & (counts.zeros > 0), axis=1)
    missing = ~np.logical_and.reduce(known, axis=1)
    odd_any = inconsistent_any(known, positive) & ~contradictory
    values = np.where(known, positive, np.nan).astype(np.float32)
    values[contradictory | odd_any] = np.nan
    frame = pd.DataFrame(values, index=pd.Index(counts.sop_uids, name="sop_uid"), columns=list(CLASSES))
    report = LabelReport(
        rows=rows,
        slices=len(frame),
        duplicate_rows=rows - int(known.sum()),
        contradictory_slices=int(contradictory.sum()),
        contradictory_sop_uids=_examples(counts, contradictory),
        inconsistent_any_slices=int(odd_any.sum()),
        inconsistent_any_sop_uids=_examples(counts, odd_any),
        incomplete_slices=int(missing.sum()),
        incomplete_sop_uids=_examples(counts, missing),
    )
    return frame, report


def inconsistent_any(known: NDArray[np.bool_], positive: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Mark slices whose known labels can't belong together: (slices, 6), (slices, 6) -> (slices,)."""
    some_subtype = positive[:, 1:].any(axis=1)
    denied = known[:, 0] & ~positive[:, 0] & some_subtype
    unexplained = positive[:, 0] & known[:, 1:].all(axis=1) & ~some_subtype
    return denied | unexplained


def _examples(counts: _Counts, chosen: NDArray[np.bool_]) -> tuple[str, ...]:
    return tuple(str(uid) for uid in counts.sop_uids[chosen][:_EXAMPLES])
