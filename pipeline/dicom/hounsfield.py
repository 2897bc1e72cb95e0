"""One DICOM file to Hounsfield units."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from ichpipe.common.constants import MIN_HU as AIR_HU
from ichpipe.common.errors import UnreadableDicomError
from ichpipe.dicom import decode
from ichpipe.dicom.dataset import EXPLICIT_BIG, PixelFacts, require_stream, stored_type
from ichpipe.dicom.pixel_data import PixelFile, read_pixel_file
from ichpipe.dicom.pydicom_quiet import quiet_pydicom

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = [
    "AIR_HU",
    "MAX_HU",
    "PixelFacts",
    "read_hu",
    "stored_to_hu",
]

MAX_HU: Final = 32767


def read_hu(path: Path | str, *, scanned: bool = False) -> NDArray[np.int16]:
    """Decode one CT slice to Hounsfield units (rows, columns), from -1024 to 32767.

    Parameters
    ----------
    path
        The file, or a member of a zip archive.
    scanned
        ``scan`` has accepted the file: its compressed stream need not be checked again for completeness.

    Raises
    ------
    UnreadableDicomError
        Names the file, and the transfer syntax where the codec failed.

    """
    try:
        with quiet_pydicom():
            file = read_pixel_file(path)
            stored = _stored_pixels(file)
            if file.facts.compressed and not scanned:
                require_stream(file.pixel_data, file.facts, stored)
    except UnreadableDicomError as error:
        raise UnreadableDicomError(f"{path}: {error}") from error
    return stored_to_hu(stored, file.facts)


def stored_to_hu(stored: NDArray[np.integer], facts: PixelFacts) -> NDArray[np.int16]:
    """Convert stored pixels (rows, columns) to Hounsfield units (rows, columns), rounded, in [-1024, 32767].

    HU = RescaleSlope (0028,1053) * stored + RescaleIntercept (0028,1052), PS3.3 C.11.1. Padding becomes
    -1024. PhotometricInterpretation MONOCHROME1 turns the display round, not the HU (C.7.6.3.1.2).
    """
    values, intercept = _pixel_values(stored, facts), facts.intercept
    if wraps := _wraps_at_12_bits(facts):
        values = values + values.dtype.type(1000)
        np.subtract(values, 4096, out=values, where=values >= 4096)
        intercept = -1000.0
    hu = _rescale(values, facts.slope, intercept)
    if facts.padding is not None and (wraps or not _padding_is_clipped(facts, facts.padding[1])):
        low, high = facts.padding
        hu[(stored >= low) & (stored <= high)] = AIR_HU
    return hu


def _rescale(values: NDArray[np.integer], slope: float, intercept: float) -> NDArray[np.int16]:
    if slope == 1.0 and intercept.is_integer() and abs(intercept) <= MAX_HU:  # nearly every file
        return _shift(values, int(intercept))
    scaled = values.astype(np.float64) * slope + intercept
    hu: NDArray[np.int16] = np.clip(np.rint(scaled), AIR_HU, MAX_HU).astype(np.int16)
    return hu


def _shift(values: NDArray[np.integer], intercept: int) -> NDArray[np.int16]:
    """Add a whole intercept, in 16 bits where the values have 16: they are clipped before, so that none overflows."""
    low, high = AIR_HU - intercept, MAX_HU - intercept
    if values.dtype.itemsize == 2:  # limits that are wanted here lie within the type, as the values do
        below, above = values.min() < low, values.max() > high
        inside = np.maximum(values, low) if below else values
        inside = np.minimum(inside, high) if above else inside
        return inside.view(np.int16) + np.int16(intercept)  # signed and unsigned numbers add alike, modulo 65536
    wide: NDArray[np.int16] = (np.clip(values.astype(np.int64), low, high) + intercept).astype(np.int16)
    return wide


def _padding_is_clipped(facts: PixelFacts, highest: int) -> bool:
    """Whether padding values end below -1024 HU anyway, as in most files; bits that are dropped only lower them."""
    return facts.slope > 0 and highest * facts.slope + facts.intercept <= AIR_HU


def _pixel_values(stored: NDArray[np.integer], facts: PixelFacts) -> NDArray[np.integer]:
    """Drop bits above BitsStored (0028,0101); they are no part of the pixel (PS3.5, 8.1.1).

    Negative numbers that were written whole stay as they are: -3024 is common beside BitsStored 12. The type is that
    of ``stored``, which is not changed; 8 bits become 16, so that what follows can add to them.
    """
    values: NDArray[np.integer] = stored.astype(stored.dtype.newbyteorder("="), copy=False)
    values = values.astype(np.int16) if values.dtype.itemsize == 1 else values
    if facts.bits_stored == facts.bits_allocated:
        return values
    span = 1 << facts.bits_stored
    if not facts.signed:
        kept: NDArray[np.integer] = values & values.dtype.type(span - 1)
        return kept
    if values.max(initial=0) < span // 2:
        return values
    not_extended = (values >= span // 2) & (values < span)  # two's complement without its leading ones
    extended: NDArray[np.integer] = np.add(values, -span, out=values.copy(), where=not_extended)
    return extended


def _wraps_at_12_bits(facts: PixelFacts) -> bool:
    """Whether values are offset by 1000 and wrapped at 4096, as in some RSNA 2019 files.

    Such headers say BitsStored 12, unsigned, and an intercept that would leave nothing below 0 HU.
    """
    return facts.bits_stored == 12 and not facts.signed and facts.intercept > -100


def _stored_pixels(file: PixelFile) -> NDArray[np.integer]:
    """Pixels as stored, (rows, columns), of the integer type that BitsAllocated and the sign give."""
    facts = file.facts
    if facts.compressed:
        stored = decode.decode(file.pixel_data, facts)
        return decode.decode_by_pydicom(file.dataset, facts) if stored is None else stored
    if facts.transfer_syntax == EXPLICIT_BIG:
        return _big_endian(file)
    pixels = np.frombuffer(file.pixel_data, dtype=stored_type(facts), count=facts.rows * facts.columns)
    return pixels.reshape(facts.rows, facts.columns)


def _big_endian(file: PixelFile) -> NDArray[np.integer]:
    """Turn samples round; 8-bit ones in words (OW) stand in pairs that are turned round, too (PS3.5, 8.1.1)."""
    facts, element = file.facts, file.dataset["PixelData"]
    pixels = element.value
    if facts.bits_allocated == 8 and element.VR == "OW":
        pixels = np.frombuffer(pixels[: len(pixels) // 2 * 2], dtype=">u2").astype("<u2").tobytes()
    kind = np.dtype(stored_type(facts))
    found = np.frombuffer(pixels, dtype=kind.newbyteorder(">"), count=facts.rows * facts.columns)
    return found.astype(kind).reshape(facts.rows, facts.columns)
