"""Reads the headers of DICOM and NIfTI files and orders the slices of each series; names why any other is rejected."""

from __future__ import annotations

import hashlib
import re
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from ichpipe.common.constants import TIE_MM
from ichpipe.common.errors import DataError, UnreadableDicomError
from ichpipe.common.processes import process_pool
from ichpipe.common.progress import Counter
from ichpipe.dicom.archive import Listing, list_files, portable, read_file, stamp_of
from ichpipe.dicom.dataset import UNCOMPRESSED
from ichpipe.dicom.decode_sandbox import TrialDecoder
from ichpipe.dicom.enhanced import FRAME, EnhancedCtError, list_frames
from ichpipe.dicom.slice_header import read_header
from ichpipe.index.header_cache import HeaderCache
from ichpipe.index.slice_order import DIRECTIONS, POSITION, order_series
from ichpipe.nifti.volume_file import SYNTAX, is_nifti, read_volume, slice_path, split_slice

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from concurrent.futures import Executor
    from contextlib import AbstractContextManager
    from pathlib import Path

    from ichpipe.common.pseudonyms import Pseudonyms
    from ichpipe.dicom.archive import ListedFile

_TEXTS: Final = (
    "patient_id", "study_uid", "series_uid", "sop_uid", "path", "transfer_syntax", "file_digest", "image_type",
    "kernel", "marks", "body_part", "acquisition",
)  # fmt: skip
_FLAGS: Final = ("lossy", "contrast_agent")
_NUMBERS: Final = ("thickness_mm", "instance_number", *POSITION, *DIRECTIONS)
HEADER_SCHEMA: Final = pa.schema(
    [(name, pa.string()) for name in _TEXTS]
    + [("rows", pa.int32()), ("columns", pa.int32())]
    + [(name, pa.bool_()) for name in _FLAGS]
    + [(name, pa.float64()) for name in _NUMBERS]
    + [("reason", pa.string()), ("code", pa.string()), ("size", pa.int64()), ("stamp", pa.int64())]
)
"""Facts of one file's header, or the ``reason`` why the file is no slice (null for a slice)."""

CHUNK_FILES: Final = 4096  # files that one process reads at a time; an interruption loses at most these
PROCESSES_FROM: Final = 2000  # with fewer files, starting other processes takes longer than reading here
REJECTED: Final = ["path", "reason", "study_uid", "series_uid", "patient_id", "code"]
# Codes of rejected files, beside those of UnreadableDicomError; empty where nothing must be told apart.
COPY, SAME_UID, NOT_CHOSEN = "copy", "same uid", "not chosen"


