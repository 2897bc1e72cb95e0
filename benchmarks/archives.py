"""Archives for benchmarks: files with the headers of real RSNA 2019 slices, or like them, and few pixels a side."""

from __future__ import annotations

import ast
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from ichpipe.common.classes import CLASSES
from ichpipe.dicom.pydicom_quiet import quiet_pydicom

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIDE_PX = 8
SERIES_PER_PATIENT = 21_744 / 18_938  # RSNA 2019


def read_headers(path: Path) -> pd.DataFrame:
    """Read ``stage1_test_with_metadata.csv``: a row a slice, positions and directions as text of DICOM."""
    columns = ["SOPInstanceUID", "SeriesInstanceUID", "ImagePositionPatient", "ImageOrientationPatient"]
    table = pd.read_csv(path, usecols=columns).drop_duplicates("SOPInstanceUID")
    for name in columns[2:]:
        table[name] = ["\\".join(ast.literal_eval(text)) for text in table[name]]
    return table.rename(columns={"SeriesInstanceUID": "series"})[["series", *columns[2:]]]


def make_headers(n_series: int = 60, seed: int = 0) -> pd.DataFrame:
    """Make headers like them: 20 to 60 slices a series, tilted, 5 mm apart."""
    generator = np.random.default_rng(seed)
    rows = []
    for series in range(n_series):
        angle = np.radians(generator.uniform(0, 30))
        direction = f"1.000000\\0.000000\\0.000000\\0.000000\\{np.cos(angle):.6f}\\{-np.sin(angle):.6f}"
        for number in range(int(generator.integers(20, 61))):
            along = 5.0 * number * np.array([0.0, np.sin(angle), np.cos(angle)]) - [125.0, 130.0, -40.0]
            rows.append((series, "\\".join(f"{value:.6f}" for value in along), direction))
    return pd.DataFrame(rows, columns=["series", "ImagePositionPatient", "ImageOrientationPatient"])


def write_archive(folder: Path, headers: pd.DataFrame, n_slices: int, side_px: int = SIDE_PX) -> None:
    """Write ``folder/dicom/ID_*.dcm``, one flat folder as Kaggle's, and ``folder/stage_2_train.csv``.

    Whole series in turn, each time under new UIDs, until there are ``n_slices``.
    """
    (folder / "dicom").mkdir(parents=True)
    labels = [f"{uid}_{name}" for uid in ["%s"] for name in (*CLASSES[1:], "any")]
    with (folder / "stage_2_train.csv").open("w") as table:
        table.write("ID,Label\n")
        for uid, content, positive in _slices(headers, n_slices, side_px):
            (folder / "dicom" / f"{uid}.dcm").write_bytes(content)
            table.writelines(f"{row % uid},{int(positive and row.endswith(('any', 'subdural')))}\n" for row in labels)


def _slices(headers: pd.DataFrame, n_slices: int, side_px: int) -> Iterator[tuple[str, bytes, bool]]:
    template, generator = _template(side_px), np.random.default_rng(0)
    groups = [group.to_numpy() for _, group in headers.groupby("series")]
    made = series = 0
    while made < n_slices:
        group = groups[series % len(groups)]
        patient = int(series / SERIES_PER_PATIENT)
        names = {"P" * 8: f"{patient:08x}", "T" * 10: f"{series:010x}", "R" * 10: f"{series:010x}"}
        sick = generator.random() < 0.4
        for number, (_, position, direction) in enumerate(group[: n_slices - made]):
            uid = f"{generator.integers(16):x}{made + number:08x}"  # names in no order
            content = template
            fields = {"S" * 9: uid, "X" * 64: position.ljust(64), "D" * 72: direction.ljust(72)}
            for old, new in (names | fields).items():
                content = content.replace(old.encode(), new.encode())
            yield f"ID_{uid}", content, sick and 10 <= number < 18
        made += min(len(group), n_slices - made)
        series += 1


def _template(side_px: int) -> bytes:
    """One file with the 24 elements of an RSNA slice, and marks of fixed length where slices differ."""
    dataset: Any = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    with quiet_pydicom():
        dataset.SOPInstanceUID, dataset.Modality, dataset.PatientID = f"ID_{'S' * 9}", "CT", f"ID_{'P' * 8}"
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.StudyID = f"ID_{'T' * 10}", f"ID_{'R' * 10}", ""
        dataset.add_new("ImagePositionPatient", "LO", "X" * 64)
        dataset.add_new("ImageOrientationPatient", "LO", "D" * 72)
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
        dataset.Rows = dataset.Columns = side_px
        dataset.PixelSpacing, dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = ["0.488281"] * 2, 16, 16, 15
        dataset.PixelRepresentation, dataset.WindowCenter, dataset.WindowWidth = 1, "40", "150"
        dataset.RescaleIntercept, dataset.RescaleSlope = "-1024", "1"
        dataset.PixelData = bytes(2 * side_px**2)
        dataset["PixelData"].VR = "OW"
        file = BytesIO()
        dataset.save_as(file, enforce_file_format=True)
    content = file.getvalue()
    for mark in (b"X" * 64, b"D" * 72):  # decimal strings, as they should be
        at = content.index(mark) - 4
        content = content[:at] + b"DS" + content[at + 2 :]
    return content
