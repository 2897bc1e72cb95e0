"""The index: one row a slice, ordered within its series, labelled, split by patient.

docs/architecture.md lists the columns, docs/data.md the rules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from ichpipe.common.classes import CLASSES
from ichpipe.common.errors import DataError
from ichpipe.common.files import atomic_path, require_file, write_json, write_text
from ichpipe.index.slice_order import TIE_MM, find_ties_and_gaps, order_series
from ichpipe.index.splits import SPLITS, assign_splits

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pandas as pd

__all__ = [
    "SCHEMA", "assign_splits", "find_ties_and_gaps", "join_labels", "order_series", "read_index",
    "summarise", "write_outputs", "write_rejected",
]  # fmt: skip

SCHEMA: Final = pa.schema(
    [(name, pa.string()) for name in ("patient_id", "study_uid", "series_uid", "sop_uid", "path")]
    + [("transfer_syntax", pa.string()), ("file_digest", pa.string()), ("slice_index", pa.int32())]
    + [("position_mm", pa.float64()), ("spacing_mm", pa.float64()), ("rows", pa.int32()), ("columns", pa.int32())]
    + [("lossy", pa.bool_())]
    + [(name, pa.float32()) for name in CLASSES]
    + [("split", pa.string()), ("fold", pa.int32())]
)
"""Columns of ``index/slices.parquet`` in order."""


def join_labels(index: pd.DataFrame, labels: pd.DataFrame | None) -> tuple[pd.DataFrame, dict[str, int]]:
    """Add the six columns of CLASSES (float32, NaN where unknown) by ``sop_uid``, never by position.

    Returns the index and the counts of slices without a row in the table and of table rows without a
    slice. Raises DataError if not one slice is in the table: it belongs to other images.
    """
    if labels is None:
        return index.assign(**dict.fromkeys(CLASSES, np.float32(np.nan))), {}
    known = index["sop_uid"].isin(labels.index)
    if not known.any():
        raise DataError(
            f"none of {len(index)} slices is in the label table (first SOPInstanceUID: {index['sop_uid'].iloc[0]}, "
            f"first in the table: {labels.index[0]}); check prepare.labels and prepare.dicom_dir"
        )
    values = labels.reindex(index["sop_uid"])[list(CLASSES)].to_numpy(np.float32)
    joined = index.assign(**{name: values[:, column] for column, name in enumerate(CLASSES)})
    unmatched = len(labels) - int(known.sum())
    return joined, {"slices_without_label": int((~known).sum()), "labels_without_slice": unmatched}


def summarise(index: pd.DataFrame, rejected: pd.DataFrame) -> dict[str, Any]:
    """Count what stands in the index (with labels and splits) and what was rejected, as JSON-like values."""
    tie, gap = find_ties_and_gaps(index)
    kinds = rejected["reason"].str.replace(
        r"^(duplicate: a copy|duplicate: same|series not chosen).*", r"\1", regex=True
    )
    spacing = index.loc[index["slice_index"] > 0, "spacing_mm"]
    return {
        "files": len(index) + len(rejected),
        **_sizes(index),
        "rejected": len(rejected),
        "lossy": int(index["lossy"].sum()),
        "rejected_by_reason": {str(reason): int(n) for reason, n in sorted(kinds.value_counts().items())},
        "transfer_syntaxes": {str(uid): int(n) for uid, n in sorted(index["transfer_syntax"].value_counts().items())},
        "ties": int(tie.sum()),
        "gaps": int(gap.sum()),
        "series_with_gaps": int(index.loc[gap, "series_uid"].nunique()),
        "largest_step_mm": float(spacing.max()) if len(spacing) else None,
        "prevalence": _prevalence(index),
        "splits": {name: _describe(index[index["split"] == name]) for name in SPLITS},
        "folds": {str(fold): _describe(rows) for fold, rows in index.groupby("fold")},
    }


def _sizes(index: pd.DataFrame) -> dict[str, int]:
    names = {"series": "series_uid", "studies": "study_uid", "patients": "patient_id"}
    return {"slices": len(index), **{name: int(index[column].nunique()) for name, column in names.items()}}


def _describe(index: pd.DataFrame) -> dict[str, Any]:
    return {**_sizes(index), "prevalence": _prevalence(index)}


def _prevalence(index: pd.DataFrame) -> dict[str, dict[str, float | int | None]]:
    """Per class the share of positive slices among those with a known label; null where none is known."""
    result: dict[str, dict[str, float | int | None]] = {}
    for name in CLASSES:
        known = index[name].dropna().astype(np.float64)
        result[name] = {
            "known": len(known),
            "positive": int(known.sum()),
            "share": float(known.mean()) if len(known) else None,
        }
    return result


def write_outputs(
    out: Path,
    index: pd.DataFrame,
    rejected: pd.DataFrame,
    summary: dict[str, Any],
    *,
    series: pd.DataFrame | None = None,
    of_studies: pd.DataFrame | None = None,
) -> None:
    """Write ``slices.parquet``, ``rejected.csv``, ``summary.json`` and the tables given; same input, same bytes."""
    table = pa.Table.from_pandas(index[SCHEMA.names], schema=SCHEMA, preserve_index=False)
    with atomic_path(out / "slices.parquet") as temporary:
        parquet.write_table(table.replace_schema_metadata(None), temporary)
    write_rejected(out, rejected)
    for name, frame in (("series", series), ("studies", of_studies)):
        if frame is not None:
            text = frame.to_csv(index=False, lineterminator="\n", float_format="%.6g")
            write_text(out / f"{name}.csv", text)
    write_json(out / "summary.json", summary)


def write_rejected(out: Path, rejected: pd.DataFrame) -> None:
    """Write ``rejected.csv`` (``path,reason``, sorted by path) into ``out``."""
    write_text(out / "rejected.csv", rejected[["path", "reason"]].to_csv(index=False, lineterminator="\n"))


def read_index(path: Path, columns: Sequence[str] = tuple(SCHEMA.names)) -> pd.DataFrame:
    """Read ``slices.parquet``: rows sorted by ``series_uid, slice_index``, all columns of SCHEMA or some.

    NaN in a label means unknown. Raises MissingFileError, or DataError if a column is absent, or (where all are read)
    the rows are not what ``prepare`` writes: a patient in two splits, a slice twice, slices out of order, a
    contradictory ``any``.
    """
    require_file(path, "run `ichpipe prepare` first")
    try:
        there = parquet.read_schema(path).names
        table = parquet.read_table(path, columns=[name for name in columns if name in there])
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not a Parquet file; run `ichpipe prepare` again") from error
    missing = [name for name in SCHEMA.names if name not in there]
    if missing:
        raise DataError(f"{path} lacks the column(s) {', '.join(missing)}; run `ichpipe prepare` again")
    frame: pd.DataFrame = table.cast(pa.schema([SCHEMA.field(name) for name in columns])).to_pandas()
    del table
    pa.default_memory_pool().release_unused()  # Arrow keeps what reading took, half as much again
    if set(columns) >= set(SCHEMA.names):  # who reads a part of it, to save memory, trains and scores nothing
        _require_consistent(frame, path)
    return frame


def _require_consistent(index: pd.DataFrame, path: Path) -> None:
    """Raise DataError where an index was changed into one that trains or scores wrongly without a sign."""
    labels = index[list(CLASSES)].to_numpy()
    some, none = (labels[:, 1:] == 1.0).any(axis=1), (labels[:, 1:] == 0.0).all(axis=1)
    same = index["series_uid"].to_numpy()[1:] == index["series_uid"].to_numpy()[:-1]
    steps = np.diff(index[["slice_index", "position_mm"]].to_numpy(np.float64), axis=0)[same]
    first = index["slice_index"].to_numpy()[np.flatnonzero(np.append(True, ~same))] if len(index) else np.zeros(0)
    wrongs = {
        "a patient in more than one split": (index.groupby("patient_id")["split"].nunique() > 1).any(),
        "a slice (SOPInstanceUID) more than once": index["sop_uid"].duplicated().any(),
        "a series in more than one place": index["series_uid"][np.append(True, ~same)].duplicated().any(),
        "slices out of order": (steps[:, 0] != 1).any() or (steps[:, 1] < -2 * TIE_MM).any() or first.any(),
        "an `any` that contradicts the five kinds": (labels[:, 0] == np.select([some, none], [0.0, 1.0], 2.0)).any(),
    }
    found = [what for what, wrong in wrongs.items() if wrong]
    if found:
        raise DataError(f"{path} holds {', '.join(found)}; run `ichpipe prepare` again")
