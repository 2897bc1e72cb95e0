"""Parses DICOM files and checks the tags that describe their pixels.

Tags and their meaning: DICOM PS3.3, C.7.6.1 to C.7.6.3 (image, plane, pixels) and C.8.2.1 (CT image).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from pydicom.uid import UID

from ichpipe.common.constants import MAX_SIDE_PX, SPACINGS_MM, SQUARE_WITHIN
from ichpipe.common.errors import FileTooLargeError, UnreadableDicomError
from ichpipe.dicom.bounded_file import DEFLATED_LITTLE, EXPLICIT_LITTLE, BoundedFile, inflate_file, parse_bounded
from ichpipe.dicom.coded_terms import PHOTOMETRIC, RESCALE_TYPES, shown
from ichpipe.dicom.elements import Elements, tags
from ichpipe.dicom.enhanced import ENHANCED_CT, EnhancedCtError, read_slice_file
from ichpipe.dicom.pydicom_quiet import quiet_pydicom
from ichpipe.dicom.stream_checks import (
    ENCAPSULATED_LITTLE,
    EXPORT_AGAIN,
    RUN_LENGTH,
    Claim,
    WrongKindError,
    describe_syntax,
    frame_bytes,
    name_stream,
    require_complete,
    require_form,
    require_kind,
    require_no_items,
    require_sound,
)

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from pydicom.dataset import Dataset
    from pydicom.tag import BaseTag
MAX_FILE_BYTES: Final = 96 * 2**20  # the largest image, 64 MiB, and a long header; also of an inflated file
_DIRECTORY_CLASS: Final = "1.2.840.10008.1.3.10"  # Media Storage Directory: a DICOMDIR
IMPLICIT_LITTLE: Final = "1.2.840.10008.1.2"
EXPLICIT_BIG: Final = "1.2.840.10008.1.2.2"
UNCOMPRESSED: Final = frozenset({
    IMPLICIT_LITTLE, EXPLICIT_LITTLE, EXPLICIT_BIG, DEFLATED_LITTLE, ENCAPSULATED_LITTLE
})  # fmt: skip
# CT has slopes near 1 and intercepts near -1024; a negative slope would make air brighter than bone.
_MIN_SLOPE, _MAX_SLOPE, _MAX_INTERCEPT = 1e-3, 1e3, 1e5
_HOUNSFIELD_TYPES: Final = frozenset({"", "HU", "HU_MOD", "US"})  # (0028,1054); US: unspecified
_GRAY: Final = frozenset({"", "MONOCHROME1", "MONOCHROME2"})  # (0028,0004); 1 turns the display round, not the HU
OVERLAY_BIT_TAGS: Final = tuple((0x6000 + 2 * plane) << 16 | 0x0102 for plane in range(16))  # OverlayBitPosition
_FLOATS: Final = ("FloatPixelData", "DoubleFloatPixelData")
PIXEL_TAGS: Final = tags(
    "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel",
    "PhotometricInterpretation", "NumberOfFrames", "RescaleSlope", "RescaleIntercept", "RescaleType",
    "PixelPaddingValue", "PixelPaddingRangeLimit", "PixelSpacing", "PixelAspectRatio", "ImagerPixelSpacing",
    "NominalScannedPixelSpacing", "ModalityLUTSequence", "PixelDataProviderURL", "PixelData", *_FLOATS,
) + list(OVERLAY_BIT_TAGS)  # fmt: skip
# Group 0002 or 0008, little-endian, or 0008 big-endian: how a file without the DICM prefix must begin.
_FIRST_GROUPS: Final = (b"\x02\x00", b"\x08\x00", b"\x00\x08")
# How files begin that hold or stand for DICOM files: bytes, their offset, and what to do.
_OTHER_FILES: Final = (
    (b"PK\x03\x04", 0, "a zip archive; unpack it, or rename it to .zip if it lies in no other"),
    (b"\x1f\x8b", 0, "a gzip file; unpack it"),
    (b"BZh", 0, "a bzip2 file; unpack it"),
    (b"\xfd7zXZ\0", 0, "an xz file; unpack it"),
    (b"\x28\xb5\x2f\xfd", 0, "a zstd file; unpack it"),
    (b"7z\xbc\xaf\x27\x1c", 0, "a 7z archive; unpack it"),
    (b"Rar!", 0, "a rar archive; unpack it"),
    (b"ustar", 257, "a tar archive; unpack it"),
    (b"version https://git-lfs", 0, "a pointer of Git LFS; fetch the file: git lfs pull"),
    (b"/annex/objects/", 0, "a pointer of git-annex; fetch the file: git annex get"),
)
READABLE: Final = UNCOMPRESSED | {RUN_LENGTH} | frozenset(
    f"1.2.840.10008.1.2.4.{number}" for number in (50, 51, 57, 70, 80, 81, 90, 91, 201, 202, 203)
)  # fmt: skip


class PixelFacts(NamedTuple):
    """How the stored pixels of one image are laid out and become Hounsfield units."""

    rows: int  # (0028,0010)
    columns: int  # (0028,0011)
    bits_allocated: int  # (0028,0100): 8, 16 or 32
    bits_stored: int  # (0028,0101)
    signed: bool  # (0028,0103)
    slope: float  # (0028,1053), HU per stored unit
    intercept: float  # (0028,1052), HU
    padding: tuple[int, int] | None  # (0028,0120) and (0028,0121): first and last padding value
    transfer_syntax: str  # (0002,0010)
    high_bit: int = 0  # (0028,0102)
    overlay: bool = False  # (60xx,0102): bits above the pixel's own hold an overlay
    aspect: float = 1.0  # distance of rows / distance of columns, (0028,0030), (0028,0034), (0018,1164), (0018,2010)
    spacing_mm: tuple[float, float] | None = None  # distance of rows and of columns, (0028,0030), within SPACINGS_MM

    @property
    def compressed(self) -> bool:
        """Whether the pixels need a codec."""
        return self.transfer_syntax not in UNCOMPRESSED

    @property
    def encapsulated(self) -> bool:
        """Whether PixelData (7FE0,0010) is a list of items."""
        return self.compressed or self.transfer_syntax == ENCAPSULATED_LITTLE

    @property
    def size_bytes(self) -> int:
        """The bytes of the stored pixels."""
        return self.rows * self.columns * self.bits_allocated // 8

    @property
    def claim(self) -> Claim:
        """What a compressed stream must agree with."""
        return Claim(self.rows, self.columns, self.bits_allocated, self.signed, self.bits_stored)

    @property
    def stored_type(self) -> str:
        """The numpy type of stored pixels, little-endian."""
        return f"<{'i' if self.signed else 'u'}{self.bits_allocated // 8}"


class PixelFile(NamedTuple):
    """What decoding needs of one file."""

    dataset: Dataset
    elements: Elements  # PIXEL_TAGS
    facts: PixelFacts

    @property
    def pixel_data(self) -> bytes:
        """PixelData (7FE0,0010) as it is stored; without the items around uncompressed pixels."""
        pixels = self.elements.value_bytes("PixelData")
        return frame_bytes(pixels) if self.facts.transfer_syntax == ENCAPSULATED_LITTLE else pixels


def read_pixel_file(path: Path | str) -> PixelFile:
    """Read what decoding needs, with the checks of ``read_header``. Call it inside ``quiet_pydicom``.

    Raises UnreadableDicomError.
    """
    dataset = parse(read_slice_file(path if isinstance(path, str) else path.as_posix(), MAX_FILE_BYTES), PIXEL_TAGS)
    elements = Elements(dataset)
    facts = pixel_facts(elements, transfer_syntax(dataset))
    require_pixels(elements, facts)
    return PixelFile(dataset, elements, facts)


def is_compressed(path: Path | str) -> bool:
    """Whether the pixels of a file need a codec; False for a file that can't be read, which decoding reports."""
    try:
        with quiet_pydicom():
            return read_pixel_file(path).facts.compressed
    except UnreadableDicomError:
        return False


