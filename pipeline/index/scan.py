"""DICOM files to ordered slices: headers read once, in processes, and every file accounted for."""

from __future__ import annotations

import gc
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from ichpipe.common.constants import TIE_MM
from ichpipe.common.errors import DataError, UnreadableDicomError
from ichpipe.common.processes import process_pool
from ichpipe.common.progress import Counter
from ichpipe.dicom.archive import list_files, portable
from ichpipe.dicom.dataset import UNCOMPRESSED
from ichpipe.dicom.decode_sandbox import TrialDecoder
from ichpipe.dicom.slice_header import SliceHeader, read_header
from ichpipe.index.header_cache import HeaderCache
from ichpipe.index.slice_order import DIRECTIONS, POSITION, order_series

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from ichpipe.common.pseudonyms import Pseudonyms
    from ichpipe.dicom.archive import ListedFile

_TEXTS: Final = (
    "patient_id", "study_uid", "series_uid", "sop_uid", "path", "transfer_syntax", "file_digest", "image_type",
    "kernel", "marks", "body_part",
)  # fmt: skip
_FLAGS: Final = ("lossy", "contrast_agent")
_NUMBERS: Final = ("thickness_mm", "instance_number", *POSITION, *DIRECTIONS)
HEADER_SCHEMA: Final = pa.schema(
    [(name, pa.string()) for name in _TEXTS]
    + [("rows", pa.int32()), ("columns", pa.int32())]
    + [(name, pa.bool_()) for name in _FLAGS]
    + [(name, pa.float64()) for name in _NUMBERS]
    + [("reason", pa.string()), ("size", pa.int64()), ("stamp", pa.int64())]
)
"""One file: what its header says, or the ``reason`` why it is no slice (null for a slice)."""

CHUNK_FILES: Final = 4096
"""Files that one process reads at a time, and that an interruption may cost."""

PROCESSES_FROM: Final = 2000
"""Fewer files than this are read in this process: starting others would take longer."""

REJECTED: Final = ["path", "reason", "study_uid", "series_uid"]


