"""DICOM files found and their headers read: what is one usable CT slice, and why another file is not.

Tags and their meaning: DICOM PS3.3, C.7.6.1 to C.7.6.3 (image, plane, pixels) and C.8.2.1 (CT image).
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pydicom
from pydicom.multival import MultiValue

from ichpipe.errors import MissingFileError, UnreadableDicomError
from ichpipe.quiet import quiet_pydicom

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pydicom.dataset import Dataset

MAX_SIDE_PX: Final = 4096
"""No CT image is wider; a header that claims more is damaged, and decoding it would fill the memory."""

MAX_FILE_BYTES: Final = 256 * 2**20
DIRECTORY_CLASS: Final = "1.2.840.10008.1.3.10"  # Media Storage Directory: a DICOMDIR
SECONDARY_CAPTURE: Final = "1.2.840.10008.5.1.4.1.1.7"  # and .7.1 to .7.4, its multi-frame kin
IMPLICIT_LITTLE: Final = "1.2.840.10008.1.2"
EXPLICIT_LITTLE: Final = "1.2.840.10008.1.2.1"
EXPLICIT_BIG: Final = "1.2.840.10008.1.2.2"
DEFLATED_LITTLE: Final = "1.2.840.10008.1.2.1.99"
UNCOMPRESSED: Final = frozenset({IMPLICIT_LITTLE, EXPLICIT_LITTLE, EXPLICIT_BIG, DEFLATED_LITTLE})
NOT_A_SLICE: Final = ("LOCALIZER", "SURVIEW", "SCOUT", "TOPOGRAM", "SCREEN SAVE", "SCREENSAVE", "DOSE")
HOUNSFIELD_TYPES: Final = frozenset({"", "HU", "HU_MOD", "US"})  # (0028,1054); US: unspecified

_IDENTITY_TAGS: Final = (
    "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "PatientID", "Modality",
    "ImageType", "InstanceNumber", "ImagePositionPatient", "ImageOrientationPatient",
)  # fmt: skip
_PIXEL_TAGS: Final = (
    "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel",
    "PhotometricInterpretation", "NumberOfFrames", "RescaleSlope", "RescaleIntercept", "RescaleType",
    "PixelPaddingValue", "PixelPaddingRangeLimit", "PixelData",
)  # fmt: skip
# Group 0002 or 0008, little-endian, or 0008 big-endian: how a file without the DICM prefix must begin.
_FIRST_GROUPS: Final = (b"\x02\x00", b"\x08\x00", b"\x00\x08")
_FIRST_ITEM: Final = b"\xfe\xff\x00\xe0"  # item tag (FFFE,E000) that opens encapsulated pixel data


@dataclass(frozen=True)
class PixelFacts:
    """How the stored pixels of one image are laid out and become Hounsfield units."""

    rows: int  # (0028,0010)
    columns: int  # (0028,0011)
    bits_allocated: int  # (0028,0100): 8, 16 or 32
    bits_stored: int  # (0028,0101)
    signed: bool  # (0028,0103)
    slope: float  # (0028,1053), HU per stored unit
    intercept: float  # (0028,1052), HU
    padding: tuple[int, int] | None  # (0028,0120) and (0028,0121): first and last padding value, as stored
    transfer_syntax: str  # (0002,0010)

    @property
    def compressed(self) -> bool:
        """Whether the pixels need a codec."""
        return self.transfer_syntax not in UNCOMPRESSED

    @property
    def pixel_bytes(self) -> int:
        """Length of the uncompressed pixels."""
        return self.rows * self.columns * self.bits_allocated // 8


@dataclass(frozen=True)
class SliceHeader:
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
    modality: str  # (0008,0060), always CT
    image_type: tuple[str, ...]  # (0008,0008), may be empty
    instance_number: int | None  # (0020,0013); absent in RSNA
    position: tuple[float, float, float]  # (0020,0032), mm, patient coordinates
    row_direction: tuple[float, float, float]  # (0020,0037), first three: unit vector
    column_direction: tuple[float, float, float]  # (0020,0037), last three: unit vector

    @property
    def compressed(self) -> bool:
        """Whether the pixels need a codec."""
        return self.transfer_syntax not in UNCOMPRESSED


def find_files(roots: Sequence[Path]) -> list[Path]:
    """List the files below ``roots`` whatever their names, sorted, each once. A root may be a file.

    Names that begin with a dot (``.DS_Store``, ``._x``, half-written temporaries) and what lies in such
    folders are left out, and links to folders are not followed. Raises MissingFileError.
    """
    found: set[Path] = set()
    for root in roots:
        if root.is_file():
            found.add(root)
        elif root.is_dir():
            found.update(_walk(root))
        else:
            raise MissingFileError(f"{root} does not exist; name a folder or file with DICOM images")
    return sorted(found, key=os.fsencode)


def _walk(root: Path) -> Iterator[Path]:
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if not name.startswith(".")]
        candidates = (Path(folder, name) for name in names if not name.startswith("."))
        yield from (path for path in candidates if path.is_file())


def read_header(path: Path) -> SliceHeader:
    """Read one file's header and digest; the pixels are measured, not decoded.

    Raises UnreadableDicomError whose message is the reason: not DICOM, damaged, not an axial-type CT
    slice, a needed tag missing, pixel data too short. docs/data.md lists them all.
    """
    data = read_bytes(path)
    with quiet_pydicom():
        dataset = parse(data, _IDENTITY_TAGS + _PIXEL_TAGS)
        _require_ct_slice(dataset)
        facts = pixel_facts(dataset)
        require_pixels(dataset, facts)
        study_uid = _required_text(dataset, "StudyInstanceUID")
        row_direction, column_direction = _directions(dataset)
        return SliceHeader(
            patient_id=_text(dataset, "PatientID") or study_uid,
            study_uid=study_uid,
            series_uid=_required_text(dataset, "SeriesInstanceUID"),
            sop_uid=_required_text(dataset, "SOPInstanceUID"),
            path=path.as_posix(),
            transfer_syntax=facts.transfer_syntax,
            file_digest=hashlib.sha256(data).hexdigest(),
            rows=facts.rows,
            columns=facts.columns,
            modality=_text(dataset, "Modality"),
            image_type=_image_type(dataset),
            instance_number=_optional_int(dataset, "InstanceNumber"),
            position=_vector(_floats(dataset, "ImagePositionPatient", 3)),
            row_direction=row_direction,
            column_direction=column_direction,
        )


def read_pixel_dataset(path: Path) -> tuple[Dataset, PixelFacts]:
    """Read what decoding needs, checked like in ``read_header``. Call it inside ``quiet_pydicom``."""
    dataset = parse(read_bytes(path), _PIXEL_TAGS)
    facts = pixel_facts(dataset)
    require_pixels(dataset, facts)
    return dataset, facts


def read_bytes(path: Path) -> bytes:
    """Read a file whole, unless it can't be one CT slice by its size."""
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise UnreadableDicomError(f"file of {size} bytes is too large for one CT slice")
        return path.read_bytes()
    except OSError as error:
        raise UnreadableDicomError(f"file can't be read: {error.strerror or type(error).__name__}") from error