def parse(data: bytes, kept_tags: list[BaseTag | int]) -> Dataset:
    """Parse the bytes of a DICOM file and keep the elements of ``kept_tags``; the DICM prefix may be missing.

    Raises UnreadableDicomError without the parser's own message, which may quote a patient's data.
    """
    if not data:
        raise UnreadableDicomError("file is empty")
    if data[128:132] != b"DICM" and data[:2] not in _FIRST_GROUPS:
        no_dicom = ": no DICM prefix and no DICOM element at its start"
        kind = next((f" but {words}" for mark, at, words in _OTHER_FILES if data.startswith(mark, at)), no_dicom)
        raise UnreadableDicomError(f"not a DICOM file{kind}")
    try:
        inflated = inflate_file(data, MAX_FILE_BYTES)
        dataset = parse_bounded(BoundedFile(inflated or data), kept_tags)
        if inflated:
            dataset.file_meta.TransferSyntaxUID = UID(DEFLATED_LITTLE)
    except FileTooLargeError as error:
        raise EnhancedCtError(str(error)) from None
    except UnreadableDicomError:
        raise
    except Exception as error:  # hostile bytes make the parser raise almost anything
        reason = f"damaged or truncated: can't be parsed as DICOM ({type(error).__name__})"
        raise UnreadableDicomError(reason) from None  # nor in a traceback
    kind = Elements(dataset.file_meta).text("MediaStorageSOPClassUID") or Elements(dataset).text("SOPClassUID")
    if kind == _DIRECTORY_CLASS:
        raise UnreadableDicomError("a DICOMDIR: a table of contents, not an image")
    if kind in ENHANCED_CT:
        raise EnhancedCtError("enhanced CT: name one of its frames, FILE/frame-0001")
    return dataset


