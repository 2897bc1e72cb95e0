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
from ichpipe.phantom.study import make_study

if TYPE_CHECKING:
    from pathlib import Path

    from ichpipe.phantom.study import Study

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
    """Write ``studies`` synthetic head CTs of ``size_px`` rows and columns below ``out``.

    The DICOM folder is renamed when it is complete and the table is written last, so a folder with a table is
    complete. An earlier phantom is replaced. Same seed, same bytes; study k does not depend on the number of studies.
    Raises DataError, and changes nothing, where ``out`` holds a ``dicom`` folder or a table of another origin.
    """
    if studies < 1 or size_px < 32:
        raise DataError(f"the phantom needs studies >= 1 and size_px >= 32, not {studies} and {size_px}")
    folder, filling, table = out / "dicom", out / ".dicom.tmp", out / TABLE_NAME
    _refuse_foreign(out, folder, filling, table)
    shutil.rmtree(filling, ignore_errors=True)  # what an interrupted run left
    filling.mkdir(parents=True)
    try:
        labels, summary = _write_studies(filling, studies, size_px, seed)
        table.unlink(missing_ok=True)
        if folder.exists():
            shutil.rmtree(folder)
        filling.rename(folder)
    finally:
        shutil.rmtree(filling, ignore_errors=True)
    rows = [f"{uid}_{name},{labels[uid][CLASSES.index(name)]}\n" for uid in sorted(labels) for name in TABLE_CLASSES]
    write_text(table, "ID,Label\n" + "".join(rows))
    return summary


def _write_studies(
    folder: Path, studies: int, size_px: int, seed: int
) -> tuple[dict[str, tuple[int, ...]], PhantomSummary]:
    labels: dict[str, tuple[int, ...]] = {}
    patients, mimics = set(), 0
    for study_index in range(studies):
        study = make_study(seed, study_index, size_px)
        write_study(folder, study)
        patients.add(study.patient_id)
        mimics += sum(lesion.is_mimic for lesion in study.lesions)
        labels.update(zip(study.sop_uids, (tuple(map(int, row)) for row in study.labels), strict=True))
    positive = {name: sum(row[column] for row in labels.values()) for column, name in enumerate(CLASSES)}
    return labels, PhantomSummary(studies, len(patients), len(labels), mimics, positive)


def write_study(folder: Path, study: Study) -> None:
    """Write one DICOM file per slice of ``study`` into ``folder``, named by SOP Instance UID (0008,0018)."""
    stored = encode(study.hu, study.scanner.encoding)
    # RSNA's identifiers (ID_...) are no valid UIDs; pydicom would warn at each.
    with config.disable_value_validation():
        for slice_index, sop_uid in enumerate(study.sop_uids):
            dataset = _header(study, slice_index)
            dataset.PixelData = stored[slice_index].astype(stored.dtype.newbyteorder("<")).tobytes()
            dataset.save_as(folder / f"{sop_uid}.dcm", enforce_file_format=True)


def _header(study: Study, slice_index: int) -> FileDataset:
    """All elements but the pixels. As in RSNA 2019 there is no InstanceNumber and no SliceThickness."""
    sop_uid, geometry = study.sop_uids[slice_index], study.geometry
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, UID(sop_uid)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID, meta.ImplementationVersionName = _IMPLEMENTATION, MAKER
    dataset = FileDataset(f"{sop_uid}.dcm", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, UID(sop_uid)
    dataset.Modality, dataset.PatientID = "CT", study.patient_id
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.StudyID = study.study_uid, study.series_uid, ""
    dataset.ImagePositionPatient = [f"{value:.6f}" for value in geometry.position_mm(slice_index)]
    dataset.ImageOrientationPatient = [f"{value:.6f}" for value in geometry.orientation]
    dataset.PixelSpacing = [f"{geometry.pixel_mm:.6f}"] * 2
    encoding = study.scanner.encoding
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = study.hu.shape[1:]
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, encoding.bits_stored, encoding.bits_stored - 1
    dataset.PixelRepresentation = encoding.pixel_representation
    if encoding.padding is not None:
        dataset.PixelPaddingValue = encoding.padding
    dataset.WindowCenter, dataset.WindowWidth = "40", "80"
    dataset.RescaleIntercept, dataset.RescaleSlope = str(encoding.intercept), "1"
    return dataset


def _refuse_foreign(out: Path, folder: Path, filling: Path, table: Path) -> None:
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; --out must name a folder")
    # Files of the temporary folder may be cut short, so only their names are checked.
    for path, is_ours in ((folder, _is_ours), (filling, _has_our_name)):
        foreign = next((entry for entry in _entries(path) if not is_ours(entry)), None)
        if foreign is not None:
            raise DataError(
                f"{foreign} was not written by the phantom, so {path} is not replaced; choose another --out"
            )
    if table.exists() and not any(_entries(folder)):
        raise DataError(f"{table} has no phantom beside it, so it is not replaced; choose another --out or remove it")


def _entries(path: Path) -> list[Path]:
    if path.is_dir() and not path.is_symlink():
        return sorted(path.iterdir())
    return [path] if path.exists() or path.is_symlink() else []


def _is_ours(path: Path) -> bool:
    """Tell the phantom's slice from a real one: RSNA's files have the same names."""
    if not _has_our_name(path):
        return False
    with path.open("rb") as handle:
        return MAKER.encode() in handle.read(512)


def _has_our_name(path: Path) -> bool:
    return path.is_file() and not path.is_symlink() and _FILE_NAME.fullmatch(path.name) is not None