def parse(data: bytes, keywords: Sequence[str]) -> Dataset:
    """Parse ``data`` as DICOM, keeping the named elements; a missing DICM prefix is tolerated.

    Raises UnreadableDicomError. The parser's own message is left out: it may quote a patient's data.
    """
    if not data:
        raise UnreadableDicomError("file is empty")
    if data[128:132] != b"DICM" and data[:2] not in _FIRST_GROUPS:
        raise UnreadableDicomError("not a DICOM file: no DICM prefix and no DICOM element at its start")
    try:
        dataset = pydicom.dcmread(BytesIO(data), force=True, specific_tags=list(keywords))
    except Exception as error:  # hostile bytes make the parser raise almost anything
        reason = f"damaged or truncated: can't be parsed as DICOM ({type(error).__name__})"
        raise UnreadableDicomError(reason) from error
    if _text(dataset.file_meta, "MediaStorageSOPClassUID") == DIRECTORY_CLASS:
        raise UnreadableDicomError("a DICOMDIR: a table of contents, not an image")
    return dataset


def pixel_facts(dataset: Dataset) -> PixelFacts:
    """Read and check the tags that describe the pixels. Raises UnreadableDicomError naming the tag."""
    rows, columns = _required_int(dataset, "Rows"), _required_int(dataset, "Columns")
    if not (1 <= rows <= MAX_SIDE_PX and 1 <= columns <= MAX_SIDE_PX):
        raise UnreadableDicomError(f"size {rows} x {columns} is outside 1 to {MAX_SIDE_PX} pixels a side")
    if (_optional_int(dataset, "NumberOfFrames") or 1) > 1:
        raise UnreadableDicomError("multi-frame image (NumberOfFrames > 1) is not supported; export single slices")
    if (samples := _optional_int(dataset, "SamplesPerPixel") or 1) != 1:
        raise UnreadableDicomError(f"SamplesPerPixel is {samples}: a colour image, not CT")
    allocated = _required_int(dataset, "BitsAllocated")
    stored = _optional_int(dataset, "BitsStored") or allocated
    if allocated not in {8, 16, 32} or not 1 <= stored <= allocated:
        raise UnreadableDicomError(f"BitsAllocated {allocated} with BitsStored {stored} is not supported")
    signed = bool(_required_int(dataset, "PixelRepresentation"))
    slope, intercept = _rescale(dataset)
    padding = _padding(dataset, allocated, signed=signed)
    syntax = _transfer_syntax(dataset)
    return PixelFacts(rows, columns, allocated, stored, signed, slope, intercept, padding, syntax)


