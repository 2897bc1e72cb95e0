"""One DICOM file to Hounsfield units."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import UID

from ichpipe.dicom_files import EXPLICIT_BIG, PixelFacts, read_pixel_dataset, require_stream
from ichpipe.errors import UnreadableDicomError
from ichpipe.quiet import quiet_pydicom

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from pydicom.dataset import Dataset

__all__ = [
    "AIR_HU",
    "MAX_HU",
    "PixelFacts",
    "read_hu",
    "stored_to_hu",
]

AIR_HU: Final = -1024
"""Lowest value that leaves this module, HU; padding becomes this."""

MAX_HU: Final = 32767


def read_hu(path: Path | str, *, scanned: bool = False) -> NDArray[np.int16]:
    """Decode one CT slice. Returns (rows, columns) in Hounsfield units, from -1024 to 32767.

    A file that ``scan`` has taken (``scanned``) is spared the check that its compressed stream is complete, which
    takes longer than decoding it. Raises UnreadableDicomError that names the file, and the transfer syntax where the
    codec failed.
    """
    try:
        with quiet_pydicom():
            dataset, facts = read_pixel_dataset(path)
            if facts.compressed and not scanned:
                require_stream(dataset.PixelData, facts, complete=True)
            stored = _stored_pixels(dataset, facts)
    except UnreadableDicomError as error:
        raise UnreadableDicomError(f"{path}: {error}") from error
    return stored_to_hu(stored, facts)


def stored_to_hu(stored: NDArray[np.integer], facts: PixelFacts) -> NDArray[np.int16]:
    """Convert stored pixels (rows, columns) to Hounsfield units (rows, columns), rounded, in [-1024, 32767].

    HU = RescaleSlope (0028,1053) * stored + RescaleIntercept (0028,1052), PS3.3 C.11.1. Padding becomes
    -1024. PhotometricInterpretation MONOCHROME1 turns the display round, not the HU (C.7.6.3.1.2).
    """
    values, intercept = _pixel_values(stored, facts), facts.intercept
    if _wraps_at_12_bits(facts):
        values += 1000
        values[values >= 4096] -= 4096
        intercept = -1000.0
    hu = _rescale(values, facts.slope, intercept)
    if facts.padding is not None:
        low, high = facts.padding
        hu[(stored >= low) & (stored <= high)] = AIR_HU
    return hu


def _rescale(values: NDArray[np.int64], slope: float, intercept: float) -> NDArray[np.int16]:
    if slope == 1.0 and intercept.is_integer():  # nearly every file: no detour through floats
        hu: NDArray[np.int16] = np.clip(values + int(intercept), AIR_HU, MAX_HU).astype(np.int16)
    else:
        hu = np.clip(np.rint(values * slope + intercept), AIR_HU, MAX_HU).astype(np.int16)
    return hu


def _pixel_values(stored: NDArray[np.integer], facts: PixelFacts) -> NDArray[np.int64]:
    """Drop bits above BitsStored (0028,0101); they are no part of the pixel (PS3.5, 8.1.1).

    Negative numbers that were written whole stay as they are: -3024 is common beside BitsStored 12.
    """
    values = stored.astype(np.int64)
    if facts.bits_stored == facts.bits_allocated:
        return values
    span = 1 << facts.bits_stored
    if not facts.signed:
        return values & (span - 1)
    not_extended = (values >= span // 2) & (values < span)  # two's complement without its leading ones
    values[not_extended] -= span
    return values


def _wraps_at_12_bits(facts: PixelFacts) -> bool:
    """Whether values are offset by 1000 and wrapped at 4096, as in some RSNA 2019 files.

    Such headers say BitsStored 12, unsigned, and an intercept that would leave nothing below 0 HU.
    """
    return facts.bits_stored == 12 and not facts.signed and facts.intercept > -100


def _stored_pixels(dataset: Dataset, facts: PixelFacts) -> NDArray[np.integer]:
    """Pixels as stored, (rows, columns), of the integer type that BitsAllocated and the sign give."""
    if facts.compressed:
        return _decode(dataset, facts)
    order, pixels = "<", dataset.PixelData
    if facts.transfer_syntax == EXPLICIT_BIG:
        order = ">"
        if facts.bits_allocated == 8 and dataset["PixelData"].VR == "OW":  # two pixels a word, turned round
            pixels = np.frombuffer(pixels[: len(pixels) // 2 * 2], dtype=">u2").astype("<u2").tobytes()
    kind = f"{order}{'i' if facts.signed else 'u'}{facts.bits_allocated // 8}"
    stored = np.frombuffer(pixels, dtype=kind, count=facts.rows * facts.columns)
    return stored.reshape(facts.rows, facts.columns)


def _decode(dataset: Dataset, facts: PixelFacts) -> NDArray[np.integer]:
    if not _has_decoder(facts.transfer_syntax):
        raise UnreadableDicomError(
            f"no decoder for transfer syntax {facts.transfer_syntax}; run: pip install 'ichpipe[dicom-codecs]'"
        )
    dataset.file_meta.TransferSyntaxUID = UID(facts.transfer_syntax)
    dataset.SamplesPerPixel = 1  # pydicom demands both; old files leave them out
    dataset.PhotometricInterpretation = dataset.get("PhotometricInterpretation") or "MONOCHROME2"
    dataset.BitsStored, dataset.NumberOfFrames = facts.bits_stored, 1
    try:
        stored: NDArray[np.integer] = dataset.pixel_array
    except Exception as error:  # each codec has its own errors
        reason = f"pixels of transfer syntax {facts.transfer_syntax} can't be decoded ({type(error).__name__})"
        raise UnreadableDicomError(reason) from None  # its message may quote the header
    if stored.shape != (facts.rows, facts.columns):
        raise UnreadableDicomError(f"decoded to {stored.shape}, the header says {facts.rows} x {facts.columns}")
    return stored


def _has_decoder(transfer_syntax: str) -> bool:
    try:
        return bool(get_decoder(UID(transfer_syntax)).is_available)
    except NotImplementedError:
        return False