def pixel_facts(elements: Elements, syntax: str) -> PixelFacts:
    """Read and check the tags that describe the pixels. Raises UnreadableDicomError naming the tag."""
    rows, columns = elements.required_whole("Rows"), elements.required_whole("Columns")
    if not (1 <= rows <= MAX_SIDE_PX and 1 <= columns <= MAX_SIDE_PX):
        raise UnreadableDicomError(f"size {rows} x {columns} is outside 1 to {MAX_SIDE_PX} pixels a side")
    if (elements.whole("NumberOfFrames") or 1) > 1:
        raise UnreadableDicomError("multi-frame image (NumberOfFrames > 1) is not supported; export single slices")
    if (samples := elements.whole("SamplesPerPixel") or 1) != 1:
        raise UnreadableDicomError(f"SamplesPerPixel is {samples}: a colour image, not CT")
    if (photometric := elements.text("PhotometricInterpretation").upper()) not in _GRAY:
        kind = shown(photometric, PHOTOMETRIC)
        raise UnreadableDicomError(f"PhotometricInterpretation (0028,0004) is {kind}: pixels are no gray values")
    if elements.has("ModalityLUTSequence"):
        raise UnreadableDicomError(
            "ModalityLUTSequence (0028,3000) maps stored values by a table, which is not supported; export the image "
            "with RescaleSlope and RescaleIntercept"
        )
    if any(map(elements.has, _FLOATS)):
        raise UnreadableDicomError(
            "pixels are floating-point numbers (7FE0,0008 or 7FE0,0009), which is not supported; export the image with "
            "whole numbers in PixelData (7FE0,0010)"
        )
    allocated = elements.required_whole("BitsAllocated")
    stored = elements.whole("BitsStored") or allocated
    if allocated not in {8, 16, 32} or not 1 <= stored <= allocated:
        raise UnreadableDicomError(f"BitsAllocated {allocated} with BitsStored {stored} is not supported")
    if (sign := elements.required_whole("PixelRepresentation")) not in {0, 1}:
        raise UnreadableDicomError(f"PixelRepresentation (0028,0103) is {sign}, not 0 or 1")
    signed = sign == 1
    aspect = _aspect(elements)
    if max(rows * aspect, columns / aspect) > MAX_SIDE_PX + 0.5 and aspect != 1:
        times = max(aspect, 1 / aspect)
        raise UnreadableDicomError(f"pixels {times:.3g} times as long as wide; PixelSpacing (0028,0030)")
    slope, intercept = _rescale(elements)
    padding = _padding(elements, allocated, stored, signed=signed)
    return PixelFacts(
        rows,
        columns,
        allocated,
        stored,
        signed,
        slope,
        intercept,
        padding,
        syntax,
        high_bit=elements.whole("HighBit") or 0,
        overlay=any(map(elements.nonzero, OVERLAY_BIT_TAGS)),
        aspect=aspect,
        spacing_mm=_spacing(elements),
    )


