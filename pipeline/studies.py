"""The index: one row a slice, ordered within its series, labelled, split by patient.

docs/architecture.md lists the columns, docs/data.md the rules.
"""

from __future__ import annotations

import os
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import parquet

from ichpipe import ct
from ichpipe.classes import CLASSES
from ichpipe.errors import DataError, UnreadableDicomError
from ichpipe.files import atomic_path, require_file, write_json, write_text
from ichpipe.ordering import DIRECTIONS, POSITION, find_ties_and_gaps, order_series
from ichpipe.splits import SPLITS, assign_splits

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = [
    "SCAN_COLUMNS", "SCHEMA", "assign_splits", "find_ties_and_gaps", "join_labels", "order_series", "read_index",
    "scan", "summarise", "write_outputs", "write_rejected",
]  # fmt: skip

SCHEMA: Final = pa.schema(
    [(name, pa.string()) for name in ("patient_id", "study_uid", "series_uid", "sop_uid", "path")]
    + [("transfer_syntax", pa.string()), ("file_digest", pa.string()), ("slice_index", pa.int32())]
    + [("position_mm", pa.float64()), ("spacing_mm", pa.float64()), ("rows", pa.int32()), ("columns", pa.int32())]
    + [(name, pa.float32()) for name in CLASSES]
    + [("split", pa.string()), ("fold", pa.int32())]
)
"""Columns of ``index/slices.parquet`` in order."""

SCAN_COLUMNS: Final = tuple(SCHEMA.names[:12])
"""Columns that come from the DICOM files alone; labels, split and fold follow later."""

PROCESSES_FROM: Final = 2000
"""Fewer files than this are read in threads: starting processes would take longer."""

_Result = ct.SliceHeader | tuple[str, str]


def scan(paths: Sequence[Path], workers: int = 1) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read the headers of ``paths`` and order the slices of each series.

    Returns the index with SCAN_COLUMNS, sorted by ``series_uid, slice_index``, and the rejected files as
    ``path, reason``, sorted. Every path is in exactly one of the two. ``workers`` headers are read at a
    time, which changes nothing in the result.
    """
    results = _read_all(sorted(paths, key=os.fsencode), workers)
    slices = _as_frame([result for result in results if isinstance(result, ct.SliceHeader)])
    unreadable = _rejected([result for result in results if not isinstance(result, ct.SliceHeader)])
    slices, repeated = _drop_repeated(slices)
    slices, mixed = _drop_mixed_series(slices)
    ordered, tilted = order_series(slices)
    rejected = pd.concat([unreadable, repeated, mixed, tilted]).sort_values("path").reset_index(drop=True)
    return ordered[list(SCAN_COLUMNS)], rejected


def _read_all(paths: list[Path], workers: int) -> list[_Result]:
    if workers <= 1 or len(paths) < 2:
        return _read_headers(paths)
    from dask import bag  # noqa: PLC0415  (a second to import)

    scheduler = "processes" if len(paths) >= PROCESSES_FROM else "threads"
    files: Any = bag.from_sequence(paths, npartitions=min(len(paths), 8 * workers))  # type: ignore[no-untyped-call]
    results: list[_Result] = files.map_partitions(_read_headers).compute(scheduler=scheduler, num_workers=workers)
    return results


def _read_headers(paths: Sequence[Path]) -> list[_Result]:
    return [_read_or_reason(path) for path in paths]


def _read_or_reason(path: Path) -> _Result:
    name = os.fsencode(path).decode("utf-8", "backslashreplace")
    if name != str(path):
        return name, "file name is not UTF-8; rename the file"
    try:
        header = ct.read_header(path)
        if header.compressed:  # its length says nothing: only decoding shows that the stream is whole
            ct.read_hu(path)
    except UnreadableDicomError as error:
        return path.as_posix(), str(error).removeprefix(f"{path}: ")
    return header


def _as_frame(headers: list[ct.SliceHeader]) -> pd.DataFrame:
    plain = [field.name for field in fields(ct.SliceHeader) if field.name in SCAN_COLUMNS]
    frame = pd.DataFrame({name: [getattr(header, name) for header in headers] for name in plain})
    frame = frame.astype({name: "int32" if name in {"rows", "columns"} else "object" for name in plain})
    numbers = [header.instance_number for header in headers]
    frame["instance_number"] = np.array([np.nan if n is None else n for n in numbers], dtype=np.float64)
    positions = np.array([header.position for header in headers], dtype=np.float64).reshape(-1, 3)
    directions = [header.row_direction + header.column_direction for header in headers]
    frame[list(POSITION)] = positions
    frame[list(DIRECTIONS)] = np.array(directions, dtype=np.float64).reshape(-1, 6)
    return frame


def _rejected(rows: Sequence[tuple[str, str]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["path", "reason"], dtype=object)


def _drop_repeated(slices: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Keep one file per SOPInstanceUID (0008,0018), the first by path."""
    repeated = slices.duplicated("sop_uid")
    kept = slices[~repeated].set_index("sop_uid")
    rows = []
    for row in slices[repeated].to_dict("records"):
        first = kept.loc[row["sop_uid"]]
        same = first["file_digest"] == row["file_digest"]
        other = "a copy of" if same else "same SOPInstanceUID (0008,0018) but other content than"
        rows.append((str(row["path"]), f"duplicate: {other} {first['path']!s}"))
    return slices[~repeated], _rejected(rows)


