"""Reader of RSNA 2019's long label table: ``ID,Label`` with IDs ``<SOPInstanceUID>_<class>``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from ichpipe.common.classes import CLASSES
from ichpipe.common.user_tables import read_table

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from ichpipe.common.user_tables import Table

    Floats = NDArray[np.float64]
    Flags = NDArray[np.bool_]

LONG_COLUMNS: Final = ["ID", "Label"]


def read_rsna_labels(
    path: Path, on_conflict: Literal["unknown", "error"] = "unknown"
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Read a long table, such as ``stage_2_train.csv`` of RSNA 2019.

    Returns the labels, indexed by ``sop_uid`` (sorted), with the columns of CLASSES as float32 that are 0, 1 or NaN
    (unknown), and a report for ``summary.json``. A slice whose ``any`` contradicts the five other labels gets six
    unknown labels. So does a slice with two different labels of one class, or with ``on_conflict="error"`` it is a
    DataError. Raises MissingFileError; DataError that names file and line at another column or class, or another label
    than 0 or 1.
    """
    table = read_table(path, "label", LONG_COLUMNS)
    if sorted(table.names) != LONG_COLUMNS:
        raise table.error(f"must have exactly the columns ID,Label{table.near_misses(LONG_COLUMNS)}")
    ids = table.text("ID")
    uids, classes = parse_ids(table, ids)
    text = pc.utf8_trim_whitespace(pc.cast(table.content["Label"].combine_chunks(), pa.string()))
    zero, one = (
        np.asarray(pc.fill_null(pc.is_in(text, value_set=pa.array([digit, f"{digit}.0"])), fill_value=False))
        for digit in "01"
    )
    table.refuse(~zero & ~one, "Label is not 0 or 1", text)
    encoded = pc.dictionary_encode(uids)
    sop_uids = np.asarray(encoded.dictionary.to_pylist(), dtype=object)
    cells = np.asarray(encoded.indices, dtype=np.int64) * len(CLASSES) + classes
    zeros, ones = (np.bincount(cells[marked], minlength=len(sop_uids) * len(CLASSES)) for marked in (zero, one))
    if on_conflict == "error":
        table.refuse((zeros * ones)[cells] > 0, "contradicts another row of the same ID; keep one of them", ids)
    order = np.argsort(sop_uids)
    sop_uids, zeros, ones = sop_uids[order], *(counts.reshape(-1, len(CLASSES))[order] for counts in (zeros, ones))
    values, contradictory, odd_any = resolve_labels(zeros, ones)
    present = zeros + ones > 0
    report: dict[str, Any] = {"rows": len(ids), "slices": len(sop_uids)}
    report["duplicate_rows"] = len(ids) - int(present.sum())
    kinds = {"contradictory": contradictory, "inconsistent_any": odd_any, "incomplete": ~present.all(axis=1)}
    for kind, marked in kinds.items():
        report |= {f"{kind}_slices": int(marked.sum()), f"{kind}_sop_uids": first_names(sop_uids[marked])}
    index = pd.Index(sop_uids, name="sop_uid")
    return pd.DataFrame(values.astype(np.float32), index=index, columns=list(CLASSES)), report


def parse_ids(table: Table, ids: pa.Array) -> tuple[pa.Array, NDArray[np.int64]]:
    """Split IDs ``<SOPInstanceUID>_<class>`` (rows,) into SOPInstanceUIDs and numbers of CLASSES.

    Raises DataError that names the first row with another ID.
    """
    complaint = "ID is not <SOPInstanceUID>_<class>"
    parts = pc.split_pattern(ids, "_", max_splits=1, reverse=True)
    table.refuse(np.asarray(pc.not_equal(pc.list_value_length(parts), 2)), complaint, ids)
    flat = parts.flatten()
    uids, names = (flat.take(pa.array(np.arange(start, len(flat), 2))) for start in (0, 1))
    table.refuse(np.asarray(pc.equal(uids, "")), f"{complaint}: it has no SOPInstanceUID", ids)
    codes = pc.index_in(names, value_set=pa.array(CLASSES))
    table.refuse(np.asarray(pc.is_null(codes)), f"{complaint}: unknown class (known: {', '.join(CLASSES)})", ids)
    return uids, np.asarray(codes, dtype=np.int64)


def resolve_labels(
    zeros: NDArray[np.int64], ones: NDArray[np.int64], *, derive_any: bool = False
) -> tuple[Floats, Flags, Flags]:
    """Turn the counts (n, 6) of rows that say 0 and 1 into labels (n, 6): 0, 1 or NaN.

    With ``derive_any`` the five other labels fill in an absent ``any``. Also returns two marks (n,): labels that
    contradict each other, and an ``any`` that does not fit. Both get NaN in all six columns.
    """
    contradictory: Flags = np.any((ones > 0) & (zeros > 0), axis=1)
    values = np.where(ones > 0, 1.0, np.where(zeros > 0, 0.0, np.nan))
    if derive_any:
        kinds, absent = values[:, 1:], np.isnan(values[:, 0])
        values[absent & (kinds == 0.0).all(axis=1), 0] = 0.0
        values[absent & (kinds == 1.0).any(axis=1), 0] = 1.0
    odd_any = inconsistent_any(~np.isnan(values), values == 1.0) & ~contradictory
    values[contradictory | odd_any] = np.nan
    return values, contradictory, odd_any


def inconsistent_any(known: NDArray[np.bool_], positive: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Mark slices whose ``any`` contradicts the other labels: (slices, 6), (slices, 6) -> (slices,)."""
    some_subtype = positive[:, 1:].any(axis=1)
    denied = known[:, 0] & ~positive[:, 0] & some_subtype
    unexplained = positive[:, 0] & known[:, 1:].all(axis=1) & ~some_subtype
    return denied | unexplained


def first_names(names: NDArray[np.object_] | pd.Index) -> list[str]:
    """Return the first ten names, for a report."""
    return [str(name) for name in names[:10]]