def require_pixels(dataset: Dataset, facts: PixelFacts) -> None:
    """Raise UnreadableDicomError unless PixelData (7FE0,0010) can hold the image that the header claims."""
    pixels = _value(dataset, "PixelData")
    if not isinstance(pixels, bytes) or not pixels:
        raise UnreadableDicomError("no PixelData (7FE0,0010)")
    if facts.compressed:
        if not pixels.startswith(_FIRST_ITEM):
            syntax = facts.transfer_syntax
            raise UnreadableDicomError(f"transfer syntax {syntax} is compressed, but PixelData is not encapsulated")
    elif len(pixels) < facts.pixel_bytes:
        raise UnreadableDicomError(f"truncated: PixelData has {len(pixels)} of {facts.pixel_bytes} bytes")


def _require_ct_slice(dataset: Dataset) -> None:
    modality = _text(dataset, "Modality")
    if modality != "CT":
        said = f"is {modality[:16]!r}" if modality else "is missing"
        raise UnreadableDicomError(f"Modality (0008,0060) {said}, not CT")
    if _text(dataset, "SOPClassUID").startswith(SECONDARY_CAPTURE):
        raise UnreadableDicomError("secondary capture (SOPClassUID 0008,0016), not an original CT slice")
    for word in _image_type(dataset):
        if any(mark in word for mark in NOT_A_SLICE):
            raise UnreadableDicomError(f"ImageType (0008,0008) says {word[:32]}: a localizer or screen, not a slice")


def _rescale(dataset: Dataset) -> tuple[float, float]:
    slope = _floats(dataset, "RescaleSlope", 1)[0]
    intercept = _floats(dataset, "RescaleIntercept", 1)[0]
    if slope == 0:
        raise UnreadableDicomError("RescaleSlope (0028,1053) is 0")
    kind = _text(dataset, "RescaleType").upper()
    if kind not in HOUNSFIELD_TYPES:
        raise UnreadableDicomError(f"RescaleType (0028,1054) is {kind[:16]!r}: values are not Hounsfield units")
    return slope, intercept


