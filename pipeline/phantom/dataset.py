"""Writes the phantom in the layout of RSNA 2019: ``dicom/ID_*.dcm`` and ``stage_2_train.csv``."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pydicom import config
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian

from ichpipe.common.classes import CLASSES, SUBTYPES
from ichpipe.common.errors import DataError
from ichpipe.common.files import write_text
from ichpipe.phantom.scanner import encode
from ichpipe.phantom.study import Study, make_study

if TYPE_CHECKING:
    from pathlib import Path

TABLE_NAME: Final = "stage_2_train.csv"
TABLE_CLASSES: Final = (*SUBTYPES, "any")  # the order of rows in the Kaggle table
MAKER: Final = "ICHPIPE_PHANTOM"  # Implementation Version Name (0002,0013): tells our files from real ones
_IMPLEMENTATION: Final = UID("2.25.293840182736450918273645091827364509")  # Implementation Class UID (0002,0012)
_FILE_NAME: Final = re.compile(r"ID_[0-9a-f]{9}\.dcm")


@dataclass(frozen=True)
class PhantomSummary:
    """Counts of a data set that was written."""

    n_studies: int
    n_patients: int
    n_slices: int
    n_mimics: int
    n_positive: dict[str, int]  # slices per class, in the order of CLASSES


def write_dataset(out: Path, studies: int, size_px: int, seed: int) -> PhantomSummary:
    """Write synthetic head CTs below ``out``. Same seed, same bytes; study k does not depend on ``studies``.

    The DICOM folder is renamed when it is complete and the table is written last, so a folder with a table is
    complete. An earlier phantom is replaced. ``size_px`` is the number of rows and columns of a slice, 32 or more.
    Raises DataError where ``out`` holds a ``dicom`` folder or a table of another origin; nothing is changed.
    """
    if studies < 1 or size_px < 32:
        raise DataError(f"the phantom needs studies >= 1 and size_px >= 32, not {studies} and {size_px}")
    folder, partial, table = out / "dicom", out / ".dicom.tmp", out / TABLE_NAME
    _refuse_foreign_files(out, folder, partial, table)
    shutil.rmtree(partial, ignore_errors=True)  # what an interrupted run left
    partial.mkdir(parents=True)
    labels: dict[str, list[int]] = {}
    patients, mimics = set(), 0
    try:
        for study_index in range(studies):
            study = make_study(seed, study_index, size_px)
            write_study(partial, study)
            patients.add(study.patient_id)
            mimics += sum(lesion.is_mimic for lesion in study.lesions)
            labels.update(zip(study.sop_uids, study.labels.tolist(), strict=True))
        table.unlink(missing_ok=True)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    rows = [f"{uid}_{name},{labels[uid][CLASSES.index(name)]}\n" for uid in sorted(labels) for name in TABLE_CLASSES]
    write_text(table, "ID,Label\n" + "".join(rows))
    positive = dict(zip(CLASSES, map(sum, zip(*labels.values(), strict=True)), strict=True))
    return PhantomSummary(studies, len(patients), len(labels), mimics, positive)


def write_study(folder: Path, study: Study) -> None:
    """Write one DICOM file per slice of ``study`` into ``folder``, named by SOP Instance UID (0008,0018).

    As in RSNA 2019 there is no InstanceNumber and no SliceThickness.
    """
    geometry, encoding = study.geometry, study.scanner.encoding
    stored = encode(study.hu, encoding)
    # RSNA's identifiers (ID_...) are no valid UIDs; pydicom would warn at each.
    with config.disable_value_validation():
        for slice_index, sop_uid in enumerate(study.sop_uids):
            meta = FileMetaDataset()
            meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, UID(sop_uid)
            meta.TransferSyntaxUID = ExplicitVRLittleEndian
            meta.ImplementationClassUID, meta.ImplementationVersionName = _IMPLEMENTATION, MAKER
            dataset = FileDataset(f"{sop_uid}.dcm", {}, file_meta=meta, preamble=b"\0" * 128)
            dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, UID(sop_uid)
            dataset.Modality, dataset.PatientID, dataset.StudyID = "CT", study.patient_id, ""
            dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study.study_uid, study.series_uid
            dataset.ImagePositionPatient = [f"{value:.6f}" for value in geometry.position_mm(slice_index)]
            dataset.ImageOrientationPatient = [f"{value:.6f}" for value in geometry.orientation]
            dataset.PixelSpacing = [f"{geometry.pixel_mm:.6f}"] * 2
            dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
            dataset.Rows, dataset.Columns = study.hu.shape[1:]
            dataset.BitsAllocated, dataset.BitsStored = 16, encoding.bits_stored
            dataset.HighBit, dataset.PixelRepresentation = encoding.bits_stored - 1, encoding.pixel_representation
            if encoding.padding is not None:
                dataset.PixelPaddingValue = encoding.padding
            dataset.WindowCenter, dataset.WindowWidth = "40", "80"
            dataset.RescaleIntercept, dataset.RescaleSlope = str(encoding.intercept), "1"
            dataset.PixelData = stored[slice_index].astype(stored.dtype.newbyteorder("<")).tobytes()
            dataset.save_as(folder / f"{sop_uid}.dcm", enforce_file_format=True)


def _refuse_foreign_files(out: Path, folder: Path, partial: Path, table: Path) -> None:
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; --out must name a folder")
    # Files of the partial folder may be cut short, so only their names are checked.
    for path, read_header in ((folder, True), (partial, False)):
        foreign = next((entry for entry in _entries(path) if not _is_ours(entry, read_header)), None)
        if foreign is not None:
            raise DataError(f"{foreign} was not written by the phantom: {path} is not replaced; choose another --out")
    if table.exists() and not any(_entries(folder)):
        raise DataError(f"{table} has no phantom beside it, so it is not replaced; choose another --out or remove it")


def _entries(path: Path) -> list[Path]:
    if path.is_dir() and not path.is_symlink():
        return sorted(path.iterdir())
    return [path] if path.exists() or path.is_symlink() else []


def _is_ours(path: Path, read_header: bool) -> bool:
    """Tell the phantom's slice from a real one: RSNA's files have the same names."""
    if not path.is_file() or path.is_symlink() or not _FILE_NAME.fullmatch(path.name):
        return False
    with path.open("rb") as handle:
        return not read_header or MAKER.encode() in handle.read(512)