def _aspect(elements: Elements) -> float:
    """Return how much farther rows are apart than columns; 1 where no tag is a pair of positive numbers."""
    keywords = ("PixelSpacing", "PixelAspectRatio", "ImagerPixelSpacing", "NominalScannedPixelSpacing")
    down, across = next(filter(None, (_positive_pair(elements, keyword) for keyword in keywords)), (1.0, 1.0))
    return down / across if abs(down / across - 1) > SQUARE_WITHIN else 1.0


def _spacing(elements: Elements) -> tuple[float, float] | None:
    """Return PixelSpacing (0028,0030), mm; None where it is absent, or no distance that a CT image has."""
    pair, (least, most) = _positive_pair(elements, "PixelSpacing"), SPACINGS_MM
    return pair if pair and all(least <= distance <= most for distance in pair) else None


def _positive_pair(elements: Elements, keyword: str) -> tuple[float, float] | None:
    try:
        first, second = elements.floats(keyword, 2)
    except UnreadableDicomError:
        return None
    return (first, second) if first > 0 and second > 0 else None


def require_pixels(elements: Elements, facts: PixelFacts) -> None:
    """Raise UnreadableDicomError unless PixelData (7FE0,0010) can hold the image that the header claims."""
    pixels, syntax = elements.value_bytes("PixelData"), facts.transfer_syntax
    if syntax not in READABLE:
        raise UnreadableDicomError(f"{describe_syntax(syntax)}, which can't be read; {EXPORT_AGAIN}")
    if not pixels:
        where = "; they lie on a server (0028,7FE0)" if elements.has("PixelDataProviderURL") else ""
        form = f"; {describe_syntax(syntax)}, so there should be items; {EXPORT_AGAIN}" if facts.encapsulated else ""
        raise UnreadableDicomError(f"no PixelData (7FE0,0010){where or form}")
    require_form(pixels, syntax, encapsulated=facts.encapsulated)
    if facts.compressed:
        require_stream(pixels, facts)
        return
    held = _unwrap(pixels, facts) if facts.encapsulated else pixels
    if (kind := name_stream(held)) and len(held) != facts.size_bytes:
        raise UnreadableDicomError(f"{describe_syntax(syntax)}, but PixelData (7FE0,0010) holds {kind}; {EXPORT_AGAIN}")
    if len(held) < facts.size_bytes:
        raise UnreadableDicomError(f"truncated: PixelData has {len(held)} of {facts.size_bytes} bytes")