def scan(
    roots: Sequence[Path],
    workers: int = 1,
    cache: Path | None = None,
    *,
    force: bool = False,
    only: Collection[str] | None = None,
    pseudonyms: Pseudonyms | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read the headers of all files below ``roots`` and order the slices of each series.

    Returns the slices, sorted by ``series_uid, slice_index``, with the columns of HEADER_SCHEMA that describe them and
    those that ``order_series`` adds; and the rejected files as ``path, reason, study_uid, series_uid`` (UIDs empty
    where unknown), sorted by path. Every file is in exactly one of the two. ``workers`` processes read headers; their
    number changes nothing in the result. With ``cache``, a folder, unchanged files are not read again. ``force``
    accepts images of another modality or kind (NotCtError), in one process, without cache; with ``only``, the paths
    of a former result, no other file is read. With ``pseudonyms`` neither the result nor the cache holds a PatientID.
    """
    listing = list_files(roots)
    if only is not None:
        names = {*only, *(match[1] for path in only if (match := FRAME.fullmatch(path)))}
        listing = Listing([file for file in listing.files if file.path in names], [])
    if force:
        headers = _name_patients(read_headers(listing.files, force=True), roots, pseudonyms)
        if only is not None:
            headers = headers.filter(pc.is_in(headers["path"], pa.array(sorted(only), pa.string())))
    else:
        header_cache = HeaderCache(cache, HEADER_SCHEMA, pseudonyms.mark if pseudonyms else "")
        headers = _read_all(listing.files, workers, header_cache, lambda read: _name_patients(read, roots, pseudonyms))
    refused = pc.is_valid(headers["reason"])
    slices = headers.filter(pc.invert(refused)).drop_columns(["reason", "code", "size", "stamp"]).to_pandas()
    damaged = pd.DataFrame(listing.damaged, columns=REJECTED[:2], dtype=object).reindex(columns=REJECTED, fill_value="")
    tables = [headers.filter(refused).select(REJECTED).to_pandas(), damaged]
    for drop in (_drop_repeated, _drop_mixed, _drop_tilted, _drop_lossy_copies):
        slices, dropped = drop(slices)
        tables.append(dropped)
    rejected = pd.concat([table for table in tables if len(table)] or tables[:1]).sort_values("path", kind="stable")
    return slices, rejected.fillna("").reset_index(drop=True)


def _read_all(
    files: list[ListedFile], workers: int, cache: HeaderCache, name_patients: Callable[[pa.Table], pa.Table]
) -> pa.Table:
    cached, unread = cache.split(files)
    chunks = [unread[start : start + CHUNK_FILES] for start in range(0, len(unread), CHUNK_FILES)]
    parallel = workers > 1 and len(unread) >= PROCESSES_FROM
    opening: AbstractContextManager[Executor | None] = process_pool(workers) if parallel else nullcontext()
    tables, counter = [cached], Counter("headers", len(unread), "file") if len(chunks) > 1 else None
    try:
        with opening as pool:
            for headers in pool.map(read_headers, chunks) if pool else map(read_headers, chunks):
                tables.append(name_patients(headers))
                cache.add(tables[-1])
                if counter:
                    counter.add(len(headers))
    except BrokenProcessPool as error:
        raise DataError(
            "a process that reads headers was killed, perhaps for want of memory; run again with fewer --workers "
            "(what was read is kept)"
        ) from error
    if counter:
        counter.close()
    whole = pa.concat_tables(tables).sort_by("path")
    cache.compact(whole)
    return whole


def _name_patients(headers: pa.Table, roots: Sequence[Path], pseudonyms: Pseudonyms | None) -> pa.Table:
    """Name the patients of NIfTI slices by their files; replace each PatientID of a slice by its pseudonym."""
    names = headers["patient_id"].to_pylist()
    for row in np.flatnonzero(np.asarray(pc.fill_null(pc.equal(headers["transfer_syntax"], SYNTAX), False))).tolist():
        names[row] = patient_of(headers["path"][row].as_py(), roots)
    hidden = iter(pseudonyms.of(name for name in names if name is not None)) if pseudonyms else None
    values = pa.array([next(hidden) if hidden and name is not None else name for name in names], pa.string())
    return headers.set_column(headers.schema.get_field_index("patient_id"), "patient_id", values)


def patient_of(path: str, roots: Sequence[Path]) -> str:
    """Return the patient of a NIfTI slice: the file below the first of ``roots`` that holds it, without ending.

    A name of BIDS ends after its first ``sub-LABEL``: ``sub-01/ses-2/ct/sub-01_ses-2_ct.nii.gz`` is ``sub-01``.
    """
    file, _ = split_slice(path) or (path, 0)
    folders = [f"{root.as_posix()}/" for root in roots if file.startswith(f"{root.as_posix()}/")]
    name = file.removeprefix(folders[0]) if folders else PurePath(file).name
    name = re.sub(r"\.nii(\.gz)?$", "", name, flags=re.IGNORECASE)
    subject = re.match(r"(?:.*?/)??sub-[A-Za-z0-9]+(?=[_/]|$)", name)
    return subject[0] if subject else name


def read_headers(files: Sequence[ListedFile], *, force: bool = False) -> pa.Table:
    """Read the headers of ``files``: a row each of HEADER_SCHEMA, in that order."""
    with TrialDecoder() as trial:
        rows = [row for file in files for row in _read(file, trial, force=force)]
    return pa.Table.from_pylist(rows, schema=HEADER_SCHEMA)


def _read(file: ListedFile, trial: TrialDecoder, *, force: bool) -> list[dict[str, Any]]:
    """Return what HEADER_SCHEMA holds of one file, or of each frame of an Enhanced CT."""
    path, facts = portable(file.path), {"size": file.size, "stamp": file.stamp}
    if path != file.path:
        reason = "file name is not UTF-8; rename the file"
        return [facts | dict(zip(REJECTED, (path, reason, "", "", "", ""), strict=True))]
    if is_nifti(path):
        return [facts | row for row in _read_nifti(path)]
    try:
        return [facts | _read_slice(path, trial, force=force)]
    except EnhancedCtError as error:
        reason = str(error)
    try:
        rows = [facts | _read_slice(frame, trial, force=force) for frame in list_frames(path)]
    except UnreadableDicomError as error:
        rows, reason = [], str(error)
    rows = [row | {"reason": f"enhanced CT: {row['reason']}"} if "reason" in row else row for row in rows]
    return rows or [facts | dict(zip(REJECTED, (path, reason, "", "", "", ""), strict=True))]


def _read_nifti(path: str) -> list[dict[str, Any]]:
    """Return the columns of each slice of a NIfTI volume, or its path and the reason why it is not used."""
    try:
        volume = read_volume(path, stamp_of(path), read_file)
    except UnreadableDicomError as error:
        return [dict(zip(REJECTED, (path, str(error), "", "", "", error.code), strict=True))]
    count, rows, columns = volume.hu.shape
    common: dict[str, Any] = dict.fromkeys(_TEXTS, "") | dict.fromkeys(_FLAGS, False)  # what no NIfTI tells
    common |= {"study_uid": volume.uid, "series_uid": f"{volume.uid}.1", "transfer_syntax": SYNTAX}
    common |= {"rows": rows, "columns": columns, "thickness_mm": np.nan}
    common |= dict(zip(DIRECTIONS, (*volume.row_direction, *volume.column_direction), strict=True))
    return [
        common
        | {"path": slice_path(path, number), "sop_uid": f"{volume.uid}.1.{number}", "instance_number": number}
        | {"file_digest": hashlib.sha256(f"{volume.digest}/{number}".encode()).hexdigest()}
        | dict(zip(POSITION, volume.origin_mm + number * volume.step_mm, strict=True))
        for number in range(count)
    ]


def _read_slice(path: str, trial: TrialDecoder, *, force: bool) -> dict[str, Any]:
    """Return the columns of one slice, or its path and the reason; raises EnhancedCtError for a file of frames."""
    try:
        header = read_header(path, force=force)
        if header.compressed:  # its length says nothing: only decoding shows that the stream is whole
            trial.require(path)
    except EnhancedCtError:
        raise
    except UnreadableDicomError as error:
        reason = str(error).removeprefix(f"{path}: ")
        return dict(zip(REJECTED, (path, reason, *error.series, error.code), strict=True))
    vectors = (*header.position, *header.row_direction, *header.column_direction)
    return header._asdict() | dict(zip((*POSITION, *DIRECTIONS), vectors, strict=True))


def _drop_repeated(slices: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Keep one file per SOPInstanceUID (0008,0018): one without loss, uncompressed, the first by path."""
    compressed = ~slices["transfer_syntax"].isin(UNCOMPRESSED)
    ranked = slices.assign(_compressed=compressed).sort_values(["lossy", "_compressed", "path"], kind="stable")
    repeated = slices.index.isin(ranked.index[ranked.duplicated("sop_uid")])
    kept, copies = slices[~repeated], slices[repeated]
    originals = kept[kept["sop_uid"].isin(copies["sop_uid"])].set_index("sop_uid").loc[copies["sop_uid"]]
    same = originals["file_digest"].to_numpy() == copies["file_digest"].to_numpy()
    kinds = np.where(same, "a copy of", "same SOPInstanceUID (0008,0018) but other content than")
    reasons = [f"duplicate: {kind} {path}" for kind, path in zip(kinds, originals["path"], strict=True)]
    return kept, copies.assign(reason=reasons, code=np.where(same, COPY, SAME_UID))[REJECTED]


def _drop_mixed(slices: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Reject series of several patients or studies, and studies of several patients: no split can keep them apart."""
    owners = slices.groupby("series_uid")[["patient_id", "study_uid"]].transform("nunique")
    of_series = (owners > 1).any(axis=1)
    patients = slices.groupby("study_uid")["patient_id"].transform("nunique")
    of_study = (patients > 1) & ~of_series
    remedy = "; give each patient's {} its own, or correct PatientID (0010,0020), such as with dcmodify"
    series_reason = "its SeriesInstanceUID (0020,000E) stands under more than one patient or study"
    series_reason += remedy.format("series")
    study_reason = "its StudyInstanceUID (0020,000D) stands under " + patients.astype(str) + " patients (0010,0020)"
    study_reason += remedy.format("study")
    mixed = of_series | of_study
    reasons = study_reason.where(of_study, series_reason)
    return slices[~mixed], slices[mixed].assign(reason=reasons[mixed], code="")[REJECTED]


def _drop_tilted(slices: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    ordered, tilted = order_series(slices)
    return ordered, slices.merge(tilted, on="path").assign(code="")[REJECTED]


def _drop_lossy_copies(slices: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Reject lossy slices where the same series shows the same position without loss."""
    lossy, position = slices["lossy"].astype(bool), (slices["position_mm"] / TIE_MM).round()
    copies = lossy & (~lossy).groupby([slices["series_uid"], position]).transform("any")
    reason = "compressed with loss, and its series has the same place without loss"
    dropped = slices[copies].assign(reason=reason, code="")[REJECTED]
    if dropped.empty:
        return slices, dropped
    return order_series(slices[~copies].drop(columns=["slice_index", "position_mm", "spacing_mm"]))[0], dropped
