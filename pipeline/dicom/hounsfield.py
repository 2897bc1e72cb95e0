"""Converts one DICOM file to Hounsfield units."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ichpipe.common.constants import MAX_HU, MIN_HU
from ichpipe.common.errors import UnreadableDicomError
from ichpipe.dicom import decode
from ichpipe.dicom.dataset import EXPLICIT_BIG, PixelFacts, PixelFile, read_pixel_file, require_stream
from ichpipe.dicom.pydicom_quiet import quiet_pydicom

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


def read_hu(path: Path | str, *, scanned: bool = False) -> NDArray[np.int16]:
    """Decode one CT slice to Hounsfield units.

    Parameters
    ----------
    path
        The file, or a member of a zip archive.
    scanned
        ``scan`` has accepted the file: its compressed stream need not be checked again for completeness.

    Returns
    -------
    NDArray[np.int16]
        HU (rows, columns), from -1024 to 32767.

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
    values, intercept = _drop_unused_bits(stored, facts), facts.intercept
    # Some RSNA 2019 files: 12 bits, offset by 1000, wrapped at 4096; their intercept would leave nothing below 0 HU.
    wraps = facts.bits_stored == 12 and not facts.signed and intercept > -100
    if wraps:
        values = values + values.dtype.type(1000)
        np.subtract(values, 4096, out=values, where=values >= 4096)
        intercept = -1000.0
    hu = _rescale(values, facts.slope, intercept)
    if facts.padding is not None:
        low, high = facts.padding
        # Most padding values end below -1024 HU anyway; bits that are dropped only lower them.
        if wraps or facts.slope <= 0 or high * facts.slope + facts.intercept > MIN_HU:
            hu[(stored >= low) & (stored <= high)] = MIN_HU
    return hu


def _rescale(values: NDArray[np.integer], slope: float, intercept: float) -> NDArray[np.int16]:
    if slope != 1.0 or not intercept.is_integer() or abs(intercept) > MAX_HU or values.dtype.itemsize != 2:
        scaled = values.astype(np.float64) * slope + intercept
        hu: NDArray[np.int16] = np.clip(np.rint(scaled), MIN_HU, MAX_HU).astype(np.int16)
        return hu
    # Nearly every file: whole numbers of 16 bits, clipped before the sum so that it does not overflow.
    low, high = MIN_HU - int(intercept), MAX_HU - int(intercept)
    if values.min() < low:  # then the limit lies within the type, as the values do
        values = np.maximum(values, low)
    if values.max() > high:
        values = np.minimum(values, high)
    return values.view(np.int16) + np.int16(intercept)  # signed and unsigned numbers add alike, modulo 65536


def _drop_unused_bits(stored: NDArray[np.integer], facts: PixelFacts) -> NDArray[np.integer]:
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


def _stored_pixels(file: PixelFile) -> NDArray[np.integer]:
    """Pixels as stored, (rows, columns), of the integer type that BitsAllocated and the sign give."""
    facts, pixels = file.facts, file.pixel_data
    if facts.compressed:
        stored = decode.decode(pixels, facts)
        return decode.decode_by_pydicom(file.dataset, facts) if stored is None else stored
    kind = np.dtype(facts.stored_type)
    if facts.transfer_syntax == EXPLICIT_BIG:
        element = file.dataset["PixelData"]
        pixels = element.value
        if facts.bits_allocated == 8 and element.VR == "OW":  # 8-bit samples in swapped pairs (PS3.5, 8.1.1)
            pixels = np.frombuffer(pixels[: len(pixels) // 2 * 2], dtype=">u2").astype("<u2").tobytes()
        samples = np.frombuffer(pixels, kind.newbyteorder(">"), count=facts.rows * facts.columns).astype(kind)
    else:
        samples = np.frombuffer(pixels, kind, count=facts.rows * facts.columns)
    return samples.reshape(facts.rows, facts.columns)