def _unwrap(pixels: bytes, facts: PixelFacts) -> bytes:
    """Return uncompressed pixels out of their items. Raises UnreadableDicomError where they can't be the pixels."""
    try:
        held = frame_bytes(pixels)
    except UnreadableDicomError as error:
        raise UnreadableDicomError(f"{describe_syntax(facts.transfer_syntax)}, but {error}; {EXPORT_AGAIN}") from None
    if not name_stream(held) and len(held) not in {facts.size_bytes, facts.size_bytes + 1}:
        raise UnreadableDicomError(  # a compressed stream that was not recognized may be shorter or longer
            f"{describe_syntax(facts.transfer_syntax)}, but the items of PixelData (7FE0,0010) hold {len(held)} bytes, "
            f"the image {facts.size_bytes}; {EXPORT_AGAIN}"
        )
    return held


def require_stream(pixels: bytes, facts: PixelFacts, stored: NDArray[np.integer] | None = None) -> None:
    """Raise UnreadableDicomError unless the compressed pixels are built as they should be (``stream_checks``).

    With the decoded pixels ``stored`` (rows, columns), their codes are checked instead.
    """
    try:
        frame = frame_bytes(pixels)
        if stored is None:
            require_kind(frame, facts.transfer_syntax)
            require_sound(frame, facts.transfer_syntax, facts.claim)
        else:
            require_complete(frame, facts.transfer_syntax, facts.claim, stored)
    except WrongKindError:
        raise
    except UnreadableDicomError as error:
        reason = (
            f"pixels of transfer syntax {facts.transfer_syntax} are damaged: {error}; copy or export the file again"
        )
        raise UnreadableDicomError(reason) from error


def _rescale(elements: Elements) -> tuple[float, float]:
    slope = elements.floats("RescaleSlope", 1)[0]
    intercept = elements.floats("RescaleIntercept", 1)[0]
    if not _MIN_SLOPE <= slope <= _MAX_SLOPE:
        raise UnreadableDicomError(f"RescaleSlope (0028,1053) is {slope:g}: no Hounsfield units")
    if abs(intercept) > _MAX_INTERCEPT:
        raise UnreadableDicomError(f"RescaleIntercept (0028,1052) is {intercept:g}: no Hounsfield units")
    kind = elements.text("RescaleType").upper()
    if kind not in _HOUNSFIELD_TYPES:
        kind = shown(kind, RESCALE_TYPES)
        raise UnreadableDicomError(f"RescaleType (0028,1054) is {kind}: values are not Hounsfield units")
    return slope, intercept


def _padding(elements: Elements, bits: int, stored: int, *, signed: bool) -> tuple[int, int] | None:
    """Return the first and the last padding value, with the sign of the pixels (PS3.3 C.7.5.1.1.2)."""
    first = elements.whole("PixelPaddingValue")
    if first is None:
        return None
    last = elements.whole("PixelPaddingRangeLimit")
    ends = (first, first if last is None else last)
    if all(-(1 << 15) <= value < 1 << 16 for value in ends):
        bits = min(bits, 16)  # of US and SS; without a stated representation the sign is that of the pixels
    values = [value & ((1 << bits) - 1) for value in ends]
    if signed:  # 63536 beside signed 16-bit pixels means -2000
        values = [value - (1 << bits) if value >> (bits - 1) else value for value in values]
        if min(values) >= 1 << (stored - 1) and max(values) < 1 << stored:  # without the leading ones
            values = [value - (1 << stored) for value in values]
    return min(values), max(values)


def transfer_syntax(dataset: Dataset) -> str:
    """Return the transfer syntax that a file states, or that the parser guessed where it has no meta header.

    Raises UnreadableDicomError where what is stated is no UID: it would be repeated in messages and tables.
    """
    stated = Elements(dataset.file_meta).text("TransferSyntaxUID")
    if stated.strip("0123456789."):
        raise UnreadableDicomError("TransferSyntaxUID (0002,0010) is no UID")
    if not stated:
        require_no_items(Elements(dataset).value_bytes("PixelData"))
    is_implicit, is_little = dataset.original_encoding
    guess = IMPLICIT_LITTLE if is_implicit else EXPLICIT_LITTLE if is_little else EXPLICIT_BIG
    return stated or guess
