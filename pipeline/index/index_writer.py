"""Writes the index with its summary and the tables beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from ichpipe.common.classes import CLASSES
from ichpipe.common.files import atomic_path, write_json, write_text
from ichpipe.index.scan import COPY, NOT_CHOSEN, SAME_UID
from ichpipe.index.slice_index import SCHEMA
from ichpipe.index.slice_order import find_ties_and_gaps
from ichpipe.index.sources import SAME_SLICE
from ichpipe.index.splits import SPLITS

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd


_SUMMARY: Final = {
    COPY: "duplicate: a copy",
    SAME_UID: "duplicate: same",
    NOT_CHOSEN: "series not chosen",
    SAME_SLICE: "stands in an earlier source",
}
"""Reasons that differ from file to file, counted together."""


def summarise(index: pd.DataFrame, rejected: pd.DataFrame) -> dict[str, Any]:
    """Count the slices of the index, by label and split, and the rejected files, as JSON-like values."""
    tie, gap = find_ties_and_gaps(index)
    kinds = rejected["reason"].where(~rejected["code"].isin(_SUMMARY), rejected["code"].map(_SUMMARY))
    spacing = index.loc[index["slice_index"] > 0, "spacing_mm"]
    counts, lengths = describe(index), index.groupby("series_uid").size()
    prevalence = counts.pop("prevalence")
    return {
        "files": len(index) + len(rejected),
        **counts,
        "rejected": len(rejected),
        "lossy": int(index["lossy"].sum()),
        "rejected_by_reason": {str(reason): int(n) for reason, n in sorted(kinds.value_counts().items())},
        "transfer_syntaxes": {str(uid): int(n) for uid, n in sorted(index["transfer_syntax"].value_counts().items())},
        "ties": int(tie.sum()),
        "gaps": int(gap.sum()),
        "series_with_gaps": int(index.loc[gap, "series_uid"].nunique()),
        "largest_step_mm": float(spacing.max()) if len(spacing) else None,
        "prevalence": prevalence,
        "series_by_length": {
            "1 or 2 slices": int((lengths < 3).sum()),
            "3 to 9": int(lengths.between(3, 9).sum()),
            "10 or more": int((lengths > 9).sum()),
        },
        "splits": {name: describe(index[index["split"] == name]) for name in SPLITS},
        "folds": {str(fold): describe(rows) for fold, rows in index.groupby("fold")},
    }


def describe(index: pd.DataFrame) -> dict[str, Any]:
    """Count rows, and for each class the positive slices among those with a label; their share is None without one."""
    columns = {"series": "series_uid", "studies": "study_uid", "patients": "patient_id"}
    prevalence: dict[str, dict[str, Any]] = {}
    for name in CLASSES:
        values = index[name].dropna().astype(np.float64)
        share = float(values.mean()) if len(values) else None
        prevalence[name] = {"known": len(values), "positive": int(values.sum()), "share": share}
    counts = {name: int(index[column].nunique()) for name, column in columns.items()}
    return {"slices": len(index), **counts, "prevalence": prevalence}


def write_outputs(
    out: Path, index: pd.DataFrame, rejected: pd.DataFrame, summary: dict[str, Any], **tables: pd.DataFrame | None
) -> None:
    """Write ``slices.parquet``, ``rejected.csv``, ``summary.json`` and ``NAME.csv`` of each of ``tables``.

    The same input gives the same bytes.
    """
    table = pa.Table.from_pandas(index[SCHEMA.names], schema=SCHEMA, preserve_index=False)
    with atomic_path(out / "slices.parquet") as temporary:
        parquet.write_table(table.replace_schema_metadata(None), temporary)
    write_rejected(out, rejected)
    for name, frame in tables.items():
        if frame is not None:
            write_text(out / f"{name}.csv", frame.to_csv(index=False, lineterminator="\n", float_format="%.6g"))
    write_json(out / "summary.json", summary)


def write_rejected(out: Path, rejected: pd.DataFrame) -> None:
    """Write ``rejected.csv`` (``path,reason``, sorted by path) into ``out``."""
    write_text(out / "rejected.csv", rejected[["path", "reason"]].to_csv(index=False, lineterminator="\n"))