def scan(
    roots: Sequence[Path],
    workers: int = 1,
    cache: Path | None = None,
    *,
    force: bool = False,
    pseudonyms: Pseudonyms | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read the headers of all files below ``roots`` and order the slices of each series.

    Returns the slices, sorted by ``series_uid, slice_index``, with the columns of HEADER_SCHEMA that describe them and
    those that ``order_series`` adds; and the rejected files as ``path, reason, study_uid, series_uid`` (empty
    where unknown), sorted by path. Every file is in exactly one of the two. ``workers`` processes read, which
    changes nothing in the result. With ``cache``, a folder, files that have not changed since are not read again.
    ``force`` takes images of another modality or kind (``headers.FORCEABLE``), one process, no cache. With
    ``pseudonyms`` no PatientID leaves this function, nor is one kept in the cache.
    """
    listing = list_files(roots)
    if force:
        headers = _hidden(read_headers(listing.files, force=True), pseudonyms)
    else:
        known = HeaderCache(cache, HEADER_SCHEMA, pseudonyms.mark if pseudonyms else "")
        headers = _read_all(listing.files, workers, known, pseudonyms)
    refused = pc.is_valid(headers["reason"])
    slices = headers.filter(pc.invert(refused)).drop_columns(["reason", "size", "stamp"]).to_pandas()
    rejected = [headers.filter(refused).select(REJECTED).to_pandas(), _rejected(listing.damaged)]
    for drop in (_drop_repeated, _drop_mixed_series, _order, _drop_lossy_copies):
        slices, dropped = drop(slices)
        rejected.append(dropped)
    table = pd.concat([one for one in rejected if len(one)] or rejected[:1]).sort_values("path", kind="stable")
    return slices, table.fillna("").reset_index(drop=True)


def _read_all(files: list[ListedFile], workers: int, cache: HeaderCache, pseudonyms: Pseudonyms | None) -> pa.Table:
    known, unread = cache.split(files)
    chunks = [unread[start : start + CHUNK_FILES] for start in range(0, len(unread), CHUNK_FILES)]
    read, counter = [], Counter("headers", len(unread), "file") if len(chunks) > 1 else None
    for found in _in_processes(chunks, workers):
        table = _hidden(found, pseudonyms)
        cache.add(table)
        read.append(table)
        if counter:
            counter.add(len(table))
    if counter:
        counter.close()
    whole = pa.concat_tables([known, *read]).sort_by("path")
    cache.compact(whole)
    return whole


def _hidden(headers: pa.Table, pseudonyms: Pseudonyms | None) -> pa.Table:
    """Replace each PatientID of a slice by its pseudonym."""
    if pseudonyms is None:
        return headers
    place = headers.schema.get_field_index("patient_id")
    given = headers["patient_id"].to_pylist()
    hidden = iter(pseudonyms.of(one for one in given if one is not None))
    values = pa.array([None if one is None else next(hidden) for one in given], pa.string())
    return headers.set_column(place, "patient_id", values)


def _in_processes(chunks: list[list[ListedFile]], workers: int) -> Iterator[pa.Table]:
    if workers <= 1 or sum(map(len, chunks)) < PROCESSES_FROM:
        yield from map(read_headers, chunks)
        return
    try:
        with process_pool(workers) as pool:
            yield from pool.map(read_headers, chunks)
    except BrokenProcessPool as error:
        raise DataError(
            "a process that reads headers was killed, perhaps for want of memory; run again with fewer --workers "
            "(what was read is kept)"
        ) from error


def read_headers(files: Sequence[ListedFile], *, force: bool = False) -> pa.Table:
    """Read the headers of ``files``: a row each of HEADER_SCHEMA, in that order."""
    with _no_collection(), TrialDecoder() as trial:
        rows = [_read(one.path, trial, force=force) for one in files]
    numbers = range(len(rows))
    headers = [row for row in rows if isinstance(row, SliceHeader)]
    good = np.array([number for number in numbers if isinstance(rows[number], SliceHeader)], dtype=np.int64)
    bad = [number for number in numbers if not isinstance(rows[number], SliceHeader)]
    table = pa.concat_tables([_good(headers), _bad([rows[number] for number in bad])])  # type: ignore[misc]
    order = np.argsort(np.concatenate([good, np.array(bad, dtype=np.int64)]), kind="stable")
    table = table.take(order)
    for name in ("size", "stamp"):
        values = pa.array([getattr(one, name) for one in files], pa.int64())
        table = table.set_column(table.schema.get_field_index(name), name, values)
    return table


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the garbage collector from walking over the growing list of headers again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _read(path: str, trial: TrialDecoder, *, force: bool) -> SliceHeader | tuple[str, str, str, str]:
    name = portable(path)
    if name != path:
        return name, "file name is not UTF-8; rename the file", "", ""
    try:
        header = read_header(path, force=True) if force else read_header(path)
        if header.compressed:  # its length says nothing: only decoding shows that the stream is whole
            trial.require(path)
    except UnreadableDicomError as error:
        return path, str(error).removeprefix(f"{path}: "), *error.series
    return header


def _good(headers: list[SliceHeader]) -> pa.Table:
    columns: dict[str, Any] = {}
    if headers:
        columns = dict(zip(SliceHeader._fields, zip(*headers, strict=True), strict=True))
    places = np.array(columns.pop("position", ()), dtype=np.float64).reshape(-1, 3)
    rows, downs = (np.array(columns.pop(name, ()), dtype=np.float64).reshape(-1, 3) for name in _DIRECTION_FIELDS)
    vectors = np.hstack([places, rows, downs])
    columns |= {name: vectors[:, number] for number, name in enumerate((*POSITION, *DIRECTIONS))}
    return _table(columns, len(headers))


_DIRECTION_FIELDS: Final = ("row_direction", "column_direction")


def _bad(rows: list[tuple[str, str, str, str]]) -> pa.Table:
    return _table(dict(zip(REJECTED, zip(*rows, strict=True), strict=True)) if rows else {}, len(rows))


def _table(columns: dict[str, Any], count: int) -> pa.Table:
    empty = pa.nulls(count)
    arrays = [pa.array(columns.get(field.name, empty), field.type) for field in HEADER_SCHEMA]
    return pa.Table.from_arrays(arrays, schema=HEADER_SCHEMA)


def _rejected(rows: Sequence[tuple[str, str]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=REJECTED[:2], dtype=object)


def _refuse(slices: pd.DataFrame, reasons: Sequence[str] | str) -> pd.DataFrame:
    return slices[["path", "study_uid", "series_uid"]].assign(reason=reasons)[REJECTED]


def _drop_repeated(slices: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Keep one file per SOPInstanceUID (0008,0018): one without loss, uncompressed, the first by path."""
    compressed = ~slices["transfer_syntax"].isin(UNCOMPRESSED)
    ranked = slices.assign(_compressed=compressed).sort_values(["lossy", "_compressed", "path"], kind="stable")
    repeated = slices.index.isin(ranked.index[ranked.duplicated("sop_uid")])
    kept = slices[~repeated]
    again = slices[repeated]
    if again.empty:
        return kept, _refuse(again, [])
    first = kept[kept["sop_uid"].isin(again["sop_uid"])].set_index("sop_uid").loc[again["sop_uid"]]
    same = first["file_digest"].to_numpy() == again["file_digest"].to_numpy()
    other = np.where(same, "a copy of", "same SOPInstanceUID (0008,0018) but other content than")
    reasons = [f"duplicate: {what} {path}" for what, path in zip(other, first["path"], strict=True)]
    return kept, _refuse(again, reasons)


def _drop_mixed_series(slices: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Reject whole series that stand under two patients or studies: a split by patient would tear them."""
    owners = slices.groupby("series_uid")[["patient_id", "study_uid"]].transform("nunique")
    mixed = (owners > 1).any(axis=1)
    reason = "its SeriesInstanceUID (0020,000E) stands under more than one patient or study"
    return slices[~mixed], _refuse(slices[mixed], reason)


def _order(slices: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    ordered, tilted = order_series(slices)
    left_out = slices[slices["path"].isin(tilted["path"])]
    return ordered, _refuse(left_out, tilted.set_index("path")["reason"].reindex(left_out["path"]).to_list())


def _drop_lossy_copies(slices: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Reject lossy slices where the same series shows the same place without loss."""
    if not slices["lossy"].any():
        return slices, _refuse(slices.iloc[:0], [])
    place = (slices["position_mm"] / TIE_MM).round()
    whole = (~slices["lossy"].astype(bool)).groupby([slices["series_uid"], place]).transform("any")
    copies = slices["lossy"].astype(bool) & whole
    if not copies.any():
        return slices, _refuse(slices.iloc[:0], [])
    kept, _ = order_series(slices[~copies].drop(columns=["slice_index", "position_mm", "spacing_mm"]))
    reason = "compressed with loss, and its series has the same place without loss"
    return kept, _refuse(slices[copies], reason)