def _drop_mixed_series(slices: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Reject whole series that stand under two patients or studies: a split by patient would tear them."""
    owners = slices.groupby("series_uid")[["patient_id", "study_uid"]].transform("nunique")
    mixed = (owners > 1).any(axis=1)
    reason = "its SeriesInstanceUID (0020,000E) stands under more than one patient or study"
    return slices[~mixed], pd.DataFrame({"path": slices.loc[mixed, "path"], "reason": reason})


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
    kinds = rejected["reason"].str.replace(r"duplicate: (a copy|same).*", r"duplicate: \1", regex=True)
    spacing = index.loc[index["slice_index"] > 0, "spacing_mm"]
    return {
        "files": len(index) + len(rejected),
        **_sizes(index),
        "rejected": len(rejected),
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


def write_outputs(out: Path, index: pd.DataFrame, rejected: pd.DataFrame, summary: dict[str, Any]) -> None:
    """Write ``slices.parquet``, ``rejected.csv`` and ``summary.json`` into ``out``; same input, same bytes."""
    table = pa.Table.from_pandas(index[SCHEMA.names], schema=SCHEMA, preserve_index=False)
    with atomic_path(out / "slices.parquet") as temporary:
        parquet.write_table(table.replace_schema_metadata(None), temporary)
    write_rejected(out, rejected)
    write_json(out / "summary.json", summary)


def write_rejected(out: Path, rejected: pd.DataFrame) -> None:
    """Write ``rejected.csv`` (``path,reason``, sorted by path) into ``out``."""
    write_text(out / "rejected.csv", rejected[["path", "reason"]].to_csv(index=False, lineterminator="\n"))


def read_index(path: Path) -> pd.DataFrame:
    """Read ``slices.parquet``: rows sorted by ``series_uid, slice_index``, columns of SCHEMA.

    NaN in a label means unknown. Raises MissingFileError, or DataError if a column is absent.
    """
    require_file(path, "run `ichpipe prepare` first")
    try:
        table = parquet.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not a Parquet file; run `ichpipe prepare` again") from error
    missing = [name for name in SCHEMA.names if name not in table.column_names]
    if missing:
        raise DataError(f"{path} lacks the column(s) {', '.join(missing)}; run `ichpipe prepare` again")
    frame: pd.DataFrame = table.select(SCHEMA.names).cast(SCHEMA).to_pandas()
    return frame
