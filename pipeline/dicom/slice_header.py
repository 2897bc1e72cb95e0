"""Reads the header of one CT slice, or gives the reason why a file is not a usable one.

Tags and their meaning: DICOM PS3.3, C.7.6.1 to C.7.6.3 (image, plane, pixels) and C.8.2.1 (CT image).
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from typing import TYPE_CHECKING, Final, NamedTuple

from ichpipe.common.errors import NotCtError, UnreadableDicomError
from ichpipe.dicom.coded_terms import MODALITIES, body_part, shown
from ichpipe.dicom.dataset import (
    MAX_FILE_BYTES,
    PIXEL_TAGS,
    UNCOMPRESSED,
    PixelFile,
    parse,
    pixel_facts,
    require_pixels,
    transfer_syntax,
)
from ichpipe.dicom.elements import MAX_TEXT, Elements, tags
from ichpipe.dicom.enhanced import read_slice_file
from ichpipe.dicom.hounsfield import stored_pixels, stored_to_hu
from ichpipe.dicom.pydicom_quiet import quiet_pydicom
from ichpipe.dicom.series_description import marks_of, names_agent

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from pydicom.dataset import Dataset

SECONDARY_CAPTURE: Final = "1.2.840.10008.5.1.4.1.1.7"  # and .7.1 to .7.4, its multi-frame kin
NOT_A_SLICE: Final = ("LOCALIZER", "SURVIEW", "SCOUT", "TOPOGRAM", "SCREEN SAVE", "SCREENSAVE", "DOSE")

_SERIES_TEXTS: Final = ("SeriesDescription", "ProtocolName", "StudyDescription")  # only their marks are kept
_HEADER_TAGS: Final = PIXEL_TAGS + tags(
    "SpecificCharacterSet", "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "PatientID",
    "Modality", "ImageType", "InstanceNumber", "AcquisitionNumber", "ImagePositionPatient", "ImageOrientationPatient",
    "ConvolutionKernel", "ContrastBolusAgent", "SliceThickness", "BodyPartExamined", "LossyImageCompression",
    *_SERIES_TEXTS,
)  # fmt: skip
# JPEG baseline and extended, JPEG-LS near-lossless; JPEG 2000 and HTJ2K, which may lose or not.
LOSSY_SYNTAXES: Final = frozenset(f"1.2.840.10008.1.2.4.{number}" for number in (50, 51, 81))
MAYBE_LOSSY_SYNTAXES: Final = frozenset(f"1.2.840.10008.1.2.4.{number}" for number in (91, 203))


class SliceHeader(NamedTuple):
    """What the index keeps of one CT slice. No name, no birth date."""

    patient_id: str  # (0010,0020); the StudyInstanceUID where it is empty
    study_uid: str  # (0020,000D)
    series_uid: str  # (0020,000E)
    sop_uid: str  # (0008,0018)
    path: str  # as found, with forward slashes
    transfer_syntax: str  # (0002,0010)
    file_digest: str  # SHA-256 of the file's bytes, 64 hexadecimal digits
    rows: int  # (0028,0010)
    columns: int  # (0028,0011)
    lossy: bool  # (0028,2110) is 01, or a transfer syntax that loses; unknown counts as lossy
    image_type: str  # (0008,0008), upper case, joined by backslashes; may be empty
    kernel: str  # (0018,1210), may be empty
    marks: str  # words that series_description knows of (0008,103E), (0018,1030) and (0008,1030); nothing else of them
    contrast_agent: bool  # (0018,0010) names one
    thickness_mm: float  # (0018,0050); NaN where absent
    body_part: str  # (0018,0015), as far as it is terms of the standard, upper case; may be empty
    instance_number: int | None  # (0020,0013), orders slices at one place; None where it is no whole number
    acquisition: str  # (0020,0012); may be empty
    position: tuple[float, float, float]  # (0020,0032), mm, patient coordinates
    row_direction: tuple[float, float, float]  # (0020,0037), first three: unit vector
    column_direction: tuple[float, float, float]  # (0020,0037), last three: unit vector

    @property
    def compressed(self) -> bool:
        """Whether the pixels need a codec."""
        return self.transfer_syntax not in UNCOMPRESSED


def read_header(path: Path | str, *, force: bool = False) -> SliceHeader:
    """Read one file's header and digest; the pixels are measured, not decoded.

    Parameters
    ----------
    path
        The file, or a member of a zip archive.
    force
        Accept any modality and kind of image (NotCtError); Hounsfield units are still required.

    Raises
    ------
    UnreadableDicomError
        The message is the reason: not DICOM, damaged, not an axial-type CT slice, a needed tag missing, pixel data
        too short (docs/data.md lists them all). ``series`` holds StudyInstanceUID and SeriesInstanceUID where they
        could be read.

    """
    name = path if isinstance(path, str) else path.as_posix()
    data = read_slice_file(name, MAX_FILE_BYTES)
    with quiet_pydicom():
        dataset = parse(data, _HEADER_TAGS)
        elements = Elements(dataset)
        try:
            return _slice_header(name, data, elements, dataset, force=force)
        except UnreadableDicomError as error:
            with contextlib.suppress(UnreadableDicomError):
                uids = elements.text("StudyInstanceUID"), elements.text("SeriesInstanceUID")
                error.series = (*uids, elements.text("PatientID") or uids[0])
            raise


def _slice_header(path: str, data: bytes, elements: Elements, dataset: Dataset, *, force: bool) -> SliceHeader:
    image_type = elements.text("ImageType").upper() if force else _require_ct_slice(elements)
    syntax = transfer_syntax(dataset)
    facts = pixel_facts(elements, syntax)
    require_pixels(elements, facts)
    if facts.high_bit >= facts.bits_stored and not facts.compressed:  # it may be open which bits hold the pixel
        stored_to_hu(stored_pixels(PixelFile(dataset, elements, facts)), facts)
    study_uid = elements.required_text("StudyInstanceUID")
    directions = elements.floats("ImageOrientationPatient", 6)
    row, column = _vector(directions[:3]), _vector(directions[3:])
    dot = sum(a * b for a, b in zip(row, column, strict=True))
    if any(abs(math.hypot(*direction) - 1) > 0.05 for direction in (row, column)) or abs(dot) > 0.05:
        raise UnreadableDicomError("ImageOrientationPatient (0020,0037) is not two perpendicular unit vectors")
    loss = elements.text("LossyImageCompression")
    return SliceHeader(
        patient_id=elements.text("PatientID") or study_uid,
        study_uid=study_uid,
        series_uid=elements.required_text("SeriesInstanceUID"),
        sop_uid=elements.required_text("SOPInstanceUID"),
        path=path,
        transfer_syntax=syntax,
        file_digest=hashlib.sha256(data).hexdigest(),
        rows=facts.rows,
        columns=facts.columns,
        lossy=loss == "01" or syntax in LOSSY_SYNTAXES or (syntax in MAYBE_LOSSY_SYNTAXES and not loss),
        image_type=image_type[:MAX_TEXT],
        kernel=elements.short_text("ConvolutionKernel"),
        marks=marks_of(*map(elements.short_text, _SERIES_TEXTS)),
        contrast_agent=names_agent(elements.short_text("ContrastBolusAgent")),
        thickness_mm=elements.optional_float("SliceThickness"),
        body_part=body_part(elements.short_text("BodyPartExamined")),
        instance_number=elements.optional_whole("InstanceNumber"),
        acquisition=elements.short_text("AcquisitionNumber"),
        position=_vector(elements.floats("ImagePositionPatient", 3)),
        row_direction=row,
        column_direction=column,
    )


def _require_ct_slice(elements: Elements) -> str:
    """Refuse what is no CT slice; return ImageType (0008,0008)."""
    modality = elements.text("Modality")
    if modality != "CT":
        fault = f"is {shown(modality, MODALITIES)}" if modality else "is missing"
        raise NotCtError(f"Modality (0008,0060) {fault}, not CT")
    if elements.text("SOPClassUID").startswith(SECONDARY_CAPTURE):
        raise NotCtError("secondary capture (SOPClassUID 0008,0016), not an original CT slice")
    image_type = elements.text("ImageType").upper()
    for word in image_type.split("\\"):
        if mark := next((mark for mark in NOT_A_SLICE if mark in word), None):
            raise NotCtError(f"ImageType (0008,0008) says {mark}: a localizer or screen, not a slice")
    return image_type


def _vector(values: Sequence[float]) -> tuple[float, float, float]:
    x, y, z = values
    return x, y, z