def _padding(dataset: Dataset, bits: int, *, signed: bool) -> tuple[int, int] | None:
    first = _optional_int(dataset, "PixelPaddingValue")
    if first is None:
        return None
    last = _optional_int(dataset, "PixelPaddingRangeLimit")
    low, high = sorted(_as_stored(value, bits, signed=signed) for value in (first, first if last is None else last))
    return low, high


def _as_stored(value: int, bits: int, *, signed: bool) -> int:
    """Read a tag's number the way pixels are: 63536 beside signed 16-bit pixels means -2000."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if signed and value >> (bits - 1) else value


def _transfer_syntax(dataset: Dataset) -> str:
    stated = _text(dataset.file_meta, "TransferSyntaxUID")
    if stated:
        return stated
    implicit, little = dataset.original_encoding  # guessed by the parser: no meta header
    if implicit:
        return IMPLICIT_LITTLE
    return EXPLICIT_LITTLE if little else EXPLICIT_BIG


def _directions(dataset: Dataset) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    values = _floats(dataset, "ImageOrientationPatient", 6)
    row, column = _vector(values[:3]), _vector(values[3:])
    lengths = [math.hypot(*row), math.hypot(*column)]
    dot = sum(a * b for a, b in zip(row, column, strict=True))
    if any(abs(length - 1) > 0.05 for length in lengths) or abs(dot) > 0.05:
        raise UnreadableDicomError("ImageOrientationPatient (0020,0037) is not two perpendicular unit vectors")
    return row, column


def _vector(values: Sequence[float]) -> tuple[float, float, float]:
    x, y, z = values
    return x, y, z


def _image_type(dataset: Dataset) -> tuple[str, ...]:
    return tuple(word.strip().upper() for word in _text(dataset, "ImageType").split("\\") if word.strip())


def _value(dataset: Dataset, keyword: str) -> Any:
    try:
        return dataset.get(keyword)
    except Exception as error:  # a damaged element; its text may quote the value, so it is not repeated
        raise UnreadableDicomError(f"{keyword} can't be read ({type(error).__name__})") from error


def _text(dataset: Dataset, keyword: str) -> str:
    value = _value(dataset, keyword)
    parts = value if isinstance(value, MultiValue) else [] if value is None else [value]
    return "\\".join(str(part).strip(" \0") for part in parts)


def _required_text(dataset: Dataset, keyword: str) -> str:
    text = _text(dataset, keyword)
    if not text:
        raise UnreadableDicomError(f"{keyword} is missing")
    return text


def _optional_int(dataset: Dataset, keyword: str) -> int | None:
    value = _value(dataset, keyword)
    if value is None or value == "":
        return None
    try:
        return int.from_bytes(value, "little") if isinstance(value, bytes) else int(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise UnreadableDicomError(f"{keyword} is not a whole number") from error


def _required_int(dataset: Dataset, keyword: str) -> int:
    value = _optional_int(dataset, keyword)
    if value is None:
        raise UnreadableDicomError(f"{keyword} is missing")
    return value


def _floats(dataset: Dataset, keyword: str, count: int) -> list[float]:
    value = _value(dataset, keyword)
    if value is None or value == "" or (isinstance(value, MultiValue) and not value):
        raise UnreadableDicomError(f"{keyword} is missing")
    try:
        numbers = [float(part) for part in (value if isinstance(value, MultiValue) else [value])]
    except (TypeError, ValueError) as error:
        raise UnreadableDicomError(f"{keyword} is not a number") from error
    if len(numbers) != count or not all(math.isfinite(number) for number in numbers):
        raise UnreadableDicomError(f"{keyword} should hold {count} finite number(s), found {len(numbers)} value(s)")
    return numbers
