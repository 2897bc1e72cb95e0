"""The index, ``slices.parquet``: its columns (docs/architecture.md describes them) and its reader."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from ichpipe.common.classes import CLASSES
from ichpipe.common.constants import TIE_MM
from ichpipe.common.errors import DataError
from ichpipe.common.files import digest_of, require_file

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from numpy.typing import NDArray

SCHEMA: Final = pa.schema(
    [(name, pa.string()) for name in ("patient_id", "study_uid", "series_uid", "sop_uid", "path")]
    + [("transfer_syntax", pa.string()), ("file_digest", pa.string()), ("slice_index", pa.int32())]
    + [("position_mm", pa.float64()), ("spacing_mm", pa.float64()), ("rows", pa.int32()), ("columns", pa.int32())]
    + [("lossy", pa.bool_())]
    + [(name, pa.float32()) for name in CLASSES]
    + [("split", pa.string()), ("fold", pa.int32())]
    + [("source", pa.string()), ("slices_only", pa.bool_())]
)


def read_index(path: Path, columns: Sequence[str] = tuple(SCHEMA.names)) -> pd.DataFrame:
    """Read ``slices.parquet``: rows sorted by ``series_uid, slice_index``, all columns of SCHEMA or some.

    NaN in a label means unknown. Raises MissingFileError; DataError if a column is absent or, when all columns are
    read, if a patient is in two splits, a slice is repeated, slices are out of order, or ``any`` contradicts the rest.
    """
    require_file(path, "run `ichpipe prepare` first")
    try:
        names = parquet.read_schema(path).names
        table = parquet.read_table(path, columns=[name for name in columns if name in names])
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} is not a Parquet file; run `ichpipe prepare` again") from error
    missing = [name for name in SCHEMA.names if name not in names]
    if missing:
        raise DataError(f"{path} lacks the column(s) {', '.join(missing)}; run `ichpipe prepare` again")
    frame: pd.DataFrame = table.cast(pa.schema([SCHEMA.field(name) for name in columns])).to_pandas()
    del table
    pa.default_memory_pool().release_unused()  # Arrow keeps its buffers, half as much memory again
    if set(columns) >= set(SCHEMA.names):  # callers that read a part, to save memory, neither train nor score
        _require_consistent(frame, path)
    return frame


def _require_consistent(index: pd.DataFrame, path: Path) -> None:
    """Raise DataError if the index was changed so that training or scores would be wrong without a sign."""
    labels = index[list(CLASSES)].to_numpy()
    some, none = (labels[:, 1:] == 1.0).any(axis=1), (labels[:, 1:] == 0.0).all(axis=1)
    same = index["series_uid"].to_numpy()[1:] == index["series_uid"].to_numpy()[:-1]
    steps = np.diff(index[["slice_index", "position_mm"]].to_numpy(np.float64), axis=0)[same]
    first = index["slice_index"].to_numpy()[np.flatnonzero(np.append(True, ~same))] if len(index) else np.zeros(0)
    faults = {
        "a patient in more than one split": (index.groupby("patient_id")["split"].nunique() > 1).any(),
        "a slice (SOPInstanceUID) more than once": index["sop_uid"].duplicated().any(),
        "a series in more than one place": index["series_uid"][np.append(True, ~same)].duplicated().any(),
        "slices out of order": (steps[:, 0] != 1).any() or (steps[:, 1] < -2 * TIE_MM).any() or first.any(),
        "an `any` that contradicts the five kinds": (labels[:, 0] == np.select([some, none], [0.0, 1.0], 2.0)).any(),
    }
    if present := [name for name, fault in faults.items() if fault]:
        raise DataError(f"{path} holds {', '.join(present)}; run `ichpipe prepare` again")


GAP: Final = 1.5  # a step longer than so many usual ones parts neighbours


def neighbour_rows(position_mm: NDArray[np.floating], neighbours: int, stride: int = 1) -> NDArray[np.intp]:
    """Return which rows of a series in order stand around each: (n, 1 + 2 neighbours), its own in the middle.

    A slice stands for a neighbour that it does not have: at an end, and beyond a gap, a step longer than GAP times the
    median one. ``position_mm`` (n,) lies along the slice normal. With a ``stride`` neighbours are those of the
    interleaved parts (`ichpipe.index.thin_slices.stride_of`).
    """
    rows = np.repeat(np.arange(len(position_mm))[:, None], 1 + 2 * neighbours, axis=1)
    if not neighbours:
        return rows
    for first in range(min(stride, len(rows))):
        part = np.arange(first, len(rows), stride)
        steps = np.diff(position_mm[part])
        usual = np.median(steps[steps >= TIE_MM]) if (steps >= TIE_MM).any() else np.inf
        stretch = np.append(0, np.cumsum(steps > GAP * usual + TIE_MM))  # its number, counted from the first slice
        for column in range(1 + 2 * neighbours):
            at = np.arange(len(part)) + column - neighbours
            inside = np.clip(at, 0, len(part) - 1)
            near = (at == inside) & (stretch[inside] == stretch)
            rows[part[near], column] = part[inside[near]]
    return rows


def index_neighbours(index: pd.DataFrame, neighbours: int) -> NDArray[np.intp]:
    """Return `neighbour_rows` of all series, as rows of the index: (n, 1 + 2 neighbours)."""
    rows = np.repeat(np.arange(len(index))[:, None], 1 + 2 * neighbours, axis=1)
    if neighbours:
        position_mm = index["position_mm"].to_numpy(np.float64)
        for series in index.groupby("series_uid", sort=False).indices.values():
            rows[series] = series[neighbour_rows(position_mm[series], neighbours)]
    return rows


def slice_files(paths: Sequence[str], rows: NDArray[np.intp]) -> Sequence[str] | Sequence[tuple[str, ...]]:
    """Return the files of each slice's image by `neighbour_rows` or `index_neighbours`; the path alone without any."""
    return paths if rows.shape[1] == 1 else [tuple(paths[row] for row in beside) for beside in rows.tolist()]


def source_digests(index: pd.DataFrame, neighbours: int) -> Sequence[str]:
    """Return the SHA-256 of what each slice's image is made from: of its file, or of the digests of `slice_files`."""
    digests = TextColumn(index["file_digest"])
    if not neighbours:
        return digests
    return [digest_of([digests[row] for row in beside]) for beside in index_neighbours(index, neighbours).tolist()]


class TextColumn(Sequence[str]):
    """A column of the index as Python strings, made on access: a list would take twice the memory."""

    def __init__(self, column: pd.Series[str]) -> None:
        self._values = column.array

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._values)

    def __getitem__(self, row: int | slice) -> Any:
        """Return one text, or a list of several."""
        values = self._values[row]
        return values.tolist() if isinstance(row, slice) else values
