"""Reads a CT series as an array of Hounsfield units, slices in anatomical order, with their positions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ichpipe.common.errors import DataError, UnreadableDicomError
from ichpipe.dicom import hounsfield
from ichpipe.dicom.archive import read_file, stamp_of
from ichpipe.dicom.dataset import MAX_FILE_BYTES, parse
from ichpipe.dicom.elements import Elements, tags
from ichpipe.dicom.enhanced import read_slice_file
from ichpipe.dicom.pydicom_quiet import quiet_pydicom
from ichpipe.index.scan import scan
from ichpipe.index.series_selection import select_series
from ichpipe.nifti.volume_file import read_volume, split_slice
from ichpipe.params.schema import SelectionParams

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    Paths = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class Volume:
    """One CT series of n slices, from the lowest to the highest along the slice normal (axial: feet to head).

    A row of ``hu`` runs from the patient's right to the left, its first row is in front, as DICOM stores axial slices.
    """

    patient_id: str  # (0010,0020), the StudyInstanceUID where it is empty; of NIfTI the name of the file
    study_uid: str  # (0020,000D)
    series_uid: str  # (0020,000E)
    sop_uids: tuple[str, ...]  # (0008,0018) of each slice
    paths: tuple[str, ...]  # file of each slice; in an archive ARCHIVE.zip/FOLDER/FILE, of NIfTI FILE.nii/slice-0000
    hu: NDArray[np.int16]  # (n, rows, columns), Hounsfield units, -1024 to 32767
    position_mm: NDArray[np.float64]  # (n,), along the slice normal, not falling; ImagePositionPatient (0020,0032)
    spacing_mm: NDArray[np.float64]  # (n,), to the slice before, of the first to the next; NaN for a single slice
    pixel_mm: tuple[
        float, float
    ]  # PixelSpacing (0028,0030), or by the affine: between rows, between columns; NaN where absent

    def __len__(self) -> int:
        """Return the number of slices."""
        return len(self.hu)


def read_series(paths: Paths, series_uid: str | None = None, *, workers: int = 1) -> Volume:
    """Read one series; slices are ordered by position, never by file name or InstanceNumber.

    Parameters
    ----------
    paths
        A folder, a zip archive, a file, or several of them.
    series_uid
        The series, read whole. Without it the series that stands for the study is read, selected by the rules of
        ``ichpipe predict`` (docs/cq500.md).
    workers
        Processes that read headers; more than one pays from some thousand files.

    Returns
    -------
    Volume
        Hounsfield units (n, rows, columns) and where each slice lies, in mm.

    Raises
    ------
    MissingFileError
        A path does not exist.
    DataError
        No slice is usable, ``paths`` hold several studies and no ``series_uid`` is given, ``series_uid`` is unknown, or
        slices differ in size.
    UnreadableDicomError
        A slice can't be decoded.

    """
    index = find_slices(paths, all_series=series_uid is not None, workers=workers).slices
    if series_uid is not None:
        index = index[index["series_uid"] == series_uid]
        if index.empty:
            raise DataError(f"{_name(paths)}: no usable slice of series {series_uid}; ichpipe.find_slices lists all")
    uids = index["series_uid"].unique()
    if len(uids) > 1:
        raise DataError(
            f"{_name(paths)} holds {len(uids)} studies; name one by series_uid (the first is {uids[0]}), "
            "or take them one by one from ichpipe.read_studies"
        )
    return _read_volume(index)


def read_studies(paths: Paths, *, all_series: bool = False, workers: int = 1) -> Iterator[Volume]:
    """Yield the series that stands for each study, or with ``all_series`` every series, one in memory at a time.

    The order is that of SeriesInstanceUID. Parameters and errors are those of `read_series`; an unreadable series stops
    the iteration.
    """
    index = find_slices(paths, all_series=all_series, workers=workers).slices
    for _, rows in index.groupby("series_uid", sort=False):
        yield _read_volume(rows)


@dataclass(frozen=True)
class Found:
    """The slices below some paths. Every file stands in ``slices`` or in ``rejected``."""

    slices: pd.DataFrame  # a row a usable slice of a chosen series, by series_uid and slice_index; docs/architecture.md
    series: pd.DataFrame  # a row a series: its facts, whether it was chosen, and why
    rejected: pd.DataFrame  # path, reason


def find_slices(
    paths: Paths, *, all_series: bool = False, workers: int = 1, selection: SelectionParams | None = None
) -> Found:
    """Read the headers below ``paths`` and choose one series a study, or with ``all_series`` all; no pixels.

    ``selection`` holds the rules, by default those of ``ichpipe predict``. Raises MissingFileError for a path that does
    not exist, DataError where no slice is usable.
    """
    scanned, rejected = scan(listed(paths), workers)
    chosen = select_series(scanned, rejected, selection or SelectionParams(), one_per_study=not all_series)
    left_out = pd.concat([rejected, chosen.left_out], ignore_index=True)[["path", "reason"]]
    if chosen.slices.empty:
        first = "" if left_out.empty else f"; the first is {left_out['path'][0]}: {left_out['reason'][0]}"
        raise DataError(f"{_name(paths)}: none of {len(left_out)} files is a usable CT slice{first}")
    return Found(chosen.slices, chosen.series, left_out)


def listed(paths: Paths) -> list[Path]:
    """Return one path or several as a list."""
    return [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]


def _name(paths: Paths) -> str:
    first, *more = listed(paths) or [Path()]
    return f"{first} and {len(more)} more" if more else str(first)


def _read_volume(index: pd.DataFrame) -> Volume:
    paths = tuple(index["path"])
    slices = [hounsfield.read_hu(path, scanned=True) for path in paths]
    shapes = {image.shape for image in slices}
    if len(shapes) > 1:
        sizes = ", ".join(f"{rows} x {columns}" for rows, columns in sorted(shapes))
        raise DataError(
            f"series {index['series_uid'].iloc[0]} has slices of {sizes} pixels, which make no array; "
            "ichpipe.read_hu reads one file, Model.predict_folder takes such a series"
        )
    return Volume(
        **{name: str(index[name].iloc[0]) for name in ("patient_id", "study_uid", "series_uid")},
        sop_uids=tuple(index["sop_uid"]),
        paths=paths,
        hu=np.stack(slices),
        position_mm=index["position_mm"].to_numpy(np.float64),
        spacing_mm=index["spacing_mm"].to_numpy(np.float64),
        pixel_mm=_read_pixel_mm(paths[0]),
    )


def _read_pixel_mm(path: str) -> tuple[float, float]:
    if nifti := split_slice(path):
        return read_volume(nifti[0], stamp_of(nifti[0]), read_file).pixel_mm
    with quiet_pydicom():
        elements = Elements(parse(read_slice_file(path, MAX_FILE_BYTES), tags("PixelSpacing")))
        try:
            between_rows, between_columns = elements.floats("PixelSpacing", 2)
        except UnreadableDicomError:
            return math.nan, math.nan
    return between_rows, between_columns
